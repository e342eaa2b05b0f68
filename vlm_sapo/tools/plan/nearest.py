"""The nearest setting that fits: what costs only time is changed first, what is trained last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from vlm_sapo.config.load import check_processes, load
from vlm_sapo.config.rollout import VllmConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.plan.estimate import Estimator
from vlm_sapo.tools.plan.memory import GB, Estimate, Gpus

ROOM = 0.95
"""Share of the memory that a recommended setting takes at most."""
Changes = tuple[str, ...]
"""Overrides."""
SHARD: tuple[int, Changes] = (1, ("train.shard=all",))
EIGHT_BITS: tuple[int, Changes] = (2, ("train.optimizer=adamw_8bit",))
ADAPTERS: tuple[int, Changes] = (4, ("model.dtype=bfloat16", "model.lora={rank: 16}"))
OFFLOAD: tuple[int, Changes] = (5, ("train.offload=true",))
FOUR_BITS: tuple[int, Changes] = (6, ("model.dtype=bfloat16", "model.lora={rank: 16, bits: 4}"))
FEWER_BITS: tuple[int, Changes] = (2, ("model.lora.bits=4",))
"""Changes of some weight: how far from the config they lead."""
CHECKPOINTING = "model.gradient_checkpointing=true"


def nearest(name: str, overrides: Sequence[str], gpus: Gpus) -> tuple[Changes, Estimate]:
    """The overrides that change least and make a config fit with some room, and what it then takes.

    Raises ValueError where none do.
    """

    def estimator(*changes: str) -> Estimator:
        return Estimator(load(TrainConfig, name, [*overrides, *changes]), gpus)

    def fitting(options: Sequence[Changes], *others: str) -> Changes | None:
        roomy = (option for option in options if estimator(*others, *option).estimate().fits_within(ROOM))
        return next(roomy, None)

    for large in _large(load(TrainConfig, name, overrides), gpus):
        if not _allowed(name, [*overrides, *large], gpus):
            continue
        base = estimator(*large)
        if base.least > ROOM * gpus.memory:
            continue
        small, generating = _small(base.config), _generating(base.config)
        least = fitting(generating[::-1], *large, *small[-1])
        if least is None:
            continue
        chosen = fitting(small, *large, *least)
        drawn = fitting(generating, *large, *chosen)
        changes = (*large, *chosen, *drawn)
        return changes, estimator(*changes).estimate()
    rows = estimator().rows
    raise ValueError(
        f"--gpus ({gpus.memory / GB:.0f} GB each) must hold one prompt of {rows.prompt} tokens with one "
        f"response of {rows.response}, and no setting of this config does; lower data.max_prompt_tokens and "
        "rollout.max_tokens, or take larger GPUs or a smaller model"
    )


def _large(config: TrainConfig, gpus: Gpus) -> Iterator[Changes]:
    """Changes of how the model is held, nearest first."""
    alone = config.train.shard == 1
    none: tuple[int, Changes] = (0, ())
    adapters = [none] if config.model.lora else [none, ADAPTERS, FOUR_BITS]
    if config.model.lora and config.model.lora.bits is None:
        adapters.append(FEWER_BITS)
    options = product(
        [none, SHARD] if alone and gpus.count > 1 else [none],
        [none, EIGHT_BITS] if config.train.optimizer == "adamw" else [none],
        [none] if config.train.offload else [none, OFFLOAD],
        adapters,
    )
    for chosen in sorted(options, key=lambda chosen: sum(cost for cost, _ in chosen)):
        yield tuple(change for _, group in chosen for change in group)


def _allowed(name: str, overrides: Sequence[str], gpus: Gpus) -> bool:
    """Whether `train` would take it."""
    try:
        check_processes(load(TrainConfig, name, overrides), gpus.count)
    except ValueError:
        return False
    return True


def _small(config: TrainConfig) -> list[Changes]:
    """Changes of a micro-batch, which change no result."""
    budget = config.train.tokens_per_microbatch
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    budgets = [()]
    for fraction in (2, 4, 8):
        if budget // fraction >= longest:
            budgets.append((f"train.tokens_per_microbatch={budget // fraction}",))
    if len(budgets) == 1 and budget > longest:
        budgets.append((f"train.tokens_per_microbatch={longest}",))
    if config.model.gradient_checkpointing:
        return budgets
    return [*budgets[:2], *((CHECKPOINTING, *smaller) for smaller in budgets)]


def _generating(config: TrainConfig) -> list[Changes]:
    """Changes of how responses are drawn, nearest first."""
    engine = config.rollout.engine
    if isinstance(engine, VllmConfig):
        shares = [number / 20 for number in range(2, 19)]
        shares.sort(key=lambda share: abs(share - engine.gpu_memory))
        return [(), *((f"rollout.engine.gpu_memory={share}",) for share in shares)]
    if engine.type == "vllm_server":
        return [()]
    prompts, options = config.rollout.prompts_per_batch, [()]
    while prompts > 1:
        prompts //= 2
        options.append((f"rollout.prompts_per_batch={prompts}",))
    return options
