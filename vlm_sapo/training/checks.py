"""Checks before training on a step: the shared layout against the plain one, the engine against the trainer.

[K] sampled tokens of some groups' responses, in order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.attention import compare_kernels
from vlm_sapo.models.device import out_of_memory, shortage_reason
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.experts import ExpertRoutes
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.packing import GroupSlice, Layout, Part, Plain
from vlm_sapo.models.vlm import VLM
from vlm_sapo.models.weights import full_tensor, shard_like
from vlm_sapo.reporting.console import Console
from vlm_sapo.rollout.engine import RolloutError, as_contexts, server_in_turn
from vlm_sapo.rollout.sampler import Rollouts
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, RolloutBatch

Autocast = Callable[[], AbstractContextManager]
COMPARED_GROUPS = 2
"""Fewest groups of a step that are compared."""
PROBE_TOKENS = 32
"""Most tokens of a response that is sampled only for a comparison."""
COARSE = 1e-3
"""From this tolerance on, rounding can hide the effect of changed weights."""
UNIQUE = itertools.count(1)
"""Counts versions of temporary weights; the negative numbers are used, which no update has."""
NOISE_SCALE = 0.5
"""Of a tensor's standard deviation, in the test of the weight sync: enough to change any log-prob."""
RUN_CHECK = "run `vlm-sapo check` in one process to find it"


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of two layouts that rounding explains."""

    mean: float
    """Of the tokens' log-probs, in absolute value."""
    quantile: float
    """The share of tokens that `logprob` bounds."""
    logprob: float
    gradient_norm: float
    """Relative."""


FLOAT32 = Tolerance(mean=1e-5, quantile=1.0, logprob=1e-4, gradient_norm=1e-3)
HALF_PRECISION = Tolerance(mean=0.03, quantile=0.99, logprob=0.25, gradient_norm=0.05)
"""A single token may differ by more than 1, as between engines; a wrong mask shows in the mean."""
ROUNDING_LIMIT = 0.2
"""From this mean difference on, no rounding explains it, whatever float32 says."""
KERNEL_ERROR = 0.02
"""Largest relative error of attention in half precision, in the Euclidean norm; bfloat16 has 8 bits."""
REPEATED_TOKENS = 256
"""Response tokens with which a comparison is repeated in float32, at least."""
REUSE_TOLERANCE = 1e-4
"""Largest difference of a token's log-probs by engine and policy with which the engine's are reused as old
ones; the narrowest clipping band, on a sequence's mean, is GSPO's 3e-4."""


class ParityError(RolloutError):
    """Engine and trainer disagree."""


@dataclass(frozen=True)
class Difference:
    """The engine's minus the trainer's log-probs, over some response tokens."""

    tokens: int
    maximum: float
    mean: float
    p50: float
    p99: float
    bias: float
    """Mean of the signed difference."""
    correlation: float
    first: float
    """Mean over the responses' first tokens."""

    @classmethod
    def of(cls, engine: torch.Tensor, trainer: torch.Tensor, first: torch.Tensor) -> Difference:
        """From [K] log-probs; `first` [K] marks the responses' first tokens."""
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
class WeightUpdate:
    """An engine's samples with changed weights, compared with the changed trainer and the unchanged one."""

    changed: Difference
    unchanged: Difference
    share: float
    """Of the change of the trainer's log-probs, how much the engine's have, along it: 1 if all arrived."""
    arrived: bool


def allowed_difference(policy: Policy, engine_dtype: str) -> float:
    """Mean absolute difference that rounding explains."""
    return 1e-4 if policy.is_exact and engine_dtype == "float32" else 0.05


