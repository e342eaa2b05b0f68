"""Starts several processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.conftest import ROOT

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*command: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python COMMAND` in so many processes that know of each other."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*start, "--master-port", str(free_port()), *command],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
