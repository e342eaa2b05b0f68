"""The records that the stages of a step pass on.

Shapes: [P] tokens of a prompt, [R] tokens of a response, [G] responses of a group, [I] images of a prompt,
[N] vision patches of all its images, [D] values of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


IMAGE_PLACEHOLDER = "<image>"
"""Marks the position of an image in a problem's text."""


Coordinates = Literal["resized", "original", "thousand", "thousand_yx", "unit"]
"""Of a box or point: pixels of the image as the model sees it, pixels of the row's image, 0 to 1000 from side
to side, the same with y before x, or 0 to 1."""


LONGEST_IN_MESSAGE = 100
"""Characters of a row's value in a message."""


class RowError(ValueError):
    """A row that cannot be used. The message names the row, its file, the field and the remedy."""


def one_line(value: object, limit: int = LONGEST_IN_MESSAGE) -> str:
    """A value of a row for a message: one line, cut where it is long. An image may have megabytes of text."""
    text = str(value)
    line = " ".join(text[: 2 * limit].split())
    return line if len(text) <= 2 * limit and len(line) <= limit else f"{line[:limit]}..."


@dataclass(frozen=True)
class Example:
    """One row of a data set: a problem with its images, its gold answer, and every other column."""

    id: str
    problem: str
    """Text with one `<image>` per image, in order; without any, the images come first."""
    answer: str
    images: tuple[Image, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0
    """Its index in its data set."""
    source: str = ""
    """The file, folder or hub id that the row comes from."""
    task: str = ""
    """Name of its task in the logs."""
    template: str = "{problem}"
    """The user's turn, with `{problem}` where the problem goes."""
    system: str | None = None
    """System prompt; None leaves it to the chat template."""
    verifier: tuple[str, Mapping[str, Any]] | None = None
    """Name and arguments of the verifier that the reward `auto` uses for this row; None lets it choose."""

    @property
    def label(self) -> str:
        """The row's name in errors."""
        return f"row {self.id} of {self.source}" if self.source else f"row {self.id}"


@dataclass(frozen=True, eq=False)
class Prompt:
    """An example as the model reads it. Images are resized once; rollout and training use the same pixels.

    Two prompts are equal only if they are the same object.
    """

    example: Example
    text: str
    """The rendered chat template, with one image token per image."""
    opening: str
    """The beginning of the answer that the template writes, such as `<think>` and a newline; mostly empty."""
    ids: torch.Tensor
    """[P] int64, image tokens expanded."""
    positions: torch.Tensor
    """[3, P] int64, the rotary positions (time, height, width)."""
    images: tuple[Image, ...]
    """The I resized images, RGB."""
    pixels: torch.Tensor | None
    """[N, D] float32, or None without images."""
    grid: torch.Tensor | None
    """[I, 3] int64, patches per image (time, height, width), or None without images."""
    coordinates: Coordinates | None = None
    """Those that the model's family writes; None if no model is known."""

    def followed_by(self, response: Response) -> Prompt:
        """A prompt of these tokens and images and those of a response, for engines that continue it."""
        import torch  # here, because reward workers, which only read texts, shall not load it

        sources = [source for source in (self, *response.images) if source.pixels is not None]
        return replace(
            self,
            ids=torch.cat([self.ids, response.ids]),
            positions=torch.cat([self.positions, response.positions], dim=1),
            images=tuple(image for source in (self, *response.images) for image in source.images),
            pixels=torch.cat([source.pixels for source in sources]) if sources else None,
            grid=torch.cat([source.grid for source in sources]) if sources else None,
        )


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Images that an environment returned in one answer, as the model reads them: resized once.

    Two are equal only if they are the same object.
    """

    images: tuple[Image, ...]
    """The I resized images, RGB."""
    pixels: torch.Tensor
    """[N, D] float32."""
    grid: torch.Tensor
    """[I, 3] int64, patches per image (time, height, width)."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled: `group` per prompt, each at most `max_tokens` long."""

    group: int
    max_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int
    slots: tuple[int, ...] = ()
    """Per prompt, a number that is mixed with the seed for its random numbers; by default its index."""
    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens whose probability sums to this."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 for all."""
    min_p: float = 0.0
    """Drop tokens below this share of the most likely token's probability."""
    max_turn_tokens: int | None = None
    """Most tokens of one turn; None for as many as the response may have."""

    def limit(self, so_far: int) -> int:
        """The most tokens of a response after one more turn, which follows so many tokens."""
        if self.max_turn_tokens is None:
            return self.max_tokens
        return min(self.max_tokens, so_far + self.max_turn_tokens)

    def seed_of(self, index: int) -> int:
        """Seed of a prompt's group, from its slot or its index; below 2 ** 62."""
        slot = self.slots[index] if self.slots else index
        return (self.seed * 1_000_003 + slot) % 2**62


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of a response, and who wrote them."""

    start: int
    end: int
    source: Literal["policy", "environment"] = "policy"
    weights_version: int | None = None
    """`VLM.version` of the weights that sampled them; None for the environment's tokens."""


Finish = Literal["stop", "length", "turns", "images", "timeout", "error"]
"""Why a response ended: with a stop token, at the limit of tokens, of turns or of images, or because its
environment took too long or failed."""


@dataclass(frozen=True, eq=False)
class Response:
    """One response, token by token: what the policy sampled and what an environment answered, in order."""

    ids: torch.Tensor
    """[R] int64, with the stop token if the policy ended its turn."""
    mask: torch.Tensor
    """[R] bool, true where the policy sampled the token; other tokens have no loss."""
    logprobs: torch.Tensor
    """[R] float32 under the distribution that was sampled (temperature and bans applied), 0 where the mask
    is off."""
    positions: torch.Tensor
    """[3, R] int64, the rotary positions (time, height, width)."""
    spans: tuple[Span, ...]
    """Who wrote which tokens, in order and without gaps."""
    text: str
    """What a verifier reads: the prompt's opening and the policy's turns, without special tokens."""
    finish: Finish
    """Why it ended."""
    experts: torch.Tensor | None = None
    """[P + R - 1, M, k] integer, the k experts of each of the M MoE layers for all tokens of prompt and
    response but the last; None unless the engine records them."""
    reward: float | None = None
    """The environment's reward; None without an environment."""
    images: tuple[ImageInputs, ...] = ()
    """What the environment returned, in the order of the image tokens in `ids`."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What happened in the environment, such as `calls` and `bad_calls`; empty without one."""

    @classmethod
    def sampled(
        cls,
        after: torch.Tensor,
        ids: torch.Tensor,
        logprobs: torch.Tensor,
        *,
        text: str,
        finish: Literal["stop", "length"],
        experts: torch.Tensor | None = None,
        version: int | None = None,
    ) -> Response:
        """A response sampled in one call: ids and log-probs [R], following tokens with positions `after`
        [3, P]."""
        import torch  # here, because reward workers, which only read texts, shall not load it

        return cls(
            ids=ids,
            mask=torch.ones(len(ids), dtype=torch.bool),
            logprobs=logprobs,
            positions=positions_after(after, len(ids)),
            spans=(Span(0, len(ids), weights_version=version),),
            text=text,
            finish=finish,
            experts=experts,
        )

    def continued(self, other: Response) -> Response:
        """This response followed by `other`, with the text, finish, experts and reward of `other`."""
        import torch

        shift = len(self.ids)
        later = (replace(span, start=span.start + shift, end=span.end + shift) for span in other.spans)
        return replace(
            other,
            ids=torch.cat([self.ids, other.ids]),
            mask=torch.cat([self.mask, other.mask]),
            logprobs=torch.cat([self.logprobs, other.logprobs]),
            positions=torch.cat([self.positions, other.positions], dim=1),
            spans=(*self.spans, *later),
            images=(*self.images, *other.images),
        )

    @property
    def turns(self) -> list[torch.Tensor]:
        """The tokens that the policy sampled, one tensor per turn."""
        turns: list[list[Span]] = []
        for before, span in zip((None, *self.spans), self.spans, strict=False):
            if span.source == "policy":
                if before is None or before.source != "policy":
                    turns.append([])
                turns[-1].append(span)
        return [self.ids[spans[0].start : spans[-1].end] for spans in turns]


def positions_after(positions: torch.Tensor, count: int) -> torch.Tensor:
    """[3, count] rotary positions of text tokens that follow tokens with positions [3, P]."""
    import torch

    return (positions.max() + 1 + torch.arange(count)).expand(3, -1)


class Report(Protocol):
    """Hears of a context's responses before the others are finished."""

    def __call__(self, responses: Sequence[Response]) -> None: ...


def no_report(responses: Sequence[Response]) -> None:
    """Nobody waits for single groups."""


@dataclass(frozen=True, eq=False)
class Context:
    """A prompt with its responses so far, which an engine continues."""

    prompt: Prompt
    responses: tuple[Response, ...] = ()
    """Responses so far; empty to start a new group of `Sampling.group` responses."""
    branches: tuple[int, ...] = ()
    """Index of each of these responses in its group; its random numbers depend on it."""
    report: Report = no_report
    """Called by engines that can with a new group's responses as soon as all are finished, in the thread of
    `generate`. What `generate` returns counts: a call saves time, and more or none make no difference."""


class ResponseText(str):
    """What a reward reads: the text of a response, with its length, image sizes and coordinates."""

    known_tokens: int | None
    """Its length in tokens; None if it is from a file that doesn't say."""
    resized: tuple[tuple[int, int], ...]
    """Width and height of the resized images."""
    coordinates: Coordinates | None
    """Those that the family of its model writes; None if its model is not known."""

    def __new__(
        cls,
        text: str,
        *,
        tokens: int | None = None,
        resized: tuple[tuple[int, int], ...] = (),
        coordinates: Coordinates | None = None,
    ):
        response = super().__new__(cls, text)
        response.known_tokens, response.resized, response.coordinates = tokens, resized, coordinates
        return response

    @property
    def tokens(self) -> int:
        """Its length in tokens. Raises ValueError if it is from a file that doesn't say."""
        if self.known_tokens is None:
            raise ValueError(
                "response.tokens is not known for this response: give its row a column `tokens`, or vlm-sapo "
                "score --model FOLDER, whose tokenizer counts them"
            )
        return self.known_tokens

    def with_text(self, text: str) -> ResponseText:
        """Another text with the same facts, such as a part of this one."""
        other = ResponseText(text)
        vars(other).update(vars(self))
        return other

    @classmethod
    def of(cls, prompt: Prompt, response: Response) -> ResponseText:
        """From a sampled response; its length counts the policy's tokens only."""
        sizes = tuple(image.size for image in prompt.images)
        return cls(
            response.text,
            tokens=int(response.mask.sum()),
            resized=sizes,
            coordinates=prompt.coordinates,
        )


@dataclass(frozen=True)
class Reward:
    """A reward, the weighted sum of named parts."""

    total: float
    parts: Mapping[str, float]
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """By part, `graded` or why it was not: `no_answer`, `timeout`, ..."""
    details: Mapping[str, str] = field(default_factory=dict)
    """By part, an explanation of an outcome other than `graded`."""


@dataclass(frozen=True)
class Group:
    """One prompt with its G responses and their rewards: the atom of the whole pipeline."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[Reward, ...]

    def without_images(self) -> Group:
        """A copy without images, columns and experts: enough for metrics and logs."""
        example = replace(self.prompt.example, images=(), columns={})
        prompt = replace(self.prompt, example=example, images=(), pixels=None)
        responses = tuple(replace(response, experts=None, images=()) for response in self.responses)
        return replace(self, prompt=prompt, responses=responses)

    def for_training(self, rows: Sequence[int]) -> Group:
        """A copy with some of the responses, and without the images and columns, which a pass through the
        model doesn't read; it keeps the pixels and the experts."""
        example = replace(self.prompt.example, images=(), columns={})
        return Group(
            replace(self.prompt, example=example, images=()),
            tuple(_without_copies(self.responses[row]) for row in rows),
            tuple(self.rewards[row] for row in rows),
        )

    @property
    def zero_variance(self) -> bool:
        """Whether all rewards are equal, so that there is nothing to learn from them."""
        return len({reward.total for reward in self.rewards}) == 1


def _without_copies(response: Response) -> Response:
    """The response with the pixels of its images alone."""
    return replace(response, images=tuple(replace(item, images=()) for item in response.images))


Origin = tuple[int, int]
"""A response among all of a step: the slot of its group, and its index in the group."""


@dataclass(frozen=True)
class RolloutBatch:
    """The groups of a step."""

    groups: tuple[Group, ...]
    """The groups that this process trains on, in the order of the mini-batches."""
    slots: tuple[int, ...]
    """Index of each among the groups of all processes."""
    version: int
    """`VLM.version` of the weights that sampled them."""
    before: Mapping[str, Any]
    """State of the prompt stream before their prompts were taken."""
    after: Mapping[str, Any]
    """State of the prompt stream afterwards."""
    replaced: tuple[Group, ...] = ()
    """Groups with zero variance that were replaced by other groups."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Durations of the stages, by name."""
