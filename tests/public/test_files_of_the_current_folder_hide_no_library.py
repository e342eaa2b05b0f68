"""A user's file named like a library's module (`json.py`) replaced it in the reward's processes.

Source: https://github.com/numpy/numpy/issues/16198
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ROWS = [
    {"id": "1", "problem": "p", "answer": "14", "response": "It is \\boxed{14}.", "images": []},
    {"id": "2", "problem": "p", "answer": "14", "response": "It is \\boxed{15}.", "images": []},
]
OWN = """
import my_helper

def score(response, example):
    import my_late_helper
    return my_helper.VALUE
"""
SCRIPT = """
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.types import Example, ResponseText

if __name__ == "__main__":
    pool = RewardPool([{"name": "math"}], workers=1)
    row = Example(id="1", problem="p", answer="14")
    print([score.total for score in pool([(ResponseText(r"\\\\boxed{14}"), row)])])
    pool.close()
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with files that must not be imported, and some rows."""
    for name in (
        "math_verify",
        "sympy",
        "latex2sympy2_extended",
        "pebble",
        "json",
        "random",
        "numpy",
        "yaml",
    ):
        (tmp_path / f"{name}.py").write_text(
            f"raise RuntimeError('the {name} of this folder was imported')\n"
        )
    (tmp_path / "PIL.py").write_text("raise RuntimeError('the PIL of this folder was imported')\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def run(folder, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_the_verifiers_are_ours(folder):
    done = run(folder, "-m", "vlm_sapo", "score", "rows.jsonl", "--reward", "math", "--out", "scored.jsonl")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in scored] == [1.0, 0.0]


@pytest.mark.slow
def test_a_reward_file_still_imports_its_neighbours(folder):
    """Also from another folder, and inside its function."""
    (folder / "mine").mkdir()
    (folder / "mine/own.py").write_text(OWN)
    (folder / "mine/my_helper.py").write_text("VALUE = 0.25\n")
    (folder / "mine/my_late_helper.py").write_text("")
    (folder / "mine/math_verify.py").write_text("raise RuntimeError('imported')\n")
    words = ("score", "rows.jsonl", "--reward", "mine/own.py:score", "--out", "scored.jsonl")
    done = run(folder, "-m", "vlm_sapo", *words)
    assert done.returncode == 0, done.stderr
    scored = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in scored] == [0.25, 0.25]


def test_a_script_of_the_users_grades_with_our_modules(folder):
    """Its own imports are Python's business; what the workers import later is ours."""
    for name in ("json", "random", "numpy", "yaml", "PIL", "pebble"):
        (folder / f"{name}.py").unlink()
    (folder / "script.py").write_text(SCRIPT)
    done = run(folder, "script.py")
    assert done.stdout == "[1.0]\n", done.stderr
