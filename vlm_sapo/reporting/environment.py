"""`environment.json` of a run's folder: with which command, code, libraries and devices it was started."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from vlm_sapo.config.secrets import mask_secrets
from vlm_sapo.plugins import PACKAGE
from vlm_sapo.reporting.run_folder import RunFolder

FILE = "environment.json"
LIBRARIES = (
    "vlm-sapo",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface-hub",
    "vllm",
    "bitsandbytes",
    "flash-linear-attention",
    "liger-kernel",
)
"""Packages whose versions can change a run's numbers, as far as they are installed."""


def describe(devices: Sequence[str]) -> dict[str, Any]:
    """What is recorded at a run's start: `command`, `commit` (null outside a git checkout),
    `uncommitted_changes`, `versions` by package, `devices` (one name per process), `started` (UTC)."""
    commit, changed = _commit()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "commit": commit,
        "uncommitted_changes": changed,
        "versions": _versions(),
        "devices": list(devices),
    }


def record(folder: RunFolder, devices: Sequence[str], further: Mapping[str, Any]) -> None:
    """Writes the file at the start of a run, with the values `further`. A start that resumes the run is added
    to the list `resumed` and leaves the rest as it is."""
    now, first = describe(devices), read(folder.path)
    written = first | {"resumed": [*first.get("resumed", []), now]} if first else now | dict(further)
    folder.replace(FILE, json.dumps(written, indent=2, ensure_ascii=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The file's contents; empty for a run that has none, as earlier versions wrote no such file."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def command(words: Sequence[str]) -> str:
    """A command line as a user types it, without secrets."""
    program, *arguments = mask_secrets(words)
    own = Path(program).name == "vlm-sapo" or Path(program) == PACKAGE / "__main__.py"
    return shlex.join([*(["vlm-sapo"] if own else ["python", program]), *arguments])


def device_name(device: torch.device) -> str:
    """A device's name: the GPU's and its memory, or CPU with the machine's architecture."""
    if device.type != "cuda":
        return f"CPU ({platform.machine()})"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _commit() -> tuple[str | None, bool]:
    """The commit of this package's code and whether files differ from it: of a checkout, or of the git
    address that it was installed from."""
    if (PACKAGE.parent / ".git").exists():
        git = ["git", "-C", str(PACKAGE.parent)]
        try:
            head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            status = subprocess.run(
                [*git, "status", "--porcelain", "--untracked-files=no"],
                capture_output=True,
                text=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout of another user
            return None, False
        return head.stdout.strip(), bool(status.stdout.strip())
    try:
        text = distribution("vlm-sapo").read_text("direct_url.json")
    except PackageNotFoundError:
        return None, False
    return (json.loads(text).get("vcs_info", {}).get("commit_id") if text else None), False
