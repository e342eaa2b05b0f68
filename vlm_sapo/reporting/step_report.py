"""Writes a step's metrics, histograms, responses and traces, and returns its console line."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from vlm_sapo.distributed import World
from vlm_sapo.models.families import FAMILIES
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.images import save_images
from vlm_sapo.reporting.metrics import (
    Diagnosed,
    Trace,
    UpdateStats,
    group_metrics,
    task_metrics,
    traces,
    update_metrics,
    update_record,
)
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.reporting.transcript import transcript
from vlm_sapo.rewards.verifiers.boxes import BOX_VERIFIERS, Box, shown
from vlm_sapo.rewards.verifiers.table import own_verifier
from vlm_sapo.types import Group, Origin, Response, ResponseText, RolloutBatch

TRACED_TOKENS = 32_768
"""Most tokens that are traced in a step, shared by its logged responses."""
TRACED_STEPS, TRACE_EVERY = 50, 10
"""The first TRACED_STEPS steps are traced, and every TRACE_EVERY-th after them."""
TREND = 10
"""Steps whose mean reward is compared with that of as many steps before."""
Boxes = tuple[list[Box], list[Box]]
"""Gold boxes and the response's, as shares of the image's sides."""


@dataclass(frozen=True)
class StepRecords:
    """What one process reports of a step."""

    rollout: RolloutBatch
    advantages: list[list[float]]
    """By group, the advantage of each response: the mean over its tokens."""
    updates: list[UpdateStats | None]
    """By mini-batch; None if no group was trained on."""
    origins: list[Sequence[Origin]]
    """By mini-batch, which response is in each of the rows that this process trained on."""
    seconds: Mapping[str, float]
    """Durations of the step's parts, by name."""
    further: Mapping[str, float]
    """Metrics measured elsewhere."""
    shortages: int
    tokens_per_microbatch: int


