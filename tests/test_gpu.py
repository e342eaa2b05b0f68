"""`make gpu`: its table, its time limits, what it skips, and all its steps at miniature size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval import gpu, gpu_steps
from eval.gpu import Outcome, Report, Runner, Step
from tests.conftest import ROOT


@pytest.fixture
def runner(tmp_path):
    return Runner("cpu", Report(tmp_path, date="today"), tmp_path, time.monotonic() + 600)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_table_is_written_after_every_step(tmp_path):
    report = Report(tmp_path, date="today", device="cuda")
    report.add(Outcome("devices", "card", "ok", 3.2, numbers={"card": "H100", "peak TFLOPS": 712.3456}))
    first = (tmp_path / "gpu.md").read_text().splitlines()
    assert first[0] == "date: today; device: cuda; card: H100"
    assert first[-1] == "| card | ok | 3 | peak TFLOPS 712.3 |"
    report.add(Outcome("moe", "MoE", "timed out", 90.0, "after 90 s", {"loss": 0.5}, ("check ok: a | b",)))
    report.add(Outcome("vllm", "vLLM", "skipped", reason="not installed: vllm"))
    *_, moe, vllm = (tmp_path / "gpu.md").read_text().splitlines()
    assert moe == r"| MoE | timed out: after 90 s | 90 | loss 0.5; check ok: a \| b |"
    assert vllm == "| vLLM | skipped: not installed: vllm | 0 |  |"
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["card"] == "H100" and [step["status"] for step in document["steps"]] == [
        "ok",
        "timed out",
        "skipped",
    ]
    assert report.failed == ["moe"]


def test_a_step_that_takes_too_long_ends_with_its_children_and_keeps_its_measurements(runner, tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('RESULT {\"child\": %d}' % child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    outcome = runner.watch(Step("slow", "Slow", 1), [sys.executable, "-c", script], 2.0)
    assert outcome.status == "timed out" and outcome.reason == "after 2 s"
    child = outcome.numbers["child"]
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def test_a_step_that_fails_says_why(runner):
    script = (
        "print('check ok: shared-prefix and plain'); print('RESULT {\"a\": 1}'); raise ValueError('no room')"
    )
    outcome = runner.watch(Step("bad", "Bad", 1), [sys.executable, "-c", script], 60.0)
    assert (outcome.status, outcome.reason) == ("failed", "ValueError: no room")
    assert outcome.numbers == {"a": 1} and outcome.checks == ("check ok: shared-prefix and plain",)


def test_a_step_is_skipped_without_its_packages_and_without_time(runner, tmp_path):
    outcome = runner.run(Step("trl", "TRL", 60, ("torch", "no_such_package")))
    assert (outcome.status, outcome.reason) == ("skipped", "not installed: no_such_package")
    late = Runner("cpu", runner.report, tmp_path, time.monotonic() + 1)
    assert late.run(Step("devices", "card", 60)).reason == "no time left (--seconds)"


def test_without_a_gpu_no_further_step_runs(runner, monkeypatch):
    monkeypatch.setattr(
        Runner, "run", lambda self, step: Outcome(step.name, "", "ok", numbers={"no gpu": "none"})
    )
    said = []
    assert gpu.run_all(gpu.STEPS, runner, said.append) == gpu.NO_GPU == 2
    assert len(runner.report.outcomes) == 1 and "--device cpu" in said[-1]


def test_wheels_are_installed_beside_the_interpreters_own_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wheels").mkdir()
    outcome = gpu.install(tmp_path / "wheels", tmp_path / "site")
    assert outcome.status == "failed" and "must hold .whl files" in outcome.reason
    wheel(tmp_path / "wheels")
    assert gpu.missing(["for_a_test"]) == ["for_a_test"]
    assert gpu.install(tmp_path / "wheels", tmp_path / "site").status == "ok"
    assert gpu.missing(["for_a_test"]) == []
    paths = gpu.environment(tmp_path / "site")["PYTHONPATH"].split(os.pathsep)
    assert paths[:2] == [str(ROOT), str(tmp_path / "site")]


def wheel(folder: Path) -> None:
    """A package with one empty module."""
    import zipfile

    with zipfile.ZipFile(folder / "for_a_test-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("for_a_test.py", "")
        info = "for_a_test-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: for-a-test\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_every_step_has_a_function():
    assert [step.name for step in gpu.STEPS] == list(gpu_steps.STEPS)
    with pytest.raises(ValueError, match="must be among devices"):
        gpu.chosen(["speed"])
    assert [step.name for step in gpu.chosen(["moe"])] == ["devices", "moe"]


def test_comparison_with_trl():
    ours = {"update": 2.0, "peak gpu gb": 20.0}
    compared = gpu_steps.against_trl(ours, {"update": 7.0, "peak_gpu_gb": 32.0, "peak_rss_gb": 5.0})
    assert compared["times_TRLs_update"] == 3.5 and compared["target_times"] == "3: met"
    assert compared["share_of_TRLs_memory"] == 0.625 and compared["target_memory"] == "0.5: missed"
    assert gpu_steps.against_trl({}, {"update": 7.0, "peak_gpu_gb": 32.0}) == {}


def test_an_error_that_is_no_number_is_no_small_error():
    reference = torch.ones(4)
    assert gpu_steps.relative_error(reference * 1.01, reference) == pytest.approx(0.01)
    assert gpu_steps.relative_error(reference * float("nan"), reference) > gpu_steps.MAX_ERROR


@pytest.mark.slow
def test_all_steps_run_at_miniature_size(tmp_path):
    command = [
        sys.executable,
        ROOT / "eval/gpu.py",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--work",
        tmp_path / "work",
    ]
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    document = json.loads((tmp_path / "gpu.json").read_text())
    steps = {step["name"]: step for step in document["steps"]}
    log = (tmp_path / "gpu.log").read_text()
    assert process.returncode == 0, process.stdout + log[-5000:]
    assert list(steps) == [step.name for step in gpu.STEPS]
    for name, step in steps.items():
        assert step["status"] == "ok" or step["reason"].startswith("not installed: "), name
        assert step["status"] == "skipped" or step["numbers"], name
    assert document["torch"] == torch.__version__
    for name in ("quickstart_float32", "quickstart_bf16", "update", "moe", "offload"):
        assert any("check ok: shared-prefix" in line for line in steps[name]["checks"]), name
    assert 0 < steps["update"]["numbers"]["share of peak"] < 1
    assert steps["sampling"]["numbers"]["launches per token"] > 50


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "eval/gpu.py"),
        "--out",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "sees no CUDA device" in process.stdout
