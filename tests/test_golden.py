"""The quick start's first steps give the numbers that they gave before, which lie beside this file.

`python tests/test_golden.py` writes them anew, after a change that is meant to change them. `tests/golden.py`
compares two commits exactly, on one machine.

The tolerance is for other CPUs, whose kernels add in another order. That changes the 7th digit, and after eight
updates numbers differ by up to 6e-6 of themselves (SSE, AVX2 and AVX-512 kernels, one and two threads); 1e-4
leaves room. Two steps sample about two thousand tokens, and one of them comes out otherwise where its random
number lies within 1e-6 or so of the border between two tokens: on one kind of CPU in some hundreds. There rewards
and lengths differ plainly, too; write the numbers anew on such a machine to work on.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm_sapo import load_config, train

STORED = Path(__file__).with_suffix("").with_name("golden.json")
START = Path(__file__).resolve().parent.parent / "data/shapes/cold_start"
OVERRIDES = (
    *("train.steps=2", "train.prompts_per_step=8", "train.lr=1e-4"),
    *("eval.data=null", "checkpoint.every=0", "log.rollouts=0", "reward.workers=1"),
)
METRICS = (
    *(
        "reward/mean",
        "response/tokens",
        "loss",
        "policy/grad_norm",
        "policy/entropy",
        "policy/effective_update",
    ),
    *("policy/ratio_max", "policy/kl_old_k3", "policy/gate_mean"),
)
TENSORS = (
    "language_model.embed_tokens",
    "language_model.layers.1.self_attn.q_proj",
    "visual.merger.linear_fc2",
)


def numbers(folder: Path) -> dict[str, float]:
    """What a new run says of each step, and how far its weights went: sums of absolute changes."""
    train(load_config("quickstart", f"run.dir={folder}", *OVERRIDES))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {f"step {row['step']} {name}": row[name] for row in rows for name in METRICS}
    before, after = (load_file(path / "model.safetensors") for path in (START, folder / "final"))
    for part in TENSORS:
        [name] = [name for name in after if name.endswith(f"{part}.weight")]
        values[f"change of {part}"] = (after[name] - before[name]).abs().sum().item()
    return values


def test_the_quick_start_gives_the_numbers_it_gave(tmp_path):
    assert numbers(tmp_path / "run") == pytest.approx(json.loads(STORED.read_text()), rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        text = json.dumps(numbers(Path(scratch) / "run"), indent=2)
    STORED.write_text(f"{text}\n")
