"""Shapes of published models, so that a plan needs no network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from vlm_sapo.config.files import read_mapping

VARIANTS = ("-Instruct", "-Thinking")
"""Ends of names whose models have the same shape."""


@cache
def published() -> dict[str, dict]:
    """The fields of config.json that decide a shape, by hub id without -Instruct or -Thinking."""
    return read_mapping(Path(__file__).with_name("shapes.yaml"))


def published_config(name: str) -> PretrainedConfig | None:
    """The config of a published model by its hub id; None for one that isn't listed."""
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    fields = published().get(name)
    if fields is None:
        return None
    model_type, values = fields["model_type"], {key: fields[key] for key in fields if key != "model_type"}
    return AutoConfig.for_model(model_type, **values)
