"""The commands that start a planned run: its vLLM servers, then one process per GPU."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from urllib.parse import urlsplit

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.plan.memory import Gpus

LOCAL = ("127.0.0.1", "localhost")
LAUNCHER = "torchrun --nnodes {nodes} --nproc-per-node {per_node} --node-rank $NODE_RANK"
"""On each of several nodes."""
RENDEZVOUS = "--master-addr $MASTER_ADDR --master-port 29500"


def launch_commands(config: TrainConfig, gpus: Gpus, words: Sequence[str]) -> list[str]:
    """What to type, servers first. `words` name the config: a file or a shipped one, and overrides.

    Servers on this machine take the GPUs behind the trainer's, those of another machine its own from 0 on.
    With several nodes the last command is typed on each, with NODE_RANK from 0 and the first node's address.
    """
    ports: dict[str, list[int]] = {}
    for address in map(urlsplit, config.rollout.engine.addresses):
        ports.setdefault(address.hostname or "", []).append(address.port or 80)
    commands, quoted = [], quote(words)
    for host, numbers in ports.items():
        first = gpus.per_node if host in LOCAL else 0
        serve = f"vlm-sapo serve {quoted}" + ("" if host in LOCAL else f" --host {host}")
        commands += _serve_commands(serve, first, numbers)
    visible = ""
    if not ports.keys().isdisjoint(LOCAL):
        visible = f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(gpus.per_node)))} "
    if gpus.count == 1:
        start = "vlm-sapo train"
    elif gpus.nodes == 1:
        start = f"torchrun --nproc-per-node {gpus.per_node} -m vlm_sapo train"
    else:
        launcher = LAUNCHER.format(nodes=gpus.nodes, per_node=gpus.per_node)
        start = f"{launcher} {RENDEZVOUS} -m vlm_sapo train"
    return [*commands, f"{visible}{start} {quoted}"]


def _serve_commands(serve: str, gpu: int, ports: list[int]) -> list[str]:
    """One server for each port, on the GPUs from `gpu` on; in a loop where the ports follow each other."""
    count = len(ports)
    if count > 1 and ports == list(range(ports[0], ports[0] + count)):
        numbers, offset = " ".join(map(str, range(gpu, gpu + count))), ports[0] - gpu
        each = f"CUDA_VISIBLE_DEVICES=$GPU {serve} --port $(({offset} + GPU))"
        return [f"for GPU in {numbers}; do {each} & done"]
    return [f"CUDA_VISIBLE_DEVICES={gpu + index} {serve} --port {port}" for index, port in enumerate(ports)]


def quote(words: Sequence[str]) -> str:
    """The words for a shell; in double quotes those with brackets, inside which YAML has single ones."""
    return " ".join(
        f'"{word}"' if re.search(r"[ {\[]", word) and not re.search(r'["$`\\!]', word) else shlex.quote(word)
        for word in words
    )
