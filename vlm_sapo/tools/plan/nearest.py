"""The nearest setting that fits: what costs only time is changed first, what is trained last."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from vlm_sapo.config.load import check_processes, load
from vlm_sapo.config.rollout import VllmConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.plan.estimate import Estimator, where_config_is
from vlm_sapo.tools.plan.memory import GB, Estimate, Gpus
from vlm_sapo.tools.plan.simulate import read_config

TARGET_SHARE = 0.95
"""Share of the memory that a recommended setting takes at most."""
LORA_LR = 1e-5
"""Learning rate of adapters, ten times the usual one of all weights; a larger one of the config stays."""


@dataclass(frozen=True)
class Change:
    """An override, why it is made, and how far it leads from the config."""

    override: str
    reason: str
    distance: int = 0


Changes = tuple[Change, ...]


@dataclass(frozen=True)
class Recommendation:
    """A config with changes that make it fit."""

    config: TrainConfig
    estimator: Estimator
    estimate: Estimate
    changes: Changes = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(change.override for change in self.changes)


SHARD = Change(
    "train.shard=all", "the GPUs share one copy of weights, gradients and optimizer state", distance=1
)
EIGHT_BIT_OPTIMIZER = Change(
    "train.optimizer=adamw_8bit",
    "optimizer state of 2 bytes a parameter instead of 8; needs vlm-sapo[quantized]",
    distance=2,
)
HALF = Change(
    "model.dtype=bfloat16",
    "12 bytes a parameter instead of 16; updates are rounded at random (docs/gpus.md)",
    distance=3,
)
HF_ENGINE = Change("rollout.engine=hf", "vLLM doesn't fit beside the trainer; this is slower", distance=5)
FROZEN_HALF = Change("model.dtype=bfloat16", "frozen weights need no more")
LORA = Change("model.lora={rank: 16}", "adapters: all weights don't fit", distance=10)
QLORA = Change(
    "model.lora={rank: 16, bits: 4}",
    "adapters on layers of 4 bits: on 16 bits they don't fit; needs vlm-sapo[quantized]",
    distance=17,
)
FOUR_BIT_BASE = Change("model.lora.bits=4", "the adapted layers in 4 bits", distance=17)
OFFLOAD = Change(
    "train.offload=true", "weights, gradients and optimizer state in host memory; much slower", distance=30
)
CHECKPOINTING = Change(
    "model.gradient_checkpointing=true", "activations are computed again: a third more time in the update"
)


def nearest(name: str, overrides: Sequence[str], gpus: Gpus) -> Recommendation:
    """The changes that lead least far from a config and make it fit with some room.

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
        smaller = search.first_fit(microbatch, (*model, *generation[-1]), training_only=True)
        if smaller is None:
            continue
        several = isinstance(base.config.rollout.engine, VllmConfig)
        sampled = search.first_fit(generation, (*model, *smaller), sorted_by_size=not several)
        if sampled is None:
            continue
        changes = (*model, *smaller, *sampled)
        return Recommendation(
            search.config(changes), search.estimator(changes), search.estimate(changes), changes
        )
    batch = search.estimator(()).batch
    raise ValueError(
        f"--gpus ({gpus.memory / GB:.0f} GB each) must hold one prompt of {batch.prompt} tokens with one "
        f"response of {batch.response}, and no setting of this config does; lower data.max_prompt_tokens and "
        "rollout.max_tokens, or take larger GPUs or a smaller model"
    )


@dataclass(frozen=True)
class Search:
    """Tries changes of a config on given GPUs."""

    name: str
    overrides: tuple[str, ...]
    gpus: Gpus
    estimates: dict[tuple[str, ...], Estimate] = field(default_factory=dict)

    def config(self, changes: Sequence[Change]) -> TrainConfig:
        return load(TrainConfig, self.name, [*self.overrides, *_overrides(changes)])

    def estimator(self, changes: Sequence[Change]) -> Estimator:
        return Estimator(self.config(changes), self.gpus)

    def is_allowed(self, changes: Sequence[Change]) -> bool:
        """Whether `train` would accept the changes."""
        try:
            check_processes(self.config(changes), self.gpus.count)
        except ValueError:
            return False
        return True

    def first_fit(
        self, options: Sequence[Changes], changes: Changes, *, training_only=False, sorted_by_size=True
    ) -> Changes | None:
        """The first option that fits together with the changes; options that are sorted take less memory from
        one to the next."""

        def fits(option: Changes) -> bool:
            estimate = self.estimate((*changes, *option))
            if training_only:
                return estimate.totals["training"] <= TARGET_SHARE * self.gpus.memory
            return estimate.fits_within(TARGET_SHARE)

        if not sorted_by_size or fits(options[0]):
            return next((option for option in options if fits(option)), None)
        index = bisect_left(options, True, key=fits)  # each try simulates a pass
        return options[index] if index < len(options) else None

    def estimate(self, changes: Changes) -> Estimate:
        key = _overrides(changes)
        if key not in self.estimates:
            self.estimates[key] = self.estimator(changes).estimate()
        return self.estimates[key]


