"""Gives each step its groups: sampled when they are needed, or prefetched while the step before trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.distributed import World
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.scoring import Stopwatch, sample_and_score
from vlm_sapo.types import Group, Prompt, Response, Reward, RolloutBatch, Sampling, Span

T = TypeVar("T")


class Rollouts(Protocol):
    """Gives each step its groups."""

    engine: RolloutEngine
    sampling: Sampling

    def next(self, step: int, vlm: VLM) -> RolloutBatch:
        """The groups of a step. Afterwards the engine has the current weights. If it raises, the state is
        unchanged."""

    def wait(self) -> None:
        """Waits until the engine is free."""

    def mark_trained(self) -> None:
        """Notes that the last batch from `next` was trained on."""

    def state(self, *, resample: bool = False) -> dict[str, Any]:
        """State to resume from, as tensors and plain values. Groups that were sampled but not yet trained on
        are replayed, or resampled with `resample`, after a fault of the engine."""

    def restore(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Sampler:
    """Samples from the current weights.

    Groups with zero variance are replaced by groups of other prompts of their task, up to `resample` times.
    """

    stream: TaskMixture
    engine: RolloutEngine
    reward: RewardPool
    sampling: Sampling
    prompts_per_step: int
    resample: int = 0
    before: dict[str, Any] | None = None
    """The stream's state before the rows that were taken but not trained on."""

    @contextmanager
    def tracking_cursor(self) -> Iterator[dict[str, Any]]:
        """Marks the rows that the block takes as not trained on. Yields the stream's state before them."""
        with self.stream.rollback_on_error() as before:
            self.before = before
            yield before

    def next(self, step: int, vlm: VLM) -> RolloutBatch:
        started = time.perf_counter()
        self.engine.sync(vlm)
        waited = time.perf_counter() - started
        batch = self.sample(step, vlm.version)
        return replace(batch, seconds={"sync": waited} | dict(batch.seconds))

    def sample(self, step: int, version: int) -> RolloutBatch:
        """Samples the groups of a step from the engine's weights."""
        with self.tracking_cursor() as before:
            watch = Stopwatch()
            groups, replaced = self._sample(step, watch)
            batch = RolloutBatch(
                groups=tuple(groups.values()),
                slots=tuple(groups),
                version=version,
                before=before,
                after=self.stream.state(),
                replaced=tuple(replaced),
                seconds=watch.seconds,
            )
        self.stream.prefetch(self.prompts_per_step)  # while this step trains
        return batch

    def _sample(self, step: int, watch: Stopwatch) -> tuple[dict[int, Group], list[Group]]:
        """Groups by slot, and the replaced ones."""
        replaced: list[Group] = []
        with watch.time("data"):
            tasks = self.stream.tasks(self.prompts_per_step)
            prompts = self.stream.next_prompts(dict(enumerate(tasks)))
        groups = self._respond(prompts, self.sampling_at(step), tuple(prompts), watch)
        for attempt in range(1, self.resample + 1):
            own = [slot for slot, group in groups.items() if group.zero_variance]
            slots = sorted(slot for theirs in self.stream.world.all_gather(own) for slot in theirs)
            with watch.time("data"):
                prompts = self.stream.next_prompts({slot: tasks[slot] for slot in slots})
            order = tuple(slots.index(slot) for slot in prompts)
            further = self._respond(prompts, self.sampling_at(step, attempt), order, watch)
            replaced += [groups[slot] for slot in further]
            groups |= further
        return groups, replaced

    def sampling_at(self, step: int, attempt: int = 0) -> Sampling:
        """The sampling of a step, with a seed of its own for each step and round of resampling, so that a
        resumed run samples the same responses as an uninterrupted one."""
        return replace(self.sampling, seed=self.sampling.seed * 1_000_033 + step + 500_000_003 * attempt)

    def _respond(
        self, prompts: Mapping[int, Prompt], sampling: Sampling, order: tuple[int, ...], watch: Stopwatch
    ) -> dict[int, Group]:
        """Samples and scores groups, by slot. `order` has a number for each prompt, which determines its
        random numbers."""
        ordered = list(prompts.values())
        responses, rewards = sample_and_score(
            self.engine, self.reward, ordered, replace(sampling, slots=order), watch
        )
        return {
            slot: Group(prompt, tuple(answers), tuple(map(with_environment, answers, scores)))
            for (slot, prompt), answers, scores in zip(prompts.items(), responses, rewards, strict=True)
        }

    def wait(self) -> None:
        """Returns at once: nothing runs between steps."""

    def mark_trained(self) -> None:
        self.before = None

    def state(self, *, resample: bool = False) -> dict[str, Any]:
        return {"stream": self.before or self.stream.state()}  # the same weights give the same responses

    def restore(self, state: dict[str, Any]) -> None:
        pending = state.get("pending")  # of a run with prefetch: resampled
        self.stream.restore(pending[0]["before"] if pending else state["stream"])

    def close(self) -> None:
        self.engine.close()
        self.reward.close()
        self.stream.close()


def with_environment(response: Response, reward: Reward) -> Reward:
    """Adds the environment's reward as a part of its own."""
    if response.reward is None:
        return reward
    parts = dict(reward.parts) | {"environment": response.reward}
    return replace(reward, total=reward.total + response.reward, parts=parts)


