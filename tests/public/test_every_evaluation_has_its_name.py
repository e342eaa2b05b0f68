"""With several evaluation sets the summary named only some of them, and the last line told of one.

Source: https://github.com/huggingface/transformers/issues/16474
"""

import pytest

from vlm_sapo.cli import _report


def result(value: float) -> dict:
    return {"pass@1": value, "ci95": [0.0, 1.0], "n": 10}


TWO = {
    "steps": 4,
    "seconds": 1.0,
    "eval_before/held-out": result(0.25),
    "eval_after/held-out": result(0.5),
    "eval_before/mathvista": result(0.125),
    "eval_after/mathvista": result(0.0625),
}
TWO_LINES = ["held-out pass@1: 0.250 before, 0.500 after", "mathvista pass@1: 0.125 before, 0.062 after"]


@pytest.mark.parametrize(
    ("summary", "lines"),
    [
        (TWO, TWO_LINES),
        ({"steps": 4, "eval_before": result(0.25), "eval_after": result(0.5)}, TWO_LINES[:1]),
        (
            {"eval_before": result(0.25), "eval_after": result(0.5)}
            | {name: TWO[name] for name in TWO if name.endswith("mathvista")},
            TWO_LINES,
        ),
        ({"steps": 4, "seconds": 1.0}, []),
        ({"eval_after/held-out": result(0.5)}, []),
        (TWO | {"learnt_nothing": "nothing was learnt"}, [*TWO_LINES, "warning: nothing was learnt"]),
    ],
    ids=["two", "one of an older run", "two of an older run", "none", "only after", "learnt nothing"],
)
def test_the_last_lines_name_each_evaluation(summary, lines, capsys):
    _report(summary)
    assert capsys.readouterr().out.splitlines() == lines
