"""Answers that were graded wrongly once: wrong ones that scored 1, correct ones that scored 0."""

import pytest

from tests.rewards.test_verifiers import IMAGE, example
from vlm_sapo.rewards.verifiers.answers import NoAnswer, boxed
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

CASES = {
    "math": [
        # a power is no unit
        ("5", "5^2", 0), ("5", "5^3", 0), ("2", "2^{3}", 0), ("3", "3mgs^2", 0), ("5", "5J", 1), ("5", "5 m", 1),
        ("100", "10^2", 1), ("8", "2^3", 1), ("1000", "10^{3}", 1), ("64", "4^3", 1), ("5", "5 m^2", 1),
        # words are no products of letters
        ("cat", "act", 0), ("left", "felt", 0), ("no", "on", 0), ("listen", "silent", 0), ("No", "no.", 1),
        (r"\angle ADC", r"\angle ACD", 0), (r"\angle ADC", r"\angle CDA", 1), ("∠ADC", r"\angle ADC", 1),
        (r"\triangle ADC", r"\triangle ACD", 0), ("USA", "SUA", 0), ("BCA", "ABC", 0), ("cat", r"\text{Cat}", 1),
        ("cat, dog", "act, god", 0), ("x-axis", "axis-x", 0), ("cat", "cat.", 1), ("cat", "x = act", 0),
        ("ab", "ba", 1), ("xy", "yx", 1), ("2xy", "2yx", 1), ("mgh", "hmg", 1), ("AB", "BA", 1),
        ("AB = CD", "CD = AB", 1), ("pi", r"\pi", 1), ("a, b", "b, a", 1),
        # integers exactly
        ("1234567", "1234568", 0), ("1234567", "1,234,568", 0), ("1234567", "1234567.0", 1),
        ("12345678901234567890", "12345678901234567891", 0), ("0.3333333", "0.33333331", 1),
        # money and units
        ("5", r"\$5", 1), ("5", "$5", 1), ("5", r"$\$5$", 1), ("18.90", r"\$18.90", 1), (r"\$18.90", "18.90", 1),
        (r"\$18.90", r"\$18.9", 1), (r"\$18.90", "19", 0), ("60", "60 km/h", 1), ("60", r"60 \text{ km/h}", 1),
        ("60 km/h", "60", 1), ("60 km/h", "61", 0), ("5 m^2", "5", 1), ("5 m^2", "6", 0),
        ("5N", "5", 0), ("5N", "5 N", 1), ("60", "60 miles per hour", 1), ("5 cm", "5 m", 0), ("5 cm", r"5\,\mathrm{cm}", 1), ("3x", "3", 0),
        (r"\frac{3}{2} km/h", "1.5", 1), ("9.8", r"9.8\ \mathrm{m/s^2}", 1), ("1200", r"\$1,200", 1),
        # other relations and lists than the number
        ("7", "7_8", 0), ("7", r"\ne 7", 0), ("7", r"\le 7", 0), ("7", "6 | 7", 0), ("7", r"6 \lor 7", 0),
        ("7", r"6\Rightarrow 7", 0), ("7", "x=1=7", 0), ("5", "6=5", 0), ("3", "3:1", 0), ("12", "1 2", 0),
        ("7", r"\log_2 128", 1), ("(cat)", "act", 0), ('"cat"', "cat", 1), ("7", "> 7", 0), ("7", "3+4=7", 1), ("6.67", r"x = \frac{20}{3} = 6.67", 1), ("1234", r"1\,234", 1),
        ("7", "7,", 1), ("7", "7;", 1), ("7", r"\color{red}7", 1), ("7", r"\textcolor{red}{7}", 1),
        ("3", r"x = \begin{pmatrix}1\\2\end{pmatrix}", 0), ("3", "9" * 6000 + " 1/2", 0),
        ("1 1/2", "1.5", 1), ("1 1/2", "1/2", 0), ("1.5", r"1\frac{1}{2}", 1),
    ],
    "short": [
        ("42", " ".join(map(str, range(100))), 0), ("cat", "cat dog", 0), ("cat", "not cat", 0),
        ("yes", "yes and no", 0), ("yes", "yes no", 0), ("left", "left, right", 0), ("cat", "cat or dog", 0),
        ("0.003", "0", 0), ("0.001", "0.004", 0), ("0.003", "0.003", 1), ("42", "41 or 42", 0), ("42", "not 42", 0),
        ("42", "x = 41 or x = 42", 0), ("42", "about 42 Mbps", 1), ("5", "5 million", 0), ("5 million", "5 million", 1),
        ("1/64", "1/64", 1), ("3", "three", 1), ("cat", "the cat", 1), ("salt and pepper", "salt and pepper", 1),
        ("cat", "It is a cat.", 1), ("10.12", "10.119", 1), ("cat", r"\text{cat}", 1), ("50%", r"50\%", 1),
    ],
    "exact": [
        ("cat", r"\text{cat}", 1), ("New York", r"\text{New York}", 1), ("50%", r"50\%", 1),
        ("$1,200", r"\$1,200", 1), ("cat", r"\text{dog}", 0), (r"\alpha", r"\alpha", 1), ("5²", "5²", 1),
    ],
    "anls": [("New York", r"\text{New York}", 1), ("$1,200", r"\$1,200", 1), ("cat", r"\text{dog}", 0)],
    "edit_distance": [("New York", r"\text{New York}", 1), ("50%", r"50\%", 1), ("abcd", r"\text{abce}", 0.75)],
    "number": [
        ("5", "5 thousand", 0), ("5", "5 million", 0), ("5", "5k", 0), ("5", "5 to six", 0), ("5", "5 (six)", 0),
        ("3", "3 squared", 0), ("3", "3 times two", 0), ("0.5", r"\frac{1}{2}", 1), ("0.5", "½", 1),
        ("0.5", "50 %", 1), ("5%", "5 percent", 1), ("-5", "- 5", 1), ("5", "x = 5", 1), ("5", "5 cm^2", 1),
        ("5000", "5 thousand", 1), ("2.5", "2 1/2", 1), ("2.5", r"2\frac{1}{2}", 1), ("-2.5", "-2 1/2", 1),
        ("1234567890", "1234567891", 0), ("5", "x = 5 = 6", 0), ("5", "5x^2", 0), ("5", "5 - 2", 0),
    ],
    "count": [("3", "3 to five", 0), ("3", "3-five", 0), ("3", "3 cats", 1)],
}  # fmt: skip
ROWS = [(name, *case) for name, cases in CASES.items() for case in cases]


