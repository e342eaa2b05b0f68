"""The layout of a response that its prompt asks for, and the reward part that checks it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_sapo.rewards.verifiers.answers import boxed
from vlm_sapo.types import Example

NAMES = ("<think>", "<answer>", "\\boxed")
"""What a prompt names if it asks for it."""


@dataclass(frozen=True)
class ResponseLayout:
    """What a prompt asks a response to have. Thoughts that it doesn't ask for are allowed."""

    thoughts: bool
    """`<think> </think>` before the answer."""
    tag: bool
    """`<answer> </answer>` around the answer."""
    box: bool
    """The answer in `\\boxed{}`."""

    @classmethod
    def asked(cls, example: Example) -> ResponseLayout:
        """What a row's system prompt and template name, or its problem where they name nothing."""
        text = f"{example.system or ''}\n{example.template}"
        if not any(name in text for name in NAMES):
            text = example.problem
        return cls(*(name in text for name in NAMES))

    def check(self) -> None:
        """Raises ValueError if the prompt asks for nothing."""
        if not (self.thoughts or self.tag or self.box):
            raise ValueError(
                "format has no pattern, and the prompt asks for none of <think> </think>, <answer> </answer> "
                "and \\boxed{}; ask for a layout in data.template, or set the part's args.pattern"
            )

    def fits(self, response: str) -> bool:
        """Whether a response has this layout: its thoughts closed, and one answer block at its end or a box
        behind them."""
        thoughts, end, rest = response.rpartition("</think>")
        if "<think>" in rest or (self.thoughts and not (end and thoughts.startswith("<think>"))):
            return False
        if self.tag:
            tags = rest.count("<answer>"), rest.count("</answer>")
            return tags == (1, 1) and rest.endswith("</answer>")
        return bool(boxed(rest) if self.box else rest.strip())

    def write(self, answer: str) -> str:
        """A response of this layout with an answer, in a box if the prompt asks for nothing."""
        text = f"\\boxed{{{answer}}}" if self.box or not self.tag else answer
        text = f"<answer>{text}</answer>" if self.tag else text
        return f"<think>Looking.</think> {text}" if self.thoughts else text


def format(response: str, example: Example, *, pattern: str | None = None) -> float:
    """1.0 where the whole response has the layout that the row's prompt asks for, or `pattern` (a regular
    expression, `.` matching newlines)."""
    if pattern is None:
        layout = ResponseLayout.asked(example)
        layout.check()
        return float(layout.fits(response.strip()))
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)
