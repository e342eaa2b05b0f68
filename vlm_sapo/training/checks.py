"""Engine against trainer: do both give the same log-probs to the responses that the engine drew?

[K] tokens of some groups' responses, in order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from vlm_sapo.distributed import World
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.vlm import VLM
from vlm_sapo.models.weights import like, whole
from vlm_sapo.reporting.console import Console
from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.rollout.sampler import Rollouts
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, Prompt, Response, RolloutBatch, Sampling

Pairs = Sequence[tuple[Prompt, Sequence[Response]]]
GROUPS = 2
"""Groups of a step that are compared at least."""
PROBE = 32
"""Longest response, in tokens, of what is drawn for a comparison alone."""
COARSE = 1e-3
"""A tolerance from which on rounding hides what changed weights alone would show."""
UNIQUE = itertools.count(1)
"""Versions of weights that are no update's; their negatives are used."""
NOISE = 0.5
"""Of a tensor's own deviation, in the test of the way that weights take: enough to change any log-prob."""


class ParityError(RolloutError):
    """Engine and trainer disagree."""


@dataclass(frozen=True)
class Difference:
    """Engine's minus trainer's log-probs over some response tokens."""

    tokens: int
    maximum: float
    mean: float
    p50: float
    p99: float
    bias: float
    """Mean of the signed difference."""
    correlation: float
    first: float
    """Mean over the first tokens of the responses."""

    @classmethod
    def of(cls, engine: torch.Tensor, trainer: torch.Tensor, first: torch.Tensor) -> Difference:
        """From [K] log-probs; `first` [K] marks the first tokens."""
        signed = (engine - trainer).double()
        gap = signed.abs()
        p50, p99 = torch.quantile(gap, gap.new_tensor([0.5, 0.99])).tolist()
        varied = len(gap) > 1 and float(engine.std()) > 0 and float(trainer.std()) > 0
        return cls(
            tokens=len(gap),
            maximum=float(gap.max()),
            mean=float(gap.mean()),
            p50=p50,
            p99=p99,
            bias=float(signed.mean()),
            correlation=float(torch.corrcoef(torch.stack([engine, trainer]))[0, 1]) if varied else 1.0,
            first=float(gap[first].mean()),
        )

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.1e}, p99 {self.p99:.1e}, max {self.maximum:.1e}, correlation "
            f"{self.correlation:.6f}, on {self.tokens} tokens"
        )


@dataclass(frozen=True)
class Followed:
    """What an engine drew while weights were changed, against the changed trainer and the unchanged one."""

    changed: Difference
    unchanged: Difference
    arrived: bool


def allowed(policy: Policy, engine_dtype: str) -> float:
    """Mean absolute difference that rounding explains."""
    model = policy.vlm.model
    full = policy.accelerator.mixed_precision == "no" and model.dtype == torch.float32
    return 1e-4 if full and engine_dtype == "float32" else 0.05


class Comparison:
    """Groups' log-probs by the engine, and by the trainer's pass under various assumptions."""

    def __init__(self, policy: Policy, pairs: Pairs, *, budget: int, world: World):
        self.policy, self.pairs, self.budget, self.world = policy, pairs, budget, world
        self.engine = torch.cat([item.logprobs for _, completions in pairs for item in completions])
        lengths = [len(item.ids) for _, completions in pairs for item in completions]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        self.first = torch.zeros(len(self.engine), dtype=torch.bool).index_fill(0, starts, True)

    def against(self, trainer: torch.Tensor) -> Difference:
        return Difference.of(self.engine, trainer, self.first)

    def by_group(self, trainer: torch.Tensor) -> list[float]:
        """Mean absolute difference of each group."""
        sizes = [sum(len(item.ids) for item in items) for _, items in self.pairs]
        return [float(gap.mean()) for gap in (self.engine - trainer).abs().split(sizes)]

    @torch.no_grad()
    def trainer(self, run: Pass | None = None, autocast: Callable | None = None) -> torch.Tensor:
        """[K] log-probs of the trainer, or of another pass or precision. All processes call it, and make
        equally many passes."""
        autocast = autocast or self.policy.autocast
        run, layout = run or self.policy.forward_pass, self.policy.layout
        sizes = [(len(prompt.ids), [len(item.ids) for item in items]) for prompt, items in self.pairs]
        found: dict[tuple[int, int], torch.Tensor] = {}
        packed = layout.pack(sizes, self.budget)
        for number in range(max(self.world.all_gather(len(packed)))):
            parts = packed[number % len(packed)]
            groups = [
                (self.pairs[group][0], [self.pairs[group][1][place].ids for place in places])
                for group, places in parts
            ]
            with autocast():
                inputs = layout.inputs(groups).to(self.policy.accelerator.device)
                logprobs, _ = self.policy.parallelism.run(run, inputs)
            keys = [(group, place) for group, places in parts for place in places]
            for key, row in zip(keys, logprobs.cpu(), strict=True):
                found[key] = row[: len(self.pairs[key[0]][1][key[1]].ids)].float()
        return torch.cat([found[key] for key in sorted(found)])

    def at_temperature_one(self) -> torch.Tensor:
        """[K] log-probs as they would be before the temperature."""
        return self.trainer(Pass(self.policy.vlm))

    def rounding(self) -> float:
        """Mean difference that computing in bfloat16 makes by itself."""
        device = self.policy.accelerator.device.type
        run = Pass(self.policy.vlm, self.policy.temperature)
        with torch.autocast(device, dtype=torch.bfloat16):
            rounded = self.trainer(run, autocast=nullcontext)
        with torch.autocast(device, enabled=False):
            exact = self.trainer(run, autocast=nullcontext)
        return float((rounded - exact).abs().mean())

    def without_bans(self) -> torch.Tensor:
        """[K] log-probs as they would be with the banned tokens in the distribution."""
        vlm = self.policy.vlm
        banned, vlm.banned = vlm.banned, []
        try:
            return self.trainer()
        finally:
            vlm.banned = banned


