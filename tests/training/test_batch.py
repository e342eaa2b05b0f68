"""The gradient of a mini-batch: what is in it, and that no arrangement changes it."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import example, response
from tests.models.shortages import SHORTAGES
from vlm_sapo.algo.advantages import zscore
from vlm_sapo.config.schema import AlgoConfig
from vlm_sapo.distributed import World
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.models.parallel import Replicated
from vlm_sapo.reporting.console import Console
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.training.batch import Batch, collate
from vlm_sapo.training.loss import GroupAdvantage, build_loss
from vlm_sapo.training.optimizer import OptimizerSettings
from vlm_sapo.training.policy import (
    MemoryBudget,
    MemoryShortage,
    Policy,
    PolicySettings,
    UpdateGuard,
    naming_micro_batch,
)
from vlm_sapo.types import Group, Reward, Sampling

OBJECTIVES = {
    "sapo": {"type": "sapo", "tau_pos": 1.0, "tau_neg": 1.05},
    "grpo": {"type": "grpo", "low": 0.2, "high": 0.2},
    "gspo": {"type": "gspo", "low": 3e-4, "high": 4e-4},
    "cispo": {"type": "cispo", "cap": 5.0},
    "dppo": {"type": "dppo"},
    "vespo": {"type": "vespo"},
}
REDUCTIONS = ("sequence_mean", "token_mean", "constant")
ROOM = 10**6


def loss_of(objective="sapo", reduction="sequence_mean", kl=0.0, **fields):
    ratio = "sequence" if objective == "gspo" else "token"
    algo = AlgoConfig(objective=OBJECTIVES[objective], ratio=ratio, reduction=reduction, kl=kl, **fields)
    return build_loss(algo, max_tokens=16)


def make_policy(
    folder, *, lr=1e-3, weight_decay=0.0, precision="no", guard=None, budget=ROOM, vlm=None, **options
) -> Policy:
    """A policy of the tiny model; `options` are those of PolicySettings, and reference."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    reference = options.pop("reference", None)
    optimizer = OptimizerSettings(lr=lr, total_steps=10, weight_decay=weight_decay)
    return Policy(
        vlm or load_vlm(str(folder)),
        accelerator,
        PolicySettings(optimizer, **options),
        parallelism=Replicated(World(), accelerator.device),
        memory=MemoryBudget(budget, Console()),
        guard=guard or UpdateGuard(None, Console(), limit=0, world=World()),
        reference=reference,
    )


def sample_groups(policy, encoder, rewards, *, tokens=12) -> list[Group]:
    prompts = [encoder(example(number, images=number % 3)) for number in range(len(rewards))]
    groups = HfEngine(policy.vlm, prompts_per_batch=8).generate(
        as_contexts(prompts), Sampling(len(rewards[0]), tokens, 1.0, seed=0)
    )
    return [
        Group(prompt, tuple(responses), tuple(Reward(value, {}) for value in values))
        for prompt, responses, values in zip(prompts, groups, rewards, strict=True)
    ]


REWARDS = [[1, 0, 0, 1], [0.5, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]


def scored(policy, groups, *, count=1, fresh=True, **options) -> Batch:
    """A step's batch as it is before its updates."""
    batch = policy.score(collate(groups, minibatches=count, **options), fresh=fresh)
    return batch.replace(advantages=GroupAdvantage(zscore)(batch))


def off_policy(policy, groups, shift=0.1) -> Batch:
    """A mini-batch whose old log-probs are the present ones and a shift."""
    policy.recompute_old_logprobs()
    policy.settings = replace(policy.settings, score_all=True)
    batch = scored(policy, groups)
    return batch.replace(old=torch.where(batch.mask, batch.old + shift, 0.0))


def gradient(policy, batch, loss, *, budget=ROOM):
    """Loss and flat gradient of a mini-batch, and its micro-batches."""
    policy.memory.tokens = budget
    learnt = policy._accumulate(batch, loss)
    flat = torch.cat(
        [p.grad.flatten() for p in policy.vlm.parameters() if p.grad is not None] or [torch.zeros(1)]
    )
    policy.optimizer.zero_grad()
    return sum(item.loss for item in learnt), flat, [item.micro for item in learnt]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", [SharedPrefix(), Plain()], ids=lambda layout: layout.name)
def test_the_token_budget_changes_no_gradient(model_folder, encoder, objective, reduction, layout):
    policy = make_policy(model_folder(), layout=layout)
    batch, loss = off_policy(policy, sample_groups(policy, encoder, REWARDS)), loss_of(objective, reduction)
    whole, expected, one = gradient(policy, batch, loss)
    parts, actual, many = gradient(policy, batch, loss, budget=1)
    assert len(one) == 1 and len(many) == 12
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_all_objectives_have_one_gradient(model_folder, encoder, reduction):
    policy = make_policy(model_folder())
    batch = scored(policy, sample_groups(policy, encoder, REWARDS))
    _, expected, _ = gradient(policy, batch, loss_of("sapo", reduction))
    for objective in ("grpo", "gspo", "cispo", "dppo", "vespo"):
        _, actual, _ = gradient(policy, batch, loss_of(objective, reduction))
        assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_zero_variance_groups_need_no_pass_and_are_in_the_denominator(model_folder, encoder):
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS)
    batch = scored(policy, groups)
    _, _, micros = gradient(policy, batch, loss_of())
    assert batch.num_sequences == 16
    assert sum(len(micro.rows) for micro in micros) == 12
    assert batch.num_tokens == sum(len(item.ids) for group in groups for item in group.responses)
    empty = scored(policy, groups[2:3])
    assert policy.update(empty, loss_of()) is None
    _, flat, micros = gradient(policy, empty, loss_of())
    assert micros == [] and not flat.any()


