"""The supported model families, with what differs between them beyond what transformers handles.

docs/families.md says what works for which family, and how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlm_sapo.types import Coordinates


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers, and the conventions that its models were trained with."""

    title: str
    processor: type
    video_processor: type
    coordinates: Coordinates
    """How it writes boxes and points; the verifiers' default."""
    thinks: bool = False
    """Whether it has models that think, between THOUGHT_TAGS."""
    tool_calls: Literal["json", "xml"] | None = None
    """How its chat template writes a call inside `<tool_call>`: a JSON object with name and arguments, or
    `<function=name>` with `<parameter=name>`; None if it knows no tools."""
    experts_transposed: bool = False
    """Whether checkpoints store the experts' matrices as [E, in, out]; transformers has [E, out, in]."""


THOUGHT_TAGS = ("<think>", "</think>")
QWEN3 = (Qwen3VLProcessor, Qwen3VLVideoProcessor)
QWEN3_VL = {"coordinates": "thousand", "thinks": True, "tool_calls": "json"}
QWEN3_5 = {"coordinates": "thousand", "thinks": True, "tool_calls": "xml"}
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLProcessor, Qwen2VLVideoProcessor, "thousand"),
    "qwen2_5_vl": Family("Qwen2.5-VL", Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, "resized"),
    "qwen3_vl": Family("Qwen3-VL", *QWEN3, **QWEN3_VL),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", *QWEN3, **QWEN3_VL, experts_transposed=True),
    "qwen3_5": Family("Qwen3.5", *QWEN3, **QWEN3_5),
    "qwen3_5_moe": Family("Qwen3.5-MoE", *QWEN3, **QWEN3_5),
}


def check_family(name: str, where: str) -> Family:
    """The family of a `model_type`. Raises ValueError, starting with `where`, if it is not supported."""
    if name not in FAMILIES:
        listed = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        raise ValueError(f"{where} ({name}) must be one of {listed}")
    return FAMILIES[name]