class Comparison:
    """Groups' log-probs by the engine, and by the trainer under several assumptions."""

    def __init__(self, policy: Policy, groups: Sequence[GroupSlice]):
        self.policy, self.groups, self.world = policy, groups, policy.world
        responses = [response for group in groups for response in group.responses]
        self.engine = torch.cat([response.logprobs[response.mask] for response in responses])
        lengths = [int(response.mask.sum()) for response in responses]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        self.first = torch.zeros(len(self.engine), dtype=torch.bool).index_fill(0, starts, True)
        numbers = [torch.full((len(turn),), n) for item in responses for n, turn in enumerate(item.turns)]
        self.turn = torch.cat(numbers)
        """[K] the index of the turn that a token belongs to."""
        self.begins = torch.cat([torch.arange(len(turn)) == 0 for item in responses for turn in item.turns])
        """[K] whether it is the first of its turn."""

    def against(self, trainer: torch.Tensor) -> Difference:
        return Difference.of(self.engine, trainer, self.first)

    def by_turn(self, trainer: torch.Tensor) -> list[Difference]:
        """The differences in all responses' first turns, their second ones, and so on."""
        parts = [self.turn == number for number in range(int(self.turn.max()) + 1)]
        return [Difference.of(self.engine[own], trainer[own], self.begins[own]) for own in parts]

    def by_group(self, trainer: torch.Tensor) -> list[float]:
        """Mean absolute difference of each group."""
        sizes = [sum(int(item.mask.sum()) for item in group.responses) for group in self.groups]
        return [float(gap.mean()) for gap in (self.engine - trainer).abs().split(sizes)]

    @torch.no_grad()
    def trainer(self, forward_pass: Pass | None = None, autocast: Autocast | None = None) -> torch.Tensor:
        """[K] log-probs of the trainer, or of another pass or precision. All processes call it, with equally
        many passes."""
        layout = self.policy.layout
        rows: dict[tuple[int, int], torch.Tensor] = {}
        packed = layout.pack([group.sizes for group in self.groups], self.policy.memory.tokens)
        for number in range(max(self.world.all_gather(len(packed)))):
            parts = packed[number % len(packed)]
            slices = [
                GroupSlice(self.groups[group].prompt, tuple(self.groups[group].responses[row] for row in own))
                for group, own in parts
            ]
            scores = self.policy.run(slices, layout, forward_pass=forward_pass, autocast=autocast)
            keys = [(group, row) for group, own in parts for row in own]
            for key, values in zip(keys, scores.logprobs.cpu(), strict=True):
                mask = self.groups[key[0]].responses[key[1]].mask
                rows[key] = values[: len(mask)][mask].float()
        return torch.cat([rows[key] for key in sorted(rows)])

    def at_temperature_one(self) -> torch.Tensor:
        """[K] log-probs at temperature 1."""
        return self.trainer(Pass(self.policy.vlm))

    def rounding(self) -> float:
        """Mean absolute difference that bfloat16 alone causes."""
        device = self.policy.device.type
        own_pass = self.policy.forward_pass
        with torch.autocast(device, dtype=torch.bfloat16):
            rounded = self.trainer(own_pass, autocast=nullcontext)
        with torch.autocast(device, enabled=False):
            exact = self.trainer(own_pass, autocast=nullcontext)
        return float((rounded - exact).abs().mean())

    def without_bans(self) -> torch.Tensor:
        """[K] log-probs of a distribution that includes the banned tokens."""
        with self.policy.vlm.without_bans():
            return self.trainer()


