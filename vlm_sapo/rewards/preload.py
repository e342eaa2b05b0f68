"""Imported once, by the process that workers are forked from: the slow imports, and the parser's caches,
which fill with the first expressions that it reads."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers

from vlm_sapo.rewards import pool  # noqa: E402, F401
from vlm_sapo.rewards.verifiers.math import answers_match  # noqa: E402

for answer, gold in (
    (r"\frac{1}{2}", "0.5"),
    (r"2\sqrt{3} \pi", r"\sqrt{12} \cdot \pi"),
    (r"x^{2} + 3x - 1", r"3x + x^2 - 1"),
    (r"(1, -\frac{3}{4}]", r"(1, -0.75]"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"y = 2x + 1", r"2x + 1 = y"),
    (r"x_1 \ge \sin(30)", r"x_1 \geq \sin(30)"),
):
    answers_match(answer, gold)
