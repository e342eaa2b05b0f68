"""Episodes: an environment answers the policy's turns; all turns are one response.

The environment's tokens have no loss; tokens of the policy are never decoded and tokenized again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL.Image import Image

from vlm_sapo.distributed import World
from vlm_sapo.environments.environment import Observation
from vlm_sapo.environments.processes import Environments, Failure, Instance, Step
from vlm_sapo.models.encode import Answer, Encoder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutEngine, RolloutError, as_contexts, continue_response
from vlm_sapo.types import Context, Finish, Prompt, Response, ResponseText, RowError, Sampling, Span

__all__ = ["Episodes", "Limits", "Observation"]
NOT_SHOWN = (0, 0)
"""The size of an image that the model doesn't see."""


@dataclass(frozen=True)
class Limits:
    """Where a response ends although its environment goes on."""

    turns: int
    """Of the policy."""
    turn_tokens: int | None = None
    """Tokens of each of them; None for as many as the response may have."""
    images: int = 8
    """That the environment returns."""


@dataclass
class Episode:
    """A response in progress."""

    prompt: Prompt
    number: int
    """Index of the response in its group."""
    instance: Instance
    response: Response | None = None
    turns: int = 0
    reward: float | None = None
    counts: Counter = field(default_factory=Counter)
    returned: list[tuple[int, int]] = field(default_factory=list)
    """Width and height in which the model sees each image that the environment returned; NOT_SHOWN for one
    that can't be resized."""
    over: bool = False

    def end(self, finish: Finish) -> None:
        counts = {name: value for name, value in self.counts.items() if value} | {"turns": self.turns}
        counts |= {f"limit/{finish}": 1} if finish in ("length", "turns", "images") else {}
        self.response = replace(self.response, finish=finish, reward=self.reward, counts=counts)
        self.over = True


class Episodes:
    """An engine whose responses are episodes: `engine` samples the turns, and each is answered by an
    environment of the response. A response has at most `Sampling.max_tokens` tokens, those of the environment
    included.

    An environment that takes too long or fails ends its response, which is counted. Where none has answered
    yet and all fail, it raises RolloutError.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        encode: Encoder,
        environments: Environments,
        *,
        limits: Limits,
        world: World,
        warn: Callable[[str], None] = print,
    ):
        self.engine, self.encode, self.environments = engine, encode, environments
        self.limits, self.world, self.warn = limits, world, warn
        self.answered, self.warned, self.problem_shown = False, False, False

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
        self.environments.close()
        self.engine.close()

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine; contexts must have no responses so far."""
        groups: list[list[Episode]] = []
        try:
            groups = self._begin(contexts, sampling)
            return self._generate(contexts, groups, sampling)
        except Exception as error:  # the others wait in `world`, which need not be the caller's
            self.world.fail_everywhere(error)
            raise
        finally:
            self.environments.release([item.instance for group in groups for item in group])

    def _begin(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Episode]]:
        seeds = [
            [sampling.seed_of(index) * sampling.group + number for number in range(sampling.group)]
            for index in range(len(contexts))
        ]
        instances = self.environments.new([context.prompt.example for context in contexts], seeds)
        return [
            [Episode(context.prompt, number, instance) for number, instance in enumerate(own)]
            for context, own in zip(contexts, instances, strict=True)
        ]

    def _generate(
        self, contexts: Sequence[Context], groups: Sequence[Sequence[Episode]], sampling: Sampling
    ) -> list[list[Response]]:
        sampling = replace(sampling, max_turn_tokens=self.limits.turn_tokens)
        self.world.barrier()  # a failure in one process must not leave the others in a model that all share
        first = self.engine.generate(as_contexts([context.prompt for context in contexts]), sampling)
        for episodes, responses in zip(groups, first, strict=True):
            for episode, response in zip(episodes, responses, strict=True):
                episode.response = response
        self._answer([episode for group in groups for episode in group], sampling.max_tokens)
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
        answered = []
        for episodes, answers in zip(running.values(), responses, strict=True):
            for episode, response in zip(episodes, answers, strict=True):
                episode.response = response
                answered.append(episode)
        self._answer(answered, sampling.max_tokens)

    def _answer(self, episodes: Sequence[Episode], max_tokens: int) -> None:
        """Passes the last turns to the environments and appends their answers."""
        steps = [Step(episode.instance, self._turn(episode)) for episode in episodes]
        answers = self.environments.step(steps)
        self._check_failures(episodes, answers)
        for episode, answer in zip(episodes, answers, strict=True):
            episode.turns += 1
            if isinstance(answer, Failure):
                episode.counts[answer.kind] += 1
                episode.end(answer.kind)
            else:
                self._append(episode, answer, max_tokens)
        self.environments.release([episode.instance for episode in episodes if episode.over])

    def _turn(self, episode: Episode) -> ResponseText:
        """What an environment reads: the last turn, and how the model sees all images so far."""
        prompt, response = episode.prompt, episode.response
        text, turn = prompt.opening + self.encode.decode(response.turns[-1]), response.turns[-1]
        sizes = (*(image.size for image in prompt.images), *episode.returned)
        return ResponseText(text, tokens=len(turn), resized=sizes, coordinates=prompt.coordinates)

    def _check_failures(self, episodes: Sequence[Episode], answers: Sequence[Observation | Failure]) -> None:
        """Warns of the first failure. Raises RolloutError if no environment has ever answered."""
        failed = [
            (episode, answer)
            for episode, answer in zip(episodes, answers, strict=True)
            if isinstance(answer, Failure)
        ]
        self.answered = self.answered or len(failed) < len(episodes)
        if not failed:
            return
        episode, failure = failed[0]
        if not self.answered:
            reason = failure.detail.strip()
            raise RolloutError(
                f"{episode.prompt.example.label}: rollout.environment failed for all {len(episodes)} "
                f"responses: {reason.splitlines()[-1]}; mend the environment, or raise "
                f"rollout.environment.timeout if it is only slow\n{reason}"
            )
        self._warn_once(episode, failure.detail)

    def _warn_once(self, episode: Episode, detail: str) -> None:
        if not self.warned:
            self.warned = True
            self.warn(
                f"{episode.prompt.example.label}: rollout.environment failed: "
                f"{detail.strip().splitlines()[-1]}; this response ends here and is scored; further failures "
                f"are only counted (environment/timeout, environment/error)\n{detail.strip()}"
            )

    def _append(self, episode: Episode, observation: Observation, max_tokens: int) -> None:
        response = episode.response
        if observation.problem and not self.problem_shown:
            self.problem_shown = True
            first = observation.problem.strip()
            self.warn(
                f"{episode.prompt.example.label}: a tool failed: {first.splitlines()[-1]}; the model "
                "reads the error and goes on; further ones are only counted (environment/tool_errors)"
                f"\n{first}"
            )
        for name, value in observation.info.items():
            episode.counts[name] += value
        if observation.reward is not None:
            episode.reward = (episode.reward or 0.0) + observation.reward
        if observation.done or not self.encode.ends_turn(response):
            episode.end(response.finish)
        elif episode.turns == self.limits.turns:
            episode.end("turns")
        elif len(episode.returned) + _images(observation) > self.limits.images:
            episode.end("images")
        elif (answer := self._encoded(episode, observation)) is None:
            episode.counts["error"] += 1
            episode.end("error")
        elif len(response.ids) + len(answer.ids) >= max_tokens:
            episode.end("length")
        else:
            episode.response = response.continued(environment_turn(response, answer))

    def _encoded(self, episode: Episode, observation: Observation) -> Answer | None:
        """The observation as tokens; None, after a warning, if the model can't read it."""
        parts = [(item.text, item.images) for item in observation.results]
        try:
            if not parts:
                answer = self.encode.answer([(observation.text, observation.images)])
                episode.returned += [image.size for item in answer.images for image in item.images]
                return answer
            return self.encode.answer([self._shown(episode, *part) for part in parts], to_calls=True)
        except (ValueError, ZeroDivisionError) as error:
            self._warn_once(episode, str(error))
            return None

    def _shown(self, episode: Episode, text: str, images: Sequence[Image]) -> tuple[str, Sequence[Image]]:
        """A tool's answer, or what is wrong with its images."""
        try:
            episode.returned += [self.encode.resize(image).size for image in images]
        except (ValueError, ZeroDivisionError) as error:
            episode.returned += [NOT_SHOWN] * len(images)
            return f"error: this image can't be shown: {error}", ()
        return text, images


