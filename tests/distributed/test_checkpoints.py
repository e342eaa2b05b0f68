"""Checkpoints that several processes write together; resuming from them is in test_processes.py."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from tests.distributed.launcher import launch
from tests.distributed.test_processes import SHARDED, Runs, same
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.training import checkpoint

pytestmark = pytest.mark.distributed


class Written(Runs):
    """Runs of two processes that write checkpoints."""

    said = ""

    def in_several(self, *runs: dict, processes: int = 2) -> None:
        listed = self.folder / "runs.json"
        listed.write_text(json.dumps(runs))
        done = launch("-m", "tests.distributed.checkpoint_worker", str(listed), processes=processes)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        self.said += done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    runs = Written(tmp_path_factory.mktemp("written"), model_folder(), model_folder("qwen3_vl_moe"))
    common = ("eval.data=null", *SHARDED)
    runs.in_several(
        runs.run("two", *common),
        runs.run("background", *common, "checkpoint.background=true"),
        runs.run("full-background", *common, "checkpoint.background=true"),
        runs.run("full-stop", *common, "checkpoint.on_error=stop"),
    )
    return runs


def steps(runs, name: str) -> list[int]:
    """Steps of a run's checkpoints, after checking that each is complete and nothing else is there."""
    folders = sorted((runs.folder / name / "checkpoints").iterdir())
    for folder in folders:
        checkpoint.check(folder)
    return [int(re.fullmatch(r"step_(\d+)", folder.name)[1]) for folder in folders]


def manifest(runs, name: str, step: int) -> dict:
    text = (runs.folder / f"{name}/checkpoints/step_{step:06d}/manifest.json").read_text()
    return {file: entry for file, entry in json.loads(text).items() if file != "progress.json"}


def test_each_process_writes_its_share(runs):
    assert steps(runs, "two") == [1, 2, 3]
    folder = runs.folder / "two/checkpoints/step_000003"
    files = {kind: sorted(folder.glob(f"{kind}-*.safetensors")) for kind in ("model", "optimizer")}
    for listed in files.values():
        assert len(listed) == 2
        sizes = [file.stat().st_size for file in listed]
        assert max(sizes) < 0.6 * sum(sizes)
    tensors = [set(safe_open(file, "pt").keys()) for file in files["model"]]
    assert not tensors[0] & tensors[1]


def test_they_are_whole_models(runs):
    """For transformers, too, which engines and users load them with."""
    folder = runs.folder / "two/checkpoints/step_000003"
    loaded = dict(load_vlm(str(folder)).named_parameters())
    final = dict(load_vlm(str(runs.folder / "two/final")).named_parameters())
    assert loaded.keys() == final.keys()
    assert all(torch.equal(loaded[key], final[key]) for key in loaded)


def test_the_background_changes_nothing(runs):
    assert steps(runs, "background") == [1, 2, 3]
    assert all(manifest(runs, "two", step) == manifest(runs, "background", step) for step in (1, 2, 3))


def test_a_full_disk_of_one_process_costs_that_checkpoint_alone(runs):
    assert steps(runs, "full-background") == [1, 3]
    assert runs.said.count("could not be written") == 1
    assert "could not be written ([Errno 28] No space left on device)" in runs.said
    assert same(runs.final("two"), runs.final("full-background"))


def test_a_full_disk_of_one_process_stops_all_if_configured(runs):
    assert steps(runs, "full-stop") == [1]
    failures = [(runs.folder / f"full-stop/failure_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("free disk space, then start the same command again" in failure for failure in failures)
