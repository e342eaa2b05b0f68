"""Held-out sets of a run: their names everywhere, the split, and what may change when the run is resumed."""

import json
import re
from types import SimpleNamespace

import pytest

from tests.training.conftest import short_run
from vlm_sapo.cli import _report
from vlm_sapo.config import schema as cfg
from vlm_sapo.evaluation.periodic import Evaluator
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.training.sft import sft
from vlm_sapo.training.trainer import train
from vlm_sapo.types import RowError

SHAPES = "{{source: 'data/shapes.py:rows', args: {{split: {split}, size: {size}}}, name: {name}}}"
TWO = f"[{SHAPES.format(split='test', size=3, name='small')}, {SHAPES.format(split='validation', size=2, name='other')}]"


def records(run, name="evaluations.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def first(model_folder, tmp_path_factory):
    """Two steps with rows held out, two sets of one's own and a benchmark that the run's reward grades; the
    folder, the summary and what was printed."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "mine.yaml").write_text(
        "source: data/shapes.py:rows\nargs: {split: test, size: 2}\nverifier: {name: run}\nmax_tokens: 8\n"
    )
    return folder


def settings(folder, model_folder, *overrides):
    common = ("data.holdout=4", f"eval.data={TWO}", f"eval.benchmarks=[{folder}/mine.yaml]", "train.steps=2")
    return short_run(folder, model_folder(), "checkpoint.keep_best=1", "eval.every=2", *common, *overrides)


def test_every_set_has_its_name_and_may_change_on_resume(first, model_folder, capsys):
    run = first / "run"
    summary = train(settings(first, model_folder))
    said = capsys.readouterr().out
    assert re.search(r"\b16 rows of data/shapes.py:rows.*, 4 more rows held out \(by image\)", said)
    names = ["held-out", "small", "other", "mine"]
    assert [row["name"] for row in records(run) if row["step"] == 0] == names
    assert {row["name"]: row["n"] for row in records(run)} == {
        "held-out": 4,
        "small": 3,
        "other": 2,
        "mine": 2,
    }
    assert all({f"eval_before/{name}", f"eval_after/{name}"} <= summary.keys() for name in names)
    assert all(f"{name} pass@1 after 2 steps" in said for name in names)
    samples = records(run, "evaluations/step_000000/samples.jsonl")
    held_out = {row["id"] for row in samples if row["benchmark"] == "held-out"}
    trained = {row["id"] for row in records(run, "rollouts.jsonl")}
    assert len(held_out) == 4 and not held_out & trained
    graded = next(row for row in samples if row["benchmark"] == "mine")
    assert graded["scores"] == [float(len(graded["responses"][0]) % 2)]  # by the run's reward

    (first / "second.yaml").write_text((first / "mine.yaml").read_text())
    added = f"eval.benchmarks=[{first}/mine.yaml, {first}/second.yaml]"
    finished = train(settings(first, model_folder, added))  # to a finished run
    assert finished["not_evaluated_before"] == ["second"]
    assert [row["name"] for row in records(run) if row["step"] == 2] == [*names, "second"]
    _report(finished)
    said = capsys.readouterr().out
    assert "this run continues with changes: eval.benchmarks: " in said
    assert "second pass@1: not evaluated before, " in said

    changes = (
        added,
        "eval.every=1",
        "eval.samples=2",
        "log.rollouts=1",
        "checkpoint.keep_last=1",
        "alarms.window=3",
    )
    train(
        settings(
            first, model_folder, *changes, "train.steps=4", "checkpoint.keep_best=0", "checkpoint.every=1"
        )
    )
    said = capsys.readouterr().out
    assert "second is evaluated with other settings than before this run was resumed" in said
    measured = [(row["step"], row["samples"]) for row in records(run) if row["name"] == "second"]
    assert measured == [(2, 1), (2, 2), (3, 2), (4, 2)]  # what can be compared starts anew
    samples = records(run, "evaluations/step_000002/samples.jsonl")
    assert [len(row["scores"]) for row in samples if row["benchmark"] == "second"] == [2, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert "eval_after/small" in summary and "eval_before/small" not in summary
    assert "| small |" not in (run / "final/README.md").read_text().partition("<details>")[0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000004"]
    logged = {row["step"]: row["id"] for row in records(run, "rollouts.jsonl")}
    assert not held_out & set(logged.values())
    slots = [
        len({row["place"] for row in records(run, "rollouts.jsonl") if row["step"] == step})
        for step in (1, 3)
    ]
    assert slots == [2, 1]
    with pytest.raises(ValueError, match=re.escape("holds a run with another config: data.holdout: 4 -> 5")):
        train(settings(first, model_folder, "train.steps=4", "data.holdout=5"))


def test_other_rows_are_not_held_out_of_a_run_that_may_have_trained_on_them(model_folder, tmp_path, capsys):
    def write(count):
        lines = [json.dumps({"problem": f"{n}+1", "answer": str(n + 1)}) for n in range(count)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    def run(*overrides):
        data = f"data={{source: {tmp_path}/rows.jsonl, holdout: 0.2}}"
        own = f"eval.data={{source: {tmp_path}/rows.jsonl, name: own, limit: 2}}"
        return train(short_run(tmp_path, model_folder(), data, own, *overrides))

    write(20)
    assert run("train.steps=1")["eval_before/held-out"]["n"] == 4
    capsys.readouterr()
    assert run("train.steps=2")["eval_before/held-out"]["n"] == 4  # nothing has changed
    assert "than before this run was resumed" not in capsys.readouterr().out
    write(40)
    with pytest.raises(ValueError, match="data.holdout holds out other rows for held-out than before"):
        run("train.steps=3")
    summary = run("train.steps=3", "run.accept_changes=true")
    assert summary["not_evaluated_before"] == ["held-out"]
    assert summary["eval_after/held-out"]["n"] == 8
    assert "held-out is evaluated on other rows than before" in capsys.readouterr().out


def test_a_row_that_cannot_be_read_stops_the_run_at_the_split(model_folder, tmp_path):
    """And not when it is drawn, after hours."""
    rows = [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in range(20)]
    rows.append({"problem": "<image>What is it?", "answer": "2", "image": "gone.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = (f"data={{source: {tmp_path}/rows.jsonl, holdout: 4}}", "eval.data=null", "train.steps=1")
    with pytest.raises(RowError, match="row 20 of .*gone.png does not exist"):
        train(short_run(tmp_path, model_folder(), *options))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert train(short_run(tmp_path, model_folder(), *options, "data.on_error=skip"))["steps"] == 1


def test_a_set_that_changed_leaves_the_samples_of_others(tmp_path):
    """Also of one whose evaluation was interrupted."""

    def item(name: str, settings: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, fingerprints={"rows": "r", "settings": settings})

    folder = RunFolder(tmp_path)
    for name in ("one", "changed"):
        folder.append("evaluations.jsonl", {"step": 2, "name": name, "rows": "r", "settings": "s"})
    samples = SampleFile(tmp_path / "evaluations/step_000002", "any")
    samples.add([{"benchmark": name, "row": 0} for name in ("one", "changed", "interrupted")])
    sets = [item("one", "s"), item("changed", "t"), item("interrupted", "s")]
    evaluator = Evaluator(sets, 1, folder, *[None] * 7)
    assert evaluator._done(2, samples.folder) == ["one"]
    assert [row["benchmark"] for row in records(samples.folder, "samples.jsonl")] == ["one", "interrupted"]


def test_supervised_training_holds_rows_out_too(model_folder, tmp_path):
    mixture = "data=[{{source: 'data/shapes.py:rows', args: {{size: 12}}, columns: {{response: demonstration}}, name: {}, share: 1}}]"
    options = (
        mixture.format("figures"),
        "data.mixture.0.args.split=train",
        "data.holdout=0.25",
        "eval.data=null",
    )
    config = short_run(tmp_path, model_folder(), *options, "train.steps=1", kind=cfg.SftConfig)
    summary = sft(config)
    assert summary["eval_after/held-out/figures"]["n"] == 3
    alone = ("run.name=alone", f"run.dir={tmp_path}/alone", "data.holdout=null", "reward.parts=[]")
    assert sft(short_run(tmp_path, model_folder(), *options, *alone, kind=cfg.SftConfig))["steps"] == 4
    with pytest.raises(
        ValueError, match="data.holdout needs a reward; set reward.parts, or remove data.holdout"
    ):
        short_run(tmp_path, model_folder(), *options, "reward.parts=[]", kind=cfg.SftConfig)