def _images(observation: Observation) -> int:
    return len(observation.images) + sum(len(item.images) for item in observation.results)


def environment_turn(before: Response, answer: Answer) -> Response:
    """The tokens of the environment as a response that continues `before`."""
    length = len(answer.ids)
    return Response(
        ids=answer.ids,
        mask=torch.zeros(length, dtype=torch.bool),
        logprobs=torch.zeros(length),
        positions=answer.positions + before.positions.max() + 1,
        spans=(Span(0, length, source="environment"),),
        text=before.text,
        finish=before.finish,
        images=answer.images,
    )


class Demonstrations:
    """An engine that returns each prompt's demonstration, turn by turn, as `turns_of` reads it from the row.
    With Episodes around it, an environment answers these turns as it would the policy's."""

    in_background = False
    shares_weights = True

    def __init__(self, encode: Encoder, turns_of: Callable[[Prompt], Sequence[str]]):
        self.encode, self.turns_of = encode, turns_of

    def problems_at_once(self, samples: int) -> int:
        return 1

    def sync(self, vlm: VLM) -> None:
        """There are no weights."""

    def close(self) -> None:
        """There is nothing to free."""

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """The next turn of each."""
        return [
            [self._next(context.prompt, so_far) for so_far in context.responses or (None,)]
            for context in contexts
        ]

    def _next(self, prompt: Prompt, so_far: Response | None) -> Response:
        turns, number = self.turns_of(prompt), 0 if so_far is None else len(so_far.turns)
        if number == len(turns):
            raise RowError(
                f"{prompt.example.label}: its demonstration has {len(turns)} turns, and the environment "
                "answers the last one; add a turn, or end it so that the environment does"
            )
        before = prompt if so_far is None else prompt.followed_by(so_far)
        turn = self.encode.respond(before, turns[number])
        return continue_response(self.encode.vlm, prompt, so_far, turn)


def play(
    episodes: Episodes, prompts: Sequence[Prompt], turns: Mapping[Prompt, Sequence[str]]
) -> list[Response]:
    """Demonstrations of several turns as responses, with what the environment of `episodes` answers. Raises
    RowError where a demonstration and the environment don't fit."""
    script = Demonstrations(episodes.encode, lambda prompt: turns[prompt])
    scripted = Episodes(
        script,
        episodes.encode,
        episodes.environments,
        limits=episodes.limits,
        world=episodes.world,
        warn=episodes.warn,
    )
    sampling = Sampling(1, 2**31, 1.0, seed=0)
    responses = [response for [response] in scripted.generate(as_contexts(prompts), sampling)]
    for prompt, response in zip(prompts, responses, strict=True):
        label, count = prompt.example.label, len(response.turns)
        if response.finish != "stop" or count < len(turns[prompt]):
            raise RowError(
                f"{label}: its demonstration of {len(turns[prompt])} turns ended after {count} "
                f"({response.finish}); change it, or rollout.environment"
            )
    return responses
