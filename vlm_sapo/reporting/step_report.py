"""What a step leaves behind: lines of metrics, histograms and responses, and the line on the console."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.images import save_images
from vlm_sapo.reporting.metrics import StepMeter, Trace, group_metrics, task_metrics
from vlm_sapo.rewards.verifiers.boxes import Box, shown
from vlm_sapo.rewards.verifiers.table import own_verifier
from vlm_sapo.training.run import Core
from vlm_sapo.types import Group, ResponseText, RolloutBatch

TRACED = 32_768
"""Tokens of a step that are traced at most, shared by its logged responses."""
OFTEN, SELDOM = 50, 10
"""The first so many steps are traced, and after them every so manyth."""
TREND = 10
"""Steps whose mean reward is compared with that of as many before."""
Boxes = tuple[list[Box], list[Box]]
"""Gold ones and the response's, as shares of the picture's sides."""


class Reporter:
    """Writes a step's line of metrics and of histograms, and `rollouts` groups of it, of all processes: the
    first, the last and those evenly between, since early groups are trained on while ratios are still 1."""

    def __init__(
        self,
        core: Core,
        *,
        minibatches: int,
        rollouts: int,
        alarms: Alarms,
        parts: Sequence[tuple[str, dict]],
    ):
        self.core, self.minibatches, self.rollouts, self.alarms = core, minibatches, rollouts, alarms
        self.rewards: deque[float] = deque(maxlen=2 * TREND)
        self.parts = parts
        """Names and arguments of the reward's."""

    def __call__(
        self,
        step: int,
        meter: StepMeter,
        drawn: RolloutBatch,
        advantages: Sequence[torch.Tensor],
        further: dict[str, float],
    ) -> str:
        """Returns the numbers that matter most. All processes call it."""
        world, memory = self.core.world, self.core.policy.memory
        own = [group.without_images() for group in drawn.groups]
        replaced = [group.without_images() for group in drawn.replaced]
        chosen = evenly(len(own) * world.size, self.rollouts)
        shown = [
            Shown(place, group, values.tolist(), *self._seen(original, meter))
            for place, original, group, values in zip(
                drawn.places, drawn.groups, own, advantages, strict=True
            )
            if place in chosen
        ]
        placed = list(zip(drawn.places, own, strict=True))
        told = world.gather((placed, replaced, shown, (memory.shortages, memory.budget)))
        if not told:
            return ""
        placed = sorted((item for items, *_ in told for item in items), key=lambda item: item[0])
        groups = [group for _, group in placed]
        replaced = [group for _, groups, *_ in told for group in groups]
        shown = sorted((item for _, _, items, _ in told for item in items), key=lambda item: item.place)
        record = {"step": step} | further | meter.record(drawn.seconds)
        record |= group_metrics(groups, replaced, drawn.seconds)
        record |= task_metrics(groups, replaced, self.minibatches)
        if shortages := sum(count for *_, (count, _) in told):
            budget = min(budget for *_, (_, budget) in told)
            record |= {"memory/shortages": shortages, "memory/tokens_per_microbatch": budget}
        self.core.folder.append("metrics.jsonl", record)
        self.alarms(record)
        folder = self.core.folder
        folder.append("histograms.jsonl", {"step": step, "minibatches": meter.distributions})
        for item in shown:
            for line in rollout_lines(item):
                folder.append("rollouts.jsonl", {"step": step, "place": item.place} | line)
            if step <= OFTEN or step % SELDOM == 0:
                most = TRACED // sum(len(other.traces) for other in shown)
                folder.append("traces.jsonl", {"step": step, "place": item.place} | self._trace(item, most))
        self.rewards.append(record["reward/mean"])
        return headline(record, self.rewards)

    def _seen(self, group: Group, meter: StepMeter) -> tuple[list[str], list[Trace | None], list[Boxes]]:
        """Names of a group's pictures, which are kept, and by response what the update saw of it and its
        boxes."""
        names = save_images(self.core.folder.path, group.prompt.images)
        traces = [meter.traces.get(id(completion.ids)) for completion in group.responses]
        example = group.prompt.example
        asked = [own_verifier(example, name, args) for name, args in self.parts]
        args = next((args for name, args in asked if name in ("box", "point_in_box")), None)
        if args is None:
            return names, traces, [([], [])] * len(traces)
        responses = [ResponseText.of(group.prompt, completion) for completion in group.responses]
        return names, traces, [shown(response, example, args) for response in responses]

    def _trace(self, item: Shown, most: int) -> dict[str, list]:
        """Token by token, by response: its text, and what the update saw, nothing where it saw none; of the
        first `most` tokens."""
        tokenizer = self.core.policy.vlm.tokenizer
        found: dict[str, list] = {
            "pieces": [
                pieces(tokenizer, completion.ids[:most].tolist()) for completion in item.group.responses
            ]
        }
        for name in ("log_ratio", "effective", "entropy"):
            found[name] = [
                [float(f"{value:.4g}") for value in getattr(trace, name)[:most].tolist()] if trace else []
                for trace in item.traces
            ]
        return found


