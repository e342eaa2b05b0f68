"""The records that travel between the stages of a step.

Shape legend: P tokens of a prompt, R tokens of a response, G responses of a group, I pictures of a prompt,
N vision patches of all its pictures, D values of a patch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


IMAGE_PLACEHOLDER = "<image>"
"""Where a picture stands in a problem's text."""


class RowError(ValueError):
    """A row that cannot be used. The message names the row, its file, the field and what to do."""


@dataclass(frozen=True)
class Example:
    """One row of a data set: a problem with its pictures, its gold answer, and every other column."""

    id: str
    problem: str
    """Text with one `<image>` mark per picture, in order; no mark at all puts the pictures first."""
    answer: str
    images: tuple[Image, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0
    """Its place in its data set."""
    source: str = ""
    """The file, folder or hub id that the row comes from."""
    task: str = ""
    """What the logs call the rows it belongs to."""
    template: str = "{problem}"
    """The user's turn, with `{problem}` where the problem goes."""
    system: str | None = None
    """System prompt; None leaves it to the chat template."""
    verifier: tuple[str, Mapping[str, Any]] | None = None
    """Name and arguments of the verifier that the reward `auto` uses for this row; None where it chooses."""

    @property
    def label(self) -> str:
        """What an error calls this row."""
        return f"row {self.id} of {self.source}" if self.source else f"row {self.id}"


@dataclass(frozen=True, eq=False)
class Prompt:
    """An example as the model reads it. Pictures are resized once; rollout and training use these pixels.

    Two prompts are equal only if they are the same object.
    """

    example: Example
    text: str
    """The rendered chat template, image marks not yet expanded."""
    opening: str
    """What the template already wrote of the answer, such as `<think>` and a newline; empty for most."""
    ids: torch.Tensor
    """[P] int64, image tokens expanded."""
    positions: torch.Tensor
    """[3, P] int64, the rotary positions (time, height, width)."""
    images: tuple[Image, ...]
    """The I resized pictures, RGB."""
    pixels: torch.Tensor | None
    """[N, D] float32, or None without pictures."""
    grid: torch.Tensor | None
    """[I, 3] int64, patches per picture (time, height, width), or None without pictures."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `group` responses per prompt, each at most `max_tokens` long."""

    group: int
    max_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    seed: int
    places: tuple[int, ...] = ()
    """What the draws of each prompt depend on beside the seed; by default the prompts' order."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from the so many likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the likeliest."""

    def seed_of(self, number: int) -> int:
        """Seed of a prompt's group, from its place or its number in the order; below 2 ** 62."""
        place = self.places[number] if self.places else number
        return (self.seed * 1_000_003 + place) % 2**62


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    ids: torch.Tensor
    """[R] int64, the stop token included when `finish` is `stop`."""
    logprobs: torch.Tensor
    """[R] float32, under the distribution that was sampled (temperature and bans applied)."""
    text: str
    """What a verifier reads: the template's opening and the decoded response without special tokens."""
    finish: Literal["stop", "length"]
    experts: torch.Tensor | None = None
    """[P + R - 1, M, k] integer, the k experts that each of the M layers with experts chose for the tokens of
    prompt and response but the last; None unless the engine was asked for them."""


class ResponseText(str):
    """What a reward reads: the text of a response, with what else is known of it."""

    tokens: int | None
    """Its length in tokens; None where it came from a file that doesn't say."""
    resized: tuple[tuple[int, int], ...]
    """Width and height of the pictures as the model saw them."""

    def __new__(cls, text: str, *, tokens: int | None = None, resized: tuple[tuple[int, int], ...] = ()):
        response = super().__new__(cls, text)
        response.tokens, response.resized = tokens, resized
        return response

    @classmethod
    def of(cls, prompt: Prompt, completion: Response) -> ResponseText:
        """A sampled one."""
        sizes = tuple(image.size for image in prompt.images)
        return cls(completion.text, tokens=len(completion.ids), resized=sizes)


@dataclass(frozen=True)
class Reward:
    """A reward and the named parts it is the weighted sum of."""

    total: float
    parts: Mapping[str, float]
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """By part, `graded` or why it could not be graded: `no_answer`, `timeout`, ..."""
    details: Mapping[str, str] = field(default_factory=dict)
    """By part, what there is to say of an outcome that isn't `graded`."""


@dataclass(frozen=True)
class Group:
    """One prompt with its G responses and their scores: the atom of the whole pipeline."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[Reward, ...]

    def without_images(self) -> Group:
        """What metrics and logs need of it."""
        example = replace(self.prompt.example, images=(), columns={})
        prompt = replace(self.prompt, example=example, images=(), pixels=None)
        responses = tuple(replace(completion, experts=None) for completion in self.responses)
        return replace(self, prompt=prompt, responses=responses)

    @property
    def flat(self) -> bool:
        """Whether all responses scored alike, so that nothing is to be learnt from them."""
        return len({reward.total for reward in self.rewards}) == 1


@dataclass
class RolloutBatch:
    """The groups of a step."""

    groups: list[Group]
    """Those that this process trains on, in the order of the mini-batches."""
    places: list[int]
    """Where they stand among those of all processes."""
    version: int
    """`VLM.version` of the weights that drew them."""
    before: dict[str, Any]
    """The stream's state before, and after."""
    after: dict[str, Any] = field(default_factory=dict)
    replaced: list[Group] = field(default_factory=list)
    """Groups without variance that others were drawn for."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Durations of the parts, by name."""

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the block's duration."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
