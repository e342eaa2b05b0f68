"""Trackers of a real run, each read back with its own library (`make test-report`)."""

import json
import signal

import pytest

from tests.training.conftest import short_run
from vlm_sapo.distributed import Interrupted, World
from vlm_sapo.reporting import trackers
from vlm_sapo.reporting.trackers import EDGES, Trackers
from vlm_sapo.training.run import Interruption
from vlm_sapo.training.trainer import train


@pytest.fixture
def run(model_folder, tmp_path):
    """`run(name, *overrides)`: a run of two steps with this tracker."""

    def make(name, *overrides):
        options = (f"log.to=[{name}]", "log.project=mine", "train.steps=2", "eval.every=2", *overrides)
        train(short_run(tmp_path, model_folder(), *options))
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        return tmp_path / "run", [json.loads(line) for line in lines]

    return make


@pytest.mark.report
def test_tensorboard(run):
    from tensorboard.backend.event_processing import event_accumulator as events

    folder, rows = run("tensorboard")
    found = events.EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    values = [(event.step, event.value) for event in found.Scalars("reward/mean")]
    assert values == [(row["step"], pytest.approx(row["reward/mean"])) for row in rows]
    assert [event.step for event in found.Scalars("eval/held-out/pass@1")] == [0, 2]
    [histogram, *_] = found.Histograms("policy/log_ratio")
    logged = json.loads((folder / "histograms.jsonl").read_text().splitlines()[0])
    assert histogram.histogram_value.num == sum(sum(one["log_ratio"]) for one in logged["minibatches"])
    assert found.Images("rollouts/0")[0].width > 10


@pytest.mark.report
def test_a_resumed_run_has_no_step_twice_in_tensorboard(run):
    from tensorboard.backend.event_processing import event_accumulator as events

    folder, _ = run("tensorboard", "checkpoint.every=1")
    run("tensorboard", "checkpoint.every=1", "train.steps=3")
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("reward/mean")] == [1, 2, 3]


@pytest.mark.report
def test_wandb_offline(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, _ = run("wandb", "checkpoint.every=1")
    [kept] = (folder / "wandb").glob("offline-run-*")
    assert kept.name.endswith(json.loads((folder / "trackers.json").read_text())["wandb"])
    assert list(kept.glob("run-*.wandb")) and list(kept.rglob("*.jpg"))
    run("wandb", "checkpoint.every=1", "train.steps=3")
    again = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    assert len(again) == 1, "a resumed run is the same run"


@pytest.mark.report
def test_trackio(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    _, rows = run("trackio")
    [found] = trackio.Api().runs("mine")
    assert found.name.startswith("run-") and found.config["train"]["steps"] == 2
    logs = trackio.SQLiteStorage.get_logs("mine", found.name)
    rewards = {log["step"]: log["reward/mean"] for log in logs if "reward/mean" in log}
    assert rewards == {row["step"]: pytest.approx(row["reward/mean"]) for row in rows}
    assert any("policy/log_ratio" in log for log in logs)


@pytest.mark.report
def test_mlflow(run, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    folder, rows = run("mlflow")
    client, id = mlflow.MlflowClient(), json.loads((folder / "trackers.json").read_text())["mlflow"]
    found = client.get_metric_history(id, "reward/mean")
    assert [(each.step, each.value) for each in found] == [
        (row["step"], pytest.approx(row["reward/mean"])) for row in rows
    ]
    assert json.loads(client.get_run(id).data.params["train"])["steps"] == 2


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(run, monkeypatch, capsys):
    class Failing:
        id = ""

        def __init__(self, *_):
            pass

        def numbers(self, step, values):
            raise ConnectionError("gone")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    _, rows = run("wandb")
    assert len(rows) == 2
    assert capsys.readouterr().out.count("wandb failed (ConnectionError('gone'))") == 1


def test_one_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda *_: __import__("no_such_tracker"))
    with pytest.raises(ValueError, match=r"log.to \(mlflow\) needs a package: pip install mlflow"):
        run("mlflow")


def test_histograms_have_an_edge_more_than_bins(tmp_path):
    assert len(EDGES["log_ratio"]) == 60 and len(EDGES["attenuated_pos"]) == 31
    Trackers({}, tmp_path, print)("metrics.jsonl", {"step": 1, "loss": float("nan"), "name": "x"})


def test_what_trackers_get(tmp_path):
    """A picture once for each group, names that MLflow allows, and a signal is not a tracker's failure."""

    class Kept:
        id = ""
        got: list[tuple] = []

        def numbers(self, step, values):
            signal.raise_signal(signal.SIGTERM)

        def picture(self, *args):
            self.got.append(args)

    told = []
    made = Trackers({"kept": Kept()}, tmp_path, told.append)
    row = {"step": 1, "pictures": ["a.jpg"], "problem": "p", "response": "r", "reward": 1.0, "answer": "1"}
    for place in (0, 0, 3, 3):
        made("rollouts.jsonl", row | {"place": place})
    assert [name for _, name, *_ in Kept.got] == ["rollouts/0", "rollouts/3"]
    asked = Interruption(World())
    with asked.handling_signals(), pytest.raises(Interrupted), asked.interruptible():
        made("metrics.jsonl", {"step": 1, "loss": 1.0})
    assert not told and "kept" in made.made
    assert trackers._allowed("task//data/../x.py:rows/pass@1") == "task/_/data/_/x.py:rows/pass_1"