class Parity:
    """Compares engine and trainer after the first two weight syncs and every `every` steps.

    A step's own responses are compared if the current weights sampled them; else a few are sampled for it.
    The first call also changes the weights temporarily and checks that the change reaches the engine. Raises
    ParityError if they disagree.
    """

    def __init__(
        self,
        policy: Policy,
        rollouts: Rollouts,
        encode: Encoder,
        console: Console,
        *,
        tolerance: float,
        every: int,
        server_urls: Sequence[str] = (),
    ):
        self.policy, self.rollouts, self.encode, self.world = policy, rollouts, encode, policy.world
        self.engine = rollouts.engine
        self.console, self.tolerance, self.every = console, tolerance, every
        sampling = rollouts.sampling
        self.sampling = replace(sampling, group=2, max_tokens=min(sampling.max_tokens, PROBE_TOKENS))
        self.server_urls, self.groups = server_urls, max(COMPARED_GROUPS, len(server_urls))
        self.calls = 0

    def __call__(self, step: int, rollout: RolloutBatch) -> dict[str, float]:
        """Metrics of the comparison; empty if none is due."""
        self.calls += 1
        if self.calls > 2 and step % self.every:
            return {}
        self.rollouts.wait()
        examples = [group.prompt.example for group in rollout.groups[: self.groups]]
        count = len(rollout.groups)  # of one call, in which the servers had their turns
        if rollout.version == self.policy.vlm.version:
            groups = [GroupSlice(group.prompt, group.responses) for group in rollout.groups[: self.groups]]
        else:
            groups, count = self.probe(examples), len(examples)
        comparison = Comparison(self.policy, groups)
        trainer = comparison.trainer()
        difference = comparison.against(trainer)
        servers = self.servers_out_of_tolerance(comparison.by_group(trainer), count)
        if servers or not difference.mean <= self.tolerance:
            causes = servers + self.likely_causes(comparison, difference, examples)
            raise ParityError(self._disagrees(difference, causes, step))
        self.world.barrier()
        self.console.say(f"step {step}: engine and trainer agree on log-probs: {difference}")
        if self.calls == 1:
            self._check_sync(examples)
        return {f"parity/{name}": value for name, value in vars(difference).items() if name != "tokens"}

    def likely_causes(
        self, comparison: Comparison, difference: Difference, examples: Sequence[Example]
    ) -> list[str]:
        """What explains a difference. With several processes only a hint: trying causes takes all of them,
        and the others don't know of the difference."""
        if self.world.size > 1:
            return [RUN_CHECK]
        return self.explain(comparison, difference, examples)

    def servers_out_of_tolerance(self, means: Sequence[float], count: int) -> list[str]:
        """A message for each server whose own groups disagree, of the first of `count` that one call sampled:
        their `means`."""
        if len(self.server_urls) < 2:
            return []
        by_server: dict[str, list[float]] = {}
        for context, mean in enumerate(means):
            number = server_in_turn(context, count, self.world) % len(self.server_urls)
            by_server.setdefault(self.server_urls[number], []).append(mean)
        return [
            f"on {url} alone the mean is {mean:.1e}"
            for url, mean in ((url, sum(own) / len(own)) for url, own in by_server.items())
            if not mean <= 2 * self.tolerance
        ]

    def probe(self, examples: Sequence[Example]) -> list[GroupSlice]:
        """Samples responses to the examples from the current weights."""
        prompts = [self.encode(example) for example in examples]  # encoded again: no cached image features
        self.engine.sync(self.policy.vlm)
        groups = self.engine.generate(as_contexts(prompts), self.sampling)
        self.world.barrier()  # before passes that all processes must run
        return [GroupSlice(prompt, tuple(items)) for prompt, items in zip(prompts, groups, strict=True)]

    def check_weight_update(
        self, examples: Sequence[Example], kinds: Sequence[str] | None = None
    ) -> WeightUpdate:
        """Changes the weights of `kinds` (default: all) temporarily, and compares what the engine samples
        then with the changed trainer and with the unchanged one."""
        with perturbed(self.policy.vlm, kinds):
            groups = self.probe(examples)
            comparison = Comparison(self.policy, groups)
            trainer = comparison.trainer()
            changed, worst = comparison.against(trainer), max(comparison.by_group(trainer))
            rounding = comparison.rounding()
        fresh = [GroupSlice(self.encode(group.prompt.example), group.responses) for group in groups]
        comparison = Comparison(self.policy, fresh)
        before = comparison.trainer()
        unchanged, change = comparison.against(before), trainer - before
        share = float(((comparison.engine - before) * change).sum() / change.square().sum().clamp(min=1e-12))
        if self.tolerance < COARSE:
            limit = 10 * self.tolerance
        else:  # a model with such noise rounds more than a trained one
            limit = max(self.tolerance, 4 * rounding, unchanged.mean / 20)
        return WeightUpdate(changed, unchanged, share, arrived=worst <= limit)

    def unsynced_kinds(self, examples: Sequence[Example]) -> list[str]:
        """The kinds of weights whose changes do not reach the engine."""
        updates = {kind: self.check_weight_update(examples, [kind]) for kind in kinds_of(self.policy.vlm)}
        return [
            kind
            for kind, item in updates.items()
            if not item.arrived and item.changed.mean > max(item.unchanged.mean, self.tolerance)
        ]

    def _check_sync(self, examples: Sequence[Example]) -> None:
        update = self.check_weight_update(examples)
        if not update.arrived:
            one = self.world.size == 1
            cause = f"weights: {self.unsynced(examples, update.unchanged)}" if one else RUN_CHECK
            raise ParityError(self._disagrees(update.changed, [cause], None))
        self.console.say(
            f"changed weights reach the engine: {update.share:.1%} of the change, {update.changed}"
        )
        if update.unchanged.mean < 10 * self.tolerance:
            self.console.warn(f"but unchanged weights would hardly differ: {update.unchanged}")

    def unsynced(self, examples: Sequence[Example], unchanged: Difference) -> str:
        """Which changed weights do not reach the engine; `unchanged` is its difference from the old ones."""
        if unchanged.mean <= self.tolerance:
            return "new weights do not reach the engine; it still answers with the old ones"
        return f"of these kinds they do not reach the engine: {', '.join(self.unsynced_kinds(examples))}"

    def explain(
        self, comparison: Comparison, difference: Difference, examples: Sequence[Example]
    ) -> list[str]:
        """The usual causes that explain the difference; each is tried."""
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
                    "images: rows without images agree; the engine's image processor gives other pixels or "
                    "another size than the trainer's"
                )
        if not causes and comparison.turn.any():
            first, *later = comparison.by_turn(comparison.trainer())
            if first.mean <= self.tolerance < max(turn.mean for turn in later):
                causes.append(
                    "turns: first turns agree, later ones do not; the engine reads what the environment "
                    "answered, or its images, in another way"
                )
        rounding = comparison.rounding()
        if not causes and difference.mean <= 4 * rounding:
            causes.append(
                f"dtype: rounding to bfloat16 alone gives a mean of {rounding:.1e} here; compare the "
                "engine's dtype with train.precision, or raise rollout.tolerance"
            )
        if not causes and difference.first <= self.tolerance:
            causes.append("positions: first tokens agree, later ones do not")
        return causes or ["none of the usual causes explains it; `vlm-sapo check` shows more"]

    def _agrees(self, examples: Sequence[Example]) -> bool:
        comparison = Comparison(self.policy, self.probe(examples))
        return comparison.against(comparison.trainer()).mean <= self.tolerance

    def _agrees_after_another_sync(self, examples: Sequence[Example]) -> bool:
        with self.policy.vlm.another_version(-next(UNIQUE)):
            return self._agrees(examples)

    def _disagrees(self, difference: Difference, causes: Sequence[str], step: int | None) -> str:
        when = "with changed weights" if step is None else f"at step {step}"
        return (
            f"engine and trainer disagree {when}: log-probs differ by {difference}; allowed is a mean of "
            f"{self.tolerance:g} (rollout.tolerance). Likely cause: {'; '.join(causes)}"
        )