class Parity:
    """Compares after the first sync, after the first one that brings new weights, and every so many steps.

    What was drawn with the present weights is compared as it is; else a few responses are drawn for it. The
    first call also changes the weights for a moment and sees that the engine follows. Raises ParityError.
    """

    def __init__(
        self,
        policy: Policy,
        rollouts: Rollouts,
        encode: Callable[[Example], Prompt],
        console: Console,
        *,
        sampling: Sampling,
        tolerance: float,
        every: int,
        budget: int,
        world: World,
        places: Sequence[str] = (),
    ):
        self.world = world
        self.policy, self.rollouts, self.encode = policy, rollouts, encode
        self.engine = rollouts.engine
        self.console, self.tolerance, self.every, self.budget = console, tolerance, every, budget
        self.sampling = replace(sampling, group=2, max_tokens=min(sampling.max_tokens, PROBE))
        self.places, self.groups = places, max(GROUPS, len(places))
        self.calls = 0

    def __call__(self, step: int, drawn: RolloutBatch) -> dict[str, float]:
        """Metrics of the comparison, empty where none was due."""
        self.calls += 1
        if self.calls > 2 and step % self.every:
            return {}
        self.rollouts.settle()
        examples = [group.prompt.example for group in drawn.groups[: self.groups]]
        if drawn.version == self.policy.vlm.version:
            pairs = [(group.prompt, group.responses) for group in drawn.groups[: self.groups]]
        else:
            pairs = self.probe(examples)
        comparison = Comparison(self.policy, pairs, budget=self.budget, world=self.world)
        trainer = comparison.trainer()
        found = comparison.against(trainer)
        off = self.off(comparison, trainer)
        if off or not found.mean <= self.tolerance:
            causes = off + self.causes(lambda: self.explain(comparison, found, examples))
            raise ParityError(self._disagrees(found, causes, step))
        self.world.barrier()
        self.console.say(f"step {step}: engine and trainer agree on log-probs: {found}")
        if self.calls == 1:
            self._check_sync(examples)
        return {f"parity/{name}": value for name, value in vars(found).items() if name != "tokens"}

    def causes(self, look: Callable[[], list[str]]) -> list[str]:
        """What `look` finds. To try causes out takes all processes, and the others know of nothing."""
        return look() if self.world.size == 1 else ["`vlm-sapo check` in one process tells it"]

    def off(self, comparison: Comparison, trainer: torch.Tensor) -> list[str]:
        """The servers whose own groups disagree; prompts go to them in turn."""
        means = comparison.by_group(trainer)
        return [
            f"of {place} alone the mean is {mean:.1e}"
            for place, mean in zip(self.places, means, strict=False)
            if len(self.places) > 1 and not mean <= 2 * self.tolerance
        ]

    def probe(self, examples: Sequence[Example]) -> Pairs:
        """Responses to the examples, drawn from the present weights."""
        prompts = [self.encode(example) for example in examples]  # anew: no picture's features are kept
        self.engine.sync(self.policy.vlm)
        drawn = self.engine.generate(prompts, self.sampling)
        self.world.barrier()  # before any pass that all must make
        return list(zip(prompts, drawn, strict=True))

    def follow(self, examples: Sequence[Example], kinds: Sequence[str] | None = None) -> Followed:
        """Changes the weights of the kinds (all by default) for a moment and compares what the engine then
        draws with the changed trainer and with the unchanged one."""
        with perturbed(self.policy.vlm, kinds):
            pairs = self.probe(examples)
            comparison = Comparison(self.policy, pairs, budget=self.budget, world=self.world)
            trainer = comparison.trainer()
            changed, worst = comparison.against(trainer), max(comparison.by_group(trainer))
            rounding = comparison.rounding()
        fresh = [(self.encode(prompt.example), items) for prompt, items in pairs]
        comparison = Comparison(self.policy, fresh, budget=self.budget, world=self.world)
        unchanged = comparison.against(comparison.trainer())
        if self.tolerance < COARSE:
            limit = 10 * self.tolerance
        else:  # a model so changed rounds more than a trained one
            limit = max(self.tolerance, 4 * rounding, unchanged.mean / 20)
        return Followed(changed, unchanged, arrived=worst <= limit)

    def stuck(self, examples: Sequence[Example]) -> list[str]:
        """Kinds of weights that do not reach the engine."""
        found = {kind: self.follow(examples, [kind]) for kind in kinds_of(self.policy.vlm)}
        return [
            kind
            for kind, item in found.items()
            if not item.arrived and item.changed.mean > max(item.unchanged.mean, self.tolerance)
        ]

    def _check_sync(self, examples: Sequence[Example]) -> None:
        found = self.follow(examples)
        if not found.arrived:
            causes = self.causes(lambda: [f"weights: {self.missing(examples, found.unchanged)}"])
            raise ParityError(self._disagrees(found.changed, causes, None))
        self.console.say(f"changed weights reach the engine: {found.changed}")
        if found.unchanged.mean < 10 * self.tolerance:
            self.console.warn(f"but unchanged ones would hardly tell themselves apart: {found.unchanged}")

    def missing(self, examples: Sequence[Example], unchanged: Difference) -> str:
        """What of changed weights does not reach an engine that differs so from the unchanged ones."""
        if unchanged.mean <= self.tolerance:
            return "new weights do not reach the engine; it still answers with the old ones"
        return f"of these kinds they do not reach the engine: {', '.join(self.stuck(examples))}"

    def explain(self, comparison: Comparison, found: Difference, examples: Sequence[Example]) -> list[str]:
        """Which of the usual causes fit, each tried out."""
        causes = []
        if comparison.against(comparison.at_temperature_one()).mean <= self.tolerance:
            causes.append(
                "temperature: the engine's log-probs are those before the temperature; it must run with "
                "logprobs_mode processed_logprobs, as `vlm-sapo serve` sets it"
            )
        if comparison.against(comparison.without_bans()).mean <= self.tolerance:
            causes.append(
                "banned mass: the engine's log-probs include the vision tokens that the trainer bans; it "
                "must run with logprobs_mode processed_logprobs"
            )
        if not causes and self._agrees_after_another_sync(examples):
            causes.append("weights: the last update did not reach the engine, another one did")
        if not causes and any(example.images for example in examples):
            bare = [
                replace(example, images=(), problem=example.problem.replace(IMAGE_PLACEHOLDER, ""))
                for example in examples
            ]
            if self._agrees(bare):
                causes.append(
                    "pictures: rows without pictures agree; the engine's image processor gives other "
                    "pixels or another size than the trainer's"
                )
        rounding = comparison.rounding()
        if not causes and found.mean <= 4 * rounding:
            causes.append(
                f"dtype: rounding to bfloat16 alone makes a mean of {rounding:.1e} here; compare the "
                "engine's dtype with train.precision, or raise rollout.tolerance"
            )
        if not causes and found.first <= self.tolerance:
            causes.append("positions: first tokens agree, later ones do not")
        return causes or ["none of the usual causes fits; `vlm-sapo check` tells more"]

    def _agrees(self, examples: Sequence[Example]) -> bool:
        comparison = Comparison(self.policy, self.probe(examples), budget=self.budget, world=self.world)
        return comparison.against(comparison.trainer()).mean <= self.tolerance

    def _agrees_after_another_sync(self, examples: Sequence[Example]) -> bool:
        vlm = self.policy.vlm
        version, vlm.version = vlm.version, -next(UNIQUE)
        try:
            return self._agrees(examples)
        finally:
            vlm.version = version

    def _disagrees(self, found: Difference, causes: Sequence[str], step: int | None) -> str:
        when = "with changed weights" if step is None else f"at step {step}"
        return (
            f"engine and trainer disagree {when}: log-probs differ by {found}; allowed is a mean of "
            f"{self.tolerance:g} (rollout.tolerance). Likely cause: {'; '.join(causes)}"
        )


