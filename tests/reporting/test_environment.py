"""What a run's folder says about how it was started."""

import json
import platform
import sys

import torch
import transformers

from vlm_sapo.config.secrets import mask_secrets
from vlm_sapo.reporting import environment
from vlm_sapo.reporting.run_folder import RunFolder

TOKEN = "hf_" + "a" * 20


def test_a_start_is_recorded_once_and_resumed_ones_are_added(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/vlm-sapo", "train", "my config.yaml", "train.lr=1e-6"])
    environment.record(folder, ["CPU", "CPU"], {"revisions": {}})
    first = json.loads((tmp_path / "environment.json").read_text())
    assert first["command"] == "vlm-sapo train 'my config.yaml' train.lr=1e-6"
    assert first["versions"]["python"] == platform.python_version()
    assert first["versions"]["transformers"] == transformers.__version__
    assert first["versions"]["torch"] in torch.__version__
    assert first["devices"] == ["CPU", "CPU"] and first["revisions"] == {}
    assert len(first["commit"]) == 40
    environment.record(folder, ["CPU"], {"revisions": {"other": "ignored"}})
    second = json.loads((tmp_path / "environment.json").read_text())
    resumed = second.pop("resumed")
    assert second == first and [entry["devices"] for entry in resumed] == [["CPU"]]


def test_no_secret_of_a_command_is_recorded():
    words = ["--password", "abc", f"--hf-token={TOKEN}", TOKEN, "reward.api_key=abc", "--token", "x" * 20]
    assert mask_secrets(words) == [
        "--password",
        "***",
        "--hf-token=***",
        "***",
        "reward.api_key=***",
        "--token",
        "***",
    ]
    harmless = ["train.lr=1", "--max-tokens", "16", "data.columns={answer: key}"]
    assert mask_secrets(harmless) == harmless
    assert environment.command(["own.py", TOKEN]) == "python own.py '***'"
