"""Short runs of the tiny model on drawn shapes, shared by the tests of training."""

import json
import re
from pathlib import Path

import pytest
import yaml

from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.training.trainer import train

REWARD = """
def even(response, example):
    return float(len(response) % 2)

def broken(response, example):
    raise RuntimeError("no idea")
"""


def short_run(folder: Path, model: Path, *overrides: str, kind=cfg.TrainConfig):
    """The config of four steps in `folder`/run."""
    (folder / "reward.py").write_text(REWARD)
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "data": {"source": "data/shapes.py:rows", "args": {"size": 20}},
        "rollout": {"group": 4, "max_tokens": 8},
        "reward": {"parts": [{"name": f"{folder}/reward.py:even"}], "workers": 1},
        "train": {"steps": 4, "lr": 1e-3},
        "eval": {"data": {"source": "data/shapes.py:rows", "args": {"split": "test", "size": 6}}},
        "checkpoint": {"every": 2},
    }
    if kind is cfg.TrainConfig:
        values["train"] |= {"prompts_per_step": 4, "minibatches": 2}
    else:
        values["train"] |= {"rows_per_step": 8}
        values["data"]["columns"] = {"response": "demonstration"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return configfile.load(kind, str(path), list(overrides))


@pytest.fixture
def settings(model_folder, tmp_path):
    return lambda *overrides, **more: short_run(tmp_path, model_folder(), *overrides, **more)


@pytest.fixture(scope="session")
def whole(model_folder, tmp_path_factory):
    """The folder of a run that nothing happened to, with every checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    train(short_run(folder, model_folder(), "eval.data=null", "checkpoint.every=1", "checkpoint.keep_last=9"))
    return folder / "run"


def metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not re.match("time/|memory/|rollout/tokens_per_second", k)}
        for row in rows
    ]
