"""Passes that add nothing, which a process of a sharded model makes beside the others'."""

import pytest
import torch

from tests.training.test_batch import REWARDS, loss_of, make_policy, sample_groups
from vlm_sapo.algo.advantages import zscore
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.training.batch import collate
from vlm_sapo.training.loss import GroupAdvantage


class Prepared:
    """A loss that prepares the present log-probs."""

    needs_usage, prepares = False, True

    def __init__(self):
        self.loss = loss_of()

    def __call__(self, passed, micro, minibatch):
        return self.loss(passed, micro, minibatch)

    def prepare(self, logprobs, minibatch):
        return logprobs


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_they_leave_every_response_as_it_was(model_folder, encoder, family):
    """Old log-probs, those of the reference and what the objective prepares, by row."""
    found = []
    for idle in (0, 2):
        vlm, reference = load_vlm(str(model_folder(family))), load_vlm(str(model_folder()))
        policy = make_policy(None, vlm=vlm, reference=reference, score_all=True)
        policy.parallelism.align = lambda passes, idle=idle: passes + idle
        groups = sample_groups(policy, encoder, REWARDS[:2])
        batch = policy.score(collate(groups, minibatches=1), fresh=False)
        batch = batch.replace(advantages=GroupAdvantage(zscore)(batch))
        stats = policy.update(batch, Prepared())
        found.append([batch.old, batch.reference, stats.logprobs, stats.prepared, stats.mask])
    for alone, beside in zip(*found, strict=True):
        assert torch.equal(alone, beside)