def kinds_of(vlm: VLM) -> dict[str, str]:
    """Kinds of parameters, their names without numbers, each with one of the kind: the next one's is of the
    next layer, so that all layers have a part."""
    kinds: dict[str, list[str]] = {}
    for name, parameter in vlm.model.named_parameters():
        if ".lora_A" not in name and parameter.numel() > 1 and parameter.is_floating_point():
            kinds.setdefault(re.sub(r"\.\d+\.", ".#.", name), []).append(name)
    return {kind: names[place % len(names)] for place, (kind, names) in enumerate(kinds.items())}


@contextmanager
def perturbed(vlm: VLM, kinds: Sequence[str] | None = None) -> Iterator[None]:
    """Adds noise to one parameter of each kind, and takes it back exactly."""
    chosen = [name for kind, name in kinds_of(vlm).items() if kinds is None or kind in kinds]
    parameters = dict(vlm.model.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in chosen}
    number, version = next(UNIQUE), vlm.version
    generator = torch.Generator().manual_seed(number)  # never the noise that an engine may still have
    try:
        with torch.no_grad():
            for name in chosen:
                noise = torch.randn(parameters[name].shape, generator=generator)
                size = NOISE * whole(saved[name]).float().std().clamp(min=0.01)
                parameters[name] += like(noise * size.cpu(), parameters[name])
        vlm.version = -number
        yield
    finally:
        with torch.no_grad():
            for name in chosen:
                parameters[name].copy_(saved[name])
        vlm.version = version
