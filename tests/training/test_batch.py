"""The gradient of a mini-batch: what is in it, and that no arrangement changes it."""

import pytest
import torch
from accelerate import Accelerator
from vlm_sapo.training.memory import Memory

from tests.conftest import completion, example
from vlm_sapo.algo.advantages import zscore
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain, SharedPrefix
from vlm_sapo.reporting.console import Console
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.training.batch import MicroBatch, minibatches
from vlm_sapo.training.loss import build_loss
from vlm_sapo.training.optimizer import schedule_factor
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import Group, Reward, Sampling

OBJECTIVES = {
    "sapo": {"type": "sapo", "tau_pos": 1.0, "tau_neg": 1.05},
    "grpo": {"type": "grpo", "low": 0.2, "high": 0.2},
    "gspo": {"type": "gspo", "low": 3e-4, "high": 4e-4},
    "cispo": {"type": "cispo", "cap": 5.0},
}
REDUCTIONS = ("sequence_mean", "token_mean", "constant")


def loss_of(objective="sapo", reduction="sequence_mean", ratio="token", kl=0.0):
    return build_loss(OBJECTIVES[objective], ratio=ratio, reduction=reduction, kl=kl, max_tokens=16)


def make_policy(folder, **options) -> Policy:
    return Policy(load_vlm(str(folder)), Accelerator(cpu=True), total_steps=10, lr=1e-3, **options)


def draw_groups(policy, encoder, rewards) -> list[Group]:
    prompts = [encoder(example(number, pictures=number % 3)) for number in range(len(rewards))]
    drawn = HfEngine(policy.vlm, prompts_per_batch=8).generate(
        prompts, Sampling(len(rewards[0]), 12, 1.0, seed=0)
    )
    return [
        Group(prompt, tuple(responses), tuple(Reward(value, {}) for value in values))
        for prompt, responses, values in zip(prompts, drawn, rewards, strict=True)
    ]


REWARDS = [[1, 0, 0, 1], [0.5, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]


def advantages(groups):
    return [zscore(torch.tensor([score.total for score in g.rewards], dtype=torch.float64)) for g in groups]


def split(policy, groups, *, count=1, budget=10**6, **options):
    batch = minibatches(
        groups, advantages(groups), count=count, layout=policy.layout, budget=budget, **options
    )
    policy.score(batch)
    return batch


def fill_old(policy, minibatch, shift=0.0):
    """Old log-probs are shifted to leave the policy."""
    with torch.no_grad():
        for micro in minibatch.micros:
            micro.old = policy.logprobs(micro)[0] + shift


def gradient(policy, groups, loss, *, budget=10**6, shift=0.0):
    """Loss and flat gradient of one mini-batch."""
    [minibatch] = split(policy, groups, budget=budget)
    fill_old(policy, minibatch, shift)
    total = 0.0
    for micro in minibatch.micros:
        logprobs, _ = policy.logprobs(micro)
        total += policy.backward(loss(logprobs, micro, minibatch))
    flat = torch.cat(
        [p.grad.flatten() for p in policy.vlm.parameters() if p.grad is not None] or [torch.zeros(1)]
    )
    policy.optimizer.zero_grad()
    return total, flat, minibatch


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", [SharedPrefix(), Plain()], ids=lambda layout: layout.name)
def test_the_token_budget_changes_no_gradient(model_folder, encoder, objective, reduction, layout):
    policy = make_policy(model_folder(), layout=layout)
    groups = draw_groups(policy, encoder, REWARDS)
    loss = loss_of(objective, reduction)
    whole, expected, one = gradient(policy, groups, loss, shift=0.1)
    parts, found, many = gradient(policy, groups, loss, budget=1, shift=0.1)
    assert len(one.micros) == 1 and len(many.micros) == 12
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_all_objectives_have_one_gradient(model_folder, encoder, reduction):
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS)
    _, expected, _ = gradient(policy, groups, loss_of("sapo", reduction))
    for objective in ("grpo", "gspo", "cispo"):
        _, found, _ = gradient(policy, groups, loss_of(objective, reduction))
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_groups_without_variance_cost_nothing_and_still_count(model_folder, encoder):
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS)
    _, _, minibatch = gradient(policy, groups, loss_of())
    assert minibatch.num_sequences == 16
    assert sum(len(micro.advantages) for micro in minibatch.micros) == 12
    assert minibatch.num_tokens == sum(len(c.ids) for group in groups for c in group.responses)
    _, flat, empty = gradient(policy, groups[2:3], loss_of())
    assert empty.micros == [] and not flat.any()