class InlineExecutor(Executor):
    """Runs work inside `submit`, for engines that share the trainer's device."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(work(*args, **kwargs))
        return future


class PrefetchedSampler:
    """Samples groups `steps` steps ahead, from the weights at the start of the current step: in the
    background with servers, else before the step trains.

    So responses are that many steps stale; the first ones are of the initial weights. The order of the data
    and the seeds are those of Sampler. Groups that were sampled but not yet trained on are part of the state.
    """

    def __init__(self, sampler: Sampler, *, steps: int, last: int, world: World):
        """`world` is the training loop's; the sampler uses the stream's own."""
        self.sampler, self.steps, self.last, self.world = sampler, steps, last, world
        self.engine, self.sampling = sampler.engine, sampler.sampling
        background = self.engine.in_background
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if background else InlineExecutor()
        self.flight: tuple[RolloutBatch | None, tuple[Future[RolloutBatch], ...]] = (None, ())
        """The batch that is being trained on, and those of the next steps; one tuple, since a signal may
        come at any time."""

    def next(self, step: int, vlm: VLM) -> RolloutBatch:
        self.wait()
        started = time.perf_counter()
        self.engine.sync(vlm)
        self.world.barrier()  # or one would continue sampling while another has failed
        waited = time.perf_counter() - started
        _, queue = self.flight
        batch = queue[0].result() if queue else self.sampler.sample(step, vlm.version)
        batch = replace(batch, seconds=dict(batch.seconds) | {"sync": waited})
        queue = queue[1:]
        self.flight = batch, queue
        for following in range(step + len(queue) + 1, min(step + self.steps, self.last) + 1):
            before = queue[-1] if queue else None
            queue = *queue, self.worker.submit(self._sample, before, following, vlm.version)
            self.flight = batch, queue
        return batch

    def _sample(self, before: Future[RolloutBatch] | None, step: int, version: int) -> RolloutBatch:
        """Samples a step, or raises the error of the step before."""
        if before is not None:
            before.result()
        return self.sampler.sample(step, version)

    def mark_trained(self) -> None:
        _, queue = self.flight
        self.flight = None, queue
        if not queue:
            self.sampler.mark_trained()

    def wait(self) -> None:
        _, queue = self.flight
        for following in queue:
            following.exception()

    def state(self, *, resample: bool = False) -> dict[str, Any]:
        self.wait()
        current, queue = self.flight
        pending = [current] if current is not None else []
        pending += [following.result() for following in queue if following.exception() is None]
        if not pending:
            return self.sampler.state()
        if resample:
            return {"stream": pending[0].before}
        pending = pending[: self.steps]  # the last one is resampled with the current step
        return {"stream": pending[-1].after, "pending": [pack(batch, self.world) for batch in pending]}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.stream.restore(state["stream"])
        queue: list[Future[RolloutBatch]] = []
        for packed in state.get("pending", ()):
            queue.append(Future())
            queue[-1].set_result(unpack(packed, self.sampler.stream))
        self.flight = None, tuple(queue)

    def close(self) -> None:
        self.sampler.close()
        self.worker.shutdown(cancel_futures=True)


def pack(batch: RolloutBatch, world: World) -> dict[str, Any]:
    """All processes' groups by slot, as tensors and plain values; a prompt is stored as its row."""
    own = dict(zip(batch.slots, map(_pack_group, batch.groups), strict=True))
    replaced = list(map(_pack_group, batch.replaced))
    return {
        "version": batch.version,
        "before": batch.before,
        "after": batch.after,
        "groups": {slot: item for theirs in world.all_gather(own) for slot, item in theirs.items()},
        "replaced": [item for theirs in world.all_gather(replaced) for item in theirs],
        "seconds": dict(batch.seconds),
    }


def unpack(packed: dict[str, Any], stream: TaskMixture) -> RolloutBatch:
    """Reverses `pack` for this process's slots; rows are read again."""
    groups = {slot: item for slot, item in sorted(packed["groups"].items()) if stream.world.is_local(slot)}
    replaced = [item for slot, item in enumerate(packed["replaced"]) if stream.world.is_local(slot)]
    return RolloutBatch(
        groups=tuple(_unpack_group(item, stream) for item in groups.values()),
        slots=tuple(groups),
        version=packed["version"],
        before=packed["before"],
        after=packed["after"],
        replaced=tuple(_unpack_group(item, stream) for item in replaced),
        seconds=packed["seconds"],
    )


def _pack_group(group: Group) -> dict[str, Any]:
    return {
        "task": group.prompt.example.task,
        "row": group.prompt.example.row,
        "completions": [_pack_response(response) for response in group.responses],
        "scores": [asdict(reward) for reward in group.rewards],
    }


def _pack_response(response: Response) -> dict[str, Any]:
    return vars(response) | {
        "spans": [tuple(vars(span).values()) for span in response.spans],
        "images": [[pil_to_tensor(image) for image in item.images] for item in response.images],
    }


def _unpack_group(item: dict[str, Any], stream: TaskMixture) -> Group:
    rows = stream.streams[item["task"]]
    prompt = rows.prompt(item["row"])
    responses = tuple(_unpack_response(prompt, fields, rows.encode) for fields in item["completions"])
    return Group(prompt, responses, tuple(Reward(**fields) for fields in item["scores"]))


def _unpack_response(prompt: Prompt, fields: dict[str, Any], encode: Encoder) -> Response:
    if "spans" not in fields:  # of version 0.1, when all tokens were the policy's
        return Response.sampled(prompt.positions, **fields)
    spans: Sequence[tuple] = fields["spans"]
    images = [encode.inputs([to_pil_image(pixels) for pixels in item]) for item in fields.get("images", ())]
    return Response(**fields | {"spans": tuple(Span(*values) for values in spans), "images": tuple(images)})
