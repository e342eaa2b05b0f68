"""A missing answer (NaN, an empty list) became the gold answer "nan" or "[]".

Source: https://github.com/modelscope/ms-swift/pull/306
"""

import json

import datasets
import pytest

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import RowError


def read(path) -> ExampleSet:
    return ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))


@pytest.mark.parametrize(
    "text", ["NaN", "null", '""', '"  "', "[]", "{}", "[null]", '[""]', "[NaN]", '"nan"', '"NaN"', '"[]"']
)
def test_missing_in_json(text, tmp_path):
    (tmp_path / "r.jsonl").write_text(f'{{"problem": "How long is the rope?", "answer": {text}}}\n')
    with pytest.raises(
        RowError, match="row 0 of .*: field answer is empty; give it a value or filter the row out"
    ):
        read(tmp_path / "r.jsonl")[0]


def test_missing_in_parquet(tmp_path):
    rows = {"problem": ["p", "q", "r", "s"], "answer": [2.0, 2.5, float("nan"), None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "r.parquet")
    examples = read(tmp_path / "r.parquet")
    assert [examples[index].answer for index in (0, 1)] == ["2", "2.5"]
    for index in (2, 3):
        with pytest.raises(RowError, match=f"row {index} of .*field answer is empty"):
            examples[index]


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "null", '""'])
def test_missing_in_a_table(cell, tmp_path):
    (tmp_path / "r.csv").write_text(f"problem,answer\np,4\nq,{cell}\n")
    examples = read(tmp_path / "r.csv")
    assert examples[0].answer == "4"
    with pytest.raises(RowError, match="row 1 of .*field answer is empty"):
        examples[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((text, text) for text in ("None", "null", "no", "N/A", "naan", "nano", "0")),
        (0, "0"),
        (0.0, "0"),
        (False, "False"),
        (["nan", "3"], '["nan", "3"]'),
    ],
)
def test_answers_that_only_look_missing(value, text, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"problem": "p", "answer": value}) + "\n")
    assert read(tmp_path / "r.jsonl")[0].answer == text
