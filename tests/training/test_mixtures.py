"""MoE models in training: replay between mini-batches, the balance loss, what is logged."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.conftest import FAMILIES, slow_but
from tests.training.test_batch import REWARDS, loss_of, make_policy, sample_groups, scored
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain, SharedPrefix
from vlm_sapo.reporting.metrics import update_metrics, update_record
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.training.trainer import train
from vlm_sapo.types import Sampling

MIXTURES = [family for family in FAMILIES if family.endswith("moe")]
FAR = 0.3
"""A learning rate that changes experts within one update."""


def moe_policy(folder, *, budget=10**6, **options):
    vlm = load_vlm(str(folder))
    return make_policy(None, vlm=vlm, budget=budget, **{"layout": SharedPrefix()} | options)


def update(policy, groups, loss, *, count=2, fresh=True):
    """One step of the loop: its mini-batches, and its metrics."""
    minibatches = scored(policy, groups, count=count, fresh=fresh).split()
    updates = [policy.update(minibatch, loss) for minibatch in minibatches]
    return minibatches, update_record([update_metrics(stats, loss) for stats in updates], 0)


@pytest.fixture(params=MIXTURES)
def folder(request, model_folder):
    return model_folder(request.param)


@pytest.fixture
def groups(folder):
    policy = moe_policy(folder)
    return sample_groups(policy, Encoder(policy.vlm), REWARDS)


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.vlm.parameters()])


@pytest.mark.parametrize("replay", [False, True], ids=["", "replay"])
@pytest.mark.parametrize(
    "other",
    [(SharedPrefix(), 1), (Plain(), 10**6), (Plain(), 120)],
    ids=lambda other: f"{other[0].name} {other[1]}",
)
def test_an_update_depends_on_neither_budget_nor_layout(folder, groups, replay, other):
    """Weights after two mini-batches with the balance loss on, of which the second is off policy."""
    loss = replace(loss_of(), balance=0.5)
    moves = []
    usual = moe_policy(folder).layout
    if isinstance(other[0], SharedPrefix) and isinstance(usual, Plain):
        pytest.skip("linear attention has no shared prefix")
    for layout, budget in ((usual, 10**6), other):
        policy = moe_policy(folder, layout=layout, replay=replay, budget=budget)
        policy.optimizer = torch.optim.SGD(policy.vlm.parameters(), lr=0.05)  # Adam magnifies rounding
        start = weights(policy)
        update(policy, groups, loss)
        moves.append(weights(policy) - start)
    assert (moves[0] - moves[1]).norm() < 1e-4 * moves[0].norm()


def test_the_balance_loss_is_in_the_gradient_and_evens_the_load(folder, groups):
    policy = moe_policy(folder, lr=3e-3)
    with torch.no_grad():
        for name, parameter in policy.vlm.model.named_parameters():
            if ".mlp.gate." in name:
                parameter[0] += 0.3 * torch.randn(
                    parameter.shape[1], generator=torch.Generator().manual_seed(0)
                )
    loads = []
    for _ in range(12):
        _, metrics = update(policy, groups, replace(loss_of(), balance=1.0), count=1)
        loads.append(metrics["policy/expert_load"])
    assert loads[-1] < loads[0] - 0.1


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("replay", [False, True], ids=["", "replay"])
def test_the_second_minibatch_uses_the_experts_of_its_old_pass(folder, replay, precision):
    """R2; without it the same update changes experts. The first mini-batch's own pass gives its own."""
    policy = moe_policy(folder, replay=replay, lr=FAR, precision=precision)
    groups = sample_groups(policy, Encoder(policy.vlm), REWARDS)
    seen = []
    for module in policy.vlm.model.modules():
        if {"gate", "experts"} <= dict(module.named_children()).keys():
            module.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    minibatches, metrics = update(policy, groups, loss_of())
    layers = len(policy.vlm.routers.layers)
    assert len(seen) == 3 * layers  # the second's old pass, the first's update and the second's
    [micro] = minibatches[1].fit(10**6, policy.layout)
    old = micro.routes.laid_out(policy.layout.inputs(micro.groups)).long()
    known = old[:, 0, 0] >= 0
    assert known.float().mean() > 0.9
    for layer in range(layers):
        before, after = (seen[start + layer][known].sort(-1).values for start in (0, 2 * layers))
        assert torch.equal(before, old[known, layer].sort(-1).values)
        assert torch.equal(before, after) == replay
    assert metrics["minibatch1/experts_changed"] > 0.05
    assert "minibatch0/experts_changed" not in metrics
    assert metrics["policy/experts_changed"] == metrics["minibatch1/experts_changed"]
    assert metrics["minibatch0/ratio_max"] == 1.0


