"""Case tables of the verifiers."""

import json

import pytest
from PIL import Image

from vlm_sapo.rewards.verifiers.answers import BadGold, NoAnswer, marked_answer, stated_answer
from vlm_sapo.rewards.verifiers.boxes import box, giou, iou, point_in_box
from vlm_sapo.rewards.verifiers.choice import choice
from vlm_sapo.rewards.verifiers.layout import ResponseLayout, format
from vlm_sapo.rewards.verifiers.math import math
from vlm_sapo.rewards.verifiers.number import count, number, read_number
from vlm_sapo.rewards.verifiers.table import auto
from vlm_sapo.rewards.verifiers.text import (
    anls,
    edit_distance,
    exact,
    json_fields,
    language,
    length,
    short,
)
from vlm_sapo.types import Example, ResponseText

COLORS = {"choices": ["red", "green", "dark blue"]}
IMAGE = Image.new("RGB", (200, 100))


def example(answer: str, **columns) -> Example:
    return Example(id="r1", problem=columns.pop("problem", "p"), answer=answer, columns=columns)


def graded(verifier, response, row, **args) -> float | str:
    """The score, or the outcome where there is none."""
    try:
        return verifier(ResponseText(response), row, **args)
    except (NoAnswer, BadGold) as error:
        return error.outcome


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{3}", "3"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{4} and then \boxed{5", "4"),
        ("<answer> 7 </answer>", "7"),
        (r"<answer>\boxed{8}</answer>", "8"),
        (r"\fbox{9}", "9"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
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
        ("3", "", "no_answer"),
        ("", "3", "bad_gold"),
        ("80°", "80", 1),
        ("2√{2}", r"2\sqrt{2}", 1),
        ("2√{2}", "2", 0),
        ("6√{2}-6", "6", 0),
        ("3√{3}cm", r"3\sqrt{3}", 1),
        ("9πcm^{2}", r"9\pi", 1),
        ("40海里", "40", 1),
        ("50", r"50 \text{ cm}", 1),
        ("50", "50 m", 1),
        ("1234", "1,234", 1),
        ("1000.99", "1000,99", 1),
        ("1", "1,2", 0),
        ("12", "1,2", 0),
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{3}", "0.33", 0),
        ("10001", "10000", 0),
        ("[1, 2)", "[1,2)", 1),
        ("[1, 2)", "[1,2]", 0),
        (r"\{1, 2\}", r"\{2, 1\}", 1),
        (r"(2,1),(3,1)", "(3,1),(2,1)", 1),
        ("x^2+y^2=1", "x^2 = 1 - y^2", 1),
        ("x = 3", "3", 1),
        ("3", "x = 3", 1),
        (r"I_{\max}=\frac{q}{\sqrt{2LC}}", r"\frac{q}{\sqrt{2CL}}", 1),
        ("x > 5", "x < 5", 0),
        (r"2 \pm \sqrt{3}", r"2 + \sqrt{3}, 2 - \sqrt{3}", 1),
        ("50%", r"50\%", 1),
    ],
)
def test_math(gold, answer, score):
    assert graded(math, f"So \\boxed{{{answer}}}", example(gold)) == score


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        (r"\frac{16}{5}", "<think>so</think><answer>3.2</answer>", 1),
        ("10", "Therefore, the answer is 10.", 1),
        ("10", "10", 1),
        ("10", "", "no_answer"),
        (r"$\{1, 2\}$", r"The roots are \boxed{1} and \boxed{2}.", 1),
    ],
)
def test_math_of_stated_answers(gold, response, score):
    assert graded(math, response, example(gold), finding="stated") == score


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is (C).", "(C)."),
        ("Answer: 12", "12"),
        ("**Final Answer:** B", "B"),
        ("first, the answer is 3. No: the correct answer is 4", "4"),
        ("seven", "seven"),
        ("one line\nand another without any statement", None),
        ("word " * 100, None),
    ],
)
def test_stated_answer(response, answer):
    assert stated_answer(response) == answer


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
        ("red", r"\textbf{(A)}\ red", 1),
        ("red", "B", 0),
        ("red", "B. red", "no_answer"),
        ("red", "red or green", "no_answer"),
        ("red", "D", "no_answer"),
        ("C", "dark blue", 1),
        ("C", "c", 1),
        ("C", "A", 0),
        ("red", "purple", "no_answer"),
        ("red", "I can't tell", "no_answer"),
        ("yellow", "red", "bad_gold"),
        ("A, C", "C and A", 1),
        ("A, C", "A", 0),
    ],
)
def test_choice(gold, answer, score):
    assert graded(choice, f"\\boxed{{{answer}}}", example(gold, **COLORS)) == score
    assert graded(auto, f"\\boxed{{{answer}}}", example(gold, **COLORS)) == score


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        ("B", "The answer is (B) green.", 1),
        ("B", "B. green", 1),
        ("B", "(B)", 1),
        ("B", "It can't be (A) since it is cold.\n\nSo the answer is (B).", 1),
        ("B", "Therefore, it is (B), as shown.", 1),
        ("C", "The ball is dark blue.", 1),
        ("B", "I'm sorry, I can't determine the colour.", "no_answer"),
        ("A", "A colour that I cannot see.", "no_answer"),
        ("A", "Red, green and dark blue are all possible.", "no_answer"),
        ("B", "", "no_answer"),
    ],
)
def test_choice_of_stated_answers(gold, response, score):
    assert graded(choice, response, example(gold, **COLORS), finding="stated") == score