def test_truncated_responses_leave_the_denominator_when_masked(model_folder, encoder):
    policy = make_policy(model_folder())
    prompt = encoder(example())
    responses = (completion([20, 21, 2]), completion([22, 23], finish="length"), completion([24, 2]))
    group = Group(prompt, responses, tuple(Reward(value, {}) for value in (1.0, 0.0, 0.0)))
    [kept] = split(policy, [group])
    [masked] = split(policy, [group], mask_truncated=True)
    assert (kept.num_sequences, kept.num_tokens) == (3, 7)
    assert (masked.num_sequences, masked.num_tokens) == (2, 5)
    assert len(masked.micros[0].advantages) == 2
    assert policy.logprobs(masked.micros[0])[0].shape == (2, 3)


def test_the_first_minibatch_has_ratio_exactly_one(model_folder, encoder):
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS)
    batch = split(policy, groups, count=2, budget=120)
    loss = loss_of()
    for micro in batch[0].micros:
        logprobs, _ = policy.logprobs(micro)
        assert torch.equal(logprobs.detach(), micro.old)
        policy.backward(loss(logprobs, micro, batch[0]))
    policy.step()
    moved = [(policy.logprobs(m)[0].detach() - m.old).abs().max() for m in batch[1].micros]
    assert max(moved) > 1e-4


def test_old_logprobs_are_those_before_any_update(model_folder, encoder):
    """Recomputed or the engine's own: the same to rounding, and fixed before the first update."""
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS[:2])
    recomputed = split(policy, groups, count=2)[1].micros[0]
    policy.reuse_sampled = True
    reused = split(policy, groups, count=2)[1].micros[0]
    assert torch.equal(reused.old, reused.sampled)
    assert torch.allclose(recomputed.old, reused.old, atol=1e-5)


def test_only_response_tokens_are_in_the_loss(model_folder, encoder):
    """Old log-probs off the mask are garbage; what is scored are the responses' tokens and nothing else."""
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS)
    loss = loss_of()
    _, expected, _ = gradient(policy, groups, loss, shift=0.1)
    [minibatch] = split(policy, groups)
    [micro] = minibatch.micros
    fill_old(policy, minibatch, 0.1)
    micro.old = torch.where(micro.mask, micro.old, float("nan"))
    trained = [item for group in groups[:2] + groups[3:] for item in group.responses]
    assert micro.mask.sum() == sum(len(item.ids) for item in trained)
    targets = policy.layout.inputs(micro.groups).targets.tolist()
    assert sorted(targets) == sorted(token for item in trained for token in item.ids.tolist())
    assert not set(targets) & set(policy.vlm.banned)
    logprobs, _ = policy.logprobs(micro)
    policy.backward(loss(logprobs, micro, minibatch))
    found = torch.cat([p.grad.flatten() for p in policy.vlm.parameters() if p.grad is not None])
    assert torch.equal(found, expected)


def test_kl_pulls_towards_the_reference(model_folder, encoder):
    reference = load_vlm(str(model_folder()), freeze=["vision", "merger", "language"])
    policy = make_policy(model_folder(), reference=reference)
    groups = draw_groups(policy, encoder, REWARDS)
    with torch.no_grad():
        for parameter in policy.vlm.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    total, _, minibatch = gradient(policy, groups, loss_of(kl=1.0))
    none, _, _ = gradient(policy, groups, loss_of(kl=0.0))
    assert total > none + 1e-4
    for _ in range(20):
        for micro in minibatch.micros:
            logprobs, _ = policy.logprobs(micro)
            micro.advantages.zero_()
            divergence = policy.backward(loss_of(kl=1.0)(logprobs, micro, minibatch))
        policy.step()
    assert divergence < 0.7 * total


def test_a_gated_update_raises_good_responses(model_folder, encoder):
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS[:1])
    loss = loss_of()
    [minibatch] = split(policy, groups)
    [micro] = minibatch.micros
    fill_old(policy, minibatch)
    for _ in range(5):
        logprobs, _ = policy.logprobs(micro)
        policy.backward(loss(logprobs, micro, minibatch))
        policy.step()
    change = (policy.logprobs(micro)[0].detach() - micro.old).sum(-1)
    good = micro.advantages[:, 0] > 0
    assert change[good].mean() > 0 > change[~good].mean()


def test_everything_frozen_is_an_error(model_folder):
    frozen = load_vlm(str(model_folder()), freeze=["vision", "merger", "language"])
    with pytest.raises(ValueError, match="model.freeze must leave something to train"):
        Policy(frozen, Accelerator(cpu=True), total_steps=1, lr=1e-3)


