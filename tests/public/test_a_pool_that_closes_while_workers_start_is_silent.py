"""A traceback of `multiprocessing` appeared after a successful command whose workers were still starting.

Source: https://github.com/cwoac/thingy_grabber/issues/33
"""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPT = """
import signal, sys, time
from vlm_sapo.rewards.pool import RewardPool

class Slow:
    '''Takes a while to arrive in a worker, as on a busy machine, where the signal to end comes late.'''
    def __reduce__(self):
        return arrive, ()

def arrive():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.7)
    return Slow()

def score(response, example, late=None):
    return 1.0

if __name__ == "__main__":
    reward = {"name": f"{sys.argv[0]}:score", "args": {"late": Slow()}}
    pool = RewardPool([reward], workers=4)
    if sys.argv[1] == "closes":
        pool.close()
    if sys.argv[1] == "raises":
        raise ValueError("something else is wrong")
    print("done")
"""


def run(tmp_path, word: str) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), word]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("word", [pytest.param("closes", marks=pytest.mark.slow), "forgets"])
def test_nothing_is_printed(tmp_path, word):
    done = run(tmp_path, word)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_error_of_the_command_itself_is_still_there(tmp_path):
    done = run(tmp_path, "raises")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("Traceback") == 1 and "something else is wrong" in done.stderr
