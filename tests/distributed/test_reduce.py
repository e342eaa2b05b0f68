"""The type in which processes add up gradients, and how many layers are gathered ahead."""

import re

import pytest

from tests.distributed.launcher import launch

pytestmark = pytest.mark.distributed


def test_sums_in_bfloat16_differ_by_their_rounding_alone(model_folder):
    """Far less than passes in bfloat16 differ from those in float32; gathering ahead changes nothing."""
    done = launch("-m", "tests.distributed.reduce_worker", str(model_folder()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    ahead = float(re.search(r"ahead (\S+)", done.stdout)[1])
    rounded, total = map(float, re.search(r"rounded (\S+) sum (\S+)", done.stdout).groups())
    passes = float(re.search(r"passes (\S+)", done.stdout)[1])
    assert ahead == 0
    assert 0 < rounded < 0.003 and rounded < passes / 2
    assert total == pytest.approx(1, abs=1e-3)