def headline(record: dict, rewards: Sequence[float]) -> str:
    """The numbers of a step that matter most, for the console; `rewards` are the last steps'."""
    last = list(rewards)
    trend = ""
    if len(last) == 2 * TREND:
        gain = (sum(last[TREND:]) - sum(last[:TREND])) / TREND
        trend = f" ({gain:+.3f} in {TREND} steps)"
    cut = f" ({record['response/truncated']:.0%} cut)" if record["response/truncated"] >= 0.05 else ""
    trained = "no group with variance"
    if "policy/effective_update" in record:
        update = record["policy/effective_update"]
        trained = f"entropy {record['policy/entropy']:.3f}  effective update {update:.3f}"
    elif "policy/skipped_updates" in record:
        trained = "no update"
    return (
        f"reward {record['reward/mean']:.3f}{trend}  tokens {record['response/tokens']:.1f}{cut}  {trained}  "
        f"{record['time/step']:.1f} s ({record['rollout/tokens_per_second']:.0f} tok/s, {peak():.1f} GB)"
    )


@dataclass(frozen=True)
class Shown:
    """A group that people look at."""

    place: int
    group: Group
    advantages: list[float]
    pictures: list[str]
    """Files of the pictures as the model saw them, small, relative to the run's folder."""
    traces: list[Trace | None]
    boxes: list[Boxes]


def evenly(count: int, wanted: int) -> set[int]:
    """So many places of 0 to count - 1, the first and the last among them."""
    if wanted < 2:
        return set(range(min(wanted, count)))
    return {round(number * (count - 1) / (wanted - 1)) for number in range(wanted)}


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """Text by token; of characters that several tokens spell, at the last of them."""
    found, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd") or len(waiting) == 4
        found.append(text if whole else "")
        waiting = [] if whole else waiting
    return found


def peak() -> float:
    """Most gigabytes so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rollout_lines(item: Shown) -> Iterator[dict[str, Any]]:
    """A group's responses for `rollouts.jsonl`."""
    group = item.group
    rows = zip(group.responses, group.rewards, item.advantages, item.boxes, strict=True)
    for completion, score, value, (golds, given) in rows:
        yield {
            "id": group.prompt.example.id,
            "task": group.prompt.example.task,
            "problem": group.prompt.example.problem,
            "answer": group.prompt.example.answer,
            "response": completion.text,
            "reward": score.total,
            "parts": dict(score.parts),
            "outcomes": dict(score.outcomes),
            "advantage": value,
            "tokens": len(completion.ids),
            "finish": completion.finish,
            "pictures": item.pictures,
            **({"gold_boxes": golds, "boxes": given} if golds or given else {}),
        }
