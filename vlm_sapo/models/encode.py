"""Encodes examples as prompts: chat template, resized images, token ids and rotary positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from vlm_sapo.models.families import THOUGHT_TAGS
from vlm_sapo.models.tool_chat import ToolChat
from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, ImageInputs, Prompt, Response, RowError

ASSISTANT_MARK = "ASSISTANT TEXT"
"""A dummy message, to find where the chat template puts it."""
NO_TOOLS = ToolChat()
AnswerPart = tuple[str, Sequence[Image]]
"""A text with `<image>` where an image goes, and the images; without any mark they come first."""


@dataclass(frozen=True)
class Answer:
    """What an environment says after a turn, as tokens."""

    ids: torch.Tensor
    """[E] int64, image tokens expanded."""
    positions: torch.Tensor
    """[3, E] int64, the rotary positions as if it were at the beginning."""
    images: tuple[ImageInputs, ...]
    """Its images together, if it has any."""


class Encoder:
    """Encodes examples for one model. Several threads may use it at the same time.

    `min_pixels` and `max_pixels` bound the area of a resized image (None: the processor's own bounds);
    `max_tokens` bounds the prompt, and `limit` names that bound and the remedy in errors; `tools` are offered
    in each prompt.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tokens: float = 4096,
        limit: str = "data.max_prompt_tokens ({}); raise that limit or lower model.max_pixels",
        tools: ToolChat = NO_TOOLS,
    ):
        self.vlm, self.max_tokens, self.limit, self.tools = vlm, max_tokens, limit, tools
        self.opening = _opening(vlm.processor)
        self.plain = PlainText(vlm.processor, vlm.tokenizer.convert_ids_to_tokens(vlm.banned))
        least, most = vlm.family.pixel_bounds(vlm.processor.image_processor)
        self.bounds = (min_pixels or least, max_pixels or most)
        if self.bounds[1] < least and (min_pixels is None or vlm.family.fixed_minimum):
            other = "" if vlm.family.fixed_minimum else ", or set model.min_pixels as well"
            raise ValueError(
                f"model.max_pixels ({max_pixels}) must be at least {least}, the smallest image of the "
                f"model's processor; raise it{other}"
            )
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(
                f"model.min_pixels ({self.bounds[0]}) must not exceed model.max_pixels ({self.bounds[1]}); "
                "lower it"
            )

    def __call__(self, example: Example) -> Prompt:
        """Raises RowError if an image cannot be resized or the prompt is longer than the limit."""
        processor = self.vlm.processor
        problem, hidden = self.plain.hide(example)
        images = tuple(self._resize_of(example, number) for number in range(len(example.images)))
        messages = self.tools.conversation(self._messages(example, problem))
        text = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.tools.arguments
        )
        self._check_image_tokens(example, text)
        ids, pixels, grid = self.vlm.family.process(processor, text, images, self.bounds)
        ids = self.plain.restore_tokens(ids, hidden)
        self.check_length(example, *self.count(ids))
        return Prompt(
            example=example,
            text=self.plain.restore_text(text, hidden),
            opening=self.opening,
            ids=ids,
            positions=self.vlm.rope_positions(ids, grid),
            images=images,
            pixels=pixels,
            grid=grid,
            coordinates=self.vlm.family.coordinates,
        )

    def describe(self, prompt: Prompt) -> str:
        """The prompt's text with size and tokens of each image where the model sees it."""
        processor = self.vlm.processor
        enclosing = {*self.vlm.tokenizer.convert_ids_to_tokens(self.vlm.banned)} - {processor.image_token}
        around = "|".join(map(re.escape, sorted(enclosing)))
        mark = re.compile(f"(?:{around})?{re.escape(processor.image_token)}(?:{around})?")
        sizes = self.vlm.image_sizes(prompt)
        labels = [
            f"<image {before.width}x{before.height}"
            + (f" resized to {after.width}x{after.height}" if before.size != after.size else "")
            + f", {size} tokens>"
            for before, after, size in zip(prompt.example.images, prompt.images, sizes, strict=True)
        ]
        pieces = mark.split(prompt.text)
        if len(pieces) != len(labels) + 1:  # the problem quotes the token
            return prompt.text
        return pieces[0] + "".join(label + piece for label, piece in zip(labels, pieces[1:], strict=True))

    def respond(self, prompt: Prompt, text: str) -> Response:
        """A text (a demonstration) as a finished response: its tokens and the one that ends a turn, with
        unknown (NaN) log-probs."""
        text = text.removeprefix(prompt.opening)
        ids = [*self.plain.ids(text), self.turn_end]
        unknown = torch.full((len(ids),), float("nan"))
        return Response.sampled(
            prompt.positions, torch.tensor(ids), unknown, text=prompt.opening + text, finish="stop"
        )

    def answer(self, parts: Sequence[AnswerPart], *, to_calls: bool = False) -> Answer:
        """What an environment says after a turn, as the chat template writes it: from the end of an
        assistant's turn to the start of the next. It is one user turn, or the answers `to_calls` of tools.

        Raises ValueError for an image that can't be resized, and for a template without such turns.
        """
        texts, hidden = self.plain.hide_texts([text for text, _ in parts])
        contents = [
            _content(text, len(images), marked=text.count(IMAGE_PLACEHOLDER) == len(images))
            for text, (_, images) in zip(texts, parts, strict=True)
        ]
        messages = self.tools.results(contents) if to_calls else [{"role": "user", "content": contents[0]}]
        text = self._after_assistant(messages)
        images = tuple(self.resize(image) for _, own in parts for image in own)
        token, *_ = self.vlm.family.placeholders(self.vlm.processor)
        if text.count(token) != len(images):
            raise ValueError(
                f"an answer of the environment has {text.count(token)} image tokens for {len(images)} "
                f"images; its text must not contain {token}"
            )
        first = self.vlm.tokenizer.bos_token or ""  # so that the processor writes no further one
        ids, pixels, grid = self.vlm.family.process(self.vlm.processor, first + text, images, self.bounds)
        if first and int(ids[0]) == self.vlm.tokenizer.bos_token_id:
            ids = ids[1:]
        ids = self.plain.restore_tokens(ids, hidden)
        inputs = () if pixels is None else (ImageInputs(images, pixels, grid),)
        return Answer(ids, self.vlm.rope_positions(ids, grid), inputs)

    def inputs(self, images: Sequence[Image]) -> ImageInputs:
        """Resized images as the model reads them, as they were in an answer."""
        return self.answer([("", images)]).images[0]

    def resize(self, image: Image) -> Image:
        """The image in the size in which the model sees it. Raises ValueError if it can't be resized."""
        return self.vlm.family.resize(image, self.vlm.processor.image_processor, self.bounds)

    @cached_property
    def turn_end(self) -> int:
        """The token that ends an assistant's turn: the one of the model's stop tokens that the chat template
        writes after it, which may be the first of the next turn; otherwise the end of sequence."""
        written = self.vlm.tokenizer(self._written_after([_user(".")]), add_special_tokens=False)["input_ids"]
        return written[0] if written and written[0] in self.vlm.stops else self.vlm.tokenizer.eos_token_id

    def _after_assistant(self, messages: list[dict]) -> str:
        """What the chat template writes for messages after the end of an assistant's turn, the opening of the
        next one included. Raises ValueError if it has no such turns."""
        stop, written = self.vlm.tokenizer.decode(self.turn_end), self._written_after(messages)
        if not written.startswith(stop) or written == stop:
            raise ValueError(
                f"the chat template of model.path must write an assistant's turn, its end ({stop}, a token "
                "that ends responses) and a user's turn after it, as rollout.environment needs; use a "
                "template and a tokenizer that do"
            )
        return written.removeprefix(stop)

    def _written_after(self, messages: list[dict]) -> str:
        """What the chat template writes after an assistant's text that is followed by messages."""
        parts = [{"type": "text", "text": ASSISTANT_MARK}]
        for content in (ASSISTANT_MARK, parts):  # GLM's prints a list as Python does; others want one
            rendered = self.vlm.processor.apply_chat_template(
                [_user("."), {"role": "assistant", "content": content}, *messages],
                tokenize=False,
                add_generation_prompt=True,
                **self.tools.arguments,
            )
            if ASSISTANT_MARK in rendered:
                break
        return rendered.partition(ASSISTANT_MARK)[2]

    def ends_turn(self, response: Response) -> bool:
        """Whether the response ends with the token that ends a turn in the chat template."""
        return int(response.ids[-1]) == self.turn_end

    def decode(self, ids: torch.Tensor) -> str:
        """Decodes tokens, without special ones."""
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    def _resize_of(self, example: Example, number: int) -> Image:
        image = example.images[number]
        try:
            return self.resize(image)
        except (ValueError, ZeroDivisionError) as error:
            size = "x".join(map(str, image.size))
            raise RowError(
                f"{example.label}: image {number + 1} ({size}) cannot be resized ({error}); crop or remove it"
            ) from error

    def _messages(self, example: Example, problem: str) -> list[dict]:
        problem = (
            problem if IMAGE_PLACEHOLDER in problem else IMAGE_PLACEHOLDER * len(example.images) + problem
        )
        content = _content(example.template.replace("{problem}", problem), 0, marked=True)
        system = [{"role": "system", "content": example.system}] if example.system else []
        return [*system, {"role": "user", "content": content}]

    def _check_image_tokens(self, example: Example, text: str) -> None:
        """Raises RowError for image tokens in the text, which would shift the images."""
        image, *video = self.vlm.family.placeholders(self.vlm.processor)
        if text.count(image) != len(example.images) or any(token in text for token in video):
            raise RowError(
                f"{example.label}: its prompt has {text.count(image)} image tokens for "
                f"{len(example.images)} images; data.template and data.system must not contain "
                f"{' or '.join([image, *video])}, and the chat template must write one "
                "for each image"
            )

    def count(self, ids: torch.Tensor) -> tuple[int, int]:
        """Number of tokens of a prompt, and how many of them are image tokens."""
        return len(ids), int((ids == self.vlm.model.config.image_token_id).sum())

    def check_length(self, example: Example, tokens: int, image_tokens: int) -> None:
        """Raises RowError if a prompt of so many tokens is longer than the limit."""
        if tokens > self.max_tokens:
            raise RowError(
                f"{example.label}: its prompt has {tokens} tokens, {image_tokens} of them for images, over "
                + self.limit.format(self.max_tokens)
                + (", or shorten the row: most of it is text" if image_tokens < tokens / 2 else "")
            )


