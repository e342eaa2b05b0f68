"""Brings answers into one spelling before they are compared: unicode signs, text commands, units, spacing."""

from __future__ import annotations

import re

SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "∕": "/", "：": ":", "，": ",", "（": "(",
        "）": ")", "＝": "=", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "′": "'", "º": "°",
        "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "±": r"\pm ", "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "²": "^{2}", "³":
        "^{3}", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "∈": r"\in ", "∠": r"\angle ",
    }
)  # fmt: skip
UNITS = (
    "square|sq|cubic|millimeters?|centimeters?|meters?|metres?|kilometers?|inches|inch|feet|foot|ft|yards?|miles?"
    "|mm|cm|dm|km|kg|mg|ml|mL|m/s|km/h|mph|grams?|liters?|litres?|degrees?|deg|units?|seconds?|minutes?|hours?"
    "|days?|weeks?|years?|dollars?|cents?|points?|people|cups?|[\u4e00-\u9fff]+"
)
UNIT_WORDS = re.compile(rf"(?<![A-Za-z\\])(?:{UNITS})(?![A-Za-z])\.?(?:\s*\^\s*\{{?[23]\}}?)?")
TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox|hbox)\s*\{([^{}]*)\}"
)


def plain(text: str) -> str:
    """The text without math delimiters, text commands, sizing and spacing commands; unicode signs
    replaced."""
    text = text.translate(SIGNS)
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[,;:!]|\\ |~|\\(?:quad|qquad)(?![A-Za-z])", " ", text)
    text = re.sub(r"\\[()\[\]]", "", text.replace("$", "") if text.count("$") > 1 else text)
    text = re.sub(r"\\([%$&#])", r"\1", text)
    while (shorter := TEXT.sub(r" \1 ", text)) != text:
        text = shorter
    return " ".join(text.split())


def normalise(text: str) -> str:
    """LaTeX in the spelling that math-verify reads: roots, fractions, degrees and constants written out,
    units gone. What is no LaTeX stays readable as such."""
    text = plain(text)
    text = re.sub(r"\^\s*\{?\s*(?:\\circ|°)\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])|°", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = roots(text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = UNIT_WORDS.sub(" ", text)
    text = (
        re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))(?!\d{3},?\d{1,2}(?:\D|$))", "", text) if _thousands(text) else text
    )
    text = text.replace("**", "^")
    text = text.replace("*", r" \cdot ") if "\\" in text else text
    return " ".join(text.split()).rstrip(".").strip()


def _thousands(text: str) -> bool:
    """Whether every comma of the text separates thousands."""
    return re.fullmatch(r"[^,]*?\b\d{1,3}(?:,\d{3})+(?:\.\d+)?\b[^,]*", text) is not None


def roots(text: str) -> str:
    """`√{2}`, `√(x+1)`, `√2`, `sqrt(3)` and `sqrt{3}` as `\\sqrt{...}`."""
    text = re.sub(r"√\s*(?=[{(])|(?<![\\A-Za-z])sqrt\s*(?=[{(])", r"\\sqrt", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    while (match := re.search(r"\\sqrt\(", text)) is not None:
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        inner = text[match.end() : end - 1] if not depth else text[match.end() :]
        text = f"{text[: match.start()]}\\sqrt{{{inner}}}{text[end:]}"
    return text
