"""Built-in verifiers: `(response, example, **args) -> float` between 0 and 1.

An answer counts only where the response marks it: in the last `\\boxed{...}`, else in the last
`<answer>...</answer>`. Without a mark it is wrong, since a guess at what was meant is a reward for luck.
"""

from __future__ import annotations

import re
import string

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from vlm_sapo.types import Example

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LETTER = re.compile(r"^\(?[A-Za-z]\)?[.:)]\s+")
OPTION_COLUMNS = ("choices", "options")


def marked_answer(response: str) -> str | None:
    """The text of the last complete `\\boxed{...}`, else of the last answer tag, else None."""
    start = response.rfind("\\boxed{")
    while start >= 0:
        begin = depth = start + len("\\boxed{")
        open_braces = 1
        while depth < len(response) and open_braces:
            open_braces += {"{": 1, "}": -1}.get(response[depth], 0)
            depth += 1
        if not open_braces:
            return response[begin : depth - 1].strip()
        start = response.rfind("\\boxed{", 0, start)
    tags = ANSWER_TAG.findall(response)
    return marked_answer(tags[-1]) or tags[-1].strip() if tags else None


def math(response: str, example: Example) -> float:
    """1.0 where the marked answer equals the gold one as text, as a number or as an expression
    (math-verify)."""
    answer = marked_answer(response)
    if not answer:
        return 0.0
    gold = marked_answer(example.answer) or example.answer.strip()
    if answer == gold:
        return 1.0
    golds, answers = _expressions(gold), _expressions(answer)
    return float(bool(golds and answers) and verify(golds, answers))


def _expressions(text: str) -> list:
    text = _to_latex(text)
    latex = "\\" in text or "$" in text or "^" in text
    wrapped = text if not latex or "$" in text else f"${text}$"
    return parse(wrapped, [LatexExtractionConfig() if latex else ExprExtractionConfig()])


def _to_latex(text: str) -> str:
    """Plain `12*sqrt(3)` and `64*pi/5` as LaTeX, which is what the parser reads roots and constants in."""
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    while (match := re.search(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", text)) is not None:
        text = f"{text[: match.start()]}\\sqrt{{{match[1]}}}{text[match.end() :]}"
    return text.replace("*", "\\cdot ") if "\\" in text else text


def choice(response: str, example: Example) -> float:
    """1.0 where the marked answer names the gold option, by letter, by letter and text, or by text.

    Options come from the row's `choices` or `options`; without them only letters are compared.
    """
    answer = marked_answer(response)
    if not answer:
        return 0.0
    given = next((example.columns[name] for name in OPTION_COLUMNS if example.columns.get(name)), ())
    options = [_plain(LETTER.sub("", str(option).strip())) for option in given]
    gold, chosen = _option(example.answer, options), _option(answer, options)
    return float(gold is not None and chosen == gold)


def _option(text: str, options: list[str]) -> int | None:
    """Index of the option that the text names, or None."""
    text = _plain(text)
    if text in options:
        return options.index(text)
    match = re.fullmatch(r"\(?([a-z])\)?(?:[.:)]?\s+(.*)|[.:)])?", text, re.DOTALL)
    if not match:
        return None
    index = string.ascii_lowercase.index(match[1])
    if options and (index >= len(options) or (match[2] and match[2] != options[index])):
        return None
    return index


def _plain(text: str) -> str:
    """Text without case, LaTeX text commands, dollar signs, doubled or outer spaces and final full stop."""
    text = re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", text)
    return " ".join(text.replace("$", "").split()).rstrip(".").casefold()


def format(response: str, example: Example, *, pattern: str = r"<think>.*</think>.*\\boxed\{.*\}.*") -> float:
    """1.0 where the whole response has the layout `pattern` (a regular expression, `.` matching newlines)."""
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)


def auto(response: str, example: Example) -> float:
    """`choice` for rows with choices or options, `math` for the others."""
    has_options = any(example.columns.get(name) for name in OPTION_COLUMNS)
    return (choice if has_options else math)(response, example)


VERIFIERS = {"auto": auto, "math": math, "choice": choice, "format": format}
