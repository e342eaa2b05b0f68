"""A gold answer that is a list scored 1 for one of its items and 0 for all of them.

Source: https://github.com/open-compass/VLMEvalKit/issues/1679
"""

import json

import pytest
from PIL import Image

from tests.rewards.test_hard_cases import score
from tests.rewards.test_verifiers import example
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows

LIST = {"answer_type": "list"}


@pytest.mark.parametrize(
    ("name", "gold", "columns", "answer", "expected"),
    [
        ("auto", "['oak', 'elm']", LIST, "oak, elm", 1),
        ("auto", "['oak', 'elm']", LIST, "['elm', 'oak']", 1),
        ("auto", "['oak', 'elm']", LIST, r"\text{elm and oak}", 1),
        ("auto", "['oak', 'elm']", LIST, "oak", 0),
        ("auto", "['oak', 'elm']", LIST, "oak, oak", 0),
        ("auto", "['oak', 'elm']", LIST, "oak, elm, ash", 0),
        ("auto", "['oak', 'elm']", LIST, "oak or elm", 0),
        ("auto", '["oak", "elm"]', {}, "elm, oak", 1),
        ("math", '["oak", "elm"]', {}, "elm, oak", 1),
        ("math", '["oak", "elm"]', {}, "elm", 0),
        ("auto", '["oak", "oak"]', {}, "oak, oak", 1),
        ("auto", '["oak", "oak"]', {}, "oak", 0),
        ("auto", '["oak"]', {}, "oak", 1),
        ("auto", "oak, elm", LIST, "elm, oak", 1),
        ("auto", "oak, elm", LIST, "elm", 0),
        ("auto", "['4', '9']", {}, "9, 4", 1),
        ("auto", "['4', '9']", {}, r"\{4, 9\}", 1),
        ("auto", "['4', '9']", {}, "4, 9 or 10", 0),
        ("auto", "['4', '9']", {}, "4", 0),
        ("auto", "['1/2', '1,500']", {}, "1,500, 0.5", 1),
        ("auto", "['1/2', '1,500']", {}, "1, 500, 0.5", 0),
        ("auto", '["(1, 2)", "(3, 4)"]', {}, "(3, 4), (1, 2)", 1),
        ("auto", '["(1, 2)", "(3, 4)"]', {}, "(2, 1), (3, 4)", 0),
        ("auto", '["fish and chips", "tea"]', {}, "tea and fish and chips", 0),
        ("auto", '["fish and chips", "tea"]', {}, "tea, fish and chips", 1),
        ("auto", "[4, 9, 1]", LIST, "9, 1, 4", 1),
        ("auto", "[4, 9, 1]", LIST | {"ordered": True}, "4, 9, 1", 1),
        ("auto", "[4, 9, 1]", LIST | {"ordered": True}, "9, 1, 4", 0),
        ("auto", "[9, 4]", {"label": [9, 4]}, "4, 9", 1),  # the row itself holds a list
        ("auto", "[4, 9]", {}, "[4, 9]", 1),  # a text: an interval or a vector
        ("auto", "[4, 9]", {}, "[9, 4]", 0),
        ("list", "['oak', 'elm']", {}, "elm; oak", 1),
        ("list", "['oak', 'elm']", {}, "elm", 0),
        ("list", "['oak', 'elm']", {}, "elm\noak", 1),
    ],
)
def test_a_list_is_compared_whole(name, gold, columns, answer, expected):
    assert score(name, answer, example(gold, **columns)) == expected


@pytest.mark.parametrize("name", ["exact", "anls", "short", "edit_distance"])
def test_lists_of_accepted_answers_stay_alternatives(name):
    row = example('["New York", "NYC"]')
    assert score(name, "NYC", row) == score(name, "New York", row) == 1
    assert score(name, "Boston", row) < 0.5


@pytest.mark.parametrize(
    ("columns", "answer", "expected"),
    [
        ({"answer_type": "short", "question_type": "open"}, "NYC", 1),
        ({"answer_type": "string"}, "NYC", 1),
        ({"metric": "anls"}, "NYC", 1),
        ({"answer_type": "string"}, "New York, NYC", 0),
    ],
)
def test_the_row_says_which_of_both_a_list_is(columns, answer, expected):
    assert score("auto", answer, example('["New York", "NYC"]', **columns)) == expected


def test_rows_of_a_file_keep_their_lists(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    row = {"problem": "Which two numbers?", "answer": [8, 3], "image": "a.png"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [item] = ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))
    assert score("auto", "3, 8", item) == 1
    assert score("auto", "8", item) == score("auto", "3, 9", item) == 0
