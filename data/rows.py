"""Transforms of the recipes: one row in, one row out."""

from __future__ import annotations

import re


def answer_in_tags(row: dict) -> dict:
    """`answer` becomes the text of the last answer tag of `solution` (or of `answer`, where there is no
    `solution`), or all of it where there is no tag."""
    text = str(row.get("solution") or row["answer"])
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return row | {"answer": (tagged[-1] if tagged else text).strip()}


def unboxed(row: dict) -> dict:
    """The row without the `\\boxed{}` around its answer."""
    match = re.fullmatch(r"\s*\\boxed\{(.*)\}\s*", str(row["answer"]), re.DOTALL)
    return row | {"answer": match[1]} if match else row


def first_label(row: dict) -> dict:
    """ChartQA: `answer` is the label, which the hub holds as a list of one."""
    label = row.get("label", row.get("answer"))
    return row | {"answer": label[0] if isinstance(label, list) else label}


def last_sentence(row: dict) -> dict:
    """FormalGeo7k restates the figure in the text; only the question is left, so the image is needed. Rows
    of other releases are left as they are."""
    if "problem_text_en" not in row:
        return row
    sentences = re.split(r"(?<=[.?!])\s+", row["problem_text_en"].strip())
    return row | {"problem_text_en": sentences[-1]}
