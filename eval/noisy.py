"""The reward of the stability study: a verifier that errs."""

from __future__ import annotations

import zlib

from vlm_sapo.rewards.verifiers.answers import Ungraded
from vlm_sapo.rewards.verifiers.table import auto


def noisy(response, example, share):
    """The verdict of `auto`, flipped for this share of all answered responses, always the same ones. 0
    without an answer."""
    try:
        correct = auto(response, example)
    except Ungraded:
        return 0.0
    flipped = zlib.crc32(f"{example.id}/{response}".encode()) < share * 2**32
    return 1.0 - correct if flipped else correct
