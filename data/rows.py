"""Transforms of the recipes: one row in, one row out."""

from __future__ import annotations

import re


def answer_in_tags(row: dict) -> dict:
    """`answer` is what stands in the last answer tag of `solution` (of `answer` where there is none), or all
    of it without a tag."""
    held = str(row.get("solution") or row["answer"])
    found = re.findall(r"<answer>(.*?)</answer>", held, re.DOTALL)
    return row | {"answer": (found[-1] if found else held).strip()}


def unboxed(row: dict) -> dict:
    """The row without the `\\boxed{}` around its answer."""
    match = re.fullmatch(r"\s*\\boxed\{(.*)\}\s*", str(row["answer"]), re.DOTALL)
    return row | {"answer": match[1]} if match else row


def first_label(row: dict) -> dict:
    """ChartQA: `answer` is the label, which the hub holds as a list of one."""
    held = row.get("label", row.get("answer"))
    return row | {"answer": held[0] if isinstance(held, list) else held}


def last_sentence(row: dict) -> dict:
    """FormalGeo7k restates the figure in the text; only the question is left, so the picture is needed. Rows
    of other releases are as they should be."""
    if "problem_text_en" not in row:
        return row
    sentences = re.split(r"(?<=[.?!])\s+", row["problem_text_en"].strip())
    return row | {"problem_text_en": sentences[-1]}
