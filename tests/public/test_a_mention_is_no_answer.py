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
        ("The answer is not 9.", "no_answer"),
        ("See Figure 9.", "no_answer"),
        ("如图9所示。", "no_answer"),
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


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("Many bars can be seen.\nThe label of line 9 is missing.", 0),
        ("There are 9 bars. I don't know more.", 0),
        ("The answer is unclear. Look at 9 again.", 0),
        ("Let me look.\nIn Figure 9 we see bars.\nHence the answer is that nobody knows.", 0),
        ("The sum of both bars follows. Therefore the sum is 9. <|im_start|>user", 1),
        ("We add 4 + 5 = 9 Therefore, the sum is 9.", 1),
        ("Look at the bars.\nThe answer is 9, for 4 + 5 is 9.", 1),
        ("Look at the bars.\nThe sum of both is 9.", 1),
        ("Look at the bars.\nx = 9", 1),
    ],
)
def test_numbers_beside_words_for_math(response, score):
    assert graded(VERIFIERS["math"], response, example("9"), finding="stated") == score


COLOURS = "Which colour has the bar?\nA. red\nB. blue\nC. green"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("The answer is not blue.", "no_answer"),
        ("It can't be blue.", "no_answer"),
        ("Blue is wrong.", "no_answer"),
        ("I can rule out (B).", "no_answer"),
        ("It is not (B).", "no_answer"),
        ("不选B", "no_answer"),
        ("B是错误的", "no_answer"),
        ("选B", 1),
        ("B是正确的", 1),
        ("The bar is blue.", 1),
        ("It isn't dark, so it is blue.", 1),
        ("It must be (B).", 1),
    ],
)
def test_options_that_are_denied(response, score):
    assert graded(VERIFIERS["choice"], response, example("B", problem=COLOURS), finding="stated") == score
