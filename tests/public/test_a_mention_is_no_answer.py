"""An extractor without an answer handed over the whole response, and any number in it earned the reward.

Source: https://github.com/PrimeIntellect-ai/verifiers/pull/1028
"""

import pytest

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.table import VERIFIERS


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("I'm sorry, I cannot make out the label of Figure 9.", "no_answer"),
        ("The image does not show any bars. It is 9 pixels high.", "no_answer"),
        ("无法看清图9中的数字。", "no_answer"),
        ("As an AI I can't read 9 digits.", "no_answer"),
        ("9", 1),
        ("9 bars", 1),
        ("There are 9 bars.", 1),
        ("The answer is 9, I think.", 1),
        ("There are 8 bars.", 0),
    ],
)
def test_numbers(response, score):
    assert graded(VERIFIERS["number"], response, example("9"), finding="stated") == score


@pytest.mark.parametrize("response", ["The bars reach 9.", "9", "The answer is 9"])
def test_training_wants_a_mark(response):
    assert graded(VERIFIERS["number"], response, example("9")) == "no_answer"
