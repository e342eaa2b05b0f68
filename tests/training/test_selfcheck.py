"""The self-check keeps shared layout and reused log-probs if they are right, and drops them if not."""

from dataclasses import replace

import torch

from tests.training.test_batch import SmallDevice, make_policy, sample_groups
from vlm_sapo.models.packing import Plain, SharedPrefix
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.checks import SelfCheck
from vlm_sapo.types import RolloutBatch

REWARDS = [[1, 0, 0, 1]]


class Shifted(SharedPrefix):
    """A layout with a bug: branches start one rotary position too late."""

    name = "shifted"

    def inputs(self, groups):
        inputs = super().inputs(groups)
        positions = inputs.positions.clone()
        positions[:, :, len(groups[0].prompt.ids) :] += 1
        return replace(inputs, positions=positions)


def check(policy, groups, budget=10**6):
    policy.memory.tokens = budget
    check = SelfCheck(policy, Console(), choose_old=policy.reuse_sampled)
    rollout = RolloutBatch(tuple(groups), (0,), policy.vlm.version, {}, {})
    assert check(1, rollout) == {}


def test_agreement_is_reported_and_nothing_changes(model_folder, encoder, capsys):
    policy = make_policy(model_folder(), reuse_sampled=True)
    check(policy, sample_groups(policy, encoder, REWARDS))
    output = capsys.readouterr().out
    assert "shared-prefix and plain pass agree" in output and "reusing them as old log-probs" in output
    assert isinstance(policy.layout, SharedPrefix) and policy.reuse_sampled
    assert all(parameter.grad is None for parameter in policy.vlm.parameters())


def test_a_wrong_layout_is_replaced_with_a_warning(model_folder, encoder, capsys):
    policy = make_policy(model_folder(), layout=Shifted())
    check(policy, sample_groups(policy, encoder, REWARDS))
    output = capsys.readouterr().out
    assert "warning: the shared-prefix pass DISAGREES" in output and "row e0" in output
    assert isinstance(policy.layout, Plain)


def test_logprobs_of_another_policy_are_recomputed(model_folder, encoder, capsys):
    policy = make_policy(model_folder(), reuse_sampled=True)
    groups = sample_groups(policy, encoder, REWARDS)
    with torch.no_grad():
        for parameter in policy.vlm.parameters():
            parameter.mul_(1.01)
    check(policy, groups)
    assert not policy.reuse_sampled and "recomputing old log-probs" in capsys.readouterr().out


def test_a_group_over_the_budget_is_checked_in_parts(model_folder, encoder, capsys):
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS)
    check(policy, groups, budget=len(groups[0].prompt.ids) + 20)
    tokens = sum(len(item.ids) for item in groups[0].responses)
    assert f"on {tokens} response tokens" in capsys.readouterr().out
    assert isinstance(policy.layout, SharedPrefix)


def test_a_check_that_runs_out_of_memory_is_repeated_in_parts(model_folder, encoder, capsys):
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS)
    SmallDevice(policy.forward_pass, len(groups[0].prompt.ids) + 13)  # a prompt with one response
    check(policy, groups)
    assert policy.memory.shortages and "shared-prefix and plain pass agree" in capsys.readouterr().out
