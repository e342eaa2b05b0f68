"""Recording and replay of experts: replayed experts get weights and gradients from the current router, in every
layout, under checkpointing and autocast."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.conftest import FAMILIES, example, group_slice
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.experts import ExpertRoutes
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.types import Sampling

MOE_FAMILIES = [family for family in FAMILIES if family.endswith("moe")]
LAYOUTS = pytest.mark.parametrize("layout", [SharedPrefix(), Plain()], ids=lambda layout: layout.name)
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
pytestmark = pytest.mark.parametrize("family", MOE_FAMILIES)


class RoutedModel:
    """A model, and the inputs of two groups of responses with images."""

    def __init__(self, folder, layout, **options):
        self.vlm = load_vlm(str(folder), **options)
        encode, generator = Encoder(self.vlm), torch.Generator().manual_seed(0)
        self.groups = [
            group_slice(
                encode(example(number, images=images)),
                [torch.randint(10, 200, (length,), generator=generator) for length in lengths],
            )
            for number, (images, lengths) in enumerate([(1, [3, 12]), (2, [5, 1, 5])])
        ]
        self.inputs = layout.inputs(self.groups)
        self.blocks = [
            module for module in self.vlm.model.modules() if "gate" in dict(module.named_children())
        ]

    def run(self, replayed=None, gradient=False):
        routed = self.vlm.routers.watch(self.inputs, replayed, gradient=gradient)
        return Pass(self.vlm)(self.inputs, routed).logprobs, routed

    def perturb(self):
        """Changes the routers, and the hidden states that they get."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.vlm.model.named_parameters():
                scale = 0.2 if ".mlp.gate." in name else 0.01
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    def record_used(self):
        """A list to which each further call of a layer's experts appends its indices [L, k]."""
        used = []
        for block in self.blocks:
            block.experts.register_forward_pre_hook(lambda _, inputs: used.append(inputs[1]))
        return used

    def gradient(self, logprobs):
        self.vlm.zero_grad()
        weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
        (logprobs * weights).sum().backward()
        return {name: p.grad.clone() for name, p in self.vlm.model.named_parameters() if p.grad is not None}


@pytest.fixture
def make(model_folder, family):
    def build(layout, **options) -> RoutedModel:
        return RoutedModel(model_folder(family), layout, **options)

    return build


class ReferenceExperts(nn.Module):
    """An MoE layer with fixed experts: every expert on every token, weighted by the softmax of the router's
    logits over the fixed experts only."""

    def __init__(self, block, fixed):
        super().__init__()
        self.block, self.fixed = block, fixed

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        logits = nn.functional.linear(flat, self.block.gate.weight)
        allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, self.fixed, True)
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)  # [L, E]
        experts = self.block.experts
        gate, up = torch.einsum("lh,eoh->leo", flat, experts.gate_up_proj).chunk(2, dim=-1)
        outputs = torch.einsum("lei,ehi->leh", nn.functional.silu(gate) * up, experts.down_proj)
        mixed = (weights[..., None] * outputs).sum(1)
        if "shared_expert" in dict(self.block.named_children()):
            mixed = mixed + self.block.shared_expert_gate(flat).sigmoid() * self.block.shared_expert(flat)
        return mixed.view_as(hidden)


def replayable(inputs):
    """[L] the tokens that replay must cover: prompts, and those that predict a response's token."""
    where = torch.zeros(inputs.ids.numel(), dtype=torch.bool)
    where[inputs.predicting] = where[inputs.prompting] = True
    return where


@LAYOUTS
@CHECKPOINTING
def test_replaying_a_passs_own_experts_changes_nothing(make, layout, checkpointing):
    setting = make(layout, gradient_checkpointing=checkpointing)
    logprobs, routed = setting.run()
    again, _ = setting.run(routed.routes())
    assert torch.equal(logprobs, again)
    expected, replayed = setting.gradient(logprobs), setting.gradient(again)
    assert expected.keys() == replayed.keys()
    assert all(torch.equal(expected[name], replayed[name]) for name in replayed)


@LAYOUTS
@CHECKPOINTING
@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
def test_replay_uses_the_recorded_experts_also_in_the_backward_pass(make, layout, checkpointing, half):
    setting = make(layout, gradient_checkpointing=checkpointing)
    context = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    used, where = setting.record_used(), replayable(setting.inputs)
    with context:
        _, routed = setting.run()
    old = [experts.sort(-1).values[where] for experts in used]
    routes, layers = routed.routes(), len(setting.blocks)
    setting.perturb()
    used.clear()
    with context:
        changed, _ = setting.run()
    assert any(not torch.equal(a, b.sort(-1).values[where]) for a, b in zip(old, used, strict=True))
    used.clear()
    with context:
        replayed, routed = setting.run(routes)
    setting.gradient(replayed)
    assert len(used) == layers * (2 if checkpointing else 1)
    order = [*range(layers), *reversed(range(layers))]
    for layer, experts in zip(order, used, strict=False):
        assert torch.equal(experts.sort(-1).values[where], old[layer])
    assert (replayed - changed).abs().max() > 1e-4
    assert routed.usage(routes).changed.sum() > 0 and len(routed.by_layer) == layers


