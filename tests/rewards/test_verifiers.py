"""Case tables of the verifiers, and what a custom reward may and may not do."""

import pytest

from vlm_sapo.rewards.combine import RewardError, build_reward
from vlm_sapo.rewards.verifiers import auto, choice, format, marked_answer, math
from vlm_sapo.types import Completion, Example

COLORS = {"choices": ["red", "green", "dark blue"]}


def example(answer: str, **columns) -> Example:
    return Example(id="r1", problem="p", answer=answer, columns=columns)


def completion(text: str) -> Completion:
    return Completion(ids=None, logprobs=None, text=text, finish="stop")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{3}", "3"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{4} and then \boxed{5", "4"),
        ("<answer> 7 </answer>", "7"),
        (r"<answer>\boxed{8}</answer>", "8"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("the answer is 3", None),
        ("", None),
    ],
)
def test_marked_answer(response, answer):
    assert marked_answer(response) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("3", "3", 1),
        ("3", "3.0", 1),
        ("3", "4", 0),
        ("12*sqrt(3)", r"12\sqrt{3}", 1),
        ("12*sqrt(3)", "12*sqrt(3)", 1),
        ("12*sqrt(3)", "12", 0),
        ("64*pi/5", r"\frac{64\pi}{5}", 1),
        ("64*pi/5", r"\frac{64}{5}", 0),
        (r"2 \sqrt { 221 }", r"2\sqrt{221}", 1),
        ("3/7", r"\frac37", 1),
        ("3/7", r"\frac{3}{8}", 0),
        ("30", r"30^\circ", 1),
        ("5", "x", 0),
        ("3", "", 0),
    ],
)
def test_math(gold, answer, score):
    assert math(f"So \\boxed{{{answer}}}", example(gold)) == score


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("red", "red", 1),
        ("red", "Red.", 1),
        ("red", "A", 1),
        ("red", "(A)", 1),
        ("red", "A. red", 1),
        ("red", "(A) red", 1),
        ("red", r"\text{red}", 1),
        ("red", "B", 0),
        ("red", "B. red", 0),
        ("red", "red or green", 0),
        ("red", "D", 0),
        ("C", "dark blue", 1),
        ("C", "c", 1),
        ("C", "A", 0),
        ("red", "purple", 0),
    ],
)
def test_choice(gold, answer, score):
    assert choice(f"\\boxed{{{answer}}}", example(gold, **COLORS)) == score
    assert auto(f"\\boxed{{{answer}}}", example(gold, **COLORS)) == score


def test_choice_by_letter_alone_needs_no_options():
    assert choice(r"\boxed{B}", example("B")) == 1.0
    assert choice(r"\boxed{A}", example("B")) == 0.0
    assert choice("B", example("B")) == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"<think>a\nb</think> so \boxed{1}", 1),
        (r"<think></think>\boxed{1} done", 1),
        (r"so \boxed{1}", 0),
        (r"<think>a</think> so 1", 0),
    ],
)
def test_format(response, score):
    assert format(response, example("1")) == score


def test_parts_are_weighted_and_named():
    parts = [{"name": "math", "label": "accuracy", "weight": 0.9}, {"name": "format", "weight": 0.1}]
    score = build_reward(parts)(completion(r"\boxed{3}"), example("3"))
    assert score.total == pytest.approx(0.9)
    assert score.parts == {"accuracy": 1.0, "format": 0.0}


CUSTOM = """
def short(response, example, limit=10):
    return float(len(response) < limit) if example.columns["kind"] == "a" else 0.5

def broken(response, example):
    return example.columns["nothing"]

def words(response, example):
    return "good"

def endless(response, example):
    return float("nan")
"""


@pytest.fixture
def custom(tmp_path):
    (tmp_path / "mine.py").write_text(CUSTOM)
    return lambda name, **args: build_reward([{"name": f"{tmp_path}/mine.py:{name}", "args": args}])


def test_a_custom_reward_from_a_file(custom):
    assert custom("short")(completion("1234"), example("x", kind="a")).parts == {"short": 1.0}
    assert custom("short", limit=3)(completion("1234"), example("x", kind="a")).total == 0.0
    assert custom("short")(completion("1234"), example("x", kind="b")).total == 0.5


@pytest.mark.parametrize(("name", "words"), [("broken", "KeyError"), ("words", "'good'"), ("endless", "nan")])
def test_a_bug_in_a_reward_stops_with_row_and_response(custom, name, words):
    with pytest.raises(RewardError) as error:
        custom(name)(completion("the response"), example("x"))
    assert all(word in str(error.value) for word in (name, "row r1", "'the response'", words))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maths", "did you mean 'math'"),
        ("no/such.py:f", "Python file that exists"),
        ("no.such.module:f", "importable module"),
        ("json:lods", "did you mean 'loads'"),
    ],
)
def test_an_unknown_reward_is_named(name, words):
    with pytest.raises(ValueError, match=r"reward.0.name") as error:
        build_reward([{"name": name}])
    assert words in str(error.value)
