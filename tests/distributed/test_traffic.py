"""What a sharded model of 32 processes sends in a pass: no parameter twice, none in another dtype."""

import json

import pytest

from tests.conftest import CORPUS
from tests.distributed.launcher import launch
from vlm_sapo.tools.new_model import Shape, new_model

pytestmark = pytest.mark.distributed
PADDING = 1.02
"""Parts are of equal length, so some rows are sent for nothing."""


def test_bytes_of_a_pass(tmp_path):
    shape = Shape(hidden=128, layers=3, vision_layers=2, heads=4, head_dim=32)
    new_model(tmp_path, family="qwen3_vl", corpus=CORPUS, shape=shape)
    done = launch("-m", "tests.distributed.traffic_worker", str(tmp_path), processes=1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    layers, everything = facts["layers"], facts["layers"] + facts["rest"]
    forward, backward = facts["forward"], facts["backward"]
    assert forward.keys() == {"gathered bfloat16"} and backward.keys() == {
        "gathered bfloat16",
        "reduced float32",
    }
    assert 2 * everything <= forward["gathered bfloat16"] <= PADDING * 2 * everything
    assert 2 * layers <= backward["gathered bfloat16"] <= PADDING * 2 * layers  # the root stays gathered
    assert 4 * everything <= backward["reduced float32"] <= PADDING * 4 * everything
