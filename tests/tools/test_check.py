"""`vlm-sapo check` and `vlm-sapo serve`, as a user runs them."""

import shlex
import socket

import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import group_slice
from tests.rollout.model_server import ModelServer
from vlm_sapo.cli import app
from vlm_sapo.evaluation import benchmarks
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.packing import Plain
from vlm_sapo.tools import serve


@pytest.fixture
def run(model_folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: {model_folder()}}}\n"
        "data: {source: 'data/shapes.py:rows', args: {size: 20}, max_prompt_tokens: 200}\n"
        "rollout: {group: 2, max_tokens: 8}\nreward: {parts: [{name: auto}], workers: 1}\ntrain: {steps: 1}\n"
    )

    def command(verb, *words):
        return CliRunner().invoke(app, [verb, str(config), *map(str, words)])

    return command


@pytest.fixture
def server(model_folder):
    model_server = ModelServer(model_folder())
    yield model_server
    model_server.close()


def lines(result):
    """The table: by name of the check, its verdict and numbers."""
    table = {}
    for line in result.output.splitlines():
        name, _, rest = line.partition("   ")
        table[name.strip()] = rest.split()
    return table


def served(server):
    return f"rollout.engine={{type: vllm_server, servers: ['{server.url}'], patience: 1, timeout: 20}}"


@pytest.mark.parametrize("kind", ["hf", "vllm_server"])
def test_check_passes_for_engines_that_agree(run, server, tmp_path, kind):
    engine = "rollout.engine=hf" if kind == "hf" else served(server)
    result = run("check", engine, "--rows", 3, "--samples", 2)
    assert result.exit_code == 0, result.output
    table = lines(result)
    checks = (
        "prompt ids equal",
        "image grids equal",
        "log-probs",
        "banned tokens",
        "changed weights arrive",
    )
    assert all(table[name][0] == "ok" for name in checks)
    assert "100.0% of the change" in " ".join(table["changed weights arrive"])
    assert "speed" in table and "weight sync" in table
    assert f"{kind} on 3 rows with 2 responses each: engine and trainer agree" in result.output
    assert not (tmp_path / "runs").exists()


def test_check_names_a_temperature_that_the_engine_ignores(run, server):
    """As with a server that was started without --logprobs-mode processed_logprobs."""

    def raw(route, body):
        if route != "inference/v1/generate":
            return None
        answer, prompt = server.act(route, body), server.prompt(body)
        for choice in answer["choices"]:
            inputs = Plain().inputs([group_slice(prompt, [choice["token_ids"]])])
            with torch.no_grad():
                scores = Pass(server.vlm)(inputs)
            choice["logprobs"]["content"] = [{"logprob": value} for value in scores.logprobs[0].tolist()]
        return answer

    server.fault = raw
    result = run("check", served(server), "rollout.temperature=0.7")
    assert result.exit_code == 1
    assert lines(result)["log-probs"][0] == "FAILS" and "temperature: " in result.output


def test_check_fails_if_new_weights_do_not_reach_the_engine(run, server):
    server.fault = lambda route, body: {} if route == "collective_rpc" else None
    result = run("check", served(server))
    assert result.exit_code == 1
    table = lines(result)
    assert table["log-probs"][0] == "ok" and table["changed weights arrive"][0] == "FAILS"
    assert "0.0% of the change" in " ".join(table["changed weights arrive"])
    assert "new weights do not reach the engine" in result.output


def test_check_fails_if_the_engine_reads_other_prompts(run, server, model_folder):
    def resized(route, body):
        if route == "inference/v1/generate":
            answer = server.act(route, body)
            return answer | {"prompt_token_ids": answer["prompt_token_ids"][:-1]}
        return None

    server.fault = resized
    result = run("check", served(server))
    assert result.exit_code == 1
    assert lines(result)["responses sampled"][0] == "FAILS" and "row train-" in result.output


def test_serve_prints_the_options_that_training_needs(run):
    result = run(
        "serve", "rollout.engine=vllm_server", "--port", 8123, "--print", "--extra", "--max-num-seqs 7"
    )
    assert result.exit_code == 0, result.output
    variable, *words = shlex.split(result.output.strip().splitlines()[-1])
    assert variable == "VLLM_SERVER_DEV_MODE=1" and words[:2] == ["vllm", "serve"]
    options = dict(zip(words[3:], words[4:], strict=False))
    assert options["--logprobs-mode"] == "processed_logprobs" and options["--generation-config"] == "vllm"
    assert options["--mm-processor-kwargs"] == '{"do_resize": false}' and "--enable-scale-out" in words
    assert (
        options["--port"] == "8123" and options["--host"] == "127.0.0.1" and options["--dtype"] == "float32"
    )
    assert options["--max-model-len"] == "208" and words[-2:] == ["--max-num-seqs", "7"]
    assert "--weight-transfer-config" not in words and "--enable-return-routed-experts" not in words
    assert "--enable-return-routed-experts" in run("serve", "algo.replay=r3", "--print").output
    smaller = run("serve", "model.max_pixels=65536", "--print").output
    assert '\'{"do_resize": false, "max_pixels": 65536}\'' in smaller
    lora = ("rollout.engine=vllm_server", "train.precision=bf16", "model.lora.rank=20")
    served = run("serve", *lora, "--print").output
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve" in served
    assert "--enable-lora --max-lora-rank 32" in served
    for merged in (
        "rollout.engine.adapter=merged",
        "model.lora.parts=[language, vision]",
        "rollout.engine.weights=nccl",
        "train.precision=no",
    ):
        assert "lora" not in run("serve", *lora, merged, "--print").output.lower(), merged
    nccl = run(
        "serve", "rollout.engine={type: vllm_server, weights: nccl}", "train.precision=bf16", "--print"
    )
    assert (
        '--weight-transfer-config \'{"backend": "nccl"}\'' in nccl.output
        and "--dtype bfloat16" in nccl.output
    )


def test_serve_prints_for_a_gpu_and_runs_on_what_is_here(run, monkeypatch):
    """A command that is printed on a machine without GPU is for one that has one."""
    executed = []
    monkeypatch.setattr(serve.os, "execve", lambda program, command, environment: executed.append(command))
    monkeypatch.setattr(serve.shutil, "which", lambda name: "vllm")
    printed = run("serve", "--print").output
    assert "--enforce-eager" not in printed and "chunked-prefill" not in printed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = run("serve", "--port", port).output
    assert "--enforce-eager" in said and "--no-enable-chunked-prefill" in said
    assert "--enforce-eager" in executed[0]


def test_serve_needs_no_rows_of_the_benchmarks(run, monkeypatch):
    """Their longest response counts, and a server's machine may have no network."""
    monkeypatch.setattr(benchmarks, "build_examples", lambda *_, **__: pytest.fail("rows were read"))
    printed = run("serve", "eval.benchmarks=[mathvista]", "--print")
    assert printed.exit_code == 0 and "--max-model-len" in printed.output


def test_serve_names_a_port_that_is_in_use(run):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = run("serve", "--port", other.getsockname()[1])
    assert "cannot be used" in str(result.exception) and "use another one" in str(result.exception)
