"""The one text normaliser: brings answers into one spelling, at a named level, before they are compared."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import Literal

Level = Literal[
    "unicode", "text", "folded", "latex", "expression", "number", "compact", "spaced_digits", "words",
    "letters", "mathvision",
]  # fmt: skip
SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "∕": "/", "\u00a0": " ", "\u2009": " ",
        "\u202f": " ", "′": "'", "º": "°",
        "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "±": r"\pm ", "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "²": "^{2}", "³":
        "^{3}", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "∈": r"\in ", "∠": r"\angle ", "△": r"\triangle ", "∅": r"\emptyset ",
        "。": ".", "、": ",", "\u2007": " ", "\u2008": " ", "\u200a": " ", "\u3000": " ",
    }
    | {chr(0xFF00 + code): chr(0x20 + code) for code in range(1, 0x5F)}
)  # fmt: skip
"""Signs in ASCII or LaTeX; the last line is the full-width forms of ASCII."""
UNITS = (
    "square|sq|cubic|(?:milli|centi|deci|kilo)?(?:met(?:er|re)|gram|lit(?:er|re))s?|inches|inch|feet|foot|ft"
    "|yards?|miles?|mm|cm|dm|km|kg|mg|ml|mL|mph|degrees?|deg|radians?|units?|seconds?|minutes?|hours?"
    "|days?|weeks?|years?|dollars?|cents?|points?|people|cups?|[\u4e00-\u9fff]+"
)
LETTERS = "m|s|g|h|hr|min|l|L|N|J|kJ|W|kW|V|A|K|Pa|kPa|Hz|kHz|MHz|eV|mol|rad"
"""Units only after a number or another unit; elsewhere they are symbols."""
NUMBER_WITH_LETTER = re.compile(rf"\d(?:{LETTERS})(?![A-Za-z])")
POWER = r"\.?(?:\s*\^\s*\{?\s*-?[1-3](?!\d)\s*\}?)?"
UNIT_WORDS = re.compile(
    rf"(?<![A-Za-z\\])(?:m/s(?:\^\{{?2\}}?)?|(?:{UNITS})(?![A-Za-z]){POWER}"
    rf"(?:\s*(?:/|per)\s*(?:{UNITS}|{LETTERS}){POWER})?)(?![A-Za-z])"
    r"|(?<=[A-Za-z])(?:平方|立方)?(?:[毫厘分千]?米|[毫千]?克|毫?升|公[里斤分])(?![\u4e00-\u9fff])"
)
DEGREES = r"\^\s*\{?\s*(?:\\circ|°)\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])|°"
ONE_UNIT = rf"(?:(?:{UNITS}|{LETTERS})(?![A-Za-z]){POWER}|(?:{DEGREES})\s*[CF]?)"
TIMES_TEN = r"\s*(?:\\times|\\cdot|[*xX])\s*10\s*\^\s*\{?\s*([-+]?\d{1,4})(?!\d)\s*\}?"
AMOUNT = re.compile(
    r"([-+]?)\s*[$€£¥]?\s*([1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?|\d+,\d\d"
    rf"|\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d{{1,4}})|{TIMES_TEN})?"
    rf"\s*({ONE_UNIT}(?:(?:\s*(?:/|\\cdot|\*|per\s)\s*|\s+){ONE_UNIT})*)?"
)
"""A number, its power of ten and its unit; a decimal comma only before two decimals: `1,5` may be a list."""
DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+|\d+),(\d+)(?![\d.,])")
EMPHASIS = re.compile(r"(\*{1,3}|`)(?![\s*`])([^*`]+)(?<!\s)\1([.!]?)")
TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox|hbox)\s*\{([^{}]*)\}"
)


CURRENCY = "$€£¥"
ASSIGNMENT = re.compile(r"^(?:[A-Za-z]\w{0,20}|\\[a-z]+)\s*=\s*")
WORD = re.compile(r"[^\s.,:;!?()\"'*$]+(?:[.,]\d+)*")
SPACE_BESIDE_A_DIGIT_ONLY = re.compile(r"(?<!\d) | (?!\d)")


def normalize(text: str, level: Level) -> str:
    """The text at a level; each is built on the one in the second column.

    | level | built on | what it does | read by |
    | --- | --- | --- | --- |
    | `unicode` | | NFKC form | `short` |
    | `text` | `unicode` | single spaces | `exact` with `case`, `edit_distance` |
    | `folded` | `text` | no upper case | `exact`, `anls`, `json_fields` |
    | `latex` | | ASCII for signs; no delimiters, text, size and space commands | `short`, `exact`, `anls` |
    | `expression` | `latex` | math-verify's spelling: roots and fractions written out, no units | `math` |
    | `number` | `latex` | `1/2` for fractions, `%` for percent; no `x =`, no currency in front | `number` |
    | `compact` | `latex` | no spaces, no upper case | `choice`, majority vote |
    | `spaced_digits` | `latex` | as `compact`, but `1 2` isn't `12`; no final stop or outer braces | `math` |
    | `words` | `latex` | words and numbers, no punctuation, no upper case | `choice` |
    | `letters` | `latex` | letters and digits, no font commands, no upper case | `choice` |
    | `mathvision` | | the rule of MATH-Vision's authors, on its own so that nothing changes it | `official` |
    """
    match level:
        case "unicode":
            return unicodedata.normalize("NFKC", text)
        case "text":
            return " ".join(normalize(text, "unicode").split())
        case "folded":
            return normalize(text, "text").casefold()
        case "mathvision":
            return _by_mathvision(text)
    text = _without_latex_dressing(text)
    match level:
        case "latex":
            return text
        case "expression":
            return _to_expression(text)
        case "number":
            return _to_number(text)
        case "compact":
            return text.replace(" ", "").casefold()
        case "spaced_digits":
            return SPACE_BESIDE_A_DIGIT_ONLY.sub("", text).rstrip(".,;").strip("{}").casefold()
        case "words":
            return " ".join(WORD.findall(text.casefold()))
        case "letters":
            return re.sub(r"mathrm|mathbf|textbf|text|quad|bf|\W", "", text.casefold())
    raise AssertionError(level)


def _without_latex_dressing(text: str) -> str:
    text = text.translate(SIGNS).replace(r"\varnothing", r"\emptyset").replace(r"\!", "")
    if emphasized := EMPHASIS.fullmatch(text.strip()):
        text = emphasized[2] + emphasized[3]
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[,;:]|\\ |~|\\(?:q?quad|(?:thin|med|thick|en)space)(?![A-Za-z])", " ", text)
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", text.replace(r"\$", "＄"))
    text = re.sub(r" ?\{ ?, ?\} ?", ",", text)
    text = re.sub(r"\\[()\[\]]", "", text.replace("$", "") if text.count("$") > 1 else text)
    text = re.sub(r"\\([%&#])", r"\1", text.replace("＄", "$"))
    while (shorter := TEXT_COMMAND.sub(r" \1 ", text)) != text:
        text = shorter
    text = " ".join(text.split())
    return r"\emptyset" if re.fullmatch(r"\\?\{ ?\\?\}", text) else text


def _to_expression(text: str) -> str:
    text = re.sub(rf"{DEGREES}|[{CURRENCY}]\s*(?=[\d.])", "", text)
    text = re.sub(r"\{ +| +\}", lambda match: match[0].strip(), text)
    text = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)  # math-verify sees an imaginary unit only as a word
    text = re.sub(r"(?<=\d)[eE]([-+]?\d{1,4})(?![\d.])", r" \\cdot 10^{\1}", text)
    text = re.sub(r"(?<![\d.,/^_}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = write_roots(text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = UNIT_WORDS.sub(" ", text)
    if _all_commas_separate_thousands(text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))(?!\d{3},?\d{1,2}(?:\D|$))", "", text)
    text = text.replace("**", "^")
    text = text.replace("*", r" \cdot ") if "\\" in text else text
    return " ".join(text.split()).rstrip(".,;").strip()


def _to_number(text: str) -> str:
    text = text.strip("*").rstrip(".").strip()
    text = ASSIGNMENT.sub("", text)
    text = re.sub(r"\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", text).strip()
    text = re.sub(rf"(?<=\d){TIMES_TEN}", r"e\1", text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/]| /)", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(r"(?<=\d)\s*(?:%|per\s?cent\b)", "%", text, flags=re.IGNORECASE)
    return re.sub(rf"^([-+]?)\s*[{CURRENCY}]?\s*", r"\1", text)


def _by_mathvision(text: str) -> str:
    text = re.sub(r"\s+|\^\{?\\circ\}?|\\text\{|units?", "", text.lower()).strip("$.")
    return re.sub(r"^\(?([a-e])\)?\}?$", r"\1", text.rpartition("=")[2])


def amount(text: str) -> tuple[Decimal | None, str]:
    """The number and the unit of a text that is nothing else; None and "" for any other one."""
    match = AMOUNT.fullmatch(normalize(text, "latex").strip("{} ").rstrip(".,; "))
    if not match:
        return None, ""
    sign, number, exponent, power_of_ten, unit = match.groups(default="")
    number = re.sub(r"[ ,](?=\d{3}(?!\d))", "", number)
    return Decimal(f"{sign}{number.replace(',', '.')}e{exponent or power_of_ten or 0}"), unit


def with_decimal_point(text: str) -> str:
    """`3,5` as 3.5 and `1.234,56` as 1234.56: for texts whose commas are known to be decimal ones."""
    return DECIMAL_COMMA.sub(lambda match: f"{match[1].replace('.', '')}.{match[2]}", text)


def _all_commas_separate_thousands(text: str) -> bool:
    """Whether every comma of the text separates thousands."""
    return re.fullmatch(r"[^,]*?\b[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?\b[^,]*", text) is not None


def write_roots(text: str) -> str:
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
