"""The supported model families, with what differs between them beyond what transformers handles.

docs/families.md says what works for which family, and how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    title: str
    processor: type
    video_processor: type
    experts_transposed: bool = False
    """Whether checkpoints store the experts' matrices as [E, in, out]; transformers has [E, out, in]."""


QWEN3 = (Qwen3VLProcessor, Qwen3VLVideoProcessor)
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": Family("Qwen2.5-VL", Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": Family("Qwen3-VL", *QWEN3),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", *QWEN3, experts_transposed=True),
    "qwen3_5": Family("Qwen3.5", *QWEN3),
    "qwen3_5_moe": Family("Qwen3.5-MoE", *QWEN3),
}


def check_family(name: str, where: str) -> Family:
    """The family of a `model_type`. Raises ValueError, starting with `where`, if it is not supported."""
    if name not in FAMILIES:
        listed = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        raise ValueError(f"{where} ({name}) must be one of {listed}")
    return FAMILIES[name]
