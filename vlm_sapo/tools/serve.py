"""What `vlm-sapo serve` does: prints and runs the `vllm serve` command that a config's training needs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path

import torch

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.evaluation.benchmarks import build_benchmarks
from vlm_sapo.models.loading import load_outline
from vlm_sapo.plugins import locate
from vlm_sapo.rollout.vllm_requests import CPU_ARGUMENTS, EXPERTS_ARGUMENTS, engine_arguments
from vlm_sapo.training.build_rollouts import default_dtype, longest_row

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
"""Opens the routes for new weights and for dropping caches."""


def serve_command(config: TrainConfig, *, host: str, port: int, extra: str, only_print: bool) -> None:
    """Replaces this process by the server, after printing the command. One that is only printed is for
    another machine, which has a GPU."""
    cpu = not only_print and not torch.cuda.is_available()
    command = build_command(config, host=host, port=port, extra=extra, cpu=cpu)
    os.environ.pop("VLLM_LOGGING_LEVEL", None)  # the server's own log lines are useful here
    variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
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
            "vllm is not installed here; install vlm-sapo[vllm], or run the printed command where it is"
        )
    os.execve(program, command, os.environ | ENVIRONMENT)


def build_command(config: TrainConfig, *, host: str, port: int, extra: str, cpu: bool) -> list[str]:
    """The arguments of the command, `vllm` first."""
    path = str(locate(config.model.path))
    engine = config.rollout.engine
    benchmarks = build_benchmarks(config.eval.benchmarks, limit=config.eval.limit)
    options = {
        "host": host,
        "port": port,
        "dtype": engine.weights_dtype(default_dtype(config)),
        "max-model-len": longest_row(config, benchmarks, load_outline(path)),
        **engine_arguments(config.model.max_pixels),
    }
    if engine.type == "vllm_server" and engine.weights == "nccl":
        options["weight-transfer-config"] = {"backend": "nccl"}
    options |= EXPERTS_ARGUMENTS if config.algo.replay == "r3" else {}
    options |= CPU_ARGUMENTS if cpu else {}
    arguments = ["vllm", "serve", path, "--enable-scale-out"]
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments + shlex.split(extra)


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
