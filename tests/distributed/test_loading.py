"""Models that several processes share: each reads its own rows, and holds no more."""

import re

import pytest

from tests.conftest import CORPUS, FAMILIES
from tests.distributed.launcher import launch
from tests.models.test_unread import changed, split_experts
from vlm_sapo.tools.new_model import Shape, new_model

pytestmark = pytest.mark.distributed
BIG = Shape(hidden=512, layers=8, vision_layers=2, heads=8, head_dim=64, embedding_rows=8000, init_std=0.02)
"""A model of 177 MB, of which the embedding is 16."""
NOISE = 8 * 2**20
"""Bytes by which the allocator's and the libraries' own memory varies."""


@pytest.fixture(scope="module")
def said(tmp_path_factory, model_folder) -> str:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        (folder / family).symlink_to(model_folder(family))
    changed(model_folder("qwen3_5_moe"), folder / "single_experts", split_experts)
    big = tmp_path_factory.mktemp("big")
    new_model(big, family="qwen3_vl", corpus=CORPUS, shape=BIG)
    done = launch("-m", "tests.distributed.loading_worker", str(folder), str(big))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("model", [*FAMILIES, "single_experts"])
def test_shards_are_those_of_the_whole_model(said, model):
    """Weights in float32 and bfloat16, adapters, a frozen tower that is replicated, and offloaded shards."""
    assert all(f"same {rank}: {model}\n" in said for rank in (0, 1))


def test_no_process_holds_more_than_its_shards_and_a_tensor(said):
    measured = re.findall(r"beside (-?\d+) largest (\d+) shards (\d+)", said)
    assert len(measured) == 2
    for beside, largest, shards in (map(int, found) for found in measured):
        assert shards > 80e6 > 4 * largest
        assert beside < 1.1 * largest + NOISE
