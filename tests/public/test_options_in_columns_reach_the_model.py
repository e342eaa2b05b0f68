"""Rows with their options in a column of its own: the model was asked for one of them and saw none.

Source: https://github.com/cvlab-columbia/viper/issues/37
"""

import json

import pytest
from PIL import Image

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.rewards.verifiers.answers import BadGold, NoAnswer
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import ResponseText, RowError

BIRDS = ["heron", "stork", "crane"]
LINES = "A. heron\nB. stork\nC. crane"
LAYOUTS = {
    "list": {"choices": BIRDS},
    "lettered list": {"options": ["(A) heron", "(B) stork", "(C) crane"]},
    "object by letter": {"options": {"A": "heron", "B": "stork", "C": "crane", "D": None}},
    "object of lists": {"choices": {"text": BIRDS, "label": ["A", "B", "C"]}},
    "list of objects": {"choices": [{"id": i, "text": bird} for i, bird in zip("ABC", BIRDS, strict=True)]},
    "JSON": {"choices": json.dumps(BIRDS)},
    "Python": {"options": "['heron', 'stork', 'crane']"},
    "one text": {"option": "A. heron; B. stork; C. crane"},
    "lines": {"choices": "heron\nstork\ncrane"},
    "bars": {"choices": "heron | stork | crane"},
    "padded": {"choices": [*BIRDS, None, None]},
    "columns by letter": {"A": "heron", "B": "stork", "C": "crane", "D": float("nan"), "E": ""},
    "columns with a prefix": {"option_a": "heron", "option_b": "stork", "option_c": "crane"},
    "columns of choices": {"choice_a": "heron", "choice_b": "stork", "choice_c": "crane"},
}


@pytest.fixture
def read(tmp_path):
    """The first example of a row, read from a file with one image."""

    def example(problem="Which bird is it?", **columns):
        Image.new("RGB", (40, 30), "olive").save(tmp_path / "bird.png")
        row = {"id": "17", "problem": problem, "image": "bird.png"} | columns
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        source = str(tmp_path / "rows.jsonl")
        return ExampleSet(open_rows(source), RowsConfig(source=source))[0]

    return example


def score(example, answer) -> float | str:
    try:
        return VERIFIERS["auto"](ResponseText(rf"\boxed{{{answer}}}"), example)
    except (NoAnswer, BadGold) as error:
        return error.outcome


@pytest.mark.parametrize("columns", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("gold", ["B", "(B)", "B. stork", "stork"])
def test_options_are_put_below_the_question(read, columns, gold):
    example = read(**columns, answer=gold)
    assert example.problem == "Which bird is it?\n" + LINES
    assert score(example, "B") == score(example, "stork") == score(example, "(B) stork") == 1
    assert score(example, "A") == 0 and score(example, "B. crane") == "no_answer"


@pytest.mark.parametrize(
    "listed",
    [
        LINES,
        "(A) heron (B) stork (C) crane",
        "Options: A) Heron B) Stork C) Crane",
        "A： heron\nB： stork\nC： crane",
        r"(A) $\text{heron}$ (B) $\text{stork}$ (C) $\text{crane}$",
    ],
)
def test_options_that_the_question_lists_are_not_repeated(read, listed):
    problem = f"Which bird is it?\n{listed}\nAnswer with the letter."
    assert read(problem, choices=BIRDS, answer="B").problem == problem


def test_a_question_that_only_mentions_the_options_gets_them(read):
    problem = "Is it a heron, a stork or a crane (A to C)?"
    assert read(problem, choices=BIRDS, answer="B").problem == f"{problem}\n{LINES}"


def test_options_in_the_image_are_not_written_out(read):
    assert read(choices=["A", "B", "C"], answer="B").problem == "Which bird is it?"
    example = read(choices=BIRDS, options_in_image=True, answer="B")
    assert example.problem == "Which bird is it?" and score(example, "stork") == 1


@pytest.mark.parametrize(
    ("columns", "gold", "letter"),
    [
        ({"choices": BIRDS}, 1, "B"),
        ({"choices": BIRDS}, "1", "B"),
        ({"choices": BIRDS}, 1.0, "B"),
        ({"choices": BIRDS}, [0, 2], "A, C"),
        ({"choices": ["5", "7", "9"]}, 1, "B"),
        ({"choices": {"text": BIRDS, "label": ["1", "2", "3"]}}, "2", "B"),
        ({"choices": {"1": "heron", "2": "stork", "3": "crane"}}, "2", "B"),
    ],
)
def test_an_index_or_a_label_of_the_rows_own_names_an_option(read, columns, gold, letter):
    example = read(**columns, answer=gold)
    assert score(example, letter) == 1 and score(example, "A") == 0
    assert score(example, "1") != 1, "the index isn't what the model reads"


def test_a_number_that_is_an_option_is_that_option(read):
    for gold, letter in (("3", "C"), ("1", "A"), (4, "D")):
        example = read("How many?", choices=["1", "2", "3", "4"], answer=gold)
        assert score(example, letter) == score(example, str(gold)) == 1
        assert score(example, "B") == score(example, "2") == 0


@pytest.mark.parametrize(
    ("columns", "gold", "words"),
    [
        ({"choices": ["1", "2", "3", "4"]}, 2, "2 may be the option '2' or the index of '3'"),
        ({"A": "heron", "B": "stork", "D": "crane"}, "B", "A, B, D of .* must follow one another"),
        ({"choices": ["heron.png", "stork.png"]}, "B", r"choices is an image \(heron.png\)"),
        ({"choices": [{"bytes": "AAAA", "path": None}, "stork"]}, "B", "of type dict"),
        ({"choices": ["iVBORw0KGgo" * 400, "stork"]}, "B", "an image .*options must be texts"),
        ({"choices": [f"bird {n}" for n in range(40)]}, "bird 3", "choices has 40"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_rows_name(read, columns, gold, words):
    with pytest.raises(RowError, match=f"row 17 of .*{words}") as error:
        read(**columns, answer=gold)
    assert len(str(error.value)) < 400


def test_numbers_of_the_problems_own_list_are_not_indices_from_zero(read):
    problem = "Which bird is it?\n1. heron\n2. stork\n3. crane"
    with pytest.raises(RowError, match="gold answer 2 may count from 1 or from 0"):
        read(problem, choices=BIRDS, answer="2")
    assert score(read(problem, choices=BIRDS, answer="stork"), "stork") == 1


def test_marks_in_options_stand_for_images(read):
    example = read("Which is a heron?", choices=["<image>", "a drawing"], answer="A")
    assert example.problem == "Which is a heron?\nA. <image>\nB. a drawing" and len(example.images) == 1


def test_other_columns_with_letters_for_names_are_no_options(read):
    example = read("What is A + B?", A=3, B=4, answer="7")
    assert example.problem == "What is A + B?"
    assert score(example, "7") == 1 and score(example, "A") == 0