def kinds_of(vlm: VLM) -> dict[str, str]:
    """One parameter name of each kind, which is a name without its layer number. Successive kinds use
    successive layers, so that all layers are covered. With adapters these alone: their base never changes."""
    kinds: dict[str, list[str]] = {}
    adapted = adapters.attached(vlm.model)
    for name, parameter in vlm.model.named_parameters():
        if adapted and not parameter.requires_grad:
            continue
        if ".lora_A" not in name and parameter.numel() > 1 and parameter.is_floating_point():
            kinds.setdefault(re.sub(r"\.\d+\.", ".#.", name), []).append(name)
    return {kind: names[index % len(names)] for index, (kind, names) in enumerate(kinds.items())}


@contextmanager
def perturbed(vlm: VLM, kinds: Sequence[str] | None = None) -> Iterator[None]:
    """Adds noise to one parameter of each kind in the block, and restores it exactly."""
    names = [name for kind, name in kinds_of(vlm).items() if kinds is None or kind in kinds]
    parameters = dict(vlm.model.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in names}
    number = next(UNIQUE)
    generator = torch.Generator().manual_seed(number)  # other noise than an engine may still have
    try:
        with torch.no_grad():
            for name in names:
                noise = torch.randn(parameters[name].shape, generator=generator)
                size = NOISE_SCALE * full_tensor(saved[name]).float().std().clamp(min=0.01)
                parameters[name] += shard_like(noise * size.cpu(), parameters[name])
        with vlm.another_version(-number):
            yield
    finally:
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(saved[name])


