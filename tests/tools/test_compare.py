"""Comparing two evaluations."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

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


def test_wins_losses_and_changed_pictures(tmp_path):
    one = write(tmp_path / "a", {"1": [0.0, 0.0], "2": [1.0, 1.0], "3": [1.0, 0.0], "4": [0.0, 1.0]})
    other = write(tmp_path / "b", {"1": [1.0, 0.0], "2": [0.0, 1.0], "3": [1.0, 1.0], "4": [1.0, 0.0]})
    [found] = compare_command(one, other, tmp_path / "c/page.html")
    assert (found.n, found.first, found.second) == (4, 0.5, 0.625)
    assert (found.wins, found.losses) == (2, 1) and found.p == 1.0
    assert found.ci95[0] < 0.125 < found.ci95[1]
    assert [first["id"] for first, _ in found.changed] == ["2", "1", "3"]
    page = (tmp_path / "c/page.html").read_text()
    assert page.count("<section>") == 3 and page.count("data:image/jpeg") == 3
    assert "How &lt;many&gt;?" in page and "says 1.0" in page


def test_the_same_scores_in_another_order_are_no_loss(tmp_path):
    one = write(tmp_path / "a", {"1": [0.1, 0.2, 0.3]})
    [found] = compare_command(one, write(tmp_path / "b", {"1": [0.3, 0.2, 0.1]}), tmp_path / "page.html")
    assert (found.wins, found.losses) == (0, 0) and not found.changed


def test_the_sign_test_is_the_binomials():
    """8 wins and 2 losses: 2 (1 + 10 + 45) / 1024."""
    assert sign_test(8, 2) == pytest.approx(112 / 1024)
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(10_000, 10_001) == pytest.approx(1.0)


def test_what_is_not_alike_is_said(tmp_path, capsys):
    one = write(tmp_path / "a", {"1": [0.0], "2": [1.0]})
    other = write(tmp_path / "b", {"1": [1.0]})
    (one / "eval.yaml").write_text("b: {model: x, max_tokens: 8, samples: 1}")
    (other / "eval.yaml").write_text("b: {model: y, max_tokens: 99, samples: 1}")
    compare_command(one, other, tmp_path / "page.html")
    for text in (capsys.readouterr().out, (tmp_path / "page.html").read_text()):
        assert "1 problems are in both, of 2 in A and 1 in B" in text and "max_tokens 8 and 99" in text
        assert "model x" not in text


def test_folders_that_share_nothing_are_named(tmp_path):
    one, other = write(tmp_path / "a", {"1": [1.0]}), write(tmp_path / "b", {"1": [1.0]}, "other")
    result = CliRunner().invoke(app, ["compare", str(one), str(other)])
    assert "share none" in str(result.exception)
    write(tmp_path / "run/evaluations/step_000000", {"1": [1.0]})
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "run"), str(other)])
    assert "step_000000" in str(result.exception)
