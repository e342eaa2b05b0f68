"""What a step leaves behind: lines of metrics, histograms and responses, and the line on the console."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vlm_sapo.distributed import World
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.images import save_images
from vlm_sapo.reporting.metrics import (
    Described,
    Trace,
    UpdateStats,
    group_metrics,
    task_metrics,
    traces,
    update_metrics,
    update_record,
)
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.rewards.verifiers.boxes import Box, shown
from vlm_sapo.rewards.verifiers.table import own_verifier
from vlm_sapo.types import Group, ResponseText, RolloutBatch

TRACED_TOKENS = 32_768
"""Tokens of a step that are traced at most, shared by its logged responses."""
TRACED_STEPS, TRACE_EVERY = 50, 10
"""The first so many steps are traced, and after them every so manyth."""
TREND = 10
"""Steps whose mean reward is compared with that of as many before."""
Boxes = tuple[list[Box], list[Box]]
"""Gold ones and the response's, as shares of the picture's sides."""


@dataclass(frozen=True)
class StepRecords:
    """What a step leaves to be reported, as one process has it."""

    rollout: RolloutBatch
    advantages: list[list[float]]
    """By group, the advantage of each response: the mean over its tokens."""
    updates: list[UpdateStats | None]
    """By mini-batch; None where there was nothing to train on."""
    first_rows: list[int]
    """Of each mini-batch, the first of its rows among all responses."""
    seconds: Mapping[str, float]
    """Durations of the step's parts, by name."""
    further: Mapping[str, float]
    """Metrics that others measured."""
    shortages: int
    tokens_per_microbatch: int


class StepReport:
    """Writes a step's line of metrics and of histograms, and `rollouts` groups of it, of all processes: the
    first, the last and those evenly between, since early groups are trained on while ratios are still 1."""

    def __init__(
        self,
        folder: RunFolder,
        alarms: Alarms,
        world: World,
        *,
        tokenizer: Tokenizer,
        loss: Described,
        rollouts: int,
        parts: Sequence[tuple[str, dict]],
    ):
        self.folder, self.alarms, self.world = folder, alarms, world
        self.tokenizer, self.loss, self.rollouts = tokenizer, loss, rollouts
        self.rewards: deque[float] = deque(maxlen=2 * TREND)
        self.parts = parts
        """Names and arguments of the reward's."""

    def write(self, step: int, records: StepRecords) -> str:
        """Returns the numbers that matter most. All processes call it."""
        own = self._own(records)
        theirs = self.world.gather(own)
        if not theirs:
            return ""
        placed = sorted((item for part in theirs for item in part.groups), key=lambda item: item[0])
        groups = [group for _, group in placed]
        replaced = [group for part in theirs for group in part.replaced]
        updates = [update for update in map(joined, zip(*(p.updates for p in theirs), strict=True)) if update]
        kept = [update for update in updates if not update.skipped]
        record = {"step": step} | dict(records.further)
        record |= update_record(
            [update_metrics(update, self.loss) for update in kept], len(updates) - len(kept)
        )
        record |= {f"time/{name}": value for name, value in records.seconds.items()}
        record |= group_metrics(groups, replaced, records.rollout.seconds)
        record |= task_metrics(groups, replaced, len(records.updates))
        if shortages := sum(part.shortages for part in theirs):
            budget = min(part.tokens_per_microbatch for part in theirs)
            record |= {"memory/shortages": shortages, "memory/tokens_per_microbatch": budget}
        self.folder.append("metrics.jsonl", record)
        self.alarms(record)
        histograms = [self.loss.distributions(update) for update in kept]
        self.folder.append("histograms.jsonl", {"step": step, "minibatches": histograms})
        self._write_groups(
            step, sorted((item for p in theirs for item in p.logged), key=lambda item: item.slot)
        )
        self.rewards.append(record["reward/mean"])
        return headline(record, self.rewards)

    def _own(self, records: StepRecords) -> ProcessRecords:
        rollout = records.rollout
        logged = evenly(len(rollout.groups) * self.world.size, self.rollouts)
        seen: dict[int, Trace] = {}
        for first, update in zip(records.first_rows, records.updates, strict=True):
            if update is not None:
                seen |= {first + row: trace for row, trace in traces(update, self.loss).items()}
        groups, first = [], 0
        for slot, group, values in zip(rollout.slots, rollout.groups, records.advantages, strict=True):
            if slot in logged:
                rows = range(first, first + len(group.responses))
                groups.append(self._logged(slot, group, values, [seen.get(row) for row in rows]))
            first += len(group.responses)
        return ProcessRecords(
            groups=[
                (slot, g.without_images()) for slot, g in zip(rollout.slots, rollout.groups, strict=True)
            ],
            replaced=[group.without_images() for group in rollout.replaced],
            logged=groups,
            updates=records.updates,
            shortages=records.shortages,
            tokens_per_microbatch=records.tokens_per_microbatch,
        )

    def _logged(self, slot: int, group: Group, values: list[float], seen: list[Trace | None]) -> LoggedGroup:
        """A group with the files of its images, saved, and with boxes where a verifier reads them."""
        names = save_images(self.folder.path, group.prompt.images)
        example = group.prompt.example
        asked = [own_verifier(example, name, args) for name, args in self.parts]
        args = next((args for name, args in asked if name in ("box", "point_in_box")), None)
        boxes: list[Boxes] = [([], [])] * len(group.responses)
        if args is not None:
            texts = [ResponseText.of(group.prompt, response) for response in group.responses]
            boxes = [shown(text, example, args) for text in texts]
        lengths = [len(response.ids) for response in group.responses]
        cut = [trace and trace.first(length) for trace, length in zip(seen, lengths, strict=True)]
        return LoggedGroup(slot, group.without_images(), values, names, cut, boxes)

    def _write_groups(self, step: int, groups: Sequence[LoggedGroup]) -> None:
        for item in groups:
            for line in rollout_lines(item):
                self.folder.append("rollouts.jsonl", {"step": step, "place": item.slot} | line)
            if step <= TRACED_STEPS or step % TRACE_EVERY == 0:
                limit = TRACED_TOKENS // sum(len(other.traces) for other in groups)
                trace = {"step": step, "place": item.slot} | self._trace(item, limit)
                self.folder.append("traces.jsonl", trace)

    def _trace(self, item: LoggedGroup, limit: int) -> dict[str, list]:
        """Token by token, by response: its text, and what the update saw, nothing where it saw none; of the
        first `limit` tokens."""
        columns: dict[str, list] = {
            "pieces": [
                pieces(self.tokenizer, response.ids[:limit].tolist()) for response in item.group.responses
            ]
        }
        for name in ("log_ratio", "effective", "entropy"):
            columns[name] = [
                [float(f"{value:.4g}") for value in vars(trace)[name][:limit].tolist()] if trace else []
                for trace in item.traces
            ]
        return columns


