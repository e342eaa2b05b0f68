"""Shapes of published models, so that a plan needs no network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vlm_sapo.config.files import read_mapping

VARIANTS = ("-Instruct", "-Thinking")
"""Ends of names whose models have the same shape."""


@cache
def published() -> dict[str, dict]:
    """The fields of config.json that decide a shape, by hub id without -Instruct or -Thinking."""
    return read_mapping(Path(__file__).with_name("shapes.yaml"))


def published_shape(name: str) -> dict | None:
    """The fields of a published model by its hub id; None for one that isn't listed."""
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    return published().get(name)
