"""The commands themselves, as a user runs them: from a wheel, and the miniature's beginning."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the sdist and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "uv", "build", "--out-dir", str(folder), cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(packages):
    return next(packages.glob("*.whl"))


def test_the_packages_have_licence_and_description(packages, wheel):
    with tarfile.open(next(packages.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CITATION.cff", "Makefile", "docs/install.md", "pyproject.toml"} <= names
    with zipfile.ZipFile(wheel) as archive:
        [licence] = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text and "# vlm_sapo" in text


def test_a_wheel_trains_the_quick_start_from_anywhere(wheel, tmp_path):
    """Configs, data generator and cold start travel in the wheel; the working folder is empty."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()
    overrides = ["train.steps=2", "eval.data.args.size=24", "eval.samples=1", "run.dir=out"]
    code = "import vlm_sapo, sys; assert 'site' in vlm_sapo.__file__; from vlm_sapo.cli import main; main()"
    command, site = (sys.executable, "-c", code), str(tmp_path / "site")
    output = run(*command, "train", "quickstart", *overrides, cwd=work, PYTHONPATH=site)
    assert "held-out pass@1:" in output
    assert json.loads((work / "out/summary.json").read_text())["steps"] == 2
    options = ("--model", "out/final", "--benchmark", "shapes", "--limit", "4", "--out", "results")
    run(*command, "eval", *options, cwd=work, PYTHONPATH=site)
    assert json.loads((work / "results/results.json").read_text())["shapes"]["n"] == 4
    run(*command, "report", "out", cwd=work, PYTHONPATH=site)
    assert "<html" in (work / "out/report.html").read_text()


def test_the_quick_start_learns(tmp_path):
    """The whole miniature, with another seed than the README's."""
    program = os.path.join(os.path.dirname(sys.executable), "vlm-sapo")
    overrides = ["run.seed=1", "eval.every=0", f"run.dir={tmp_path}/run"]
    run(program, "train", "quickstart", *overrides, cwd=ROOT)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["eval_before/held-out"]["pass@1"] <= 0.60
    assert summary["eval_after/held-out"]["pass@1"] >= 0.95


def test_the_miniature_with_a_tool_runs(tmp_path):
    """The first steps of `make zoom`; docs/tools.md has what all of them show."""
    program = os.path.join(os.path.dirname(sys.executable), "vlm-sapo")
    overrides = ["train.steps=4", "eval.data.args.size=40", f"run.dir={tmp_path}/run"]
    run(program, "train", "zoom", *overrides, cwd=ROOT)
    before, *_ = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert 0.5 < before["pass@1"] < 0.8 and 0.03 < before["episodes"]["calls"] < 0.3
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["environment/turns"] > 1 and row["environment/images"] > 0 for row in rows)
    assert all(row["reward/calls"] > 0 for row in rows)


def test_the_cold_start_is_made_by_its_command(tmp_path):
    """`make coldstart` in small: new model, both stages, and the result is a model that loads."""
    program = os.path.join(os.path.dirname(sys.executable), "vlm-sapo")
    run(program, "new-model", str(tmp_path / "init"), cwd=ROOT)
    overrides = [f"model.path={tmp_path}/init", f"run.dir={tmp_path}/sft", "train.steps=20", "eval.data=null"]
    run(program, "sft", "cold_start", *overrides, "reward=[]", cwd=ROOT)
    rows = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_demonstrations_of_two_turns_are_played(tmp_path):
    """`make zoom-coldstart` in small."""
    program = os.path.join(os.path.dirname(sys.executable), "vlm-sapo")
    run(program, "new-model", str(tmp_path / "init"), "--corpus", "data/zoom.py:corpus", cwd=ROOT)
    overrides = [f"model.path={tmp_path}/init", f"run.dir={tmp_path}/sft", "train.steps=12", "eval.data=null"]
    run(program, "sft", "zoom_cold_start", *overrides, "train.rows_per_step=8", cwd=ROOT)
    rows = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
