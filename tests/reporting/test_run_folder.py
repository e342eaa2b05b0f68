"""The run's folder: reading, rewinding, clearing, and writes that fail."""

import io
import json
from pathlib import Path

import pytest

from vlm_sapo.reporting.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin("a: 1\n")
    return folder


def test_a_partly_written_line_is_not_read(folder):
    folder.append("metrics.jsonl", {"step": 1, "name": "größe"})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "na')
    assert folder.read("metrics.jsonl") == [{"step": 1, "name": "größe"}]


def test_rewind_drops_later_steps(folder):
    for step in (0, 1, 2, 3):
        folder.append("evaluations.jsonl", {"step": step})
    folder.rewind(2)
    assert [record["step"] for record in folder.read("evaluations.jsonl")] == [0, 1, 2]


def test_clear_removes_only_files_of_a_run(folder):
    folder.append("metrics.jsonl", {"step": 1})
    (folder.path / "final").mkdir()
    (folder.path / "notes.txt").write_text("mine")
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_a_stored_config_counts_only_with_results(folder):
    assert folder.stored() is None
    folder.append("metrics.jsonl", {"step": 1})
    assert folder.stored() == "a: 1\n"


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold a run"):
        RunFolder(tmp_path).stored()


def test_best_evaluations_prefer_the_later_of_equals(folder):
    for step, share in enumerate((0.1, 0.5, 0.4, 0.5)):
        folder.append("evaluations.jsonl", {"step": step, "name": "held-out", "pass@1": share})
        folder.append("evaluations.jsonl", {"step": step, "name": "other", "pass@1": 1.0})
    assert [folder.best(count, "held-out") for count in (0, 1, 3)] == [[], [3], [3, 1, 2]]


def test_lines_are_kept_while_the_disk_is_full(folder, monkeypatch):
    folder.append("metrics.jsonl", {"step": 1})

    def full(self, lines):
        self.write('{"step": 2, "na')
        raise OSError(28, "No space left on device")

    class Full(io.TextIOWrapper):
        writelines = full

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", lambda self, mode, **_: Full(io.FileIO(self, mode)))
        folder.append("metrics.jsonl", {"step": 2})
        folder.append("metrics.jsonl", {"step": 3})
        with pytest.raises(OSError, match="No space left"):
            folder.flush()
    assert [row["step"] for row in folder.read("metrics.jsonl")] == [1, 2, 3]
    assert folder.path.joinpath("metrics.jsonl").read_text() == '{"step": 1}\n'
    folder.append("metrics.jsonl", {"step": 4})
    steps = [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