def _content(text: str, images: int, *, marked: bool) -> list[dict]:
    """A message's parts: text with images where it is marked, or so many images before it."""
    pieces = text.split(IMAGE_PLACEHOLDER) if marked else [text]
    content: list[dict] = [] if marked else [{"type": "image"}] * images
    for number, piece in enumerate(pieces):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def _user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


class PlainText:
    """Encodes special tokens' names in a data set's text as plain text: `<|im_end|>` there ends no turn.

    While the chat template is applied they are replaced by a special token that neither the template nor the
    text uses, the stand-in.
    """

    def __init__(self, processor, vision_tokens: Sequence[str]):
        self.tokenizer = processor.tokenizer
        names = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.names = [name for name in names if name != IMAGE_PLACEHOLDER]  # LFM2-VL's image token
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "$^")
        turns = [{"role": "system", "content": "."}, _user(".")]
        frame = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        self.free = [name for name in self.names if name not in frame and name not in vision_tokens]

    def ids(self, text: str) -> list[int]:
        """Encodes a text without special tokens."""
        return self._splitting(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    @cached_property
    def _splitting(self) -> PreTrainedTokenizerBase:
        """A tokenizer of its own: whether special tokens are split is a setting of the object, and other
        threads may be encoding with the processor's."""
        return deepcopy(self.tokenizer)

    def hide(self, example: Example) -> tuple[str, list[str]]:
        """The problem with the stand-in for every special token's name, and the stand-in followed by those
        names in order (empty without any). Raises RowError if every special token is in use."""
        own = example.template + (example.system or "")
        try:
            [problem], hidden = self.hide_texts([example.problem], beside=own)
        except ValueError as error:
            raise RowError(f"{example.label}: its text {error}") from error
        return problem, hidden

    def hide_texts(self, texts: Sequence[str], beside: str = "") -> tuple[list[str], list[str]]:
        """The same for texts beside others whose special tokens remain. Raises ValueError."""
        names = [name for text in texts for name in self.pattern.findall(text)]
        if not names:
            return list(texts), []
        stand_in = next((name for name in self.free if name not in beside), None)
        if stand_in is None:
            raise ValueError(f"contains {names[0]}, a special token of this model; remove it")
        return [self.pattern.sub(stand_in, text) for text in texts], [stand_in, *names]

    def restore_text(self, text: str, hidden: list[str]) -> str:
        """The text with the names instead of the stand-ins."""
        names = iter(hidden[1:])
        return re.sub(re.escape(hidden[0]), lambda _: next(names), text) if hidden else text

    def restore_tokens(self, ids: torch.Tensor, hidden: list[str]) -> torch.Tensor:
        """Token ids [P] with the names' plain tokens instead of the stand-ins."""
        if not hidden:
            return ids
        stand_in, names = self.tokenizer.convert_tokens_to_ids(hidden[0]), iter(hidden[1:])
        pieces = [self.ids(next(names)) if token == stand_in else [token] for token in ids.tolist()]
        return torch.tensor([token for piece in pieces for token in piece])


def _opening(processor) -> str:
    """The beginning of the answer that the chat template writes: a thinking tag left open, or nothing."""
    turn = [_user(".")]
    closed = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
    prompted = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    added = prompted[len(closed) :]
    first, last = THOUGHT_TAGS
    start = added.rfind(first)
    return added[start:] if start >= 0 and last not in added[start:] else ""
