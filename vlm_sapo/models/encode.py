"""Encodes examples as prompts: chat template, resized images, token ids and rotary positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from vlm_sapo.models.families import THOUGHT_TAGS
from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, Prompt, Response, RowError

ASSISTANT_MARK, USER_MARK = "ASSISTANT TEXT", "USER TEXT"
"""Dummy messages, to find where the chat template puts them."""


class Encoder:
    """Encodes examples for one model. Several threads may use it at the same time.

    `min_pixels` and `max_pixels` bound the area of a resized image (None: the processor's own bounds);
    `max_tokens` bounds the prompt, and `limit` names that bound and the remedy in errors.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tokens: float = 4096,
        limit: str = "data.max_prompt_tokens ({}); raise that limit or lower model.max_pixels",
    ):
        self.vlm, self.max_tokens, self.limit = vlm, max_tokens, limit
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
        images = tuple(self._resize(example, number) for number in range(len(example.images)))
        messages = self._messages(example, problem)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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

    def user_turn(self, text: str) -> torch.Tensor:
        """[E] the tokens of a user turn with this text, from the end of an assistant turn to the start of the
        next."""
        before, after = self._user_turn
        tokenizer = self.vlm.tokenizer
        pieces = (
            tokenizer(before, add_special_tokens=False)["input_ids"],
            self.plain.ids(text),
            tokenizer(after, add_special_tokens=False)["input_ids"],
        )
        return torch.tensor([token for piece in pieces for token in piece])

    @cached_property
    def turn_end(self) -> int:
        """The token that ends an assistant's turn: the one of the model's stop tokens that the chat template
        writes after it, which may be the first of the next turn; otherwise the end of sequence."""
        written = self.vlm.tokenizer(self._later_turn[0], add_special_tokens=False)["input_ids"]
        return written[0] if written and written[0] in self.vlm.stops else self.vlm.tokenizer.eos_token_id

    @cached_property
    def _user_turn(self) -> tuple[str, str]:
        """What the chat template writes before and after a user's text that follows the end of an assistant's
        turn.

        Raises ValueError if the template has no such turns.
        """
        stop, (before, mark, after) = self.vlm.tokenizer.decode(self.turn_end), self._later_turn
        if not mark or not before.startswith(stop):
            raise ValueError(
                f"the chat template of model.path must write an assistant's turn, its end ({stop}, a token "
                "that ends responses) and a user's turn after it, as rollout.environment needs; use a "
                "template and a tokenizer that do"
            )
        return before.removeprefix(stop), after

    @cached_property
    def _later_turn(self) -> tuple[str, str, str]:
        """What the chat template writes after an assistant's text: what comes before a user's text, that
        text, and what comes after it."""
        parts = [{"type": "text", "text": ASSISTANT_MARK}]
        for content in (ASSISTANT_MARK, parts):  # GLM's prints a list as Python does; others want one
            rendered = self.vlm.processor.apply_chat_template(
                [
                    {"role": "user", "content": [{"type": "text", "text": "."}]},
                    {"role": "assistant", "content": content},
                    {"role": "user", "content": [{"type": "text", "text": USER_MARK}]},
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            if ASSISTANT_MARK in rendered:
                break
        return rendered.rpartition(ASSISTANT_MARK)[2].partition(USER_MARK)

    def ends_turn(self, response: Response) -> bool:
        """Whether the response ends with the token that ends a turn in the chat template."""
        return int(response.ids[-1]) == self.turn_end

    def decode(self, ids: torch.Tensor) -> str:
        """Decodes tokens, without special ones."""
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    def _resize(self, example: Example, number: int):
        image = example.images[number]
        try:
            return self.vlm.family.resize(image, self.vlm.processor.image_processor, self.bounds)
        except (ValueError, ZeroDivisionError) as error:
            size = "x".join(map(str, image.size))
            raise RowError(
                f"{example.label}: image {number + 1} ({size}) cannot be resized ({error}); crop or remove it"
            ) from error

    def _messages(self, example: Example, problem: str) -> list[dict]:
        problem = (
            problem if IMAGE_PLACEHOLDER in problem else IMAGE_PLACEHOLDER * len(example.images) + problem
        )
        pieces = example.template.replace("{problem}", problem).split(IMAGE_PLACEHOLDER)
        content: list[dict] = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece else []
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
        user = {"role": "user", "content": [{"type": "text", "text": "."}]}
        turns = [{"role": "system", "content": "."}, user]
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
        names = self.pattern.findall(example.problem)
        if not names:
            return example.problem, []
        own = example.template + (example.system or "")
        stand_in = next((name for name in self.free if name not in own), None)
        if stand_in is None:
            raise RowError(
                f"{example.label}: its text contains {names[0]}, a special token of this model; remove it"
            )
        return self.pattern.sub(stand_in, example.problem), [stand_in, *names]

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
    turn = [{"role": "user", "content": [{"type": "text", "text": "."}]}]
    closed = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
    prompted = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    added = prompted[len(closed) :]
    first, last = THOUGHT_TAGS
    start = added.rfind(first)
    return added[start:] if start >= 0 and last not in added[start:] else ""