@LAYOUTS
@CHECKPOINTING
def test_gradients_under_replay_match_a_reference_layer(make, layout, checkpointing):
    setting = make(layout, gradient_checkpointing=checkpointing)
    routes = setting.run()[1].routes()
    setting.perturb()
    used = setting.record_used()
    logprobs, _ = setting.run(routes)
    replayed = list(used)
    gradients = setting.gradient(logprobs)
    routers = [name for name in gradients if ".mlp.gate." in name]
    assert len(routers) == len(setting.blocks) and all(gradients[name].norm() > 1e-3 for name in routers)
    layers = setting.vlm.model.model.language_model.layers
    blocks = [layer for layer in layers if layer.mlp in setting.blocks]
    for layer, experts in zip(blocks, replayed, strict=True):
        layer.mlp = ReferenceExperts(layer.mlp, experts)
    reference = Pass(setting.vlm)(setting.inputs).logprobs
    assert (reference - logprobs).abs().max() < 1e-5
    for name, expected in setting.gradient(reference).items():
        name = name.replace("mlp.block.", "mlp.")
        assert (gradients[name] - expected).norm() < 1e-4 * expected.norm() + 1e-6, name


@CHECKPOINTING
def test_both_layouts_and_any_split_give_the_same_usage(make, checkpointing):
    """Routes of the packed row are replayed in separate rows; compares the usage and its gradient."""
    shared, plain = (
        make(layout, gradient_checkpointing=checkpointing) for layout in (SharedPrefix(), Plain())
    )
    plain.inputs = Plain().inputs(shared.groups)
    routes = shared.run()[1].routes()
    assert torch.equal(routes.responses, plain.run()[1].routes().responses)
    shared.perturb()
    plain.perturb()
    logprobs, packed = shared.run(routes, gradient=True)
    rows, separate = plain.run(routes, gradient=True)
    assert (logprobs - rows).abs().max() < 1e-5
    one, other = packed.usage(routes), separate.usage(routes)
    assert one.probabilities.requires_grad and not one.counts.requires_grad
    for name in ("probabilities", "counts", "entropy", "changed"):
        assert torch.allclose(vars(one)[name], vars(other)[name], atol=1e-4)
    lengths = shared.inputs.response_mask.sum(-1).float()
    assert torch.allclose(one.probabilities.sum(-1), lengths[:, None].expand(-1, 2))
    assert torch.equal(one.counts.sum(-1), 2 * lengths[:, None].expand(-1, 2))
    weights = torch.randn(one.probabilities.shape, generator=torch.Generator().manual_seed(3))
    gradients = []
    for setting, usage in ((shared, one), (plain, other)):
        (usage.probabilities * weights).sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in setting.vlm.parameters() if p.grad is not None])
        )
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm() > 0
    last = shared.groups[1]
    part = Plain().inputs([GroupSlice(last.prompt, last.responses[1:])])
    routed = plain.vlm.routers.watch(part, routes[3:], gradient=False)
    replayed = Pass(plain.vlm)(part, routed).logprobs
    assert (replayed - rows[3:, : replayed.shape[1]]).abs().max() < 1e-5


def test_the_engine_reports_the_experts_that_the_trainer_selects(make):
    setting = make(Plain())
    vlm, prompts = setting.vlm, [group.prompt for group in setting.groups]
    sampling = Sampling(3, 8, 1.0, seed=4)
    groups = HfEngine(vlm, prompts_per_batch=2, experts=True).generate(as_contexts(prompts), sampling)
    reported = [(prompt, item) for prompt, items in zip(prompts, groups, strict=True) for item in items]
    inputs = Plain().inputs(
        [GroupSlice(prompt, tuple(items)) for prompt, items in zip(prompts, groups, strict=True)]
    )
    routed = vlm.routers.watch(inputs, None, gradient=False)
    Pass(vlm)(inputs, routed)
    own = routed.experts().view(len(reported), -1, *routed.experts().shape[1:])
    for row, (prompt, item) in zip(own, reported, strict=True):
        assert len(item.experts) == len(prompt.ids) + len(item.ids) - 1
        assert torch.equal(item.experts.sort(-1).values, row[: len(item.experts)].sort(-1).values)
    routes = ExpertRoutes.reported([(prompt, item.experts) for prompt, item in reported])
    assert float(routed.usage(routes).changed.sum()) == 0.0
    silent = HfEngine(vlm, prompts_per_batch=2).generate(as_contexts(prompts), sampling)
    assert [item.ids.tolist() for items in silent for item in items] == [i.ids.tolist() for _, i in reported]
    assert silent[0][0].experts is None


def test_freezing_the_router_freezes_only_the_router(model_folder, family):
    def frozen(*parts):
        model = load_vlm(str(model_folder(family)), freeze=list(parts)).model
        return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    routers = frozen("router")
    assert routers and all(name.endswith(".mlp.gate.weight") for name in routers)
    assert not routers & frozen("language") and frozen("language")
    everything = {name for name, _ in load_vlm(str(model_folder(family))).model.named_parameters()}
    assert frozen("vision", "merger", "language", "router") == everything
