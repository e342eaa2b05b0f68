"""The real commands with the real vLLM, in its own environment (`make test-vllm`)."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed.launcher import launch
from tests.rollout.test_contract import free_port, start_server, stop

pytestmark = pytest.mark.vllm
COLD_START = ROOT / "data/shapes/cold_start"
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}


def command(*words, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "vlm_sapo.cli", *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_quick_start_learns_with_vllm_as_with_hf(tmp_path):
    """Seven of its forty steps; the held-out rate is within a few points of the other engine's."""
    reached = {}
    for engine in ("hf", "vllm"):
        folder = tmp_path / engine
        options = ("train.steps=7", "eval.every=0", f"run.dir={folder}")
        said = command("train", "quickstart", f"rollout.engine={engine}", *options).stdout
        summary = json.loads((folder / "summary.json").read_text())
        reached[engine] = summary["eval_before/held-out"]["pass@1"], summary["eval_after/held-out"]["pass@1"]
    assert "changed weights reach the engine" in said and "step 2: engine and trainer agree" in said
    for before, after in reached.values():
        assert before < 0.65 and after > 0.85
    first = rows(tmp_path / "vllm/metrics.jsonl")[0]
    assert first["parity/mean"] < 1e-5 and first["minibatch0/ratio_max"] == 1.0


def test_two_processes_with_an_engine_each_train_what_one_does(tmp_path):
    options = ("train.steps=2", "eval.data=null", "rollout.engine=vllm", "train.shard=all")
    command("train", "quickstart", *options, f"run.dir={tmp_path / 'one'}")
    done = launch(
        "-m",
        "vlm_sapo.cli",
        "train",
        "quickstart",
        *options,
        f"run.dir={tmp_path / 'two'}",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 processes (cpu), 2 of which share a copy" in done.stdout
    assert "changed weights reach the engine" in done.stdout
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two"))
    before = load_file(COLD_START / "model.safetensors")
    moved = max(float((one[name] - before[name]).abs().max()) for name in one)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < moved / 20


def test_check_prints_its_table_and_agrees():
    said = command("check", "quickstart", "rollout.engine=vllm").stdout
    for words in (
        "prompt ids equal",
        "image grids equal",
        "log-probs",
        "banned tokens",
        "changed weights arrive",
    ):
        [line] = [line for line in said.splitlines() if line.startswith(words)]
        assert " ok " in line
    assert "engine and trainer agree" in said


def test_check_detects_an_engine_with_another_dtype():
    done = command(
        "check",
        "quickstart",
        "rollout.engine={type: vllm, dtype: bfloat16}",
        "rollout.tolerance=1e-4",
        check=False,
    )
    assert done.returncode == 1
    assert "FAILS" in done.stdout and "dtype: " in done.stdout


def test_eval_with_vllm_is_eval_with_hf(tmp_path):
    """At temperature 0 both engines give the same answers."""
    benchmark = tmp_path / "shapes.yaml"
    benchmark.write_text(
        "about: drawn shapes\nsource: data/shapes.py:rows\nargs: {split: test, size: 24}\n"
        "verifier: {name: auto}\nmax_tokens: 48\n"
    )
    answers = {}
    for engine in ("hf", "vllm"):
        out = tmp_path / engine
        command("eval", "--model", COLD_START, "--benchmark", benchmark, "--engine", engine, "--out", out)
        answers[engine] = [row["responses"] for row in rows(out / "samples.jsonl")]
    assert len(answers["hf"]) == 24
    assert sum(a == b for a, b in zip(*answers.values(), strict=True)) >= 23, "one may lie on a knife's edge"


def test_a_server_is_killed_in_the_middle(tmp_path):
    """Of two, one is killed; the run goes on with the other. Then that one is killed as well; the run stops with
    a checkpoint, and goes on from it when a server is there again."""
    ports = [free_port(), free_port()]
    with ThreadPoolExecutor() as pool:
        servers = [*pool.map(lambda port: start_server(COLD_START, port, tmp_path / f"{port}.log"), ports)]
    urls = ", ".join(f"'http://127.0.0.1:{port}'" for port in ports)
    engine = f"rollout.engine={{type: vllm_server, servers: [{urls}], patience: 2, timeout: 60}}"
    words = ["train", "quickstart", engine, "rollout.ahead=1", "checkpoint.every=0", "train.steps=12"]
    words += [
        "eval.every=0",
        "eval.data.args.size=24",
        f"run.dir={tmp_path}/run",
        "data.max_prompt_tokens=256",
    ]
    log = (tmp_path / "run.log").open("w")
    run = subprocess.Popen(
        [sys.executable, "-m", "vlm_sapo.cli", *words], cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log
    )
    try:
        wait_for_step(tmp_path / "run", 3, run)
        kill(servers[0])
        wait_for_step(tmp_path / "run", 6, run)
        kill(servers[1])
        assert run.wait(120) == 1
        said = (tmp_path / "run.log").read_text()
        assert "error: no server of" in said and "a checkpoint after" in said
        done = len(rows(tmp_path / "run/metrics.jsonl"))
        assert (tmp_path / f"run/checkpoints/step_{done:06d}").is_dir()
        servers.append(start_server(COLD_START, ports[1], tmp_path / "again.log"))
        command(*words)
    finally:
        for process in servers:
            kill(process)
    logged = rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(1, 13))
    assert logged[-1]["reward/mean"] > 0.85
    ids = [row["id"] for row in rows(tmp_path / "run/rollouts.jsonl")][::8]
    assert len(set(ids)) == len(ids), "a row was used twice"


def wait_for_step(folder, step, run):
    path = folder / "metrics.jsonl"
    while not path.is_file() or len(rows(path)) < step:
        assert run.poll() is None, "the run ended early"
        time.sleep(0.2)


def kill(process):
    """The server and the engine that it started, at once."""
    if process.poll() is None:
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        process.send_signal(signal.SIGKILL)
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        process.wait(30)


def test_serve_ends_its_server_on_a_signal(tmp_path):
    port = free_port()
    process = start_server(COLD_START, port, tmp_path / "server.log")
    own = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    stop(process)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
    deadline = time.monotonic() + 30  # helpers of multiprocessing end a moment later
    while any(Path(f"/proc/{child}").exists() for child in own) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert own and time.monotonic() < deadline, "its engine goes on without it"
