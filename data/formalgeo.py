"""Rows of the FormalGeo7k release of Geometry3K, whose text restates the figure."""

from __future__ import annotations

import re


def last_sentence(row: dict) -> dict:
    """The row with only the question of `problem_text_en` left, so the picture is needed."""
    sentences = re.split(r"(?<=[.?!])\s+", row["problem_text_en"].strip())
    return row | {"problem_text_en": sentences[-1]}