def score(name: str, answer: str, row: Example, **args) -> float:
    """The score of an answer in a box; 0 if the verifier reads none."""
    try:
        return VERIFIERS[name](ResponseText(rf"\boxed{{{answer}}}", resized=((100, 100),)), row, **args)
    except NoAnswer:
        return 0.0


@pytest.mark.parametrize(("name", "gold", "answer", "expected"), ROWS)
def test_verdicts(name, gold, answer, expected):
    assert score(name, answer, example(gold)) == expected


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"I write it in \boxed{ as asked. \boxed{7}", ["7"]),
        (r"\boxed{\boxed{7}}", [r"\boxed{7}"]),
        (r"\boxed{\frac{1}{2}} and \boxed{\{1\}}", [r"\frac{1}{2}", r"\{1\}"]),
        (r"{ \boxed{7} } } \boxed{8}", ["7", "8"]),
        (r"\boxed{\boxed{7}", ["7"]),
        (r"\boxed{5", []),
    ],
)
def test_boxes_that_are_not_closed(text, contents):
    assert boxed(text) == contents


def test_spaces_in_lists_are_ignored():
    assert score("exact", "[1,2]", example("[1, 2]")) == 1
    assert score("auto", "[1,2]", example("[1, 2]", answer_type="list")) == 1
    assert score("exact", "[1,3]", example("[1, 2]")) == score("exact", "[12]", example("[1, 2]")) == 0


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ('{"a": 1}', '{"a": true}', 0),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": "none"}', '{"a": null}', 0),
        ('{"a": null}', '{"a": null}', 1),
        ('{"a": [1]}', '{"a": [true]}', 0),
        ('{"a": [1.0]}', '{"a": [1]}', 1),
    ],
)
def test_json_values(gold, answer, expected):
    assert score("json_fields", answer, example(gold)) == expected


def test_json_is_read_from_the_last_of_fence_and_box():
    fence, box = '```json\n{"a": 1}\n```', r'\boxed{{"a": 2}}'
    row = example('{"a": 2}')
    assert VERIFIERS["json_fields"](ResponseText(f"{fence} no, {box}"), row) == 1
    assert VERIFIERS["json_fields"](ResponseText(f"{box} no, {fence}"), row) == 0
    assert VERIFIERS["json_fields"](ResponseText(f"<answer>{fence}</answer>"), example('{"a": 1}')) == 1


BOX_ROW = Example(id="r", problem="p", answer="[20, 20, 60, 60]", images=(IMAGE,))