def joined(parts: Sequence[UpdateStats | None]) -> UpdateStats | None:
    """What all processes saw of an update."""
    seen = [part for part in parts if part is not None]
    return UpdateStats.join(seen) if seen else None


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
class LoggedGroup:
    """A group that people look at."""

    slot: int
    group: Group
    advantages: list[float]
    images: list[str]
    """Files of the images as the model saw them, small, relative to the run's folder."""
    traces: list[Trace | None]
    boxes: list[Boxes]


@dataclass(frozen=True)
class ProcessRecords:
    """What the main process gets from each."""

    groups: list[tuple[int, Group]]
    """With their slots."""
    replaced: list[Group]
    logged: list[LoggedGroup]
    updates: list[UpdateStats | None]
    shortages: int
    tokens_per_microbatch: int


def evenly(count: int, size: int) -> set[int]:
    """`size` indices of 0 to count - 1, the first and the last among them."""
    if size < 2:
        return set(range(min(size, count)))
    return {round(number * (count - 1) / (size - 1)) for number in range(size)}


class Tokenizer(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text by token; of characters that several tokens spell, at the last of them."""
    texts, pending = [], []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        complete = not text.endswith("\ufffd") or len(pending) == 4
        texts.append(text if complete else "")
        pending = [] if complete else pending
    return texts


def peak() -> float:
    """Most gigabytes so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rollout_lines(item: LoggedGroup) -> Iterator[dict[str, Any]]:
    """A group's responses for `rollouts.jsonl`."""
    group, example = item.group, item.group.prompt.example
    rows = zip(group.responses, group.rewards, item.advantages, item.boxes, strict=True)
    for response, reward, advantage, (gold_boxes, boxes) in rows:
        yield {
            "id": example.id,
            "task": example.task,
            "problem": example.problem,
            "answer": example.answer,
            "response": response.text,
            "reward": reward.total,
            "parts": dict(reward.parts),
            "outcomes": dict(reward.outcomes),
            "advantage": advantage,
            "tokens": int(response.mask.sum()),
            "finish": response.finish,
            "pictures": item.images,
            **({"gold_boxes": gold_boxes, "boxes": boxes} if gold_boxes or boxes else {}),
        }
