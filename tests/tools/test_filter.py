"""Sampling the training rows, selecting those worth training on, and training on them."""

import base64
import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.conftest import numbered_image
from vlm_sapo.cli import app
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.sources import build_examples
from vlm_sapo.tools.filter import write_selected
from vlm_sapo.training.trainer import train

REWARD = """
def some(response, example):
    number = int(example.id.rpartition("-")[2])
    return float(number % 3 == 1) if number % 3 < 2 else float(len(response) % 2)
"""


@pytest.fixture
def settings(tmp_path, model_folder):
    (tmp_path / "reward.py").write_text(REWARD)

    def make(**data):
        values = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(model_folder())},
            "data": data or {"source": "data/shapes.py:rows", "args": {"size": 30}},
            "rollout": {"group": 4, "max_tokens": 8},
            "reward": {"parts": [{"name": f"{tmp_path}/reward.py:some"}], "workers": 1},
            "train": {"steps": 2, "prompts_per_step": 4, "minibatches": 2},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "c.yaml")

    return make


def test_rows_that_are_solved_sometimes_are_kept_and_trained_on(settings, tmp_path):
    config, out = settings(), tmp_path / "kept"
    command = ["filter", config, "--samples", "4", "--keep", "0.05..0.9", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    rates = {record["id"]: sum(record["scores"]) / 4 for record in samples}
    rows = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    assert len(samples) == 30 and rows
    assert {row["id"]: row["pass_rate"] for row in rows} == {
        k: v for k, v in rates.items() if 0.05 <= v <= 0.9
    }
    assert all(int(row["id"].rpartition("-")[2]) % 3 == 2 for row in rows)  # the others are all or nothing
    before = (out / "samples.jsonl").read_text()
    again = CliRunner().invoke(
        app, [*command[:-4], "--keep", "0..1", "--out", str(out)]
    )  # no new samples needed
    assert again.exit_code == 0 and (out / "samples.jsonl").read_text() == before
    assert (
        len((out / "kept.jsonl").read_text().splitlines())
        == len(list((out / "kept_pictures").iterdir()))
        == 30
    )
    [line] = [line for line in result.output.splitlines() if line.startswith("train on them")]
    overrides = line.rpartition(": ")[2].split()
    loaded = configfile.load(cfg.TrainConfig, config, overrides)
    assert loaded.data.args == {} and train(loaded)["steps"] == 2


def test_another_config_or_range_is_refused(settings, tmp_path):
    config = settings()
    base = ["filter", config, "--samples", "2", "--out", str(tmp_path / "kept")]
    assert CliRunner().invoke(app, base).exit_code == 0
    result = CliRunner().invoke(app, [*base, "rollout.max_tokens=4"])
    assert "another config" in str(result.exception)
    weights = next(Path(yaml.safe_load(Path(config).read_text())["model"]["path"]).glob("*.safetensors"))
    os.utime(weights)  # another model under the same name
    result = CliRunner().invoke(app, base)
    assert "another config, model" in str(result.exception)
    result = CliRunner().invoke(app, [*base, "--keep", "0.9..0.1"])
    assert "two rates" in str(result.exception)


def test_groups_without_variance_are_resampled_within_their_task(settings, tmp_path):
    """A third of the rows has variance: more rounds leave fewer flat groups, and shares stay."""
    tasks = [
        {"source": "data/shapes.py:rows", "args": {"size": 30, "seed": seed}, "name": name, "share": 0.5}
        for seed, name in ((0, "one"), (1, "two"))
    ]
    config = settings(mixture=tasks)
    flat = {}
    for rounds in (0, 6):
        folder = tmp_path / str(rounds)
        train(configfile.load(cfg.TrainConfig, config, [f"rollout.resample={rounds}", f"run.dir={folder}"]))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        flat[rounds] = sum(f"minibatch{k}/loss" in row for row in rows for k in (0, 1))
        assert all(
            row[f"minibatch{k}/prompts/{name}"] == 1
            for row in rows
            for k in (0, 1)
            for name in ("one", "two")
        )
        assert all((row["rollout/groups"] > 4) == bool(rounds) for row in rows)
        assert all("task/one/reward" in row for row in rows)
    assert flat[6] >= flat[0]


def test_kept_rows_give_the_paths_of_their_images(settings, tmp_path):
    """Outside the folder of the kept rows, which the printed overrides allow."""
    (tmp_path / "set").mkdir()
    numbered_image().save(tmp_path / "set/p.png")
    rows = [{"problem": f"How many {n}?", "answer": "1", "image": "p.png"} for n in range(4)]
    source = tmp_path / "set/rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(source=str(source))
    command = ["filter", config, "--samples", "2", "--keep", "0..1", "--out", str(tmp_path / "kept")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    [line] = [line for line in result.output.splitlines() if line.startswith("train on them")]
    loaded = configfile.load(cfg.TrainConfig, config, line.rpartition(": ")[2].split())
    assert [len(example.images) for example in build_examples(loaded.data)] == [1] * 4


ENVIRONMENT = """
from vlm_sapo.rollout.environment import Observation

class Once:
    def reset(self, example):
        pass

    def step(self, response):
        return Observation(done=True, reward=1.0)

class Broken:
    def reset(self, example):
        raise KeyError("no such level")

    def step(self, response):
        return Observation(done=True)
"""


def test_rows_are_sampled_in_the_environment_that_trains_on_them(settings, tmp_path):
    (tmp_path / "world.py").write_text(ENVIRONMENT)
    environment = f"rollout.environment.function={tmp_path}/world.py:Broken"
    command = ["filter", settings(), environment, "--samples", "2", "--out", str(tmp_path / "kept")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0
    assert "no such level" in result.output + str(result.exception)


def test_kept_conversations_keep_their_images(tmp_path):
    """Of parts, in base64 and as a list that is text: as files, whatever folder the kept rows are in."""
    (tmp_path / "set").mkdir()
    (tmp_path / "kept").mkdir()
    numbered_image().save(tmp_path / "set/p.png")
    code = base64.b64encode((tmp_path / "set/p.png").read_bytes()).decode()
    parts = [{"type": "image", "image": "p.png"}, {"type": "image_url", "image_url": {"url": code}}, "Same?"]
    rows = [
        {"messages": [{"role": "user", "content": parts}], "solution": "yes"},
        {
            "messages": [{"role": "user", "content": "Same?"}],
            "solution": "yes",
            "images": '["p.png", "p.png"]',
        },
        {"messages": [{"role": "user", "content": "Same?"}], "solution": "yes", "images": [code, code]},
    ]
    section = RowsConfig(source=str(tmp_path / "set/rows.jsonl"))
    records = [{"row": index, "scores": [0.5]} for index in range(3)]
    target = tmp_path / "kept/kept.jsonl"
    assert write_selected(target, ExampleSet(rows, section), records, (0, 1)) == 3
    written = build_examples(RowsConfig(source=str(target), pictures_anywhere=True))
    assert [[image.tobytes() for image in example.images] for example in written] == [
        [numbered_image().tobytes()] * 2
    ] * 3