def test_truncated_responses_leave_the_denominator_when_masked(model_folder, encoder):
    policy = make_policy(model_folder())
    prompt = encoder(example())
    responses = (
        response([20, 21, 2], prompt),
        response([22, 23], prompt, finish="length"),
        response([24, 2], prompt),
    )
    group = Group(prompt, responses, tuple(Reward(value, {}) for value in (1.0, 0.0, 0.0)))
    whole, masked = scored(policy, [group]), scored(policy, [group], mask_truncated=True)
    assert (whole.num_sequences, whole.num_tokens) == (3, 7)
    assert (masked.num_sequences, masked.num_tokens) == (2, 5)
    [micro] = masked.fit(ROOM, policy.layout)
    assert micro.rows.tolist() == [0, 2]
    assert policy.forward(micro)[0].logprobs.shape == (2, 3)


def test_the_first_minibatch_has_ratio_exactly_one(model_folder, encoder):
    policy = make_policy(model_folder(), budget=120)
    batch, loss = scored(policy, sample_groups(policy, encoder, REWARDS), count=2), loss_of()
    first, second = (policy.update(minibatch, loss) for minibatch in batch.split())
    assert torch.equal(first.logprobs, first.old)
    assert (second.logprobs - second.old).abs().max() > 1e-4


def test_old_logprobs_are_those_before_any_update(model_folder, encoder):
    """Recomputed or the engine's own: the same to rounding, and fixed before the first update."""
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS[:2])
    recomputed = scored(policy, groups, count=2).split()[1]
    reusing = make_policy(model_folder(), reuse_sampled=True)
    reused = scored(reusing, groups, count=2).split()[1]
    assert torch.equal(reused.old, reused.sampled)
    assert torch.allclose(recomputed.old, reused.old, atol=1e-5)


def test_only_sampled_tokens_are_in_the_loss(model_folder, encoder):
    """Off the mask everything is garbage; what is scored are the responses' tokens and nothing else."""
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS)
    batch, loss = off_policy(policy, groups), loss_of()
    _, expected, [micro] = gradient(policy, batch, loss)
    trained = [item for group in groups[:2] + groups[3:] for item in group.responses]
    assert micro.mask.sum() == sum(len(item.ids) for item in trained)
    targets = policy.layout.inputs(micro.groups).targets.tolist()
    assert sorted(targets) == sorted(token for item in trained for token in item.ids.tolist())
    assert not set(targets) & set(policy.vlm.banned)
    nan = {name: torch.where(batch.mask, vars(batch)[name], float("nan")) for name in ("old", "advantages")}
    _, actual, _ = gradient(policy, batch.replace(**nan), loss)
    assert torch.equal(actual, expected)


