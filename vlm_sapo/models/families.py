"""The model families: all that differs between them and that transformers doesn't know. docs/families.md says
what works for which, and how to add one."""

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
    experts_turned: bool = False
    """Whether checkpoints hold experts' matrices as [E, in, out], and not as [E, out, in] like
    transformers."""


QWEN3 = (Qwen3VLProcessor, Qwen3VLVideoProcessor)
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": Family("Qwen2.5-VL", Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": Family("Qwen3-VL", *QWEN3),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", *QWEN3, experts_turned=True),
    "qwen3_5": Family("Qwen3.5", *QWEN3),
    "qwen3_5_moe": Family("Qwen3.5-MoE", *QWEN3),
}


def check_family(name: str, where: str) -> Family:
    """The family of a `model_type`. Raises ValueError, beginning with `where`, for one that is not listed."""
    if name not in FAMILIES:
        listed = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        raise ValueError(f"{where} ({name}) must be one of {listed}")
    return FAMILIES[name]
