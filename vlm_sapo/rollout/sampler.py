"""Where a step's groups come from: drawn when they are wanted, or while the step before trains."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.distributed import World
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rewards.pool import RewardPool, score_groups
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.types import Group, Prompt, Response, Reward, RolloutBatch, Sampling

T = TypeVar("T")


class Rollouts(Protocol):
    """Gives each step its groups."""

    engine: RolloutEngine
    sampling: Sampling

    def __call__(self, step: int, vlm: VLM) -> RolloutBatch:
        """The groups of a step. Afterwards the engine has the present weights. Where it raises, the state is
        the one before."""

    def settle(self) -> None:
        """Waits until the engine is free."""

    def trained(self) -> None:
        """What was given out last was trained on."""

    def state(self, *, anew: bool = False) -> dict[str, Any]:
        """What `restore` needs to go on after the steps that were trained on: tensors and plain values. What
        was given out and not trained on is given out again, drawn `anew` where the engine is at fault."""

    def restore(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Sampler:
    """Draws from the present weights.

    Groups without variance are drawn anew, from other prompts of their task, up to `resample` times.
    """

    stream: TaskMixture
    engine: RolloutEngine
    reward: RewardPool
    sampling: Sampling
    prompts_per_step: int
    resample: int = 0
    before: dict[str, Any] | None = None
    """The stream's state before what was given out and not trained on."""

    @contextmanager
    def tracking_cursor(self) -> Iterator[dict[str, Any]]:
        """What the block takes from the stream is given out. Yields the stream's state before."""
        with self.stream.rollback_on_error() as before:
            self.before = before
            yield before

    def __call__(self, step: int, vlm: VLM) -> RolloutBatch:
        started = time.perf_counter()
        self.engine.sync(vlm)
        waited = time.perf_counter() - started
        drawn = self.draw(step, vlm.version)
        drawn.seconds["sync"] = waited
        return drawn

    def draw(self, step: int, version: int) -> RolloutBatch:
        """The groups of a step from the weights that the engine has."""
        with self.tracking_cursor() as before:
            drawn = RolloutBatch([], [], version, before)
            self._draw(drawn, step)
            drawn.after = self.stream.state()
        return drawn

    def _draw(self, drawn: RolloutBatch, step: int) -> None:
        with drawn.time("data"):
            tasks = self.stream.tasks(self.prompts_per_step)
            prompts = self.stream.next_prompts(dict(enumerate(tasks)))
        groups = self._respond(prompts, self.sampling_at(step), drawn)
        for attempt in range(1, self.resample + 1):
            own = [place for place, group in groups.items() if group.flat]
            flat = sorted(place for told in self.stream.world.all_gather(own) for place in told)
            with drawn.time("data"):
                prompts = self.stream.next_prompts({place: tasks[place] for place in flat})
            numbers = {place: number for number, place in enumerate(flat)}
            further = self._respond(prompts, self.sampling_at(step, attempt), drawn, numbers)
            drawn.replaced += [groups[place] for place in further]
            groups |= further
        drawn.groups, drawn.places = list(groups.values()), list(groups)

    def sampling_at(self, step: int, attempt: int = 0) -> Sampling:
        """Each step, and each round of drawing anew, has a seed of its own, so a resumed run draws what the
        whole one would have."""
        return replace(self.sampling, seed=self.sampling.seed * 1_000_033 + step + 500_000_003 * attempt)

    def _respond(
        self,
        prompts: dict[int, Prompt],
        sampling: Sampling,
        drawn: RolloutBatch,
        numbers: dict[int, int] | None = None,
    ) -> dict[int, Group]:
        """Groups by place. Their draws depend on the places, or on `numbers` by place."""
        given = list(prompts.values())
        places = tuple(numbers[place] if numbers else place for place in prompts)
        with drawn.time("rollout"):
            responses = self.engine.generate(given, replace(sampling, places=places))
        with drawn.time("reward"):
            scores = score_groups(self.reward, given, responses)
        return {
            place: Group(prompt, tuple(responded), tuple(scored))
            for place, prompt, responded, scored in zip(prompts, given, responses, scores, strict=True)
        }

    def settle(self) -> None:
        """Nothing goes on in between."""

    def trained(self) -> None:
        self.before = None

    def state(self, *, anew: bool = False) -> dict[str, Any]:
        return {"stream": self.before or self.stream.state()}  # the same weights draw the same again

    def restore(self, state: dict[str, Any]) -> None:
        pending = state.get("pending")  # of a run that drew ahead: drawn anew
        self.stream.restore(pending[0]["before"] if pending else state["stream"])

    def close(self) -> None:
        self.engine.close()
        self.reward.close()