def test_tokens_of_an_environment_have_no_loss(model_folder, encoder):
    """They are read, in both layouts alike, and neither scored nor counted."""
    shared = make_policy(model_folder())
    groups = sample_groups(shared, encoder, REWARDS[:2])

    def answered(item):
        mask = item.mask.clone()
        mask[len(mask) // 2 : len(mask) // 2 + 2] = False
        return replace(item, mask=mask, logprobs=torch.where(mask, item.logprobs, 0.0))

    groups = [replace(group, responses=tuple(map(answered, group.responses))) for group in groups]
    plain = make_policy(model_folder(), layout=Plain())
    gradients = {}
    for policy in (shared, plain):
        batch = off_policy(policy, groups)
        assert batch.num_tokens == sum(int(item.mask.sum()) for group in groups for item in group.responses)
        _, gradients[policy], micros = gradient(policy, batch, loss_of())
        for micro in micros:
            logprobs = policy.forward(micro)[0].logprobs
            assert not logprobs[~micro.mask].any() and logprobs[micro.mask].all()
    assert (gradients[shared] - gradients[plain]).norm() < 1e-5 * gradients[plain].norm()


def test_kl_pulls_towards_the_reference(model_folder, encoder):
    reference = load_vlm(str(model_folder()), freeze=["vision", "merger", "language"])
    policy = make_policy(model_folder(), reference=reference)
    groups = sample_groups(policy, encoder, REWARDS)
    with torch.no_grad():
        for parameter in policy.vlm.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = scored(policy, groups, keep_zero_advantages=True)
    total, _, _ = gradient(policy, batch, loss_of(kl=1.0))
    none, _, _ = gradient(policy, batch, loss_of(kl=0.0))
    assert total > none + 1e-4
    still = batch.replace(advantages=torch.zeros_like(batch.advantages))
    for _ in range(20):
        stats = policy.update(still, loss_of(kl=1.0))
    assert stats.loss < 0.7 * total


def test_a_gated_update_raises_good_responses(model_folder, encoder):
    policy = make_policy(model_folder())
    batch = off_policy(policy, sample_groups(policy, encoder, REWARDS[:1]), shift=0.0)
    updates = [policy.update(batch, loss_of()) for _ in range(6)]
    change = (updates[-1].logprobs - updates[-1].old).sum(-1)
    good = updates[-1].advantages[:, 0] > 0
    assert change[good].mean() > 0 > change[~good].mean()


def test_everything_frozen_is_an_error(model_folder):
    frozen = load_vlm(str(model_folder()), freeze=["vision", "merger", "language"])
    with pytest.raises(ValueError, match="model.freeze must leave something to train"):
        make_policy(None, vlm=frozen)


def test_schedules():
    def rates(schedule):
        settings = OptimizerSettings(lr=1.0, total_steps=10, schedule=schedule, warmup_steps=2)
        return [settings.rate_at(step) for step in range(10)]

    assert rates("constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)
    assert rates("linear")[2:] == pytest.approx([1 - k / 8 for k in range(8)])
    assert rates("cosine")[2] == 1.0 and rates("cosine")[6] == pytest.approx(0.5)


class SmallDevice:
    """A device on which a pass of more than so many tokens runs out of memory."""

    def __init__(self, forward_pass, limit: int):
        self.limit, self.lengths = limit, []
        forward_pass.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        length = inputs[0].ids.numel()
        self.lengths.append(length)
        if length > self.limit:
            raise SHORTAGES[len(self.lengths) % len(SHORTAGES)]


@pytest.mark.parametrize("layout", [SharedPrefix(), Plain()], ids=["shared", "plain"])
def test_a_pass_that_runs_out_of_memory_is_split_and_retried(model_folder, encoder, layout, capsys):
    """Later mini-batches start with the smaller size; gradients are those of a device with enough memory."""

    def train(limit: int) -> tuple[list, Policy, SmallDevice]:
        policy = make_policy(model_folder(), layout=layout)
        groups = sample_groups(policy, encoder, REWARDS)
        device = SmallDevice(policy.forward_pass, limit)
        for minibatch in scored(policy, groups, count=2).split():
            learnt = policy._accumulate(minibatch, loss_of())
            trained = sum(len(group.responses) for group in groups if not group.zero_variance)
            assert sum(len(item.micro.rows) for item in learnt) <= trained
            grads = [parameter.grad.clone() for parameter in policy.trained if parameter.grad is not None]
            policy.step()
        return grads, policy, device

    grads, roomy, _ = train(ROOM)
    again, small, device = train(70)
    assert roomy.memory.shortages == 0 and small.memory.shortages >= 1
    assert device.lengths[-1] <= small.memory.tokens < 70 or max(device.lengths[-2:]) <= 70
    for first, second in zip(grads, again, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    assert "set train.tokens_per_microbatch=" in capsys.readouterr().out


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: str(error)[:30])
def test_a_shortage_names_its_micro_batch_and_other_errors_pass(error):
    with pytest.raises(MemoryShortage), naming_micro_batch(None):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), naming_micro_batch(None):
        raise RuntimeError("shapes differ")


def test_a_response_too_large_for_the_device_is_named(model_folder, encoder):
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS)
    SmallDevice(policy.forward_pass, 10)
    with pytest.raises(
        ValueError, match="one response to row e[0-9]+, .* tokens with its prompt, does not fit"
    ):
        policy.update(scored(policy, groups), loss_of())


