"""Examples to prompts: chat template, pictures resized once, token ids and rotary positions."""

from __future__ import annotations

import torch
from qwen_vl_utils import fetch_image

from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import MARK, Completion, Example, Prompt, RowError


class Encoder:
    """Encodes examples for one model.

    `min_pixels` and `max_pixels` bound the area of a resized picture (None: the processor's own bounds);
    `max_tokens` bounds the prompt, and `limit` says what that is and what to do about it.
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
        size = vlm.processor.image_processor.size
        self.min_pixels = min_pixels or size["shortest_edge"]
        self.max_pixels = max_pixels or size["longest_edge"]
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"model.min_pixels ({self.min_pixels}) must not exceed model.max_pixels "
                f"({self.max_pixels}); lower it"
            )

    def __call__(self, example: Example) -> Prompt:
        """Raises RowError when a picture cannot be resized or the prompt is longer than the limit."""
        processor = self.vlm.processor
        images = tuple(self._resize(example, number) for number in range(len(example.images)))
        messages = self._messages(example)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self._check_marks(example, text)
        encoded = processor(text=[text], images=list(images) or None, do_resize=False, return_tensors="pt")
        ids, grid = encoded["input_ids"][0], encoded.get("image_grid_thw")
        self.check_length(example, *self.count(ids))
        return Prompt(
            example=example,
            text=text,
            opening=self.opening,
            ids=ids,
            positions=self.vlm.rope_positions(ids, encoded["mm_token_type_ids"][0], grid),
            images=images,
            pixels=encoded.get("pixel_values"),
            grid=grid,
        )

    def respond(self, prompt: Prompt, text: str) -> Completion:
        """A given text as a finished response: its tokens and the stop token. Its log-probs are unknown
        (NaN)."""
        tokenizer = self.vlm.tokenizer
        text = text.removeprefix(prompt.opening)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if smuggled := sorted(set(ids) & set(self.vlm.banned)):
            raise RowError(
                f"{prompt.example.label}: its demonstration holds {tokenizer.decode(smuggled)}, which no "
                "response may contain; remove it"
            )
        unknown = torch.full((len(ids),), float("nan"))
        return Completion(ids=torch.tensor(ids), logprobs=unknown, text=prompt.opening + text, finish="stop")

    def _resize(self, example: Example, number: int):
        picture = example.images[number]
        request = {"image": picture, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        try:
            return fetch_image(request, image_patch_size=self.vlm.processor.image_processor.patch_size)
        except (ValueError, ZeroDivisionError) as error:
            size = "x".join(map(str, picture.size))
            raise RowError(
                f"{example.label}: picture {number + 1} ({size}) cannot be resized ({error}); "
                "crop or remove it"
            ) from error

    def _messages(self, example: Example) -> list[dict]:
        problem = example.problem if MARK in example.problem else MARK * len(example.images) + example.problem
        pieces = example.template.replace("{problem}", problem).split(MARK)
        content: list[dict] = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece else []
        system = [{"role": "system", "content": example.system}] if example.system else []
        return [*system, {"role": "user", "content": content}]

    def _check_marks(self, example: Example, text: str) -> None:
        """Image tokens that the data set's own text smuggles in would shift the pictures."""
        processor = self.vlm.processor
        if text.count(processor.image_token) != len(example.images) or processor.video_token in text:
            raise RowError(
                f"{example.label}: its prompt has {text.count(processor.image_token)} places for "
                f"{len(example.images)} pictures; the text must not contain {processor.image_token} or "
                f"{processor.video_token}, and the chat template must place each picture once"
            )

    def count(self, ids: torch.Tensor) -> tuple[int, int]:
        """Tokens of a prompt, and how many of them stand for pictures."""
        return len(ids), int((ids == self.vlm.model.config.image_token_id).sum())

    def check_length(self, example: Example, tokens: int, image_tokens: int) -> None:
        """Raises RowError when a prompt of so many tokens is longer than the limit."""
        if tokens > self.max_tokens:
            raise RowError(
                f"{example.label}: its prompt has {tokens} tokens, {image_tokens} of them for pictures, over "
                + self.limit.format(self.max_tokens)
                + (", or shorten the row: most of it is text" if image_tokens < tokens / 2 else "")
            )


def _opening(processor) -> str:
    """What the chat template writes of the answer itself: a thinking tag that it opens and leaves open."""
    turn = [{"role": "user", "content": [{"type": "text", "text": "."}]}]
    closed = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
    prompted = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    added = prompted[len(closed) :]
    start = added.rfind("<think>")
    return added[start:] if start >= 0 and "</think>" not in added[start:] else ""
