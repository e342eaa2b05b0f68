"""What a resumed run says of rows and Python files that are others than at its start."""

import json
import re

import pytest

from tests.training.conftest import short_run
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.training.trainer import train

REWARD = "def mine(response, example):\n    return float(len(response) % 2 == {remainder})\n"


@pytest.fixture
def run(model_folder, tmp_path):
    """`run(steps)` trains, or goes on, on rows.jsonl with the reward in mine.py."""

    def go(steps: int, *overrides: str) -> dict:
        common = (
            f"data={{source: {tmp_path}/rows.jsonl}}",
            f"reward={tmp_path}/mine.py:mine",
            "eval.data=null",
        )
        return train(short_run(tmp_path, model_folder(), *common, f"train.steps={steps}", *overrides))

    write_rows(tmp_path, 8)
    (tmp_path / "mine.py").write_text(REWARD.format(remainder=0))
    go(1)
    return go


def write_rows(folder, count: int) -> None:
    rows = [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_other_rows_are_refused(run, tmp_path, capsys):
    """With more of them, the order of all is another."""
    write_rows(tmp_path, 9)
    words = f"the number of rows of {tmp_path}/rows.jsonl"
    with pytest.raises(ValueError, match=rf"{re.escape(words)} changed since the run in .* read them"):
        run(2)
    assert run(2, "run.accept_changes=true")["steps"] == 2
    assert (
        f"this run goes on although the rows of {tmp_path}/rows.jsonl and {words} changed"
        in capsys.readouterr().out
    )
    assert run(3)["steps"] == 3  # the new ones are known now


@pytest.mark.parametrize("mended", ["row", "reward"])
def test_what_was_mended_is_named(run, tmp_path, mended, capsys):
    """A row or a reward that stopped a run is mended, and the run goes on: it says so, and so does the card."""
    if mended == "row":
        path = tmp_path / "rows.jsonl"
        path.write_text(path.read_text().replace("0 + 1", "1 + 0"))
        words = f"the rows of {path}"
    else:
        (tmp_path / "mine.py").write_text(REWARD.format(remainder=1))
        words = f"the file {tmp_path}/mine.py"
    run(2)
    assert f"this run goes on although {words} changed since it began" in capsys.readouterr().out
    run(3)
    assert "this run goes on although" not in capsys.readouterr().out
    assert f"- changed between two starts: {words}\n" in (tmp_path / "run/final/README.md").read_text()


def test_what_is_gone_is_named(run, tmp_path):
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"data.source \(.*rows.jsonl\)"):
        run(2)


def test_a_file_beside_the_config_that_is_gone_is_named(run, tmp_path, monkeypatch):
    """A path that can't be looked up stays relative, which is no other config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").rename(tmp_path / "renamed.py")
    with pytest.raises(ValueError, match=r"reward.parts.0.name \(.*/mine.py:mine\) isn't there any more"):
        run(2, "reward=mine.py:mine")


def test_evaluations_are_graded_alike_by_the_same_code_anywhere(model_folder, tmp_path):
    """And differently by other code in the same place."""

    def settings(folder, remainder: int) -> str:
        folder.mkdir(exist_ok=True)
        write_rows(folder, 4)
        (folder / "mine.py").write_text(REWARD.format(remainder=remainder))
        rows = f"{{source: {folder}/rows.jsonl}}"
        common = (f"data={rows}", f"reward={folder}/mine.py:mine", f"eval.data={rows}", "run.overwrite=true")
        train(short_run(folder, model_folder(), *common, "train.steps=1"))
        return RunFolder(folder / "run").read("evaluations.jsonl")[0]["settings"]

    one, other = settings(tmp_path / "a", 0), settings(tmp_path / "b", 0)
    assert one == other and settings(tmp_path / "a", 1) != one
