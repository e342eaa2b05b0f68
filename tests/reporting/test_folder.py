"""The run's folder: what it keeps, what it refuses, what a cut-off write leaves."""

import pytest

from vlm_sapo.reporting.folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.open("a: 1\n", overwrite=False)
    return made


def test_a_line_cut_off_in_writing_is_left_out(folder):
    folder.append("metrics.jsonl", {"step": 1, "name": "größe"})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "na')
    assert folder.read("metrics.jsonl") == [{"step": 1, "name": "größe"}]


def test_going_on_from_a_step_drops_what_came_after(folder):
    for step in (0, 1, 2, 3):
        folder.append("evaluations.jsonl", {"step": step})
    folder.rewind(2)
    assert [record["step"] for record in folder.read("evaluations.jsonl")] == [0, 1, 2]


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(folder):
    folder.append("metrics.jsonl", {"step": 1})
    (folder.path / "final").mkdir()
    (folder.path / "notes.txt").write_text("mine")
    folder.open("a: 2\n", overwrite=True)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "notes.txt"]


def test_a_folder_without_results_takes_another_config(folder):
    folder.open("a: 2\n", overwrite=False)
    folder.append("metrics.jsonl", {"step": 1})
    with pytest.raises(ValueError, match="another config, which differs in: a: 2; a: 3"):
        folder.open("a: 3\n", overwrite=False)
