"""Verifiers: functions that read a response and grade it against a gold answer; table.py lists them.

All are here by the names that a config gives them: `from vlm_sapo.rewards.verifiers import math, format`.
"""

from vlm_sapo.rewards.verifiers.answers import marked_answer
from vlm_sapo.rewards.verifiers.boxes import box, point_in_box
from vlm_sapo.rewards.verifiers.choice import choice
from vlm_sapo.rewards.verifiers.judge import judge
from vlm_sapo.rewards.verifiers.layout import format
from vlm_sapo.rewards.verifiers.math import list_items as list
from vlm_sapo.rewards.verifiers.math import math
from vlm_sapo.rewards.verifiers.number import count, number
from vlm_sapo.rewards.verifiers.official import chartqa
from vlm_sapo.rewards.verifiers.table import auto
from vlm_sapo.rewards.verifiers.text import (
    anls,
    edit_distance,
    exact,
    json_fields,
    language,
    length,
    short,
)

__all__ = [
    "anls",
    "auto",
    "box",
    "chartqa",
    "choice",
    "count",
    "edit_distance",
    "exact",
    "format",
    "json_fields",
    "judge",
    "language",
    "length",
    "list",
    "marked_answer",
    "math",
    "number",
    "point_in_box",
    "short",
]
