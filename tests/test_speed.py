"""The benchmark: what it measures, how it goes on where it stopped, and its table."""

import importlib.util
import json
import sys

import pytest

from tests.conftest import ROOT


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEYS = {"seconds_per_rollout_batch", "generation", "old_logprobs", "update", "peak_rss_gb", "first_step"}


@pytest.mark.parametrize("options", ["", "--plain", "--unequal --images 2 --frozen-vision --checkpointing"])
def test_a_measurement(options, model_folder, monkeypatch, capsys):
    sizes = "--side 64 --group 4 --prompts 2 --tokens 8 --steps 1 --budget 300"
    monkeypatch.setattr(sys, "argv", ["speed.py", str(model_folder()), *sizes.split(), *options.split()])
    load("speed").main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) >= KEYS and 0 < result["model_flops_utilisation"] < 1
    assert result["response_tokens"] == 8 or "--unequal" in options
    parts = sum(result[key] for key in ("generation", "old_logprobs", "update"))
    assert 0 < parts <= result["seconds_per_rollout_batch"] + 0.01


@pytest.mark.slow
def test_the_bench_goes_on_and_prints_medians(tmp_path, monkeypatch, capsys):
    bench = load("bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench.WORKLOADS, "cpu", {"small": "--side 64 --prompts 2 --group 2 --tokens 4"})
    done = bench.Results(tmp_path / "runs/bench/cpu.jsonl", fresh=False)
    for number, seconds in enumerate((30.0, 10.0, 20.0)):
        measured = {key: seconds for key in bench.KEYS if key != "peak_gpu_gb"}
        if number:
            done.add({"round": number, "workload": "small", "side": "ours"} | measured)
        done.add({"round": number, "workload": "small", "side": "ours, plain"} | measured)
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.main()
    header, _, ours, plain = capsys.readouterr().out.strip().splitlines()[-4:]
    assert "ours is faster by" in header and "| ours | 10.00 s |" in ours
    assert "| ours, plain | 20.00 s |" in plain and plain.endswith("| 2.0 |")
    rows = [json.loads(line) for line in (tmp_path / "runs/bench/cpu.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[-1]["side"] == "ours" and set(rows[-1]) >= KEYS