def test_choice_reads_options_from_columns_and_problem():
    assert choice(r"\boxed{green}", example("B", options="['red', 'green']")) == 1
    assert choice(r"\boxed{green}", example("B", option="A. red; B. green")) == 1
    assert choice(r"\boxed{green}", example("B", problem="Which? (A) red (B) green")) == 1
    assert choice(r"\boxed{\frac{1}{2}}", example("A", choices=["$1 : 2$", "$2 : 3$"])) == 1


def test_choice_by_letter_alone_needs_no_options():
    assert choice(r"\boxed{B}", example("B")) == 1.0
    assert choice(r"\boxed{A}", example("B")) == 0.0
    assert graded(choice, "B", example("B")) == "no_answer"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3.50", -3.5), ("1,425.00", 1425), ("$1,425", 1425), ("-$5", -5), ("1/4", 0.25),
        ("12%", 0.12),
        ("3 apples", 3), ("2.5 km/h", 2.5), ("three", 3), ("2e-3", 0.002), (".5", 0.5), (r"$\text{7}$", 7),
        ("", None), ("x", None), ("3 or 4", None), ("3x", 3), ("1/0", None), ("3, 4", None), ("9^9", None),
    ],
)  # fmt: skip
def test_read_number(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    ("gold", "answer", "args", "score"),
    [
        ("10", "10.4", {"relative": 0.05}, 1),
        ("10", "10.6", {"relative": 0.05}, 0),
        ("10", "10.4", {}, 0),
        ("0", "0.001", {"relative": 0.05}, 0),
        ("2.68", "2.6849", {"precision": 2}, 1),
        ("1/11", "0.0909", {"absolute": 0.001}, 1),
        ("50%", "50", {}, 0),
        ("50%", "50%", {}, 1),
        ("50%", "0.5", {}, 1),
        ("10", "ten", {}, 1),
        ("10", "unknown", {}, "no_answer"),
        ("many", "10", {}, "bad_gold"),
    ],
)
def test_number(gold, answer, args, score):
    assert graded(number, f"\\boxed{{{answer}}}", example(gold), **args) == score


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("3", "3", 1),
        ("3", "three", 1),
        ("3", "3.0", 1),
        ("3", "4", 0),
        ("3", "C. 3", "no_answer"),
        ("x", "3", "bad_gold"),
    ],
)
def test_count(gold, answer, score):
    assert graded(count, f"<answer> {answer} </answer>", example(gold)) == score


