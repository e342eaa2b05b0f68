"""The records that travel between the stages of a step.

Shape legend: P tokens of a prompt, R tokens of a response, G responses of a group, I pictures of a prompt,
N vision patches of all its pictures, D values of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """How responses are sampled: `group` per prompt, each at most `max_tokens` long."""

    group: int
    max_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    seed: int
    slots: tuple[int, ...] = ()
    """Per prompt, what its random numbers depend on beside the seed; by default its index."""
    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens whose probability sums to this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""

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
    """`VLM.version` of the weights that sampled them; None for the environment's."""


@dataclass(frozen=True, eq=False)
class Response:
    """One response, token by token: what the policy sampled and what an environment answered, in order."""

    ids: torch.Tensor
    """[R] int64, the stop token included where the policy ended its turn."""
    mask: torch.Tensor
    """[R] bool, true where the policy sampled the token; the others have no loss."""
    logprobs: torch.Tensor
    """[R] float32 under the distribution that was sampled (temperature and bans applied), 0 where the mask
    is off."""
    positions: torch.Tensor
    """[3, R] int64, the rotary positions (time, height, width)."""
    spans: tuple[Span, ...]
    """Who wrote which tokens, in order and without gaps."""
    text: str
    """What a verifier reads: the template's opening and the policy's tokens without special ones, turn by
    turn."""
    finish: Literal["stop", "length", "turns"]
    """Whether it ended by itself, at `max_tokens`, or at the environment's limit of turns."""
    experts: torch.Tensor | None = None
    """[P + R - 1, M, k] integer, the k experts that each of the M MoE layers chose for the tokens of prompt
    and response but the last; None unless the engine was asked for them."""
    reward: float | None = None
    """What an environment gave for it; None without one."""

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
        """What the policy sampled in one go, ids and log-probs [R], behind tokens with positions `after`
        [3, P]."""
        import torch  # not for the processes that grade, which read texts alone

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
        """This response with `other`, what came after it, whose text, finish, experts and reward count."""
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
        )

    @property
    def turns(self) -> list[torch.Tensor]:
        """The tokens that the policy sampled, [turn's tokens] by turn."""
        turns: list[list[Span]] = []
        for before, span in zip((None, *self.spans), self.spans, strict=False):
            if span.source == "policy":
                if before is None or before.source != "policy":
                    turns.append([])
                turns[-1].append(span)
        return [self.ids[spans[0].start : spans[-1].end] for spans in turns]


def positions_after(positions: torch.Tensor, count: int) -> torch.Tensor:
    """[3, count] rotary positions of the text tokens behind some with positions [3, P]."""
    import torch

    return (positions.max() + 1 + torch.arange(count)).expand(3, -1)


@dataclass(frozen=True, eq=False)
class Context:
    """A prompt with the responses so far, which an engine is to continue."""

    prompt: Prompt
    responses: tuple[Response, ...] = ()
    """Responses so far; none: a new group of `Sampling.group` responses begins."""
    branches: tuple[int, ...] = ()
    """Index of each of these responses in its group, on which its random numbers depend."""


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
    def of(cls, prompt: Prompt, response: Response) -> ResponseText:
        """That of a sampled response; its length is that of what the policy wrote."""
        sizes = tuple(image.size for image in prompt.images)
        return cls(response.text, tokens=int(response.mask.sum()), resized=sizes)


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
    """One prompt with its G responses and their rewards: the atom of the whole pipeline."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[Reward, ...]

    def without_images(self) -> Group:
        """What metrics and logs need of it."""
        example = replace(self.prompt.example, images=(), columns={})
        prompt = replace(self.prompt, example=example, images=(), pixels=None)
        responses = tuple(replace(response, experts=None) for response in self.responses)
        return replace(self, prompt=prompt, responses=responses)

    @property
    def zero_variance(self) -> bool:
        """Whether all rewards are equal, so that there is nothing to learn from them."""
        return len({reward.total for reward in self.rewards}) == 1


@dataclass(frozen=True)
class RolloutBatch:
    """The groups of a step."""

    groups: tuple[Group, ...]
    """Those that this process trains on, in the order of the mini-batches."""
    slots: tuple[int, ...]
    """Index of each among the groups of all processes."""
    version: int
    """`VLM.version` of the weights that sampled them."""
    before: Mapping[str, Any]
    """State of the prompt stream before they were taken from it."""
    after: Mapping[str, Any]
    """The same afterwards."""
    replaced: tuple[Group, ...] = ()
    """Groups without variance that others were sampled for."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Durations of the parts, by name."""
