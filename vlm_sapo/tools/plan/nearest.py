"""The nearest setting that fits: what costs only time is changed first, what is trained last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from vlm_sapo.config.load import check_processes, load
from vlm_sapo.config.rollout import VllmConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.plan.estimate import Estimator
from vlm_sapo.tools.plan.memory import GB, Estimate, Gpus

TARGET_SHARE = 0.95
"""Share of the memory that a recommended setting takes at most."""
Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """Overrides, and how far they lead from the config."""

    distance: int
    overrides: Overrides


NO_CHANGE = Change(0, ())
SHARD = Change(1, ("train.shard=all",))
EIGHT_BIT_OPTIMIZER = Change(2, ("train.optimizer=adamw_8bit",))
LORA = Change(4, ("model.dtype=bfloat16", "model.lora={rank: 16}"))
OFFLOAD = Change(5, ("train.offload=true",))
QLORA = Change(6, ("model.dtype=bfloat16", "model.lora={rank: 16, bits: 4}"))
FOUR_BIT_BASE = Change(2, ("model.lora.bits=4",))
CHECKPOINTING = "model.gradient_checkpointing=true"


def nearest(name: str, overrides: Sequence[str], gpus: Gpus) -> tuple[Overrides, Estimate]:
    """The overrides that change least and make a config fit with some room, and its estimate with them.

    Raises ValueError where none do.
    """
    search = Search(name, tuple(overrides), gpus)
    for model in _model_changes(load(TrainConfig, name, overrides), gpus):
        if not search.is_allowed(model):
            continue
        base = search.estimator(model)
        if base.minimum > TARGET_SHARE * gpus.memory:
            continue
        microbatch, generation = _microbatch_changes(base.config), _generation_changes(base.config)
        smallest = search.first_fit(generation[::-1], (*model, *microbatch[-1]))
        if smallest is None:
            continue
        microbatch_change = search.first_fit(microbatch, (*model, *smallest))
        generation_change = search.first_fit(generation, (*model, *microbatch_change))
        changes = (*model, *microbatch_change, *generation_change)
        return changes, search.estimator(changes).estimate()
    batch = search.estimator(()).batch
    raise ValueError(
        f"--gpus ({gpus.memory / GB:.0f} GB each) must hold one prompt of {batch.prompt} tokens with one "
        f"response of {batch.response}, and no setting of this config does; lower data.max_prompt_tokens and "
        "rollout.max_tokens, or take larger GPUs or a smaller model"
    )


@dataclass(frozen=True)
class Search:
    """Tries overrides of a config on given GPUs."""

    name: str
    overrides: Overrides
    gpus: Gpus

    def estimator(self, changes: Overrides) -> Estimator:
        return Estimator(load(TrainConfig, self.name, [*self.overrides, *changes]), self.gpus)

    def is_allowed(self, changes: Overrides) -> bool:
        """Whether `train` would accept the changes."""
        try:
            check_processes(load(TrainConfig, self.name, [*self.overrides, *changes]), self.gpus.count)
        except ValueError:
            return False
        return True

    def first_fit(self, options: Sequence[Overrides], changes: Overrides) -> Overrides | None:
        """The first option that fits together with the changes."""
        for option in options:
            if self.estimator((*changes, *option)).estimate().fits_within(TARGET_SHARE):
                return option
        return None


def _distance(changes: tuple[Change, ...]) -> int:
    return sum(change.distance for change in changes)


def _model_changes(config: TrainConfig, gpus: Gpus) -> Iterator[Overrides]:
    """Changes of how the model is stored and trained, nearest first."""
    adapters = [NO_CHANGE] if config.model.lora else [NO_CHANGE, LORA, QLORA]
    if config.model.lora and config.model.lora.bits is None:
        adapters.append(FOUR_BIT_BASE)
    options = product(
        [NO_CHANGE, SHARD] if config.train.shard == 1 and gpus.count > 1 else [NO_CHANGE],
        [NO_CHANGE, EIGHT_BIT_OPTIMIZER] if config.train.optimizer == "adamw" else [NO_CHANGE],
        [NO_CHANGE] if config.train.offload else [NO_CHANGE, OFFLOAD],
        adapters,
    )
    for changes in sorted(options, key=_distance):
        yield tuple(override for change in changes for override in change.overrides)


def _microbatch_changes(config: TrainConfig) -> list[Overrides]:
    """Changes of a micro-batch, which change no result, nearest first."""
    budget = config.train.tokens_per_microbatch
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    budgets: list[Overrides] = [()]
    for fraction in (2, 4, 8):
        if budget // fraction >= longest:
            budgets.append((f"train.tokens_per_microbatch={budget // fraction}",))
    if len(budgets) == 1 and budget > longest:
        budgets.append((f"train.tokens_per_microbatch={longest}",))
    if config.model.gradient_checkpointing:
        return budgets
    return [*budgets[:2], *((CHECKPOINTING, *smaller) for smaller in budgets)]


def _generation_changes(config: TrainConfig) -> list[Overrides]:
    """Changes of how responses are generated, nearest first."""
    engine = config.rollout.engine
    if isinstance(engine, VllmConfig):
        shares = [number / 20 for number in range(2, 19)]
        shares.sort(key=lambda share: abs(share - engine.gpu_memory))
        return [(), *((f"rollout.engine.gpu_memory={share}",) for share in shares)]
    if engine.type == "vllm_server":
        return [()]
    sequences, options = config.rollout.batch_sequences, [()]
    field, size = "sequences_per_batch", 1
    if config.rollout.sequences_per_batch is None:
        field, size = "prompts_per_batch", config.rollout.group
    while sequences > config.rollout.group:
        sequences = max(sequences // 2, config.rollout.group)
        options.append((f"rollout.{field}={sequences // size}",))
    return options