def test_schedules():
    def factors(kind):
        return [schedule_factor(step, kind=kind, warmup=2, total=10) for step in range(10)]

    assert factors("constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)
    assert factors("linear")[2:] == pytest.approx([1 - k / 8 for k in range(8)])
    assert factors("cosine")[2] == 1.0 and factors("cosine")[6] == pytest.approx(0.5)


class Small:
    """A device on which a pass of more than so many tokens runs out of memory."""

    def __init__(self, forward_pass, most: int):
        self.most, self.lengths = most, []
        forward_pass.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        length = inputs[0].ids.numel()
        self.lengths.append(length)
        if length > self.most:
            raise torch.OutOfMemoryError(f"{length} tokens tried. More advice")


@pytest.mark.parametrize("layout", [SharedPrefix(), Plain()], ids=["shared", "plain"])
def test_a_pass_that_runs_out_of_memory_is_made_in_parts(model_folder, encoder, layout, capsys):
    """Mini-batches that come after it begin small; gradients are those of a device with room."""

    def train(most: int) -> tuple[dict, Policy, Small]:
        policy = make_policy(model_folder(), layout=layout)
        groups = draw_groups(policy, encoder, REWARDS)
        device = Small(policy.forward_pass, most)
        batch = split(policy, groups, count=2)
        for minibatch in batch:
            passed = list(policy.accumulate(minibatch, loss_of()))
            assert sum(len(item["mask"]) for item in passed) == sum(
                len(ids) for micro in minibatch.micros for _, ids in micro.groups
            )
            grads = [parameter.grad.clone() for parameter in policy.trained if parameter.grad is not None]
            policy.step()
        return grads, policy, device

    grads, roomy, _ = train(10**6)
    again, small, device = train(70)
    assert roomy.memory.shortages == 0 and small.memory.shortages >= 1
    assert device.lengths[-1] <= small.memory.budget < 70 or max(device.lengths[-2:]) <= 70
    for first, second in zip(grads, again, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    assert "set train.tokens_per_microbatch=" in capsys.readouterr().out


def test_a_response_that_fits_no_device_is_named(model_folder, encoder):
    policy = make_policy(model_folder())
    groups = draw_groups(policy, encoder, REWARDS)
    Small(policy.forward_pass, 10)
    with pytest.raises(
        ValueError, match="one response to row e[0-9]+, .* tokens with its prompt, does not fit"
    ):
        for minibatch in split(policy, groups):
            policy.accumulate(minibatch, loss_of())


def test_it_is_the_pass_that_failed_which_is_made_smaller(model_folder, encoder):
    """In the plain layout a long response alone has fewer tokens than eight short ones with a long prompt."""
    policy = make_policy(model_folder(), layout=Plain())
    lone, wide = encoder(example(0, pictures=0)), encoder(example(1, pictures=2))
    ids = torch.arange(10, 130)
    groups = [(lone, [ids]), (wide, [ids[:8]] * 8)]
    micros = [
        MicroBatch(
            [group],
            torch.ones(len(group[1]), 1),
            torch.ones(len(group[1]), len(group[1][0])).bool(),
            torch.zeros(len(group[1]), len(group[1][0])),
        )
        for group in groups
    ]
    most = len(lone.ids) + len(ids)
    assert Plain().size([groups[1]]) > most > SharedPrefix().size([groups[1]])

    def work(micro):
        if Plain().size(micro.groups) > most:
            raise torch.OutOfMemoryError("no room")
        return len(micro.mask)

    done = policy.memory.fitting(micros, work, layout=Plain())
    assert sum(count for _, count in done) == 9 and done[0][1] == 1


def test_a_sharded_model_is_not_run_in_parts():
    with pytest.raises(SystemExit, match="set train.tokens_per_microbatch=50"):
        Memory(1000, Console(), can_shrink=False).shrink(100, "no room")


def test_what_no_pass_reaches_has_a_gradient_of_zero(model_folder, encoder):
    """As it has in several processes, of which another one may look at a picture: AdamW goes on with it."""
    policy = make_policy(model_folder(), weight_decay=0.1)
    tower = [parameter for name, parameter in policy.named.items() if "visual." in name]
    before = [parameter.detach().clone() for parameter in tower]
    (minibatch,) = split(policy, draw_groups(policy, encoder, [[1, 0, 0, 1]]))
    assert all(prompt.pixels is None for micro in minibatch.micros for prompt, _ in micro.groups)
    list(policy.accumulate(minibatch, loss_of()))
    policy.step()
    for old, new in zip(before, tower, strict=True):
        torch.testing.assert_close(new.detach(), old * (1 - 1e-3 * 0.1))