def test_the_engines_experts_are_replayed_in_the_old_pass_too(folder, groups):
    """R3 with an engine of other weights: each pass uses the experts that the responses carry."""
    policy = moe_policy(folder, replay=True, lr=FAR)
    engine = HfEngine(load_vlm(str(folder)), prompts_per_batch=8, experts=True)
    with torch.no_grad():
        for name, parameter in engine.vlm.model.named_parameters():
            if ".mlp.gate." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sampled = engine.generate(as_contexts([group.prompt for group in groups]), Sampling(4, 12, 1.0, seed=0))
    routed = [replace(group, responses=tuple(items)) for group, items in zip(groups, sampled, strict=True)]
    minibatches, metrics = update(policy, routed, loss_of(), fresh=False)
    assert metrics["minibatch0/experts_changed"] > 0.05 < metrics["minibatch1/experts_changed"]
    for minibatch in minibatches:
        for micro in minibatch.fit(10**6, policy.layout):
            rows = [item for group in routed for item in group.responses if not group.zero_variance]
            assert any(
                torch.equal(micro.routes.responses[0, : len(item.ids)], item.experts[-len(item.ids) :])
                for item in rows
            )
    with torch.no_grad():  # the engine's own weights then give the engine's own log-probs
        own = moe_policy(folder, replay=True)
        own.vlm.load_state_dict(engine.vlm.state_dict())
        [micro] = scored(own, routed).fit(10**6, own.layout)
        assert (own.forward(micro)[0].logprobs - micro.sampled).abs().max() < 2e-5


def test_metrics_that_do_not_apply_are_not_logged(folder, groups, model_folder):
    policy = moe_policy(folder, reuse_sampled=True)
    _, metrics = update(policy, groups, loss_of())
    assert not [name for name in metrics if "experts_changed" in name]
    assert 1.0 <= metrics["policy/expert_load"] <= 4.0 and 0 < metrics["policy/router_entropy"] <= math.log(4)
    dense = moe_policy(model_folder("qwen3_vl"))
    _, metrics = update(dense, sample_groups(dense, Encoder(dense.vlm), REWARDS), loss_of())
    assert not [name for name in metrics if "expert" in name or "router" in name]


@pytest.mark.parametrize("override", ["algo.replay=r2", "algo.balance=0.01", "model.freeze=[router]"])
def test_a_dense_model_is_refused(settings, override):
    with pytest.raises(ValueError, match=r"must be for a mixture of experts; .* is dense"):
        train(settings(override))


@pytest.mark.parametrize("replay", slow_but("r3", of=["r2", "r3"]))
def test_a_run_with_replay(settings, tmp_path, folder, replay):
    options = [f"model.path={folder}", f"algo.replay={replay}", "algo.balance=0.01", "train.steps=2"]
    train(
        settings("algo.objective={type: grpo}", "model.gradient_checkpointing=true", "train.lr=0.1", *options)
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["minibatch0/ratio_max"] == pytest.approx(1.0, abs=1e-4) for row in rows)
    assert any(row.get("policy/experts_changed", 0) > 0 for row in rows)
    assert all("policy/expert_load" in row for row in rows)


def test_a_microbatch_that_adds_nothing_adds_nothing_to_balance(folder, groups):
    """Processes without work of their own run such ones."""
    policy = moe_policy(folder)
    batch = scored(policy, groups)
    passed, _ = policy.forward(batch.idle(), usage_gradient=True)
    assert policy.backward(replace(loss_of(), balance=1.0)(passed, batch.idle(), batch)) == 0.0
    assert float(policy.grad_norm()) == 0.0
