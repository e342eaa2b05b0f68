"""One rule for where the answer is: an answer that is moved, wrapped, translated or prefixed keeps its verdict."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.answers import is_degenerate, marked_answer, stated_answer
from vlm_sapo.rewards.verifiers.table import VERIFIERS

BEFORE = st.sampled_from(
    [
        "",
        "Look at the drawing first. ",
        "<think>Is it {other}? I don't think so.</think>\n",
        "Perhaps \\boxed{{{other}}}. No. ",
        "<answer>{other}</answer> was wrong.\n",
        "In Figure 3 there are two sides.\n\n",
        "先看图。\n",
    ]
)
MARKED = [
    "\\boxed{{{answer}}}",
    "<answer>{answer}</answer>",
    "<answer>\\boxed{{{answer}}}</answer>",
    "$\\boxed{{{answer}}}$",
]
STATED = [
    "The answer is {answer}.",
    "**Answer:** {answer}",
    "\n### Final Answer\n\n{answer}",
    "Therefore, the correct answer is **{answer}**.",
    "So the answer must be {answer}",
    "答案是：{answer}。",
    "故答案为{answer}",
]
AFTER = st.sampled_from(["", " ", "\n", "\n\nThat is all."])
PAIRS = [
    ("math", "3/4", "3/5"),
    ("number", "17", "71"),
    ("choice", "B", "C"),
    ("exact", "blue", "red"),
    ("auto", "12", "21"),
]


def verdict(name: str, gold: str, finding: str, text: str) -> float | str:
    return graded(VERIFIERS[name], text, example(gold), finding=finding)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(PAIRS), BEFORE, st.sampled_from(MARKED), AFTER, st.sampled_from(["marked", "stated"]))
def test_a_marked_answer_keeps_its_verdict(pair, before, form, after, finding):
    name, right, wrong = pair
    for answer, other, score in ((right, wrong, 1), (wrong, right, 0)):
        text = before.format(other=other) + form.format(answer=answer) + after
        assert verdict(name, right, finding, text) == score, text


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(PAIRS), BEFORE, st.sampled_from(STATED), AFTER)
def test_a_stated_answer_keeps_its_verdict(pair, before, form, after):
    name, right, wrong = pair
    for answer, other, score in ((right, wrong, 1), (wrong, right, 0)):
        text = before.format(other=other) + form.format(answer=answer) + after
        assert verdict(name, right, "stated", text) == score, text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(PAIRS), BEFORE, st.sampled_from(STATED))
def test_training_never_reads_a_statement(pair, before, form):
    name, right, wrong = pair
    text = before.format(other=wrong) + form.format(answer=right)
    assert verdict(name, right, "marked", text) in (0, "no_answer"), text


@pytest.mark.parametrize(
    ("response", "marked", "stated"),
    [
        ("\\boxed 5", "5", "5"),
        ("\\boxed{\\boxed{5}}", "5", "5"),
        ("<ANSWER>5</ANSWER>", "5", "5"),
        ("<answer>4</answer> <answer>5", "4", "5"),
        ("\\boxed{}", "", ""),
        ("5 </think>", None, None),
        ("Final answer — 12", None, "12"),
        ("The answer choices are A, B and C.\nI take them all.", None, None),
        ('{"reason": "looked", "answer": "12"}', None, "12"),
        ("答案选项如下", None, "答案选项如下"),
    ],
)
def test_forms(response, marked, stated):
    assert (marked_answer(response), stated_answer(response)) == (marked, stated)


def test_a_text_that_repeats_itself_is_known_by_how_it_compresses():
    assert is_degenerate("ab" * 1000) and is_degenerate("I think that it is so. " * 200)
    assert not is_degenerate("ab" * 100)
    assert not is_degenerate(" ".join(str(number * number % 9973) for number in range(2000)))


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" * 2500 + "7" + "}" * 2500,
        "<answer>\\boxed{" * 800 + "7" + "}</answer>" * 800,
        "\\boxed 3 " * 2000 + "\\boxed 7",
        "\\boxed{" * 2500 + "\\boxed{7}",
    ],
)
def test_thousands_of_marks_are_read_at_once(response):
    start = time.perf_counter()
    assert marked_answer(response) == stated_answer(response) == "7"
    assert time.perf_counter() - start < 2
