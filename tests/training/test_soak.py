"""The short form of eval/soak.py: the quick start with faults at random loses nothing, and leaves nothing behind."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

OWN_DISK = ("unshare", "--user", "--map-root-user", "--mount")
"""Gives the script a disk of its own that it can fill, where the system lets it."""


@pytest.mark.slow
def test_faults_at_random(tmp_path, capsys):
    allowed = subprocess.run([*OWN_DISK, "true"], capture_output=True, check=False).returncode == 0
    script = [sys.executable, ROOT / "eval/soak.py", "--steps=40", "--rate=3e-3", f"--out={tmp_path}"]
    done = subprocess.run(
        [*(OWN_DISK if allowed else ()), *map(str, script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # it checks that no step is missing or twice
    with capsys.disabled():
        print(done.stdout[done.stdout.index("\nwithout_faults") :])
    usual, faulty = (
        json.loads((tmp_path / f"{name}_faults.json").read_text()) for name in ("without", "with")
    )
    struck = faulty["struck"]
    assert struck["bad row"] and struck["slow reward"] + struck["dying worker"]
    assert struck["full disk"] or not allowed
    for name in ("children", "threads", "files"):
        assert faulty["seen"][-1][name] <= usual["seen"][-1][name], f"{name} left after the end"
    running = [row for row in faulty["seen"][:-1] if row["steps"] >= 10]
    assert running[-1]["resident MB"] < 1.05 * running[0]["resident MB"]
    assert max(row["threads"] for row in running[len(running) // 2 :]) <= running[0]["threads"] + 2
    assert faulty["eval_after/held-out"]["pass@1"] > usual["eval_after/held-out"]["ci95"][0] - 0.05