@pytest.mark.parametrize(
    ("answer", "args", "expected"),
    [
        ("[0, 0, 200, 100]", {"metric": "giou"}, 0),
        ("[40, 40, 40, 40]", {"metric": "giou"}, 0),
        ("[20, 20, 60, 60]", {"metric": "giou"}, 1),
        ("[20, 20, 60, 55]", {"metric": "giou"}, 1),
        ("[20, 20, 60, 40]", {"metric": "giou", "threshold": None}, 0.5),
        ("[100, 70, 120, 90]", {"metric": "giou", "threshold": None}, 0),
        ("[60, 60, 20, 20]", {"threshold": 0.0}, 0),
        ("[-900, -900, 900, 900]", {"threshold": 0.0}, 0),
    ],
)
def test_degenerate_and_oversized_boxes(answer, args, expected):
    assert score("box", answer, BOX_ROW, coordinates="original", **args) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(20, 20)", 1),
        ("x=20, y=20", 1),
        ('{"point_2d": [20, 20], "label": "button 3"}', 1),
        ("20 20", 1),
        ("[20, 20, 60, 60]", 1),
        ("[10, 10, 70, 70]", 1),
        ("(20, 20), (80, 80)", 0),
        ("20,20,20", 0),
        ("[20, 20, 80]", 0),
        ("[0, 0, 85, 85]", 0),
        ("[60, 60, 20, 20]", 0),
        ("(100, 80)", 0),
    ],
)
def test_points(answer, expected):
    assert score("point_in_box", answer, BOX_ROW, coordinates="original") == expected


def test_boxes_are_read_from_the_last_of_fence_and_box():
    fence, box = "```json\n[[0, 0, 5, 5]]\n```", r"\boxed{[20, 20, 60, 60]}"
    assert VERIFIERS["box"](ResponseText(f"{fence} no, {box}"), BOX_ROW, coordinates="original") == 1
    assert VERIFIERS["box"](ResponseText(f"{box} no, {fence}"), BOX_ROW, coordinates="original") == 0


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("7", "The answer is 8. Earlier I had 7", 0),
        ("8", "The answer is 8. Earlier I had 7", 1),
        ("7", r"Earlier I had \boxed{7}, now \boxed{8}", 0),
        (r"$\{1, 2\}$", r"The roots are \boxed{1} and \boxed{2}.", 1),
    ],
)
def test_only_the_stated_expression_is_graded(gold, response, expected):
    assert VERIFIERS["math"](ResponseText(response), example(gold), finding="stated") == expected


COLORS = ["red", "green", "blue", "black"]
TENS = ["10", "20", "30", "40"]


@pytest.mark.parametrize(
    ("options", "gold", "answer", "expected"),
    [
        # a letter with another option behind it
        (COLORS, "B", "B. red", 0),
        (COLORS, "B", "B or C or D", 0),
        (COLORS, "B", "B is wrong, C", 0),
        (COLORS, "B", "B - C", 0),
        (COLORS, "B", "B. It is red", 0),
        (COLORS, "B", "B. not green", 0),
        (TENS, "B", "B. 25", 0),
        (TENS, "B", "B: 30", 0),
        (TENS, "B", "B: 20", 1),
        (TENS, "B", "B. 20.0", 1),
        (TENS, "B", "B. 20 cm", 1),
        (COLORS, "B", "B. green", 1),
        (COLORS, "B", "B - green", 1),
        (COLORS, "B", "B. It is green", 1),
        (COLORS, "B", "B, because A leaf grows", 0),
        (["4", "2"], "B", "2^2", 0),
        # how a letter may be written
        (COLORS, "B", "Option B", 1),
        (COLORS, "B", "option b", 1),
        (COLORS, "B", "Answer: B", 1),
        (COLORS, "B", "The answer is B.", 1),
        (COLORS, "B", "B?", 1),
        (COLORS, "A,C", "AC", 1),
        (COLORS, "AC", "A, C", 1),
        (COLORS, "AC", "AB", 0),
        (COLORS, "AC", "A", 0),
        ([], "AC", "AC", 1),
        # the letter of an option comes before the same letter as another's text
        (["B", "C", "D"], "A", "B", 0),
        (["B", "C", "D"], "A", "A", 1),
        (["B", "C", "D"], "C", "D", 1),
        (["AB", "AC", "BC"], "B", "AC", 1),
    ],
)
def test_choices(options, gold, answer, expected):
    assert score("choice", answer, example(gold, choices=options)) == expected


@pytest.mark.parametrize(
    "columns",
    [
        {"options": "[]", "question_type": "open"},
        {"choices": "null"},
        {"choices": "nan"},
        {"choices": "None"},
        {"choices": ""},
        {"choices": "42"},
        {"choices": []},
        {"choices": float("nan")},
        {"answer_type": "float", "precision": float("nan")},
        {"answer_type": "float", "precision": ""},
        {"answer_type": "float", "precision": "1.0"},
        {"metric": "anls", "threshold": float("nan")},
        {"metric": "anls", "threshold": ""},
    ],
)
def test_empty_columns_are_ignored(columns):
    assert score("auto", "42", example("42", **columns)) == 1
    assert score("auto", "70", example("42", **columns)) == 0


def test_options_may_be_a_json_object_by_letter():
    assert score("choice", "green", example("B", options='{"A": "red", "B": "green"}')) == 1
