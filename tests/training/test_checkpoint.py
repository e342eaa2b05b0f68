"""Checkpoints: what is torn, what a full disk does, which stay, and writing in the background."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.training.conftest import metrics
from vlm_sapo.distributed import Interrupted, World
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import Lines, RunFolder
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.sampler import Sampler
from vlm_sapo.training import checkpoint
from vlm_sapo.training import run as training_run
from vlm_sapo.training.checkpoint import Checkpoints
from vlm_sapo.training.policy import Policy
from vlm_sapo.training.run import Interruption
from vlm_sapo.training.trainer import train

NOTHING = ("eval.data=null", "checkpoint.every=1")


@pytest.mark.parametrize(
    "damage", ["no manifest", "cut manifest", "empty manifest", "odd manifest", "cut", "other bytes", "gone"]
)
def test_a_torn_checkpoint_is_named_and_an_older_one_used(whole, tmp_path, capsys, damage):
    newest = tmp_path / "checkpoints/step_000004"
    shutil.copytree(whole / "checkpoints", newest.parent)
    file = newest / "model.safetensors"
    if damage == "no manifest":
        (newest / checkpoint.MANIFEST).unlink()
    elif "manifest" in damage:
        text = (newest / checkpoint.MANIFEST).read_text()
        texts = {"cut manifest": text[:40], "empty manifest": "{}", "odd manifest": "[]"}
        (newest / checkpoint.MANIFEST).write_text(texts[damage])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "other bytes":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        file.unlink()
    checkpoints = Checkpoints(RunFolder(tmp_path), console=Console(), world=World())
    assert checkpoints.newest() == newest.parent / "step_000003" and checkpoints.newest_step == 3
    said = capsys.readouterr().out
    assert f"{newest} is torn" in said and "using an older one" in said
    assert (newest.parent / "torn_step_000004").is_dir()  # and doesn't count among those that stay


def test_if_all_checkpoints_are_torn_the_run_stops(whole, settings, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    before = (run / "metrics.jsonl").read_text()
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint of this run is whole .*run.overwrite=true"):
            train(settings(*NOTHING, "run.accept_changes=true"))
    assert (run / "metrics.jsonl").read_text() == before


def test_half_written_files_of_a_killed_process_are_dropped(whole, settings, tmp_path):
    """Half a character, too."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    (run / "checkpoints/.step_000009.partial").mkdir()
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        with (run / name).open("ab") as file:
            file.write('{"step": 5, "problem": "角'.encode()[:-1])
    train(settings(*NOTHING, "run.accept_changes=true"))
    assert metrics(run) == metrics(whole)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("train.steps=2", r"train.steps \(2\) must be 4 or more"),
        ("train.steps=6", "is finished and left no checkpoint"),
    ],
)
def test_a_finished_run_is_not_repeated(settings, tmp_path, change, sentence):
    options = ("eval.data=null", "checkpoint.every=0")
    train(settings(*options))
    before = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=sentence):
        train(settings(*options, change))
    assert train(settings(*options, "alarms.window=7"))["steps"] == 4
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_only_a_runs_folder_can_be_overwritten(settings, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold a run"):
        train(settings(*NOTHING, "run.overwrite=true"))
    assert (tmp_path / "run/checkpoints/mine.txt").is_file()


def test_a_run_resumes_from_the_newest_complete_checkpoint(whole, settings, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    (run / "checkpoints/step_000004/model.safetensors").unlink()
    train(settings(*NOTHING, "run.accept_changes=true"))  # for the reward's path
    assert metrics(run) == metrics(whole)
    checkpoint.check(run / "checkpoints/step_000004")


def test_a_full_disk_leaves_earlier_checkpoints_intact_and_the_run_continues(
    whole, settings, tmp_path, capsys, monkeypatch
):
    _full_at(monkeypatch, 3)
    train(settings(*NOTHING, "checkpoint.keep_last=5"))
    said = capsys.readouterr().out
    assert "could not be written ([Errno 28] No space left on device)" in said and "continues" in said
    assert checkpoint_steps(tmp_path / "run") == [1, 2, 4]
    assert metrics(tmp_path / "run") == metrics(whole)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_if_configured(whole, settings, tmp_path, monkeypatch):
    with monkeypatch.context() as disk:
        _full_at(disk, 3)
        with pytest.raises(
            ValueError, match=r"No space left.*step_.*|free disk space, then start the same comm"
        ):
            train(settings(*NOTHING, "checkpoint.on_error=stop"))
    assert checkpoint_steps(tmp_path / "run") == [1, 2]
    train(settings(*NOTHING, "checkpoint.on_error=stop"))
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_full_disk_while_evaluating_loses_no_sample_and_no_step(settings, tmp_path, monkeypatch):
    options = ("train.steps=3", "eval.every=1", "checkpoint.every=9")
    train(settings(*options, f"run.dir={tmp_path}/usual"))
    run, write = tmp_path / "full", Lines.write

    def full(lines):
        if "step_000001" in str(lines.path) and len((run / "metrics.jsonl").read_text().split("\n")) < 4:
            raise OSError(28, "No space left on device")
        write(lines)
        if lines.path.name == "evaluations.jsonl" and lines.path.is_file():
            for line in lines.path.read_text().splitlines():
                samples = run / f"evaluations/step_{json.loads(line)['step']:06d}/samples.jsonl"
                assert len(samples.read_text().splitlines()) == 6, "counted before its samples are there"

    monkeypatch.setattr(Lines, "write", full)
    train(settings(*options, f"run.dir={run}"))
    assert metrics(run) == metrics(tmp_path / "usual")
    for step in range(4):
        name = f"evaluations/step_{step:06d}/samples.jsonl"
        assert (run / name).read_text() == (tmp_path / "usual" / name).read_text()
    steps = [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_a_result_that_cannot_be_written_is_written_later(whole, settings, tmp_path, monkeypatch):
    options = ("eval.data=null", "checkpoint.every=3")
    with monkeypatch.context() as disk:
        disk.setattr(Policy, "export", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        _full_at(disk, 4)
        with pytest.raises(ValueError, match="all 4 steps .* No space left.* is of step 3; free disk space"):
            train(settings(*options))
    assert checkpoint_steps(tmp_path / "run") == [3]
    train(settings(*options))
    assert metrics(tmp_path / "run") == metrics(whole)
    final = [folder / "final/model.safetensors" for folder in (tmp_path / "run", whole)]
    assert final[0].read_bytes() == final[1].read_bytes()


def _full_at(monkeypatch, step: int) -> None:
    """The disk is full when the checkpoint of a step is nearly written."""
    seal = checkpoint._seal

    def full(folder):
        if folder.name == f".step_{step:06d}.partial":
            raise OSError(28, "No space left on device")
        seal(folder)

    monkeypatch.setattr(checkpoint, "_seal", full)


def checkpoint_steps(run) -> list[int]:
    """Steps of a run's checkpoints, after checking that each is complete and nothing else is there."""
    folders = sorted((run / "checkpoints").iterdir())
    for folder in folders:
        checkpoint.check(folder)
    return [int(re.fullmatch(r"step_(\d+)", folder.name)[1]) for folder in folders]


@pytest.mark.parametrize("kind", [(), pytest.param(("model.lora.rank=4",), marks=pytest.mark.slow)])
def test_writing_in_the_background_changes_nothing(settings, tmp_path, kind):
    options = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", *kind)
    for name, more in (("fore", ()), ("back", ("checkpoint.background=true",))):
        train(settings("eval.data=null", *options, *more, f"run.dir={tmp_path}/{name}"))
    assert metrics(tmp_path / "fore") == metrics(tmp_path / "back")
    listed = [manifests(tmp_path / name) for name in ("fore", "back")]
    assert len(listed[0]) == 3 and listed[0] == listed[1]


def manifests(run) -> list[dict]:
    """Sizes and hashes of all checkpoints' files but the seconds that passed."""
    listed = []
    for folder in sorted((run / "checkpoints").iterdir()):
        files = json.loads((folder / checkpoint.MANIFEST).read_text())
        files.pop("progress.json")
        listed.append(files)
    return listed


@pytest.mark.slow
def test_the_best_and_the_last_checkpoints_stay(settings, tmp_path, monkeypatch):
    train(settings("checkpoint.every=1", "eval.every=1", "checkpoint.keep_last=1", "checkpoint.keep_best=1"))
    records = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    best = max(records[1:], key=lambda record: (record["pass@1"], record["step"]))["step"]
    assert set(checkpoint_steps(tmp_path / "run")) in ({best, 4}, {4})


def test_best_needs_evaluations_at_checkpoints(settings):
    with pytest.raises(ValueError, match=r"eval.every \(3\) must be a multiple of checkpoint.every \(2\)"):
        settings("checkpoint.keep_best=1", "eval.every=3")


@pytest.mark.parametrize(
    ("number", "phase"), [(signal.SIGTERM, "sample"), (signal.SIGINT, "update"), (signal.SIGTERM, "sampled")]
)
def test_a_signal_writes_a_checkpoint_and_the_run_can_resume(
    whole, settings, tmp_path, monkeypatch, number, phase
):
    """During sampling it ends at once, and where that is just done too, during an update after it; nothing is
    sampled or logged twice, or left out."""
    before = signal.getsignal(number)
    owner, name, call = {
        "sample": (HfEngine, "generate", 3),
        "sampled": (Sampler, "next", 3),
        "update": (Policy, "step", 5),
    }[phase]
    inner, calls = vars(owner)[name], []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return inner(self, *args, **kwargs)
        rollout = inner(self, *args, **kwargs) if phase == "sampled" else None
        signal.raise_signal(number)
        return rollout or inner(self, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(owner, name, interrupted)
        with pytest.raises(Interrupted):
            train(settings("eval.data=null", "checkpoint.every=0"))
    assert len(checkpoint_steps(tmp_path / "run")) == 1
    assert signal.getsignal(number) == before
    train(settings("eval.data=null", "checkpoint.every=0"))
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_second_signal_ends_the_process(monkeypatch):
    interruption = Interruption(World())
    with interruption.handling_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher's, of the same request
        monkeypatch.setattr(training_run, "SAME_SIGNAL", 0.0)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), interruption.interruptible():
        pass


def test_a_signal_after_an_alarm_is_the_first(monkeypatch):
    interruption = Interruption(World())
    monkeypatch.setattr(training_run, "SAME_SIGNAL", 0.0)
    with interruption.handling_signals():
        interruption.request_stop("the reward has fallen", alarm=True)
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="the reward has fallen") as raised, interruption.interruptible():
        pass
    assert raised.value.alarm


def test_a_signal_while_a_line_is_written_leaves_it_whole_and_once(tmp_path, monkeypatch):
    interruption, lines = Interruption(World()), Lines(tmp_path / "log")
    stat = Path.stat

    def signalled(self, **options):
        signal.raise_signal(signal.SIGTERM)
        return stat(self, **options)

    with (
        interruption.handling_signals(),
        pytest.raises(Interrupted),
        interruption.interruptible(),
        monkeypatch.context() as context,
    ):
        lines.add("1\n")
        context.setattr(Path, "stat", signalled)
        lines.add("2\n")
    assert (tmp_path / "log").read_text() == "1\n2\n" and not lines.waiting


def test_a_signal_while_the_disk_is_full_stops_no_later_line(tmp_path, monkeypatch):
    """The line waits, the request too: it ends the next block between two steps and nothing before."""
    interruption, lines = Interruption(World()), Lines(tmp_path / "log")

    def full(self, **options):
        signal.raise_signal(signal.SIGTERM)
        raise OSError(28, "No space left on device")

    with interruption.handling_signals():
        with interruption.interruptible(), monkeypatch.context() as context:
            context.setattr(Path, "stat", full)
            context.setattr(Path, "is_file", lambda self: True)
            lines.add("1\n")
        lines.add("2\n")  # of an update, which a signal must not end
        with pytest.raises(Interrupted), interruption.interruptible():
            pass
    assert (tmp_path / "log").read_text() == "1\n2\n"


def test_a_lone_surrogate_is_written(tmp_path):
    lines = Lines(tmp_path / "log")
    lines.add('"\ud83d"\n')
    assert json.loads((tmp_path / "log").read_text()) == "\ud83d"


def test_without_checkpoints_there_is_no_newest(tmp_path):
    assert Checkpoints(RunFolder(tmp_path / "none"), console=Console(), world=World()).newest() is None
