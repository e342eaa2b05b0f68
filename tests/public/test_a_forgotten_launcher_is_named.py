"""A config for several GPUs, started without a launcher, trained on one of them and said nothing.

Source: https://github.com/whitecircle/halo/pull/22
"""

import pytest
import yaml

from vlm_sapo.config.load import check_processes, load
from vlm_sapo.config.schema import SftConfig, TrainConfig
from vlm_sapo.training.launch import forgotten_launcher

VALUES = {"model": {"path": "m"}, "data": {"source": "d"}, "reward": "math", "train": {"steps": 3}}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALUES))
    return lambda *overrides: load(TrainConfig, str(tmp_path / "run.yaml"), overrides)


@pytest.mark.parametrize(
    ("shard", "devices", "words"),
    [
        ("1", 4, ("one GPU of 4", "torchrun --nproc-per-node 4 -m vlm_sapo train", "CUDA_VISIBLE_DEVICES=0")),
        ("all", 2, ("one GPU of 2", "torchrun --nproc-per-node 2 -m vlm_sapo train", "train.shard=1")),
        ("all", 1, ("train.shard (all)", "torchrun --nproc-per-node 8", "train.shard=1")),
        ("all", 0, ("train.shard (all)", "torchrun")),
    ],
)
def test_the_command_is_named(config, shard, devices, words):
    said = forgotten_launcher(config(f"train.shard={shard}"), 1, devices)
    assert all(word in said for word in words)


@pytest.mark.parametrize(
    ("overrides", "size", "devices"),
    [((), 1, 0), ((), 1, 1), ((), 4, 4), (("train.shard=all",), 4, 4), (("train.shard=all",), 2, 0)],
)
def test_nothing_is_said_where_nothing_is_forgotten(config, overrides, size, devices):
    assert forgotten_launcher(config(*overrides), size, devices) == ""


def test_offloading_on_one_gpu_needs_no_launcher(config):
    offloaded = config("train.shard=all", "train.offload=true")
    assert forgotten_launcher(offloaded, 1, 1) == ""
    assert "torchrun" in forgotten_launcher(offloaded, 1, 8)


def test_a_shard_of_several_in_one_process_names_the_command(config):
    with pytest.raises(ValueError, match=r"`torchrun --nproc-per-node 8 -m vlm_sapo ...` starts 8"):
        check_processes(config("train.shard=8"), 1)


def test_sft_is_named_as_sft():
    sft = load(SftConfig, "cold_start", ["train.shard=all"])
    assert "-m vlm_sapo sft" in forgotten_launcher(sft, 1, 8)