@dataclass(frozen=True)
class Measured:
    """A group under one layout."""

    logprobs: torch.Tensor
    """[K] of the sampled tokens."""
    gradient_norm: float
    """Of a loss with a term for every token."""
    routes: ExpertRoutes | None
    """The experts that were used; None for a dense model."""


@dataclass(frozen=True)
class LayoutDifference:
    """The shared layout against the plain one."""

    gap: torch.Tensor
    """[K] absolute differences of the log-probs."""
    gradient_norm: float
    """Relative difference."""
    worst: str
    """The token that differs most."""

    @classmethod
    def of(cls, shared: Measured, plain: Measured) -> LayoutDifference:
        gap = (shared.logprobs - plain.logprobs).abs()
        index = int(gap.nan_to_num(nan=float("inf")).argmax())
        values = f"{float(shared.logprobs[index]):.4f} shared, {float(plain.logprobs[index]):.4f} plain"
        relative = abs(shared.gradient_norm - plain.gradient_norm) / max(plain.gradient_norm, 1e-12)
        return cls(gap, relative, f"token {index} ({values})")

    @property
    def mean(self) -> float:
        return float(self.gap.mean())

    def within(self, tolerance: Tolerance) -> bool:
        return bool(
            torch.isfinite(self.gap).all()
            and self.mean <= tolerance.mean
            and self.gap.double().quantile(tolerance.quantile) <= tolerance.logprob
            and self.gradient_norm <= tolerance.gradient_norm
        )

    def __str__(self) -> str:
        p99 = float(self.gap.double().quantile(0.99))
        return (
            f"log-probs within {float(self.gap.max()):.1e} (mean {self.mean:.1e}, 99 of 100 within "
            f"{p99:.1e}), gradient norm within {self.gradient_norm:.1e}, on {len(self.gap)} response tokens"
        )


