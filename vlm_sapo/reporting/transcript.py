"""A response of several turns as texts: what the policy said, and what an environment answered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL.Image import Image

from vlm_sapo.types import Response

Decode = Callable[[torch.Tensor], str]
"""Text of token ids [n], without special tokens."""
SaveImages = Callable[[Sequence[Image]], list[str]]
"""Writes images and returns the names of their files."""


def transcript(
    response: Response, decode: Decode, save_images: SaveImages, image_tokens: Collection[int]
) -> list[dict[str, Any]]:
    """The turns in order: who spoke (`by`), the text, and the files of the environment's images (`pictures`).
    Empty for a response that no environment answered.

    Answers with one of `image_tokens` (ids that stand for an image) have the images.
    """
    answers = [span for span in response.spans if span.source == "environment"]
    if not answers:
        return []
    stands_for_image = torch.isin(response.ids, torch.tensor([*image_tokens]))
    showing = (span for span in answers if stands_for_image[span.start : span.end].any())
    images = {span: inputs.images for span, inputs in zip(showing, response.images, strict=False)}
    turns = [(source, list(spans)) for source, spans in groupby(response.spans, lambda span: span.source)]
    return [
        {
            "by": source,
            "text": decode(response.ids[spans[0].start : spans[-1].end]),
            "pictures": save_images([image for span in spans for image in images.get(span, ())]),
        }
        for source, spans in turns
    ]