class InlineExecutor(Executor):
    """Does what it is given before `submit` returns, for engines that share the trainer's device."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(work(*args, **kwargs))
        return future


class PrefetchedSampler:
    """Draws groups `steps` steps ahead, from the weights that the present step begins with: in the background
    with servers, else before it trains.

    So a step trains on responses of weights so many steps older, the first ones of the run's first weights;
    the order of the data and the draws' seeds are those of OnDemand. What was drawn and not yet trained on is
    part of the state.
    """

    def __init__(self, rollouts: Sampler, *, steps: int, last: int, world: World, beside: bool):
        """`beside` draws in the background. `world` is for the loop; what draws has the stream's, for
        itself."""
        self.rollouts, self.steps, self.last, self.world = rollouts, steps, last, world
        self.engine, self.sampling = rollouts.engine, rollouts.sampling
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if beside else InlineExecutor()
        self.flight: tuple[RolloutBatch | None, tuple[Future[RolloutBatch], ...]] = (None, ())
        """What was given out and not trained on, and the steps after it; changed at once, since a signal may
        come at any time."""

    def __call__(self, step: int, vlm: VLM) -> RolloutBatch:
        self.settle()
        started = time.perf_counter()
        self.engine.sync(vlm)
        self.world.barrier()  # or one would draw on while another has failed
        waited = time.perf_counter() - started
        _, queue = self.flight
        drawn = queue[0].result() if queue else self.rollouts.draw(step, vlm.version)
        drawn.seconds["sync"] = waited
        queue = queue[1:]
        self.flight = drawn, queue
        for following in range(step + len(queue) + 1, min(step + self.steps, self.last) + 1):
            before = queue[-1] if queue else None
            queue = *queue, self.worker.submit(self._draw, before, following, vlm.version)
            self.flight = drawn, queue
        return drawn

    def _draw(self, before: Future[RolloutBatch] | None, step: int, version: int) -> RolloutBatch:
        """The groups of a step; after a step that could not be drawn, its error."""
        if before is not None:
            before.result()
        return self.rollouts.draw(step, version)

    def trained(self) -> None:
        _, queue = self.flight
        self.flight = None, queue
        if not queue:
            self.rollouts.trained()

    def settle(self) -> None:
        _, queue = self.flight
        for following in queue:
            following.exception()

    def state(self, *, anew: bool = False) -> dict[str, Any]:
        self.settle()
        given, queue = self.flight
        next_ = [given] if given is not None else []
        next_ += [following.result() for following in queue if following.exception() is None]
        if not next_:
            return self.rollouts.state()
        if anew:
            return {"stream": next_[0].before}
        kept = next_[: self.steps]  # the last one beside a step under way is drawn with it again
        return {"stream": kept[-1].after, "pending": [pack(drawn, self.world) for drawn in kept]}

    def restore(self, state: dict[str, Any]) -> None:
        self.rollouts.stream.restore(state["stream"])
        made: list[Future[RolloutBatch]] = []
        for packed in state.get("pending", ()):
            made.append(Future())
            made[-1].set_result(unpack(packed, self.rollouts.stream))
        self.flight = None, tuple(made)

    def close(self) -> None:
        self.rollouts.close()
        self.worker.shutdown(cancel_futures=True)


def pack(drawn: RolloutBatch, world: World) -> dict[str, Any]:
    """All processes' groups, by place, as tensors and plain values; a prompt is its row."""

    def one(group: Group) -> dict[str, Any]:
        return {
            "task": group.prompt.example.task,
            "row": group.prompt.example.row,
            "completions": [vars(completion) for completion in group.responses],
            "scores": [asdict(score) for score in group.rewards],
        }

    own = {place: one(group) for place, group in zip(drawn.places, drawn.groups, strict=True)}
    replaced = [one(group) for group in drawn.replaced]
    return {
        "version": drawn.version,
        "before": drawn.before,
        "after": drawn.after,
        "groups": {place: item for told in world.all_gather(own) for place, item in told.items()},
        "replaced": [item for told in world.all_gather(replaced) for item in told],
        "seconds": dict(drawn.seconds),
    }


def unpack(packed: dict[str, Any], stream: TaskMixture) -> RolloutBatch:
    """What `pack` packed, with the rows read again: those at this process's places."""

    def one(item: dict[str, Any]) -> Group:
        prompt = stream.streams[item["task"]].prompt(item["row"])
        completions = tuple(Response(**completion) for completion in item["completions"])
        return Group(prompt, completions, tuple(Reward(**score) for score in item["scores"]))

    groups = {place: item for place, item in sorted(packed["groups"].items()) if stream.world.is_local(place)}
    replaced = [item for place, item in enumerate(packed["replaced"]) if stream.world.is_local(place)]
    return RolloutBatch(
        groups=[one(item) for item in groups.values()],
        places=list(groups),
        version=packed["version"],
        before=packed["before"],
        after=packed["after"],
        replaced=[one(item) for item in replaced],
        seconds=defaultdict(float, packed["seconds"]),
    )
