"""Holds the fast ways against the plain ones on the run's first real group, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_sapo.distributed import World
from vlm_sapo.models.packing import Layout, Part, Plain
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import Group, RolloutBatch


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding explains."""

    logprob: float
    """Of one token."""
    mean_logprob: float
    """Mean over tokens, in absolute value."""
    gradient_norm: float
    """Relative."""


FLOAT32 = Tolerance(logprob=1e-4, mean_logprob=1e-5, gradient_norm=1e-3)
BFLOAT16 = Tolerance(logprob=0.5, mean_logprob=0.03, gradient_norm=0.05)
SAMPLED = 1e-4
"""Engine and policy must agree on each token's log-prob this closely for the engine's to serve as old ones: a
tenth of the narrowest clipping band (GSPO's 3e-4) on a sequence's mean."""


class SelfCheck:
    """Runs once, on the first group it is given; afterwards a call does nothing.

    Where the shared layout disagrees with the plain one, the policy falls back to the plain one; with
    `choose`, old log-probs are recomputed where the engine's disagree with the policy's. Both say so.
    `uncorrected` says that responses are drawn by older weights and no correction is configured. Each process
    looks at a group of its own, and one that disagrees decides for all.
    """

    def __init__(
        self,
        policy: Policy,
        console: Console,
        *,
        choose: bool,
        world: World,
        uncorrected: bool = False,
    ):
        self.policy, self.console, self.choose = policy, console, choose
        self.world = world
        self.uncorrected = uncorrected
        self.done = False

    def __call__(self, step: int, drawn: RolloutBatch) -> dict[str, float]:
        if self.done:
            return {}
        self.done = True
        group = drawn.groups[0]
        logprobs = self._compare_layouts(group)
        if self.choose:
            self._choose(logprobs, torch.cat([item.logprobs for item in group.responses]))
        if self.uncorrected and not self.policy.reuse_sampled:
            self.console.warn(
                "with rollout.ahead and recomputed old log-probs nothing in the loss knows that older "
                "weights drew the responses; set train.old_logprobs=rollout, or algo.correction"
            )
        return {}

    def _compare_layouts(self, group: Group) -> torch.Tensor:
        policy = self.policy
        plain, plain_norm = self._measure(
            group, Plain(), single=True
        )  # one response at a time: the least memory
        if policy.layout.name == Plain.name:
            return plain
        shared, shared_norm = self._measure(group, policy.layout, single=False)
        difference = (shared - plain).abs()
        worst, mean = float(difference.max()), float(difference.mean())
        relative = abs(shared_norm - plain_norm) / max(plain_norm, 1e-12)
        found = (
            f"log-probs within {worst:.1e} (mean {mean:.1e}), gradient norm within {relative:.1e}, "
            f"on {len(plain)} response tokens of {group.prompt.example.label}"
        )
        allowed = self._tolerance()
        agrees = (
            worst <= allowed.logprob
            and mean <= allowed.mean_logprob
            and relative <= allowed.gradient_norm
            and bool(torch.isfinite(difference).all())
        )
        place = int(difference.nan_to_num(nan=float("inf")).argmax())
        wrong = (
            f"the shared-prefix pass DISAGREES with the plain pass: {found}; the worst token is number "
            f"{place} ({float(shared[place]):.4f} shared, {float(plain[place]):.4f} plain); allowed are "
            f"{allowed}. The run goes on with the plain pass, several times slower; please report this model "
            "and these numbers"
        )
        told = [text for text in self.world.all_gather(None if agrees else wrong) if text is not None]
        if not told:
            self.console.say(f"self-check: the shared-prefix pass agrees with the plain pass: {found}")
            return shared
        self.console.warn(told[0])
        policy.layout = Plain()
        return plain

    def _choose(self, logprobs: torch.Tensor, sampled: torch.Tensor) -> None:
        worst = max(self.world.all_gather(float((logprobs - sampled).abs().max())))
        if worst <= SAMPLED:
            self.console.say(
                f"self-check: the engine's log-probs agree within {worst:.1e} and serve as old log-probs"
            )
            return
        self.console.say(
            f"self-check: the engine's log-probs differ by up to {worst:.1e} from the policy's (allowed "
            f"{SAMPLED:.0e}), so old log-probs are recomputed, at a forward pass per update but the first"
        )
        self.policy.reuse_sampled = False

    def _measure(self, group: Group, layout: Layout, *, single: bool) -> tuple[torch.Tensor, float]:
        """Log-probs [K] of the response tokens, and the norm of a gradient that every token takes part in;
        `single` runs one response at a time."""
        policy, memory = self.policy, self.policy.memory
        sizes = [(len(group.prompt.ids), [len(item.ids) for item in group.responses])]
        while True:
            packed, short = layout.pack(sizes, 1 if single else memory.budget), None
            try:
                found = self._run(group, layout, packed)
            except torch.OutOfMemoryError as error:
                short = str(error).partition(". ")[0]
                if not memory.can_shrink:  # the others wait on their devices
                    memory.shrink(memory.budget, short)
            told = [reason for reason in self.world.all_gather(short) if reason is not None]
            if not told:
                break
            policy.optimizer.zero_grad()
            row = group.prompt.example.label if single else None
            memory.shrink(min(memory.budget, sizes[0][0] + sum(sizes[0][1])), told[0], row=row)
        norm = float(policy.grad_norm())
        policy.optimizer.zero_grad()
        return torch.cat([found[place] for place in sorted(found)]), norm

    def _run(self, group: Group, layout: Layout, packed: list[list[Part]]) -> dict[int, torch.Tensor]:
        """Log-probs by response, with their gradient. All processes make equally many passes."""
        policy, responses = self.policy, [item.ids for item in group.responses]
        generator = torch.Generator().manual_seed(0)
        signs = [torch.randint(0, 2, ids.shape, generator=generator) * 2.0 - 1.0 for ids in responses]
        found: dict[int, torch.Tensor] = {}
        for number in range(max(self.world.all_gather(len(packed)))):
            places = [place for _, chosen in packed[number % len(packed)] for place in chosen]
            logprobs, _ = policy.run([(group.prompt, [responses[place] for place in places])], layout)
            rows = [row[: len(responses[place])] for row, place in zip(logprobs, places, strict=True)]
            found |= {place: row.detach().cpu() for row, place in zip(rows, places, strict=True)}
            weights = torch.cat([signs[place] for place in places]).to(logprobs.device)
            share = float(number < len(packed)) / len(responses)
            policy.backward((torch.cat(rows) * weights).sum() * share)
        return found

    def _tolerance(self) -> Tolerance:
        model = self.policy.vlm.model
        full = self.policy.accelerator.mixed_precision == "no" and model.dtype == torch.float32
        return FLOAT32 if full else BFLOAT16
