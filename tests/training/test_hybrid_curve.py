"""A run of a tiny Qwen3.5 on the drawn world: the same curve with shared prompts and with a row per response."""

import json

import pytest

from tests.conftest import CORPUS
from vlm_sapo import load_config, train
from vlm_sapo.tools.new_model import new_model

REWARD = '''
def digits(response, example):
    """Share of digits among the characters: a model that knows nothing can learn it."""
    return sum(letter.isdigit() for letter in response) / max(1, len(response))
'''


def curves(folder, *, steps: int, rate: str) -> list[list[dict]]:
    """The metrics of a run with shared rows and of one with plain rows."""
    new_model(folder / "model", family="qwen3_5", corpus=CORPUS)
    (folder / "reward.py").write_text(REWARD)
    for layout in ("shared", "plain"):
        train(
            load_config(
                "quickstart",
                f"model.path={folder}/model",
                f"reward.parts=[{{name: {folder}/reward.py:digits}}]",
                f"run.dir={folder}/{layout}",
                f"train.layout={layout}",
                f"train.steps={steps}",
                f"train.lr={rate}",
                "rollout.max_tokens=24",
                "eval.data=[]",
            )
        )
    files = [folder / layout / "metrics.jsonl" for layout in ("shared", "plain")]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.slow
def test_the_numbers_of_steps_are_the_same_to_rounding(tmp_path):
    """At the quick start's rate they stay so for about ten steps of 3,072 tokens: Adam makes whole steps of
    gradients that are rounding alone, until a token is sampled otherwise."""
    for shared, plain in zip(*curves(tmp_path, steps=6, rate="3e-5"), strict=True):
        for name, within in (("reward/mean", 1e-6), ("loss", 1e-6), ("policy/grad_norm", 1e-4)):
            assert shared[name] == pytest.approx(plain[name], abs=within), (shared["step"], name)


@pytest.mark.slow
def test_both_learn_the_same(tmp_path):
    rewards = [[row["reward/mean"] for row in curve] for curve in curves(tmp_path, steps=20, rate="1e-3")]
    assert all(curve[0] < 0.05 and curve[-1] > 0.9 for curve in rewards), rewards