class StepReport:
    """Writes the metrics and histograms of a step, and `rollouts` of its groups: the first, the last and
    evenly spaced ones between, since early groups are trained on while ratios are still 1."""

    def __init__(
        self,
        folder: RunFolder,
        alarms: Alarms,
        world: World,
        *,
        tokenizer: Tokenizer,
        loss: Diagnosed,
        rollouts: int,
        parts: Sequence[tuple[str, dict]],
    ):
        self.folder, self.alarms, self.world = folder, alarms, world
        self.tokenizer, self.loss, self.rollouts = tokenizer, loss, rollouts
        self.rewards: deque[float] = deque(maxlen=2 * TREND)
        self.parts = parts
        """Names and arguments of the reward's parts."""
        self.image_tokens = image_tokens(tokenizer)

    def write(self, step: int, records: StepRecords) -> str:
        """Returns the console line. All processes call it."""
        parts = self.world.gather(self._own(records))
        if not parts:
            return ""
        updates = [update for update in map(joined, zip(*(p.updates for p in parts), strict=True)) if update]
        record = {"step": step} | self._metrics(records, parts, updates)
        traces_of = {origin: trace for p in parts for origin, trace in p.traces.items()}
        self._write_groups(step, sorted((item for p in parts for item in p.logged), key=_slot), traces_of)
        self.folder.append("metrics.jsonl", record)
        self.alarms(record)
        histograms = [self.loss.distributions(update) for update in updates if not update.skipped]
        self.folder.append("histograms.jsonl", {"step": step, "minibatches": histograms})
        self.rewards.append(record["reward/mean"])
        return headline(record, self.rewards)

    def _metrics(
        self, records: StepRecords, parts: Sequence[ProcessRecords], updates: Sequence[UpdateStats]
    ) -> dict[str, float]:
        """All metrics of a step, over all processes."""
        by_slot = dict(item for part in parts for item in part.groups)
        groups = [by_slot[slot] for slot in sorted(by_slot)]
        replaced = [group for part in parts for group in part.replaced]
        applied = [update_metrics(update, self.loss) for update in updates if not update.skipped]
        metrics = dict(records.further) | update_record(applied, len(updates) - len(applied))
        metrics |= {f"time/{name}": value for name, value in records.seconds.items()}
        metrics |= group_metrics(groups, replaced, records.rollout.seconds)
        metrics |= task_metrics(groups, replaced, len(records.updates))
        if shortages := sum(part.shortages for part in parts):
            budget = min(part.tokens_per_microbatch for part in parts)
            metrics |= {"memory/shortages": shortages, "memory/tokens_per_microbatch": budget}
        for name in parts[0].peaks:
            metrics[name] = max(part.peaks[name] for part in parts)
        return metrics

    def _own(self, records: StepRecords) -> ProcessRecords:
        rollout = records.rollout
        logged_slots = evenly(len(rollout.groups) * self.world.size, self.rollouts)
        traced = {
            origins[row]: trace
            for origins, update in zip(records.origins, records.updates, strict=True)
            if update is not None
            for row, trace in traces(update, self.loss).items()
        }
        logged = [
            self._logged(slot, group, values)
            for slot, group, values in zip(rollout.slots, rollout.groups, records.advantages, strict=True)
            if slot in logged_slots
        ]
        return ProcessRecords(
            groups=[
                (slot, g.without_images()) for slot, g in zip(rollout.slots, rollout.groups, strict=True)
            ],
            replaced=[group.without_images() for group in rollout.replaced],
            logged=logged,
            traces={origin: trace for origin, trace in traced.items() if origin[0] in logged_slots},
            updates=records.updates,
            shortages=records.shortages,
            tokens_per_microbatch=records.tokens_per_microbatch,
            peaks=memory_peaks(),
        )

    def _logged(self, slot: int, group: Group, values: list[float]) -> LoggedGroup:
        """Saves a group's images; adds its turns, and boxes if a verifier of the reward reads them."""
        names = save_images(self.folder.path, group.prompt.images)
        example = group.prompt.example
        verifiers = [own_verifier(example, name, args) for name, args in self.parts]
        args = next((args for name, args in verifiers if name in BOX_VERIFIERS), None)
        boxes: list[Boxes] = [([], [])] * len(group.responses)
        if args is not None:
            texts = [ResponseText.of(group.prompt, response) for response in group.responses]
            boxes = [shown(text, example, args) for text in texts]
        turns = [self._turns(response) for response in group.responses]
        return LoggedGroup(slot, group.without_images(), values, names, boxes, turns)

    def _turns(self, response: Response) -> list[dict[str, Any]]:
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return transcript(response, decode, partial(save_images, self.folder.path), self.image_tokens)

    def _write_groups(
        self, step: int, groups: Sequence[LoggedGroup], traces_of: Mapping[Origin, Trace]
    ) -> None:
        for item in groups:
            for line in rollout_lines(item):
                self.folder.append("rollouts.jsonl", {"step": step, "place": item.slot} | line)
            if step <= TRACED_STEPS or step % TRACE_EVERY == 0:
                limit = TRACED_TOKENS // sum(len(other.group.responses) for other in groups)
                trace = {"step": step, "place": item.slot} | self._trace(item, limit, traces_of)
                self.folder.append("traces.jsonl", trace)

    def _trace(self, item: LoggedGroup, limit: int, traces_of: Mapping[Origin, Trace]) -> dict[str, list]:
        """Columns with a list per response: text and trace of each of the first `limit` tokens, an empty list
        without a trace; and which of them are the policy's, an empty list where all are."""
        responses = item.group.responses
        columns: dict[str, list] = {
            "pieces": [pieces(self.tokenizer, response.ids[:limit].tolist()) for response in responses],
            "policy": [
                [] if response.mask.all() else response.mask[:limit].int().tolist() for response in responses
            ],
        }
        own = [traces_of.get((item.slot, row)) for row in range(len(responses))]
        trimmed = [
            trace and trace.first(min(len(response.ids), limit))
            for trace, response in zip(own, responses, strict=True)
        ]
        for name in ("log_ratio", "effective", "entropy"):
            columns[name] = [
                [float(f"{value:.4g}") for value in vars(trace)[name].tolist()] if trace else []
                for trace in trimmed
            ]
        return columns


def _slot(group: LoggedGroup) -> int:
    return group.slot


def joined(parts: Sequence[UpdateStats | None]) -> UpdateStats | None:
    """The data of an update over all processes; None if no process had any."""
    stats = [part for part in parts if part is not None]
    return UpdateStats.join(stats) if stats else None


