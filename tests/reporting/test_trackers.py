"""The trackers of a real run, each read back with its own library (`make test-report`)."""

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
    logged = events.EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    values = [(event.step, event.value) for event in logged.Scalars("reward/mean")]
    assert values == [(row["step"], pytest.approx(row["reward/mean"])) for row in rows]
    assert [event.step for event in logged.Scalars("eval/held-out/pass@1")] == [0, 2]
    [histogram, *_] = logged.Histograms("policy/log_ratio")
    row = json.loads((folder / "histograms.jsonl").read_text().splitlines()[0])
    assert histogram.histogram_value.num == sum(sum(one["log_ratio"]) for one in row["minibatches"])
    assert logged.Images("rollouts/0")[0].width > 10


@pytest.mark.report
def test_a_resumed_run_has_no_step_twice_in_tensorboard(run):
    from tensorboard.backend.event_processing import event_accumulator as events

    folder, _ = run("tensorboard", "checkpoint.every=1")
    run("tensorboard", "checkpoint.every=1", "train.steps=3")
    logged = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in logged.Scalars("reward/mean")] == [1, 2, 3]


@pytest.mark.report
def test_wandb_offline(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, _ = run("wandb", "checkpoint.every=1")
    [offline] = (folder / "wandb").glob("offline-run-*")
    assert offline.name.endswith(json.loads((folder / "trackers.json").read_text())["wandb"])
    assert list(offline.glob("run-*.wandb")) and list(offline.rglob("*.jpg"))
    run("wandb", "checkpoint.every=1", "train.steps=3")
    again = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    assert len(again) == 1, "a resumed run is the same run"


@pytest.mark.report
def test_trackio(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    _, rows = run("trackio")
    [tracked] = trackio.Api().runs("mine")
    assert tracked.name.startswith("run-") and tracked.config["train"]["steps"] == 2
    logs = trackio.SQLiteStorage.get_logs("mine", tracked.name)
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
    history = client.get_metric_history(id, "reward/mean")
    assert [(each.step, each.value) for each in history] == [
        (row["step"], pytest.approx(row["reward/mean"])) for row in rows
    ]
    assert json.loads(client.get_run(id).data.params["train"])["steps"] == 2


def test_a_failing_tracker_is_dropped_and_the_run_continues(run, monkeypatch, capsys):
    class Failing:
        id = ""

        def __init__(self, *_):
            pass

        def log(self, values, step):
            raise ConnectionError("gone")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    _, rows = run("wandb")
    assert len(rows) == 2
    assert capsys.readouterr().out.count("wandb failed (ConnectionError('gone'))") == 1


def test_the_error_names_a_tracker_that_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda *_: __import__("no_such_tracker"))
    with pytest.raises(ValueError, match=r"log.to \(mlflow\) needs a package: pip install mlflow"):
        run("mlflow")


def test_histograms_have_one_edge_more_than_bins(tmp_path):
    assert len(EDGES["log_ratio"]) == 60 and len(EDGES["attenuated_pos"]) == 31
    Trackers({}, tmp_path, print)("metrics.jsonl", {"step": 1, "loss": float("nan"), "name": "x"})


def test_what_is_sent_to_trackers(tmp_path):
    """One image per group, metric names that MLflow allows; a signal doesn't count as a tracker's failure."""

    class Recorder:
        id = ""
        images: list[tuple] = []
        histograms: list[tuple] = []

        def log(self, values, step):
            signal.raise_signal(signal.SIGTERM)

        def log_image(self, *args, step):
            self.images.append(args)

        def log_histogram(self, name, counts, edges, step):
            self.histograms.append((name, counts, len(edges)))

    warnings = []
    active = Trackers({"recorder": Recorder()}, tmp_path, warnings.append)
    row = {"step": 1, "pictures": ["a.jpg"], "problem": "p", "response": "r", "reward": 1.0, "answer": "1"}
    for slot in (0, 0, 3, 3):
        active("rollouts.jsonl", row | {"place": slot})
    assert [name for name, *_ in Recorder.images] == ["rollouts/0", "rollouts/3"]
    active("histograms.jsonl", {"step": 1, "minibatches": []})
    minibatch = {name: [1] * (len(edges) - 1) for name, edges in EDGES.items()}
    active("histograms.jsonl", {"step": 1, "minibatches": [minibatch, minibatch]})
    assert Recorder.histograms[0] == ("policy/log_ratio", [2] * 59, 60) and len(Recorder.histograms) == 3
    asked = Interruption(World())
    with asked.handling_signals(), pytest.raises(Interrupted), asked.interruptible():
        active("metrics.jsonl", {"step": 1, "loss": 1.0})
    assert not warnings and "recorder" in active.active
    sent = []
    Recorder.log = lambda self, values, step: sent.append(values)
    active("metrics.jsonl", {"step": 1, "policy/entropy": 0.5, "minibatch0/entropy": 0.4})
    assert sent == [{"policy/entropy": 0.5}], "means over mini-batches only"
    assert trackers._mlflow_name("task//data/../x.py:rows/pass@1") == "task/_/data/_/x.py:rows/pass_1"


@pytest.mark.report
def test_mlflow_leaves_a_run_of_the_caller_alone(run, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    mlflow.set_experiment("theirs")
    with mlflow.start_run() as theirs:
        folder, rows = run("mlflow")
    id = json.loads((folder / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    assert len(client.get_metric_history(id, "reward/mean")) == len(rows)
    assert not client.get_run(theirs.info.run_id).data.metrics
