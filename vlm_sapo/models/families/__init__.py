"""The supported model families, each with what differs beyond what transformers handles.

docs/families.md says what works for which family, and how to add one.
"""

from __future__ import annotations

from difflib import get_close_matches

from vlm_sapo.models.families.family import Family
from vlm_sapo.models.families.gemma import GEMMA
from vlm_sapo.models.families.glm import GLM
from vlm_sapo.models.families.internvl import INTERNVL
from vlm_sapo.models.families.lfm2 import LFM2
from vlm_sapo.models.families.qwen import QWEN
from vlm_sapo.models.families.smolvlm import SMOLVLM

THOUGHT_TAGS = ("<think>", "</think>")
FAMILIES: dict[str, Family] = QWEN | GLM | INTERNVL | GEMMA | SMOLVLM | LFM2
"""By transformers' `model_type`."""


def check_family(name: str, where: str) -> Family:
    """The family of a `model_type`. Raises ValueError, starting with `where`, if it is not supported."""
    if name not in FAMILIES:
        listed = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        close = get_close_matches(name.lower(), FAMILIES, n=1, cutoff=0.8)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{where} ({name}) must be one of {listed}{hint}")
    return FAMILIES[name]
