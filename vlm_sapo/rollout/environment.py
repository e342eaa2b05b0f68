"""Episodes: an environment answers the policy's turns; all turns are one response.

The environment's tokens have no loss; tokens of the policy are never decoded and tokenized again.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from vlm_sapo.distributed import Interrupted, World
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutEngine, RolloutError, as_contexts
from vlm_sapo.types import Context, Example, Prompt, Response, Sampling, Span

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn."""

    text: str = ""
    """The next user turn; ignored if the episode is over."""
    images: tuple[Image, ...] = ()
    """Not supported yet."""
    done: bool = False
    """Whether the episode is over."""
    reward: float | None = None
    """Added to the response's reward; rewards of all turns are summed."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Anything else; not read by the trainer."""


class Environment(Protocol):
    """One episode. Each response gets a new object."""

    def reset(self, example: Example) -> None:
        """Starts the episode with the problem that the policy answers."""

    def step(self, response: str) -> Observation:
        """Answers a turn of the policy."""


@dataclass
class Episode:
    """A response in progress."""

    prompt: Prompt
    number: int
    """Index of the response in its group."""
    environment: Environment
    response: Response | None = None
    turns: int = 0
    reward: float | None = None
    over: bool = False

    def end(self, finish: Literal["stop", "length", "turns"]) -> None:
        self.response, self.over = replace(self.response, finish=finish, reward=self.reward), True


class Episodes:
    """An engine whose responses are episodes: `engine` samples at most `max_turns` turns, and an environment
    from `new_environment` answers each. A response has at most `Sampling.max_tokens` tokens, those of the
    environment included."""

    def __init__(
        self,
        engine: RolloutEngine,
        encode: Encoder,
        new_environment: Callable[[], Environment],
        *,
        max_turns: int,
        world: World,
    ):
        self.engine, self.encode, self.new_environment = engine, encode, new_environment
        self.max_turns, self.world = max_turns, world

    @property
    def in_background(self) -> bool:
        return self.engine.in_background

    @property
    def shares_weights(self) -> bool:
        return self.engine.shares_weights

    def problems_at_once(self, samples: int) -> int:
        return self.engine.problems_at_once(samples)

    def sync(self, vlm: VLM) -> None:
        self.engine.sync(vlm)

    def close(self) -> None:
        self.engine.close()

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine; contexts must have no responses so far."""
        try:
            return self._generate(contexts, sampling)
        except Exception as error:  # the others wait in `world`, which need not be the caller's
            self.world.fail_everywhere(error)
            raise

    def _generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        groups = [
            [self._begin(context.prompt, number) for number in range(sampling.group)] for context in contexts
        ]
        self.world.barrier()  # a failure in one process must not leave the others in a model that all share
        first = self.engine.generate(as_contexts([context.prompt for context in contexts]), sampling)
        for episodes, responses in zip(groups, first, strict=True):
            for episode, response in zip(episodes, responses, strict=True):
                self._answer(episode, response, sampling.max_tokens)
        waiting = self._report(contexts, groups, range(len(groups)))
        while any(self.world.all_gather(bool(waiting))):
            self._continue(groups, sampling)
            waiting = self._report(contexts, groups, waiting)
        return [[episode.response for episode in episodes] for episodes in groups]

    def _report(
        self, contexts: Sequence[Context], groups: Sequence[Sequence[Episode]], waiting: Iterable[int]
    ) -> list[int]:
        """Reports the groups whose episodes are over. Returns the indices of the others."""
        over = {index: all(item.over for item in groups[index]) for index in waiting}
        for index in (index for index, done in over.items() if done):
            contexts[index].report([episode.response for episode in groups[index]])
        return [index for index, done in over.items() if not done]

    def _begin(self, prompt: Prompt, number: int) -> Episode:
        with _naming_row(prompt):
            environment = self.new_environment()
            environment.reset(prompt.example)
        return Episode(prompt, number, environment)

    def _continue(self, groups: Sequence[Sequence[Episode]], sampling: Sampling) -> None:
        """Samples a further turn of each episode that isn't over."""
        running = {index: [item for item in group if not item.over] for index, group in enumerate(groups)}
        running = {index: episodes for index, episodes in running.items() if episodes}
        contexts = [
            Context(
                episodes[0].prompt,
                tuple(item.response for item in episodes),
                tuple(item.number for item in episodes),
            )
            for episodes in running.values()
        ]
        slots = tuple(sampling.slots[index] if sampling.slots else index for index in running)
        responses = self.engine.generate(contexts, replace(sampling, slots=slots))
        for episodes, answers in zip(running.values(), responses, strict=True):
            for episode, response in zip(episodes, answers, strict=True):
                self._answer(episode, response, sampling.max_tokens)

    def _answer(self, episode: Episode, response: Response, max_tokens: int) -> None:
        """Passes the last turn to the environment and appends its answer."""
        episode.response, episode.turns = response, episode.turns + 1
        turn = episode.prompt.opening + self.encode.decode(response.turns[-1])
        with _naming_row(episode.prompt):
            observation = episode.environment.step(turn)
        if not isinstance(observation, Observation):
            raise RolloutError(
                f"{episode.prompt.example.label}: step of rollout.environment.function must return an "
                f"Observation; it returned {type(observation).__name__}"
            )
        if observation.images:
            raise RolloutError(
                f"{episode.prompt.example.label}: the environment returned images, which are not supported "
                "yet; return text"
            )
        if observation.reward is not None:
            if not math.isfinite(reward := float(observation.reward)):
                raise RolloutError(
                    f"{episode.prompt.example.label}: the reward of an Observation must be a finite number; "
                    f"the environment returned {reward}"
                )
            episode.reward = (episode.reward or 0.0) + reward
        if observation.done or response.finish == "length" or not self.encode.ends_turn(response):
            episode.end(response.finish)
            return
        if episode.turns == self.max_turns:
            episode.end("turns")
            return
        ids = self.encode.user_turn(observation.text)
        if len(response.ids) + len(ids) >= max_tokens:
            episode.end("length")
            return
        episode.response = response.continued(_environment_turn(response, ids))


@contextmanager
def _naming_row(prompt: Prompt) -> Iterator[None]:
    """Names the row in an error of the user's environment."""
    try:
        yield
    except Interrupted:  # a signal's, and no fault of the environment
        raise
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        raise RolloutError(
            f"{prompt.example.label}: rollout.environment.function raised {error!r}; fix it\n{trace}"
        ) from error


def _environment_turn(before: Response, ids: torch.Tensor) -> Response:
    """The tokens of the environment as a response that continues `before`."""
    length = len(ids)
    return replace(
        Response.sampled(before.positions, ids, torch.zeros(length), text=before.text, finish=before.finish),
        mask=torch.zeros(length, dtype=torch.bool),
        spans=(Span(0, length, source="environment"),),
    )
