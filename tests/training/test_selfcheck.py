"""The self-check keeps shared layout and reused log-probs if they are right, and drops them if not."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.conftest import CORPUS
from tests.training.test_batch import SmallDevice, make_policy, sample_groups
from vlm_sapo.models.attention import Segments
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.packing import Plain, SharedPrefix
from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.new_model import Shape, new_model
from vlm_sapo.training import checks
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


class Unmasked(SharedPrefix):
    """A layout with a bug: the branches of a prompt see each other."""

    name = "unmasked"

    def inputs(self, groups):
        inputs = super().inputs(groups)
        groups = [replace(item, branches=(sum(item.branches),)) for item in inputs.segments.groups]
        return replace(inputs, segments=Segments(tuple(groups)))


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


DEEP = Shape(
    hidden=128, layers=28, vision_layers=2, heads=4, head_dim=32, init_std=0.09, experts=16, expert_ratio=0.5
)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """`deep_folder(family)`: a model as deep as Qwen3-VL-2B, with logits about as sharp as a trained one's."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"deep_{family}")
            new_model(made[family], family=family, corpus=CORPUS, shape=DEEP)
        return str(made[family])

    return make


def deep_policy(folder, precision, **options):
    """Whole weights under autocast, or adapters on bfloat16 ones."""
    lora = Adapters(base="x", rank=4, alpha=8.0) if precision == "lora" else None
    vlm = load_vlm(folder, dtype="bfloat16" if lora else "float32", freeze=["vision", "merger"], lora=lora)
    head = vlm.model.lm_head.weight
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)) * 0.35)
    return make_policy(folder, vlm=vlm, precision="bf16", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [("qwen3_vl", "autocast"), ("qwen3_vl_moe", "lora")])
def test_rounding_of_deep_models_is_no_disagreement(deep_folder, capsys, family, precision):
    policy = deep_policy(deep_folder(family), precision)
    groups = sample_groups(policy, Encoder(policy.vlm), [[0] * 8], tokens=48)
    weights = {name: item.clone() for name, item in policy.vlm.named_parameters()}
    check(policy, groups)
    output = capsys.readouterr().out
    assert "check ok" in output and isinstance(policy.layout, SharedPrefix), output
    assert all(torch.equal(item, weights[name]) for name, item in policy.vlm.named_parameters())
    assert all(item.dtype == weights[name].dtype for name, item in policy.vlm.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision", "layout"), [("qwen3_vl", "lora", Unmasked), ("qwen3_vl_moe", "autocast", Shifted)]
)
def test_a_wrong_layout_of_a_deep_model_is_found_in_half_precision(
    deep_folder, capsys, family, precision, layout
):
    policy = deep_policy(deep_folder(family), precision, layout=layout())
    groups = sample_groups(policy, Encoder(policy.vlm), [[0] * 8], tokens=48)
    check(policy, groups)
    assert "DISAGREES" in capsys.readouterr().out and isinstance(policy.layout, Plain)


@pytest.mark.parametrize("precision", ["autocast", "lora"])
def test_more_rounding_than_allowed_is_compared_in_float32(
    model_folder, encoder, capsys, monkeypatch, precision
):
    """As if bfloat16 had a bit less: the comparison fails there, and float32 decides."""
    none = checks.Tolerance(mean=0.0, quantile=0.5, logprob=0.0, gradient_norm=0.0)
    monkeypatch.setattr(checks, "HALF_PRECISION", none)
    for layout in (SharedPrefix(), Shifted()):
        policy = deep_policy(str(model_folder()), precision, layout=layout)
        weights = {name: item.clone() for name, item in policy.vlm.named_parameters()}
        check(policy, sample_groups(policy, encoder, REWARDS))
        output = capsys.readouterr().out
        assert ("agree in float32" in output) == (layout.name == "shared prefix"), output
        assert ("in float32 log-probs" in output) == (layout.name == "shifted"), output
        assert all(torch.equal(item, weights[name]) for name, item in policy.vlm.named_parameters())


def test_a_check_that_runs_out_of_memory_is_repeated_in_parts(model_folder, encoder, capsys):
    policy = make_policy(model_folder())
    groups = sample_groups(policy, encoder, REWARDS)
    SmallDevice(policy.forward_pass, len(groups[0].prompt.ids) + 13)  # a prompt with one response
    check(policy, groups)
    assert policy.memory.shortages and "shared-prefix and plain pass agree" in capsys.readouterr().out


def short_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def pass_in_float32_short(monkeypatch):
    run = SelfCheck._run
    monkeypatch.setattr(
        SelfCheck,
        "_run",
        lambda check, *args, **options: (short_of_memory if args[4] is nullcontext else run)(
            check, *args, **options
        ),
    )


@pytest.mark.parametrize("where", ["weights", "pass"])
def test_a_comparison_in_float32_that_does_not_fit_changes_no_budget(
    model_folder, encoder, capsys, monkeypatch, where
):
    """The run goes on with the plain pass, as without the comparison."""
    monkeypatch.setattr(checks, "HALF_PRECISION", checks.Tolerance(0.0, 0.5, 0.0, 0.0))
    policy = deep_policy(str(model_folder()), "lora")
    groups = sample_groups(policy, encoder, REWARDS)
    if where == "weights":
        monkeypatch.setattr(checks, "in_float32", short_of_memory)
    else:
        pass_in_float32_short(monkeypatch)
    check(policy, groups, budget=1000)
    output = capsys.readouterr().out
    assert "DISAGREES" in output and "in float32" not in output and isinstance(policy.layout, Plain)
    assert policy.memory.tokens == 1000 and not policy.memory.shortages
    assert {item.dtype for item in policy.vlm.parameters()} == {torch.bfloat16, torch.float32}
