"""Weights were written with mode 0600 whatever the umask, so that a serving account could not read them.

Source: https://github.com/safetensors/safetensors/issues/782
"""

import os
import stat

import pytest
import torch

from vlm_sapo.config.load import load
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.models.file_modes import use_umask
from vlm_sapo.training.trainer import train


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True, ids=oct)
def test_every_file_of_a_run_has_it(umask, model_folder, tmp_path):
    config = load(
        TrainConfig,
        "quickstart",
        [
            *(f"model.path={model_folder()}", f"run.dir={tmp_path}/run", "model.lora.rank=4"),
            *("rollout.group=2", "rollout.max_tokens=4", "rollout.prompts_per_batch=2", "data.args.size=4"),
            *("train.steps=1", "train.prompts_per_step=2", "train.minibatches=2", "reward.workers=1"),
            *("eval.data=null", "checkpoint.every=1", "log.rollouts=1"),
        ],
    )
    train(config)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors", "summary.json"}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


@pytest.mark.parametrize("umask", [0o022], indirect=True, ids=oct)
def test_other_files_of_the_folder_are_left_alone(umask, tmp_path):
    (tmp_path / "key.txt").write_text("private")
    (tmp_path / "key.txt").chmod(0o600)
    torch.save({}, tmp_path / "a.safetensors")
    use_umask(tmp_path)
    assert stat.S_IMODE((tmp_path / "key.txt").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "key.txt"]