class SelfCheck:
    """Runs once, on the first group; later calls do nothing.

    If the shared layout disagrees with the plain one, the policy switches to the plain one. In half precision
    a comparison that fails is repeated in float32 where that is possible: rounding disappears there, a wrong
    mask or position remains. An MoE model's shared pass replays the experts of the plain one, which rounding
    would change. With `choose_old`, old log-probs are recomputed if the engine's disagree with the policy's.
    `uncorrected` says that older weights sample the responses and no correction is configured. Each process
    checks a group of its own; a disagreement in one counts for all.
    """

    def __init__(self, policy: Policy, console: Console, *, choose_old: bool, uncorrected: bool = False):
        self.policy, self.console, self.world = policy, console, policy.world
        self.choose_old, self.uncorrected = choose_old, uncorrected
        self.done = False

    def __call__(self, step: int, rollout: RolloutBatch) -> dict[str, float]:
        if self.done:
            return {}
        self.done = True
        group = rollout.groups[0]
        logprobs = self._compare_layouts(GroupSlice(group.prompt, group.responses))
        if self.choose_old:
            sampled = torch.cat([item.logprobs[item.mask] for item in group.responses])
            self._choose_old_logprobs(logprobs, sampled)
        if self.uncorrected and not self.policy.reuse_sampled:
            self.console.warn(
                "with rollout.ahead and recomputed old log-probs the loss does not correct for the older "
                "weights that sampled the responses; set train.old_logprobs=rollout, or algo.correction"
            )
        return {}

    def _compare_layouts(self, group: GroupSlice) -> torch.Tensor:
        """[K] log-probs under the layout that remains."""
        policy, row = self.policy, group.prompt.example.label
        plain = self._measure(group, Plain(), single=True)  # one response at a time needs the least memory
        if policy.layout.name == Plain.name:
            return plain.logprobs
        replayed = None if policy.is_exact else plain.routes
        shared = self._measure(group, policy.layout, single=False, replayed=replayed)
        difference = LayoutDifference.of(shared, plain)
        allowed = FLOAT32 if policy.is_exact else HALF_PRECISION
        if all(self.world.all_gather(difference.within(allowed))):
            self.console.say(f"check ok: shared-prefix and plain pass agree: {difference} of {row}")
            return shared.logprobs
        repeated = self._repeat_in_float32(group, difference)
        if repeated is not None and all(self.world.all_gather(repeated.within(FLOAT32))):
            self.console.say(
                f"check ok: shared-prefix and plain pass agree in float32: {repeated} of {row}; in "
                f"{policy.precision} rounding makes more of a difference than usual: {difference}"
            )
            return shared.logprobs
        exact = f"; in float32 {repeated}" if repeated else ""
        text = (
            f"the shared-prefix pass DISAGREES with the plain pass: {difference} of {row}{exact}; the worst "
            f"is {difference.worst}; allowed are {allowed}. The run continues with the plain pass, several "
            "times slower; please report this model and these numbers"
        )
        texts = self.world.all_gather(None if difference.within(allowed) else text)
        self.console.warn(next(text for text in texts if text is not None))
        policy.use_plain_layout()
        return plain.logprobs

    def _repeat_in_float32(self, group: GroupSlice, difference: LayoutDifference) -> LayoutDifference | None:
        """Compares a few responses in float32. None where that can't be done or can't help: the weights are
        sharded or in 4 bits, or the difference is too large for rounding. All processes call it."""
        policy = self.policy
        possible = (
            not policy.is_exact
            and not policy.parallelism.sharded
            and difference.mean <= ROUNDING_LIMIT
            and all(parameter.is_floating_point() for parameter in policy.vlm.parameters())
        )
        if not all(self.world.all_gather(possible)):
            return None
        few, count = [], 0
        for response in sorted(group.responses, key=lambda item: len(item.ids)):
            if count < REPEATED_TOKENS:
                few.append(response)
                count += len(response.ids)
        group = GroupSlice(group.prompt, tuple(few))
        with ExitStack() as stack:
            if not self._fits(lambda: stack.enter_context(in_float32(policy))):
                return None
            shared, _ = self._attempt(group, policy.layout, single=False, autocast=nullcontext)
            plain, _ = self._attempt(group, Plain(), single=True, autocast=nullcontext)
        if shared is None or plain is None or not all(self.world.all_gather(self._kernels_are_right(group))):
            return None
        return LayoutDifference.of(shared, plain)

    def _fits(self, work: Callable[[], object]) -> bool:
        """Whether memory suffices for some work in every process. All processes call it."""
        fits = True
        try:
            work()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        return all(self.world.all_gather(fits))

    def _kernels_are_right(self, group: GroupSlice) -> bool:
        """Whether a GPU's attention kernels, which float32 passes don't use, agree with the others on this
        group's row: one layer, with random values."""
        policy, config = self.policy, self.policy.vlm.model.config.get_text_config()
        segments = policy.layout.inputs([group]).to(policy.device).segments
        if policy.device.type == "cpu" or segments is None:
            return True
        heads = config.num_attention_heads, config.num_key_value_heads
        size = config.to_dict().get("head_dim") or config.hidden_size // heads[0]
        return compare_kernels(segments, heads=heads, size=size, device=policy.device) <= KERNEL_ERROR

    def _choose_old_logprobs(self, logprobs: torch.Tensor, sampled: torch.Tensor) -> None:
        worst = max(self.world.all_gather(float((logprobs - sampled).abs().max())))
        if worst <= REUSE_TOLERANCE:
            self.console.say(
                f"check ok: generation and training log-probs agree ({worst:.1e}); reusing them as old "
                "log-probs"
            )
            return
        self.console.say(
            f"check: generation and training log-probs differ by up to {worst:.1e} (limit "
            f"{REUSE_TOLERANCE:.0e}); recomputing old log-probs, a forward pass for each update but the first"
        )
        self.policy.recompute_old_logprobs()

    def _measure(
        self, group: GroupSlice, layout: Layout, *, single: bool, replayed: ExpertRoutes | None = None
    ) -> Measured:
        """The group under a layout, with smaller passes where memory runs out; `single` runs one response at
        a time, `replayed` are the experts to use."""
        memory, (prompt, responses) = self.policy.memory, group.sizes
        while True:
            measured, shortage = self._attempt(group, layout, single=single, replayed=replayed)
            if measured is not None:
                return measured
            row = group.prompt.example.label if single else None
            memory.shrink(min(memory.tokens, prompt + sum(responses)), shortage, row=row)

    def _attempt(
        self,
        group: GroupSlice,
        layout: Layout,
        *,
        single: bool,
        replayed: ExpertRoutes | None = None,
        autocast: Autocast | None = None,
    ) -> tuple[Measured | None, str]:
        """The group under a layout, by default in the policy's precision; or None, and why memory ran out in
        some process. All processes call it."""
        policy, shortage = self.policy, None
        rows: dict[int, torch.Tensor] = {}
        routes: ExpertRoutes | None = None
        packed = layout.pack([group.sizes], 1 if single else policy.memory.tokens)
        passes = max(self.world.all_gather(len(packed)))
        try:
            rows, routes = self._run(
                group, layout, packed, replayed, autocast or policy.autocast, passes=passes
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            shortage = shortage_reason(error)
            if not policy.memory.can_shrink:  # the others wait on their devices
                policy.memory.shrink(policy.memory.tokens, shortage)
        shortages = [reason for reason in self.world.all_gather(shortage) if reason is not None]
        norm = 0.0 if shortages else float(policy.grad_norm())
        policy.optimizer.zero_grad()
        if shortages:
            return None, shortages[0]
        return Measured(torch.cat([rows[index] for index in sorted(rows)]), norm, routes), ""

    def _run(
        self,
        group: GroupSlice,
        layout: Layout,
        packed: list[list[Part]],
        replayed: ExpertRoutes | None,
        autocast: Autocast,
        *,
        passes: int,
    ) -> tuple[dict[int, torch.Tensor], ExpertRoutes | None]:
        """Log-probs by response, and their experts; adds the gradient. All processes run this many passes."""
        policy, responses = self.policy, group.responses
        generator = torch.Generator().manual_seed(0)
        signs = [torch.randint(0, 2, item.ids.shape, generator=generator) * 2.0 - 1.0 for item in responses]
        rows: dict[int, torch.Tensor] = {}
        used: list[tuple[torch.Tensor, ExpertRoutes]] = []
        for number in range(passes):
            indices = [index for _, own in packed[number % len(packed)] for index in own]
            slices = [GroupSlice(group.prompt, tuple(responses[index] for index in indices))]
            part = None if replayed is None else replayed[indices]
            scores, routes = policy.run_routed(slices, layout, replayed=part, autocast=autocast)
            own = [
                values[: len(responses[index].ids)][responses[index].mask]
                for index, values in zip(indices, scores.logprobs, strict=True)
            ]
            rows |= {index: values.detach().cpu() for index, values in zip(indices, own, strict=True)}
            used += [] if routes is None else [(torch.tensor(indices), routes)]
            weights = torch.cat([signs[index][responses[index].mask] for index in indices])
            share = float(number < len(packed)) / len(responses)
            policy.backward((torch.cat(own) * weights.to(scores.logprobs.device)).sum() * share)
        tokens = pad_sequence([response.mask for response in responses], batch_first=True)
        return rows, ExpertRoutes.scatter(used, tokens)


@contextmanager
def in_float32(policy: Policy) -> Iterator[None]:
    """Within the block all weights are in float32; what was in half precision is again afterwards, the same
    to the bit."""
    halves = {item: item.dtype for item in policy.vlm.parameters() if item.dtype != torch.float32}
    try:
        for parameter in halves:
            parameter.data = parameter.data.float()
        yield
    finally:
        policy.optimizer.zero_grad()
        for parameter, dtype in halves.items():
            parameter.data = parameter.data.to(dtype)