def test_exact_ignores_case_and_spaces_and_takes_any_gold():
    golds = json.dumps(["New York", "NYC"])
    assert exact(r"\boxed{new  york}", example(golds)) == exact(r"\boxed{NYC}", example(golds)) == 1
    assert exact(r"\boxed{new york}", example("New York"), case=True) == 0
    assert exact(r"\boxed{York}", example("New York")) == 0


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Coca Cola", 1), ("coca  cola", 1), ("CocaCola", 1 - 1 / 9), ("Coca", 0), ("Cat", 0)],
)
def test_anls(answer, score):
    row = example(json.dumps(["Coca Cola", "Coca Cola Company"]))
    assert anls(f"<answer>{answer}</answer>", row) == pytest.approx(score)


def test_edit_distance():
    assert edit_distance(r"\boxed{abcd}", example("abce")) == 0.75
    assert edit_distance(r"\boxed{the red cat}", example("the cat"), unit="word") == 0.5
    assert edit_distance(r"\boxed{something else entirely}", example("abc")) == 0.0


def test_short_finds_words_and_numbers():
    assert short(r"\boxed{about 60 Mbps}", example("60")) == 1
    assert short(r"\boxed{Point A is it}", example("A"), finding="stated") == 1
    assert short(r"\boxed{a point}", example("A"), finding="stated") == 0
    assert short(r"\boxed{embryonic stage}", example("embryonic"), finding="stated") == 1
    assert short(r"\boxed{embryonic stage}", example("embryonic")) == 0
    assert short(r"\boxed{1/4}", example("1/64")) == 0
    assert short(r"\boxed{1000 * 12 / 500 = 24}", example("1000")) == 0
    assert short(r"\boxed{1000 * 12 / 500 = $24}", example("24")) == 1
    assert short(r"\boxed{x = y + 2}", example("x = y + 2")) == 1


def test_json_fields():
    gold = json.dumps({"total": 12.5, "name": "ACME Ltd", "paid": True})
    response = 'Here:\n```json\n{"total": 12.50, "name": "acme  ltd", "paid": false}\n```'
    assert json_fields(response, example(gold)) == pytest.approx(2 / 3)
    assert graded(json_fields, "\\boxed{{not json}}", example(gold)) == "no_answer"
    assert graded(json_fields, response, example("[1]")) == "bad_gold"


BOX = "[20, 10, 60, 50]"


@pytest.mark.parametrize(
    ("answer", "args", "score"),
    [
        ("[20, 10, 60, 50]", {"coordinates": "original"}, 1),
        ("[10, 5, 30, 25]", {"coordinates": "resized"}, 1),
        ("[100, 100, 300, 500]", {"coordinates": "thousand"}, 1),
        ("[0.1, 0.1, 0.3, 0.5]", {"coordinates": "unit"}, 1),
        ("[20, 10, 40, 40]", {"coordinates": "original", "layout": "xywh"}, 1),
        ("(20,10),(60,50)", {"coordinates": "original"}, 1),
        ("[20, 10, 60, 30]", {"coordinates": "original", "threshold": None}, 0.5),
        ("[20, 10, 60, 30]", {"coordinates": "original", "threshold": 0.6}, 0),
        ("[20, 10, 60, 50] [0, 0, 5, 5]", {"coordinates": "original"}, 0.5),
        ("nowhere", {}, "no_answer"),
    ],
)
def test_box(answer, args, score):
    row = Example(id="r", problem="p", answer=BOX, images=(IMAGE,))
    response = ResponseText(f"<answer>{answer}</answer>", resized=((100, 50),))
    try:
        assert box(response, row, **args) == pytest.approx(score)
    except NoAnswer:
        assert score == "no_answer"


def test_boxes_are_matched_whatever_their_order():
    row = Example(id="r", problem="p", answer="[[0, 0, 10, 10], [50, 50, 90, 90]]", images=(IMAGE,))
    listed = [{"bbox_2d": [50, 50, 90, 90], "label": "b"}, {"bbox_2d": [0, 0, 10, 10], "label": "a"}]
    fence = f"```json\n{json.dumps(listed)}\n```"
    assert box(ResponseText(fence), row, coordinates="original") == 1


