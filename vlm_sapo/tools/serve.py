"""What `vlm-sapo serve` does: prints and runs the `vllm serve` command that a config's training needs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.evaluation.benchmarks import read_definition
from vlm_sapo.hub import local_model
from vlm_sapo.models.loading import load_outline
from vlm_sapo.models.vlm import VLM
from vlm_sapo.plugins import locate
from vlm_sapo.rollout.vllm_lora import NO_FOLDER, AdapterShape, served_beside
from vlm_sapo.rollout.vllm_requests import CPU_ARGUMENTS, EXPERTS_ARGUMENTS, engine_arguments
from vlm_sapo.training.build_rollouts import default_dtype, longest_row

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""Opens the routes for new weights and for dropping caches."""
ADAPTER_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Opens those for new adapters."""


def serve_command(config: TrainConfig, *, host: str, port: int, extra: str, only_print: bool) -> None:
    """Replaces this process by the server, after printing the command. One that is only printed is for
    another machine, which has a GPU."""
    cpu = not only_print and not torch.cuda.is_available()
    command = build_command(config, host=host, port=port, extra=extra, cpu=cpu)
    os.environ.pop("VLLM_LOGGING_LEVEL", None)  # the server's own log lines are useful here
    environment = ENVIRONMENT | (ADAPTER_ENVIRONMENT if "--enable-lora" in command else {})
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"{variables} {shlex.join(command)}", flush=True)
    if config.rollout.engine.type != "vllm_server":
        print(
            f"note: this config has rollout.engine={config.rollout.engine.type}; train with "
            f"rollout.engine=vllm_server rollout.engine.servers=http://{host}:{port}",
            file=sys.stderr,
        )
    if only_print:
        return
    check_port(host, port)
    installed = Path(sys.executable).parent / "vllm"
    program = str(installed) if installed.is_file() else shutil.which("vllm")
    if program is None:
        raise ValueError(
            "vllm is not installed here; install the extra vllm (docs/install.md), or "
            "run the printed command where it is"
        )
    os.execve(program, command, os.environ | environment)


def build_command(config: TrainConfig, *, host: str, port: int, extra: str, cpu: bool) -> list[str]:
    """The arguments of the command, `vllm` first."""
    model = config.model
    engine = config.rollout.engine
    definitions = [read_definition(name)[1] for name in config.eval.benchmarks]  # their rows aren't needed
    lengths = [definition.max_tokens for definition in definitions]
    outline = load_outline(local_model(model.path, model.revision, weights=False))
    options = {
        "host": host,
        "port": port,
        "dtype": engine.weights_dtype(default_dtype(config)),
        "max-model-len": longest_row(config, lengths, outline),
        **engine_arguments(outline, model.max_pixels, config.rollout.returned_images),
    }
    if model.revision is not None:
        options["revision"] = model.revision
    if engine.type == "vllm_server" and engine.weights == "nccl":
        options["weight-transfer-config"] = {"backend": "nccl"}
    if (shape := served_shape(config, outline)) is not None:
        options |= shape.arguments
    options |= EXPERTS_ARGUMENTS if config.algo.replay == "r3" else {}
    options |= CPU_ARGUMENTS if cpu else {}
    arguments = ["vllm", "serve", str(locate(model.path)), "--enable-scale-out"]
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments + shlex.split(extra)


def served_shape(config: TrainConfig, outline: VLM) -> AdapterShape | None:
    """The adapters that training will send beside the base; None if it has none or merges them."""
    engine, lora = config.rollout.engine, config.model.lora
    if engine.type != "vllm_server" or lora is None:
        return None
    shape = AdapterShape(frozenset(lora.parts), lora.rank, lora.bits)
    if lora.adapter is not None:
        shape = replace(AdapterShape.read(locate(lora.adapter)), bits=lora.bits)
    dtype = engine.weights_dtype(default_dtype(config))
    obstacle = NO_FOLDER if engine.weights == "nccl" else ""
    beside = served_beside(engine.adapter, shape, outline, dtype, obstacle=obstacle)
    return shape if beside else None


def check_port(host: str, port: int) -> None:
    """Raises ValueError if the port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--port ({port}) of {host} cannot be used ({error}); use another one"
            ) from error
