"""Runs that an earlier version left in the middle go on, with the numbers that it would have given.

`tests/fixtures/old_run.py` built them and says what they are. The tolerance is for other CPUs, as in
`tests/test_golden.py`; what the run ahead of its updates trains on lies in its checkpoint.
"""

import json
import shutil

import pytest

from tests.conftest import ROOT
from tests.training.conftest import metrics
from vlm_sapo import load_config, train

OLD = ROOT / "tests/fixtures/old_run"


@pytest.mark.parametrize("kind", ["plain", "ahead"])
def test_a_run_of_an_earlier_version_goes_on_to_its_numbers(kind, tmp_path, monkeypatch):
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    before = metrics(folder / kind)
    assert train(load_config(f"{kind}.yaml"))["steps"] == 4
    after = metrics(folder / kind)
    assert after[:2] == before and len(after) == 4
    for row, expected in zip(
        after[2:], json.loads((folder / f"{kind}_goes_on.json").read_text()), strict=True
    ):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