def test_overlaps():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert giou((0, 0, 1, 1), (2, 0, 3, 1)) == pytest.approx(-1 / 3)
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == giou((0, 0, 1, 1), (0, 0, 1, 1)) == 1


def test_point_in_box():
    row = Example(id="r", problem="p", answer=BOX, images=(IMAGE,))
    inside = ResponseText("<answer>(20, 15)</answer>", resized=((100, 50),))
    outside = ResponseText("<answer>(40, 15)</answer>", resized=((100, 50),))
    scores = [point_in_box(response, row, coordinates="resized") for response in (inside, outside)]
    assert scores == [1, 0]


@pytest.mark.parametrize(("tokens", "penalty"), [(10, 0), (100, 0), (110, -0.5), (120, -1), (500, -1)])
def test_length(tokens, penalty):
    assert length(ResponseText("r", tokens=tokens), example("x"), allowed=100, buffer=20) == penalty


def test_language():
    assert language("It is 3 cm.", example("x")) == 1
    assert language("答案是三", example("x")) == 0
    assert language("答案是三", example("x"), script="chinese") == 1
    assert language("3 + 4 = 7", example("x")) == 1


@pytest.mark.parametrize(
    ("columns", "gold", "response", "score"),
    [
        ({"question_type": "multi_choice"}, "B", "B", 1),
        ({"answer_type": "float", "precision": 1.0}, "3.1", "3.14", 1),
        ({"answer_type": "integer"}, "5", "5.0", 1),
        ({"metric": "anls", "threshold": 0.5}, '["abc"]', "abd", 1 - 1 / 3),
        ({"answer_type": "list"}, "[0, 2]", "[0, 2]", 1),
        ({"question_type": "open"}, "60", "about 60", 1),
        ({}, r"\frac{1}{2}", "1/2", 1),
    ],
)
def test_auto_selects_the_verifier_by_the_row(columns, gold, response, score):
    assert auto(ResponseText(response), example(gold, **columns), finding="stated") == pytest.approx(score)


IN_BOX, IN_TAGS = "Give the answer in \\boxed{}.", "Give it in <answer> </answer> tags."
THINK = "First reason in <think> </think> tags."


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        (THINK + IN_BOX, "<think>a\nb</think> so \\boxed{1}", 1),
        (THINK + IN_BOX, r"<think></think>\boxed{1} done", 1),
        (THINK + IN_BOX, r"so \boxed{1}", 0),
        (THINK + IN_BOX, r"<think>a</think> so 1", 0),
        (IN_BOX, r"so \boxed{1}", 1),
        (IN_BOX, r"<think>a</think> so \boxed{1}", 1),
        (IN_BOX, r"<think>is it \boxed{1}?</think> so 1", 0),
        (IN_BOX, "<answer>1</answer>", 0),
        (IN_TAGS, "<answer>1</answer>", 1),
        (IN_TAGS, "<think>a</think>\n<answer>1</answer>\n", 1),
        (IN_TAGS, r"\boxed{1}", 0),
        (IN_TAGS, "<answer>1</answer> or 2", 0),
        (IN_TAGS, "<answer>1</answer> <answer>2</answer>", 0),
        (IN_BOX, r"<think> \boxed{1}", 0),
        (THINK + IN_TAGS, "<think>a</think><answer>1</answer>", 1),
        (THINK + IN_TAGS, "<answer>1</answer>", 0),
    ],
)
def test_format_follows_the_prompt(prompt, response, score):
    row = example("1", problem=f"How many? {prompt}")
    assert format(response, row) == score
    assert format(ResponseLayout.asked(row).write("1"), row) == 1


def test_format_without_a_layout_in_the_prompt_wants_a_pattern():
    with pytest.raises(ValueError, match="set the part's args.pattern"):
        format("1", example("1"))
    assert format("a 1", example("1"), pattern="a .") == 1
