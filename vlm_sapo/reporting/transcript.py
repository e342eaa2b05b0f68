"""A response of several turns as texts: what the policy said, what an environment answered, with its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL.Image import Image

from vlm_sapo.types import Response, Span

Decode = Callable[[torch.Tensor], str]
"""Text of token ids [n], without special tokens."""
SaveImages = Callable[[Sequence[Image]], list[str]]
"""Writes images and returns the names of their files."""


def transcript(
    response: Response, decode: Decode, save_images: SaveImages, image_token_id: int | None
) -> list[dict[str, Any]]:
    """The turns in order: who spoke (`by`), the text, and the files of the environment's images (`pictures`).
    Empty for a response that no environment answered.

    `image_token_id` tells which answers have images. Without it, images are left out unless every answer has
    some.
    """
    answers = [span for span in response.spans if span.source == "environment"]
    if not answers:
        return []
    if image_token_id is not None:
        answers = [span for span in answers if (_ids(response, span) == image_token_id).any()]
    matched = zip(answers, response.images, strict=True) if len(answers) == len(response.images) else ()
    images = {span: inputs.images for span, inputs in matched}
    turns = [(source, list(spans)) for source, spans in groupby(response.spans, lambda span: span.source)]
    return [
        {
            "by": source,
            "text": decode(response.ids[spans[0].start : spans[-1].end]),
            "pictures": save_images([image for span in spans for image in images.get(span, ())]),
        }
        for source, spans in turns
    ]


def _ids(response: Response, span: Span) -> torch.Tensor:
    return response.ids[span.start : span.end]
