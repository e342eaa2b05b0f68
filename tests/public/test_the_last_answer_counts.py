"""A grader took an earlier answer, a formula in a box, or the beginning of another answer for the final one.

Source: https://github.com/openai/evals/issues/1767
"""

import pytest

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.table import VERIFIERS


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"It obeys \boxed{p V = n R T}.\n\n**Answer: C**".replace(r"\n", "\n"), 1),
        ("Option B looks wrong, so the answer must be C", 1),
        ("ANSWER: B ... no, ANSWER: C", 1),
        ("ANSWER: C ... no, ANSWER: B", 0),
        ("ANSWER: CD", 0),
        ("### Final answer\n\nC", 1),
        ("**Final Answer**\n(C)", 1),
        ("| Answer | C |", 1),
        (r"The answer is $\boxed{C}$. The answer is correct because of the law.", 1),
        ("It must be option C.", 1),
        ("I would choose (C)", 1),
        ("We pick C because of its colour", 1),
        ("I would not choose C", "no_answer"),
        ("It can't be C.", "no_answer"),
        ("Both A and C are mentioned in the text", "no_answer"),
    ],
)
def test_letters(response, score):
    assert graded(VERIFIERS["choice"], response, example("C"), finding="stated") == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("The answer is:\n\n$$\n\\frac{17}{4}\n$$", 1),
        ("We get \\boxed{4}. Wait, I forgot a quarter: the answer is 17/4.", 1),
        ("We get 17/4. Wait, that was another triangle: the answer is \\boxed{4}.", 0),
        ("Therefore, x = 17/4.\n\nThis uses the rule of chapter 12.", 1),
        ("Therefore, x = 12.\n\nThis uses the rule of chapter 17/4.", 0),
        ("\\boxed{17/4}\n\nThe answer is not 4.", 1),
    ],
)
def test_values(response, score):
    assert graded(VERIFIERS["math"], response, example(r"\frac{17}{4}"), finding="stated") == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"<answer>58</answer> or rather \boxed{59}", 1),
        (r"\boxed{59} or rather <answer>58</answer>", 0),
        (r"<answer>The sum is \boxed{59}</answer>", 1),
        (r"\boxed{59} and \boxed{58", 1),
        ("<answer>59", "no_answer"),
        ("The answer is 59", "no_answer"),
    ],
)
def test_training_reads_the_last_complete_mark(response, score):
    assert graded(VERIFIERS["math"], response, example("59")) == score