def test_the_pass_that_failed_is_the_one_that_shrinks(model_folder, encoder):
    """In the plain layout a long response alone has fewer tokens than eight short ones with a long prompt."""
    policy = make_policy(model_folder(), layout=Plain())
    lone, wide = encoder(example(0, images=0)), encoder(example(1, images=2))
    ids = list(range(10, 130))
    groups = [
        Group(
            prompt, tuple(response(row, prompt) for row in rows), tuple(Reward(i % 2, {}) for i in range(8))
        )
        for prompt, rows in ((lone, [ids] + [ids[:1]] * 7), (wide, [ids[:8]] * 8))
    ]
    limit = len(lone.ids) + len(ids)
    whole = [GroupSlice(groups[1].prompt, groups[1].responses)]
    assert Plain().size(whole) > limit > SharedPrefix().size(whole)
    device = SmallDevice(policy.forward_pass, limit)
    stats = policy.update(scored(policy, groups), loss_of())
    assert len(stats.rows) == 16 and limit in device.lengths


def test_a_sharded_model_stops_when_out_of_memory():
    with pytest.raises(SystemExit, match="set train.tokens_per_microbatch=50"):
        MemoryBudget(1000, Console(), can_shrink=False).shrink(100, "no room")


def test_parameters_without_a_pass_have_a_gradient_of_zero(model_folder, encoder):
    """As with several processes, one of which may have an image: AdamW updates them too."""
    policy = make_policy(model_folder(), weight_decay=0.1)
    tower = [parameter for name, parameter in policy.named.items() if "visual." in name]
    before = [parameter.detach().clone() for parameter in tower]
    batch = scored(policy, sample_groups(policy, encoder, [[1, 0, 0, 1]]))
    assert all(group.prompt.pixels is None for group in batch.groups)
    policy.update(batch, loss_of())
    for old, new in zip(before, tower, strict=True):
        torch.testing.assert_close(new.detach(), old * (1 - 1e-3 * 0.1))


def test_the_idle_microbatch_adds_nothing(model_folder, encoder):
    policy = make_policy(model_folder())
    batch = scored(policy, sample_groups(policy, encoder, REWARDS[:1]))
    value = policy.backward(loss_of()(policy.forward(batch.idle())[0], batch.idle(), batch))
    assert value == 0.0 and float(policy.grad_norm()) == 0.0


class FarthestLeftOut:
    """An objective that leaves out the tokens whose ratios are farthest from 1 in the whole mini-batch."""

    def __init__(self, share=0.2):
        self.share = share

    def prepare(self, tensors):
        distance = torch.where(tensors.mask, tensors.token_log_ratio.abs(), -1.0)
        limit = torch.quantile(distance[tensors.mask], 1 - self.share)
        return distance <= limit

    def __call__(self, log_ratio, advantage, prepared):
        return torch.where(prepared, -log_ratio.exp() * advantage, 0.0)


@pytest.mark.parametrize("layout", [SharedPrefix(), Plain()], ids=lambda layout: layout.name)
def test_prepared_tensors_do_not_depend_on_the_token_budget(model_folder, encoder, layout, tmp_path):
    own = {"type": "own", "function": "tests.training.test_batch:FarthestLeftOut", "args": {"share": 0.3}}
    loss = build_loss(AlgoConfig(objective=own), max_tokens=16)
    changes = []
    for budget in (ROOM, 1):
        policy = make_policy(model_folder(), layout=layout, budget=budget)
        policy.optimizer = torch.optim.SGD(policy.trained, lr=0.05)
        groups = sample_groups(policy, encoder, REWARDS)
        before = torch.cat([p.detach().flatten().clone() for p in policy.trained])
        first, second = (policy.update(part, loss) for part in scored(policy, groups, count=2).split())
        changes.append(torch.cat([p.detach().flatten() for p in policy.trained]) - before)
        share = float(second.prepared[second.mask].double().mean())
        assert 0.6 < share < 0.8 and first.prepared[first.mask].all()  # on policy no ratio is farther
    assert (changes[0] - changes[1]).norm() < 1e-4 * changes[0].norm()


def test_an_updates_numbers_reach_the_host_in_one_copy(model_folder, encoder, monkeypatch):
    """Whatever the number of its micro-batches; and they are those of each micro-batch."""
    policy = make_policy(model_folder())
    policy.memory.tokens = 1
    batch, copies = off_policy(policy, sample_groups(policy, encoder, REWARDS)), []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (copies.append(self.shape), copy(self))[1])
    learnt = policy._accumulate(batch, loss_of())
    assert len(learnt) == 12 and len(copies) == 1
    monkeypatch.undo()
    policy.optimizer.zero_grad()
    for item in learnt:
        passed, value = policy._learn(item.micro, batch, loss_of())
        assert torch.equal(item.passed.logprobs, passed.logprobs)
        assert torch.equal(item.passed.entropies, passed.entropies)
        assert torch.equal(item.passed.old, item.micro.old)
        assert item.loss == float(value)
