"""Non-finite updates are skipped, counted and saved; too many of them stop the run."""

import json

import pytest
import torch

from tests.training.conftest import metrics
from tests.training.test_batch import loss_of, make_policy, sample_groups, scored
from vlm_sapo.distributed import World
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.loss import PolicyLoss
from vlm_sapo.training.policy import NumbersError, UpdateGuard
from vlm_sapo.training.sft import Likelihood
from vlm_sapo.training.trainer import train

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0]]


class InfiniteLoss(Likelihood):
    def __call__(self, passed, micro, minibatch):
        return passed.logprobs.sum() * float("inf")


class InfiniteGradient(Likelihood):
    def __call__(self, passed, micro, minibatch):
        return (passed.logprobs.sum() * 0).sqrt()


@pytest.fixture
def policy(model_folder, tmp_path):
    return make_policy(model_folder(), guard=UpdateGuard(tmp_path / "bad", Console(), limit=1, world=World()))


def weights(policy):
    return [parameter.detach().clone() for parameter in policy.trained]


def update(policy, encoder, *, loss=None, old=None) -> float:
    batch = scored(policy, sample_groups(policy, encoder, REWARDS))
    if old is not None:
        fixed = torch.full_like(batch.old, old)
        batch = batch.replace(old=fixed, on_policy=torch.zeros(len(fixed), dtype=torch.bool))
    policy.set_step(6)
    return policy.update(batch, loss or loss_of()).grad_norm


@pytest.mark.parametrize("wrong", ["ratio", "loss", "gradient"])
def test_a_non_finite_update_is_skipped(policy, encoder, tmp_path, capsys, wrong):
    ways = {
        "ratio": {"old": -1000.0},
        "loss": {"loss": InfiniteLoss()},
        "gradient": {"loss": InfiniteGradient()},
    }
    before, version = weights(policy), policy.vlm.version
    norm = update(policy, encoder, **ways[wrong])
    assert norm != norm
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))
    assert policy.vlm.version == version
    assert all(parameter.grad is None for parameter in policy.trained)
    printed = capsys.readouterr().out
    assert "step 7: an update is skipped" in printed and wrong in printed
    if wrong != "gradient":
        saved = torch.load(tmp_path / "bad/step_000007_process_0.pt", weights_only=True)
        assert len(saved["rows"]) == len(saved["prompts"]) == len(saved["responses"]) == 2
        assert wrong in saved["wrong"] and saved["logprobs"].shape == saved["mask"].shape
    assert update(policy, encoder) > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


def test_too_many_skipped_in_a_row_stop_the_run(policy, encoder):
    update(policy, encoder, old=-1000.0)
    update(policy, encoder)
    update(policy, encoder, old=-1000.0)
    with pytest.raises(
        NumbersError, match=r"makes 2 skipped updates in a row, and train.bad_updates allows 1; lower"
    ):
        update(policy, encoder, old=-1000.0)


@pytest.mark.slow
def test_a_run_continues_after_a_skipped_update(settings, tmp_path, monkeypatch):
    inner, calls = PolicyLoss.__call__, []

    def sometimes(self, *args):
        calls.append(1)
        return inner(self, *args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(PolicyLoss, "__call__", sometimes)
    train(settings("eval.data=null"))
    rows = metrics(tmp_path / "run")
    assert [row.get("policy/skipped_updates", 0) for row in rows] == [0, 1, 0, 0]
    assert all(value == value for row in rows for value in row.values())
    assert list((tmp_path / "run/bad_updates").iterdir())
    json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
