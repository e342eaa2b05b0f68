"""Whole runs of the tiny model: what they write, how they resume, how they fail."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import SHARED
from tests.training.conftest import metrics
from vlm_sapo.cli import main
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.training.sft import sft
from vlm_sapo.training.trainer import train
from vlm_sapo.types import RowError


def test_a_run_writes_what_scripts_rely_on(settings, tmp_path, capsys):
    summary = train(settings("eval.every=2"))
    run = tmp_path / "run"
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["seconds"] > 0
    for name in ("eval_before/held-out", "eval_after/held-out"):
        low, high = summary[name]["ci95"]
        assert low <= summary[name]["pass@1"] <= high and summary[name]["n"] == 6
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = (
        "loss",
        "reward/mean",
        "reward/std",
        "reward/even",
        "memory/host_peak_gb",
        "policy/grad_norm",
        "policy/effective_update",
        "time/rollout",
    )
    assert all(name in row for name in names for row in rows)
    assert rows[0]["minibatch0/ratio_max"] == 1.0 and rows[0]["minibatch0/effective_update"] == 1.0
    assert [row["epoch"] for row in rows] == [0.2, 0.4, 0.6, 0.8], "4 prompts a step, of 20 rows"
    rollout = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    assert {"step", "id", "response", "parts", "advantage"} <= set(rollout)
    assert configfile.load(cfg.TrainConfig, str(run / "config.yaml")) == settings("eval.every=2")
    AutoModelForImageTextToText.from_pretrained(run / "final")
    AutoProcessor.from_pretrained(run / "final")
    assert (run / "curves.png").stat().st_size > 10_000
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    out = capsys.readouterr().out
    assert all(f"held-out pass@1 after {step} steps" in out for step in (0, 2, 4))
    assert out.count("; gold: ") == 6, "three samples of the first evaluation and three of the last"


@pytest.mark.parametrize("ahead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_threads_that_prepare_prompts_change_no_number(settings, tmp_path, ahead):
    """With rows that are skipped, groups that are replaced, and a checkpoint in the middle."""
    (tmp_path / "own.py").write_text(
        "import os, threading\n"
        "from data.shapes import rows as shapes\n"
        "def rows(size):\n"
        "    broken = {'problem': '', 'answer': '1'}\n"
        "    return [broken if n % 7 == 3 else row for n, row in enumerate(shapes(size=size))]\n"
    )
    common = (
        f"data={{source: {tmp_path}/own.py:rows, args: {{size: 20}}, on_error: skip}}",
        "rollout.resample=1",
        "rollout.group=2",
        "eval.data=null",
        f"rollout.ahead={ahead}",
    )
    for workers in (0, 3):
        train(settings(*common, f"run.dir={tmp_path}/{workers}", f"data.workers={workers}"))
    without, threads = tmp_path / "0", tmp_path / "3"
    assert metrics(without) == metrics(threads)
    one, two = (torch.load(run / "checkpoints/step_000002/rollouts.pt") for run in (without, threads))
    assert one["stream"] == two["stream"]
    assert sum(task["skipped"] for task in one["stream"].values()) > 0


def test_a_resumed_run_equals_the_whole_one(settings, tmp_path):
    train(settings(f"run.dir={tmp_path}/whole"))
    train(settings(f"run.dir={tmp_path}/cut", "train.steps=2"))
    cut = tmp_path / "cut"
    (cut / "summary.json").unlink()
    text = (cut / "config.yaml").read_text().replace("steps: 2", "steps: 4")
    (cut / "config.yaml").write_text(text)
    (cut / "metrics.jsonl").open("a").write('{"step": 3, "loss": 99}\n{"st')  # a step that was under way
    train(settings(f"run.dir={cut}"))
    assert metrics(cut) == metrics(tmp_path / "whole")
    one, two = (AutoModelForImageTextToText.from_pretrained(tmp_path / n / "final") for n in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.slow
def test_a_finished_run_is_reported_and_another_config_refused(settings, tmp_path, capsys):
    first = train(settings())
    assert train(settings()) == first
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run with another config: train.lr: 0.001 -> 0.0001. Cho"):
        train(settings("train.lr=1e-4"))
    train(settings("train.lr=1e-4", "train.steps=2", "run.overwrite=true"))
    assert len(metrics(tmp_path / "run")) == 2
    changes = ("train.tokens_per_microbatch=100", "train.layout=plain", "train.steps=4", "train.lr=1e-4")
    train(settings(*changes))  # a finished run goes on, in its own way
    assert [row["lr"] for row in metrics(tmp_path / "run")] == [1e-4] * 4
    said = capsys.readouterr().out
    assert "continues with changes: train.layout: shared -> plain; train.steps: 2 -> 4; train.tok" in said
    train(settings(*changes, "train.lr=2e-4", "train.steps=5", "run.accept_changes=true"))
    assert [row["lr"] for row in metrics(tmp_path / "run")] == [1e-4] * 4 + [2e-4]
    train(settings("train.lr=1e-4", "train.steps=2", "run.overwrite=true"))
    assert len(metrics(tmp_path / "run")) == 2


def test_a_folder_that_is_no_run_is_left_alone(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="must be empty or hold a run"):
        train(settings())
    assert (tmp_path / "run/thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.objective={type: grpo}", "algo.advantage=leave_one_out", "algo.reduction=token_mean"],
        ["algo.objective={type: gspo}", "algo.ratio=sequence", "train.tokens_per_microbatch=100"],
        [
            "algo.objective={type: cispo}",
            "algo.kl=0.01",
            "algo.mask_truncated=true",
            "algo.reduction=constant",
        ],
        ["train.precision=bf16", "model.gradient_checkpointing=true", "model.freeze=[vision, merger]"],
    ],
)
def test_choices_combine(settings, tmp_path, overrides):
    train(settings("train.steps=2", "eval.data=null", "checkpoint.every=0", *overrides))
    assert len(metrics(tmp_path / "run")) == 2
    assert not (tmp_path / "run/checkpoints").exists()


def test_one_minibatch_warns(settings, capsys):
    train(settings("train.steps=1", "train.minibatches=1", "eval.data=null"))
    assert "train.minibatches is 1" in capsys.readouterr().out


def test_frozen_parts_stay_as_they_were(settings, tmp_path, model_folder):
    train(settings("train.steps=2", "eval.data=null", "model.freeze=[vision]"))
    before = AutoModelForImageTextToText.from_pretrained(model_folder()).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/final").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert any("merger" in name for name in changed)
    assert not any("visual" in name and "merger" not in name for name in changed)


@pytest.mark.slow
def test_sft_lowers_its_loss_and_its_result_trains_on(settings, tmp_path):
    summary = sft(settings("train.steps=30", "train.lr=1e-2", kind=cfg.SftConfig))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert summary["steps"] == 30 and "eval_after/held-out" in summary
    train(settings(f"model.path={tmp_path}/run/final", f"run.dir={tmp_path}/rl", "train.steps=1"))


def test_a_broken_reward_stops_the_run(settings, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"reward broken, row train-\d+ of data/shapes.py:rows, response .* RuntimeError: no idea",
    ):
        train(settings(f"reward.parts.0.name={tmp_path}/reward.py:broken", "eval.data=null"))


def test_a_reward_that_hangs_is_counted_and_the_run_goes_on(settings, tmp_path):
    """Every tenth response or so; the others are graded as ever."""
    code = (
        "import time, zlib\n\ndef f(response, example):\n    hang = zlib.crc32(response.encode()) % 10 == 0\n"
    )
    (tmp_path / "hangs.py").write_text(
        code + "    time.sleep(1000 * hang)\n    return float(len(response) % 2)\n"
    )
    overrides = [f"reward.parts.0.name={tmp_path}/hangs.py:f", "reward.timeout=0.5", "eval.data=null"]
    train(settings(*overrides, "checkpoint.every=0"))
    counted = sum(row.get("outcome/f/timeout", 0) for row in metrics(tmp_path / "run"))
    assert 1 <= counted < 32


def test_the_command_line_says_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["vlm-sapo", "train", "quickstart", "model.path=/nowhere", f"run.dir={tmp_path}/r"]
    )
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith(
        "error: model.path (/nowhere) must be a model folder or a hub id"
    )


GEOMETRY = SHARED / "data/geometry3k_formalgeo7k/problems.jsonl"


@pytest.mark.skipif(not GEOMETRY.is_file(), reason="the real problems are not at ../shared/data")
def test_two_steps_on_real_geometry(model_folder, tmp_path):
    """The shipped Geometry3K config with model and data overridden on the command line."""
    overrides = [
        f"model.path={model_folder('qwen2_5_vl')}",
        "model.min_pixels=1024",
        "model.max_pixels=16384",
        f"data={{recipe: formalgeo, source: {GEOMETRY}, on_error: skip}}",
        "eval.data=null",
        "rollout.engine=hf",
        "rollout.max_tokens=16",
        "train.steps=2",
        "train.prompts_per_step=8",
        f"run.dir={tmp_path}/geometry",
    ]
    train(configfile.load(cfg.TrainConfig, "geometry3k", overrides))
    rows = metrics(tmp_path / "geometry")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["prompt/tokens"] > 40
    rollouts = [json.loads(line) for line in (tmp_path / "geometry/rollouts.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rollouts} == {1, 2}
    assert all(
        row["problem"].count(".") <= 2 and set(row["parts"]) == {"accuracy", "format"} for row in rollouts
    )


FRAGILE = """
from pathlib import Path

from data.shapes import rows as drawn

def rows(size, broken):
    found = list(drawn(split="train", size=size))
    mended = not Path(broken).is_file()
    return [row if mended or number != 13 else row | {"answer": ""} for number, row in enumerate(found)]
"""


@pytest.mark.slow
def test_supervised_learning_loses_no_row_to_a_bad_one(settings, tmp_path):
    """Once the row is mended the run goes on as if nothing had been."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    broken = tmp_path / "broken"
    source = (f"data.source={tmp_path}/fragile.py:rows", f"data.args={{size: 20, broken: {broken}}}")
    options = (*source, "eval.data=null", "train.rows_per_step=4", "checkpoint.every=0")
    sft(settings(*options, f"run.dir={tmp_path}/whole", kind=cfg.SftConfig))
    broken.touch()
    with pytest.raises(RowError, match="train-13"):
        sft(settings(*options, kind=cfg.SftConfig))
    broken.unlink()
    assert [row["step"] for row in metrics(tmp_path / "run")]
    sft(settings(*options, kind=cfg.SftConfig))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
