"""The layout of a response that its prompt asks for, and the reward part that checks it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_sapo.types import Example

NAMES = ("<think>", "<answer>", "\\boxed")
"""What a prompt names if it asks for it."""


@dataclass(frozen=True)
class Layout:
    """What a prompt asks a response to have. Thoughts that it doesn't ask for are allowed."""

    thoughts: bool
    """`<think> </think>` before the answer."""
    tag: bool
    """`<answer> </answer>` around the answer."""
    box: bool
    """The answer in `\\boxed{}`."""

    @classmethod
    def asked(cls, example: Example) -> Layout:
        """What a row's system prompt and template name, or its problem where they name nothing."""
        text = f"{example.system or ''}\n{example.template}"
        if not any(name in text for name in NAMES):
            text = example.problem
        return cls(*(name in text for name in NAMES))

    @property
    def pattern(self) -> str:
        """A regular expression of the whole response, `.` matching newlines. Raises ValueError if the prompt
        asks for nothing."""
        if not (self.thoughts or self.tag or self.box):
            raise ValueError(
                "format has no pattern, and the prompt asks for none of <think> </think>, <answer> </answer> "
                "and \\boxed{}; ask for a layout in data.template, or set the part's args.pattern"
            )
        thoughts = r"<think>.*?</think>" if self.thoughts else r"(?:.*</think>)?+"
        thoughts += r"(?!.*<think>)"  # none that stays open
        if self.tag:
            return rf"{thoughts}(?:(?!<answer>).)*<answer>(?:(?!<answer>).)*</answer>"
        return rf"{thoughts}.*\\boxed\{{.*\}}.*" if self.box else rf"{thoughts}.*\S.*"

    def write(self, answer: str) -> str:
        """A response of this layout with an answer, in a box if the prompt asks for nothing."""
        text = f"\\boxed{{{answer}}}" if self.box or not self.tag else answer
        text = f"<answer>{text}</answer>" if self.tag else text
        return f"<think>Looking.</think> {text}" if self.thoughts else text


def format(response: str, example: Example, *, pattern: str | None = None) -> float:
    """1.0 where the whole response has the layout that the row's prompt asks for, or `pattern` (a regular
    expression, `.` matching newlines)."""
    pattern = Layout.asked(example).pattern if pattern is None else pattern
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)
