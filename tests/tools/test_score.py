"""`vlm-sapo score`: files of responses, good and bad."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import ROOT, SHARED
from vlm_sapo.cli import app

ROWS = [
    {"id": 1, "gold": "3", "response": r"so \boxed{3}", "verdict": True, "source": "a"},
    {"id": 2, "gold": "3", "response": "4", "verdict": True, "source": "a"},
    {"id": 3, "gold": "3", "response": "3", "verdict": False, "source": "b"},
    {"id": 4, "gold": "3", "response": "", "short": "3", "verdict": True, "source": "b", "flags": ["odd"]},
    {"id": 5, "gold": "", "response": "3"},
    {"id": 6, "gold": "red", "response": "B", "choices": ["red", "blue"]},
    {"id": 7, "gold": "green", "response": "B", "choices": ["red", "blue"]},
]


@pytest.fixture
def run(tmp_path):
    """Runs the command on the lines; its result, and the rows that it wrote."""

    def score(lines, *options):
        path, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
        path.write_text("\n".join(lines) + "\n")
        result = CliRunner().invoke(app, ["score", str(path), "--out", str(out), *options])
        written = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return result, written

    return score


def test_a_file_is_graded_and_compared(run):
    lines = [json.dumps(row) for row in ROWS] + ["{broken", '"text"']
    result, rows = run(lines, "--response", "response,short")
    assert result.exit_code == 0, result.output
    assert [row["score"] for row in rows] == [1, 0, 1, 1, 0, 0, 0, 0, 0]
    outcomes = ["graded"] * 4 + ["bad_gold", "graded", "bad_gold", "bad_row", "bad_row"]
    assert [row["outcome"] for row in rows] == outcomes
    assert rows[4]["error"].startswith("no gold answer") and rows[7]["line"] == 8
    table = {line.split("  ")[0]: line.split() for line in result.output.splitlines()}
    assert table["a"] == ["a", "2", "50.0%", "0", "1"]
    assert table["b"] == ["b", "1", "0.0%", "1", "0"] and table["b (flagged)"][3] == "100.0%"
    assert "bad_row 2" in result.output


def test_a_users_function_grades_a_file(run, tmp_path):
    (tmp_path / "mine.py").write_text("def f(response, example, by=1):\n    return len(response) * by\n")
    name = f"{tmp_path}/mine.py:f"
    result, rows = run(
        ['{"answer": "x", "text": "abc"}'], "--reward", name, "--response", "text", "--args", "{by: 2}"
    )
    assert result.exit_code == 0 and rows[0]["score"] == 6.0


def test_a_users_function_sees_the_rows_images(run, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "mine.py").write_text("def f(response, example):\n    return example.images[0].size[0]\n")
    lines = [json.dumps({"answer": "x", "response": "r", "image": name}) for name in ("a.png", "b.png")]
    result, rows = run(lines, "--reward", f"{tmp_path}/mine.py:f")
    assert [row["score"] for row in rows] == [30, 0] and rows[1]["outcome"] == "bad_row"
    assert "b.png does not exist" in rows[1]["error"]


def test_the_documented_function_that_counts_tokens(run, tmp_path):
    page = (ROOT / "docs/rewards.md").read_text()
    (tmp_path / "concise.py").write_text(re.search(r"```python\n# concise.py\n(.*?)```", page, re.DOTALL)[1])
    options = ("--reward", f"{tmp_path}/concise.py:concise", "--args", "{longest: 12}")
    lines = [json.dumps({"gold": "3", "response": text + r"\boxed{3}"}) for text in ("", "so it is " * 9)]
    result, _ = run(lines, *options)
    assert "--model FOLDER, whose tokenizer counts them" in str(result.exception)
    result, rows = run(lines, *options, "--model", str(ROOT / "data/shapes/cold_start"))
    assert result.exit_code == 0 and [row["score"] for row in rows] == [1.0, 0.9]
    result, rows = run([lines[0][:-1] + ', "tokens": 50}'], *options)
    assert result.exit_code == 0 and rows[0]["score"] == 0.9


def test_graded_rows_are_written_before_a_function_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sapo.tools.score.ROWS_PER_WRITE", 2)
    (tmp_path / "mine.py").write_text(
        "def f(response, example):\n    return {'ok': 1.0, 'bad': None}[response]\n"
    )
    lines = [json.dumps({"id": n, "gold": "x", "response": "bad" if n == 3 else "ok"}) for n in range(4)]
    result, rows = run(lines, "--reward", f"{tmp_path}/mine.py:f")
    assert result.exit_code != 0 and "row 3" in str(result.exception) and len(rows) == 2
    result, rows = run(lines, "--reward", f"{tmp_path}/mine.py:f", "--on-error", "zero")
    assert result.exit_code == 0 and [row["outcome"] for row in rows] == ["graded"] * 3 + ["error"]


def test_bad_arguments_are_named(run):
    for options, words in (
        (["--reward", "maths"], "did you mean 'math'"),
        (["--args", "[1]"], "YAML mapping"),
        (["--on-error", "skip"], "must be `stop` or `zero`"),
    ):
        result, _ = run(['{"gold": "1", "response": "1"}'], *options)
        assert words in str(result.exception)


TARGETS = {
    "anls_shunk031": 1.0,
    "logicvista": 0.95,
    "math_verify_tests": 0.96,
    "mathvision": 0.98,
    "mathvista": 0.96,
    "mmmu_pro": 0.95,
    "mmmu_val": 0.95,
    "olympiadbench_scoring_examples": 0.90,
    "qwen25math_rm_maj": 0.99,
    "r1v_counting": 0.99,
    "r1v_geoqa": 0.97,
    "tabmwp": 0.95,
}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "verifier_truth").exists(), reason="the truth files are not here")
def test_agreement_with_the_benchmarks_authors(run):
    lines = (SHARED / "verifier_truth" / "triples.jsonl").read_text().splitlines()
    _, rows = run(lines, "--response", "extraction,response")
    for source, target in TARGETS.items():
        rows_of_source = [row for row in rows if row["source"] == source and not row.get("flags")]
        agree = [
            (row["score"] >= 0.5) == row["verdict"]
            if isinstance(row["verdict"], bool)
            else abs(row["score"] - row["verdict"]) <= 0.01
            for row in rows_of_source
        ]
        assert sum(agree) / len(agree) >= target, source