def headline(record: dict, rewards: Sequence[float]) -> str:
    """The console line: the most important numbers of a step. `rewards` are those of the last steps."""
    last = list(rewards)
    trend = ""
    if len(last) == 2 * TREND:
        gain = (sum(last[TREND:]) - sum(last[:TREND])) / TREND
        trend = f" (last {TREND} steps {gain:+.3f} against the {TREND} before)"
    truncated = (
        f" ({record['response/truncated']:.0%} truncated)" if record["response/truncated"] >= 0.05 else ""
    )
    trained = "no learning signal: all rewards equal within every group"
    if "policy/effective_update" in record:
        unclipped = record["policy/effective_update"]
        trained = f"entropy {record['policy/entropy']:.3f}  unclipped {100 * unclipped:.3g} %"
    elif "policy/skipped_updates" in record:
        trained = "update skipped: not finite"
    peak = record.get("memory/gpu_peak_gb", record["memory/host_peak_gb"])
    return (
        f"reward {record['reward/mean']:.3f}{trend}  tokens {record['response/tokens']:.1f}{truncated}"
        f"{_episodes(record)}  "
        f"{trained}  {record['time/step']:.1f} s ({record['rollout/tokens_per_second']:.0f} tok/s, "
        f"{peak:.1f} GB)"
    )


def _episodes(record: dict) -> str:
    """Turns and calls of a response, and the share of calls that failed; empty without an environment."""
    if "environment/turns" not in record:
        return ""
    text = f"  turns {record['environment/turns']:.2f}"
    if not (calls := record.get("environment/calls", 0.0)):
        return text
    failed = record.get("environment/bad_calls", 0.0) + record.get("environment/tool_errors", 0.0)
    return f"{text}  calls {calls:.2f}" + (f" ({failed / calls:.0%} failed)" if failed else "")


@dataclass(frozen=True)
class LoggedGroup:
    """A group whose responses are logged."""

    slot: int
    group: Group
    advantages: list[float]
    images: list[str]
    """Files of small copies of the images, relative to the run's folder."""
    boxes: list[Boxes]
    turns: list[list[dict[str, Any]]]
    """The transcript of each response."""


@dataclass(frozen=True)
class ProcessRecords:
    """What each process sends to the main one."""

    groups: list[tuple[int, Group]]
    """Slots and groups."""
    replaced: list[Group]
    logged: list[LoggedGroup]
    traces: dict[Origin, Trace]
    """Of the logged groups' responses that were trained on by this process."""
    updates: list[UpdateStats | None]
    shortages: int
    tokens_per_microbatch: int
    peaks: dict[str, float]
    """Peak memory of the process so far, in GB."""


def evenly(count: int, size: int) -> set[int]:
    """`size` evenly spaced indices of 0 to count - 1, the first and the last included."""
    if size < 2:
        return set(range(min(size, count)))
    return {round(number * (count - 1) / (size - 1)) for number in range(size)}


class Tokenizer(Protocol):
    added_tokens_decoder: Mapping[int, Any]

    def decode(self, ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = False) -> str: ...


def image_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids of the tokens that stand for an image in any family: only images bring them into an answer."""
    names = {family.chat.ids["image_token_id"] for family in FAMILIES.values()}
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.content in names}


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text by token; a character of several tokens is at the last of them."""
    texts, pending = [], []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        complete = not text.endswith("\ufffd") or len(pending) == 4
        texts.append(text if complete else "")
        pending = [] if complete else pending
    return texts


def memory_peaks() -> dict[str, float]:
    """Metrics of this process: its peak memory in GB, and that of its GPU if it has one."""
    peaks = {"memory/host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    if torch.cuda.is_available():
        peaks["memory/gpu_peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return peaks


def rollout_lines(item: LoggedGroup) -> Iterator[dict[str, Any]]:
    """The lines of a group in `rollouts.jsonl`."""
    group, example = item.group, item.group.prompt.example
    rows = zip(group.responses, group.rewards, item.advantages, item.boxes, item.turns, strict=True)
    for response, reward, advantage, (gold_boxes, boxes), turns in rows:
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
            **({"turns": turns, "counts": dict(response.counts)} if response.counts else {}),
        }