def _overrides(changes: Sequence[Change]) -> tuple[str, ...]:
    return tuple(change.override for change in changes)


def _model_changes(config: TrainConfig, gpus: Gpus) -> Iterator[Changes]:
    """Changes of how the model is stored, trained and sampled, nearest first."""
    lora, engine = config.model.lora, config.rollout.engine
    experts = (
        read_config(where_config_is(config.model)).get_text_config().to_dict().get("num_experts_per_tok")
    )
    left_out = "; the experts get none (docs/moe.md)" if experts else ""
    sixteen, four = (replace(change, reason=change.reason + left_out) for change in (LORA, QLORA))
    value = f"{max(LORA_LR, config.train.lr):g}".replace("e-0", "e-")
    rate = Change(f"train.lr={value}", "adapters need about ten times the rate")
    adapters: list[Changes] = [()]
    if lora is None:
        adapters += [(FROZEN_HALF, sixteen, rate), (FROZEN_HALF, four, rate)]
    elif lora.bits is None:
        adapters.append((FOUR_BIT_BASE,))
    options = product(
        _optional(SHARD, config.train.shard == 1 and gpus.count > 1),
        _optional(EIGHT_BIT_OPTIMIZER, config.train.optimizer == "adamw" and lora is None),
        _optional(HALF if lora is None else FROZEN_HALF, config.model.dtype == "float32"),
        _optional(HF_ENGINE, isinstance(engine, VllmConfig)),
        _optional(OFFLOAD, not config.train.offload),
        adapters,
    )
    combinations = [tuple(change for part in parts for change in part) for parts in options]
    combinations = [parts for parts in combinations if not {HALF, rate} <= set(parts)]
    return iter(sorted(combinations, key=lambda changes: sum(change.distance for change in changes)))


def _optional(change: Change, possible: bool) -> list[Changes]:
    return [(), (change,)] if possible else [()]


def _microbatch_changes(config: TrainConfig) -> list[Changes]:
    """Changes of a micro-batch, which change no result, nearest first."""
    budget = config.train.tokens_per_microbatch
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    sizes = [budget // fraction for fraction in (2, 4, 8) if budget // fraction >= longest]
    if not sizes and budget > longest:
        sizes = [longest]
    budgets: list[Changes] = [()]
    reason = "smaller passes, with the same result"
    budgets += [(Change(f"train.tokens_per_microbatch={size}", reason),) for size in sizes]
    if config.model.gradient_checkpointing:
        return budgets
    return [*budgets[:2], *((CHECKPOINTING, *smaller) for smaller in budgets)]


def _generation_changes(config: TrainConfig) -> list[Changes]:
    """Changes of how responses are generated, nearest first."""
    engine = config.rollout.engine
    if isinstance(engine, VllmConfig):
        shares = [number / 20 for number in range(2, 19)]
        shares.sort(key=lambda share: abs(share - engine.gpu_memory))
        reason = "the engine's share of the GPU while it generates"
        return [(), *((Change(f"rollout.engine.gpu_memory={share}", reason),) for share in shares)]
    if engine.type != "hf":
        return [()]
    sequences, options = config.rollout.batch_sequences, [()]
    field, size = "sequences_per_batch", 1
    if config.rollout.sequences_per_batch is None:
        field, size = "prompts_per_batch", config.rollout.group
    while sequences > config.rollout.group:
        sequences = max(sequences // 2, config.rollout.group)
        reason = "what is generated together, as memory allows"
        options.append((Change(f"rollout.{field}={sequences // size}", reason),))
    return options
