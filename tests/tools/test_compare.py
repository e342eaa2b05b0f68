"""The comparison of two evaluations: statistics, notes and page."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.tools.report.test_collect import data_of
from vlm_sapo.cli import app
from vlm_sapo.tools.compare import compare_command, sign_test


def write(folder, scores: dict[str, list[float]], benchmark: str = "b"):
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "pictures/a.jpg")
    lines = [
        json.dumps(
            {
                "benchmark": benchmark, "row": row, "id": key, "problem": "How <many>?", "answer": "3",
                "responses": [f"says {score}" for score in values], "scores": values, "pictures": ["pictures/a.jpg"],
            }
        )
        for row, (key, values) in enumerate(scores.items())
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_wins_losses_and_changed_problems(tmp_path):
    one = write(tmp_path / "a", {"1": [0.0, 0.0], "2": [1.0, 1.0], "3": [1.0, 0.0], "4": [0.0, 1.0]})
    other = write(tmp_path / "b", {"1": [1.0, 0.0], "2": [0.0, 1.0], "3": [1.0, 1.0], "4": [1.0, 0.0]})
    [comparison] = compare_command(one, other, tmp_path / "c/page.html")
    assert (comparison.n, comparison.first, comparison.second) == (4, 0.5, 0.625)
    assert (comparison.wins, comparison.losses) == (2, 1) and comparison.p == 1.0
    assert comparison.ci95[0] < 0.125 < comparison.ci95[1]
    assert [first["id"] for first, _ in comparison.changed] == ["2", "1", "3"]
    page = (tmp_path / "c/page.html").read_text()
    data = data_of(page)
    assert len(page) < 100_000, "a page without charts needs no chart library"
    assert data["rows"][0][:5] == ["b", "4", "0.500", "0.625", "+0.125"]
    assert [item["id"] for item in data["items"]] == ["2", "1", "3", "4"] and data["changed"] == 3
    assert [item["changed"] for item in data["items"]] == [True] * 3 + [False]
    assert [item["images"] for item in data["items"]] == [[0]] * 4 and len(data["images"]) == 1
    assert [finding["kind"] for finding in data["findings"]] == ["same"]
    first = data["items"][0]
    assert first["problem"] == "How <many>?" and "How <many>" not in page
    assert first["means"] == {"A": 1.0, "B": 0.5} and first["gain"] == -0.5
    assert [(each["when"], each["text"]) for each in first["responses"]] == [
        ("A", "says 1.0"),
        ("A", "says 1.0"),
        ("B", "says 0.0"),
        ("B", "says 1.0"),
    ]


def test_a_page_has_a_limited_number_of_responses_and_images_of_its_folder_only(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    one, other = write(tmp_path / "a", {"1": [1.0] * 9}), write(tmp_path / "b", {"1": [0.0] * 9})
    for path in (one / "samples.jsonl", other / "samples.jsonl"):
        path.write_text(path.read_text().replace("pictures/a.jpg", "../secret.jpg"))
    compare_command(one, other, tmp_path / "page.html")
    [item] = data_of((tmp_path / "page.html").read_text())["items"]
    assert len(item["responses"]) == 8 and item["images"] == [None]


def test_problems_are_paired_by_what_they_are(tmp_path, capsys):
    """Not by row and id: rows may have been added to the file, or be others altogether."""
    one, other = (
        write(tmp_path / "a", {"1": [0.0], "2": [0.0]}),
        write(tmp_path / "b", {"1": [1.0], "2": [0.0]}),
    )
    path = other / "samples.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    moved = [first | {"row": 7, "id": "other"}, second | {"answer": "another"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in moved))
    [comparison] = compare_command(one, other, tmp_path / "page.html")
    assert (comparison.n, comparison.wins) == (1, 1)
    assert "1 problems are in both, of 2 in A and 2 in B" in capsys.readouterr().out


def test_reordered_scores_are_no_change(tmp_path, capsys):
    one = write(tmp_path / "a", {"1": [0.1, 0.2, 0.3]})
    other = write(tmp_path / "b", {"1": [0.3, 0.2, 0.1]})
    [comparison] = compare_command(one, other, tmp_path / "page.html")
    assert (comparison.wins, comparison.losses) == (0, 0) and not comparison.changed
    out = capsys.readouterr().out
    assert "no verdict changed\n" in out and "whose verdict changed" not in out
    data = data_of((tmp_path / "page.html").read_text())
    assert data["changed"] == 0 and [item["id"] for item in data["items"]] == ["1"]
    assert "no problem's score changed" in data["findings"][0]["text"]


def test_the_sign_test_is_binomial():
    """8 wins and 2 losses: 2 (1 + 10 + 45) / 1024."""
    assert sign_test(8, 2) == pytest.approx(112 / 1024)
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(10_000, 10_001) == pytest.approx(1.0)


def test_different_problems_and_settings_are_noted(tmp_path, capsys):
    one = write(tmp_path / "a", {"1": [0.0], "2": [1.0]})
    other = write(tmp_path / "b", {"1": [1.0]})
    (one / "eval.yaml").write_text("b: {model: x, max_tokens: 8, samples: 1}")
    (other / "eval.yaml").write_text("b: {model: y, max_tokens: 99, samples: 1}")
    compare_command(one, other, tmp_path / "page.html")
    for text in (capsys.readouterr().out, (tmp_path / "page.html").read_text()):
        assert "1 problems are in both, of 2 in A and 1 in B" in text and "max_tokens 8 and 99" in text
        assert "model x" not in text


def test_errors_name_folders_that_cannot_be_compared(tmp_path):
    one, other = write(tmp_path / "a", {"1": [1.0]}), write(tmp_path / "b", {"1": [1.0]}, "other")
    result = CliRunner().invoke(app, ["compare", str(one), str(other)])
    assert "share none" in str(result.exception)
    write(tmp_path / "run/evaluations/step_000000", {"1": [1.0]})
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "run"), str(other)])
    assert "step_000000" in str(result.exception)
