"""A valid file of rows (a JSON array, CSV, TSV) was called invalid or missing.

Source: https://github.com/modelscope/ms-swift/issues/3981
"""

import json

import pytest

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows

ROWS = [{"question": f"What is {n} times 7?", "answer": 7 * n} for n in range(3)]
TABLE = [["question", "answer"], *([row["question"], str(row["answer"])] for row in ROWS)]
FILES = {
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=4),
    "wrapped.json": json.dumps({"about": "sevens", "data": ROWS}),
    "by_id.json": json.dumps({f"q{n}": row for n, row in enumerate(ROWS)}),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "array.jsonl": json.dumps(ROWS),
    "marked.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, ROWS)),
    "commas.csv": "\n".join(map(",".join, TABLE)),
    "semicolons.csv": "\r\n".join(map(";".join, TABLE)),
    "tabs.tsv": "\n".join(map("\t".join, TABLE)),
}


def read(path) -> ExampleSet:
    return ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))


@pytest.mark.parametrize("name", FILES)
def test_rows_are_read(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], newline="")
    examples = read(tmp_path / name)
    assert [(example.problem, example.answer) for example in examples] == [
        (row["question"], str(row["answer"])) for row in ROWS
    ]


NEAR_MISSES = {
    "texts.json": ('["a question", "an answer"]', "item 1: a JSON object is needed; this is str"),
    "cut.json": (FILES["indented.json"][:-5], "line 1[0-9]: not valid JSON"),
    "columns.json": (json.dumps({"question": ["q"], "answer": ["7"]}), "an object of columns"),
    "cells.csv": ("question,answer\nWhat is 7, doubled?,14\n", "line 2: 3 cells for 2 columns"),
    "book.xlsx": ("PK", "JSON, JSON lines, CSV, TSV, parquet or Arrow file; .xlsx"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_file_of_rows_names_its_line_or_type(name, tmp_path):
    text, sentence = NEAR_MISSES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / name)
