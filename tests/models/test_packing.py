"""The shared-prefix layout against the plain one: the same log-probs and gradients, in any arrangement."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from tests.conftest import CORPUS, FAMILIES, example, group_slice
from vlm_sapo.models import linear
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.linear import GroupedLinearAttention
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix, choose
from vlm_sapo.models.vision import Features
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.tools.new_model import Shape, new_model
from vlm_sapo.types import Sampling

SHAPES = {
    "one image": [(1, [5, 1, 9, 30])],
    "three images": [(3, [7, 2])],
    "no image": [(0, [4, 4])],
    "one branch": [(1, [6])],
    "eight even branches": [(2, [8] * 8)],
    "several groups": [(1, [3, 12]), (0, [1]), (2, [5, 5, 2])],
    "many lengths": [(1, [70, 1, 150]), (0, [68, 100])],
}
HYBRID = "qwen3_5"


def build(encoder, shapes, seed=0):
    """Groups of (number of images, lengths of responses)."""
    generator = torch.Generator().manual_seed(seed)

    def responses(lengths):
        return [torch.randint(10, 200, (length,), generator=generator) for length in lengths]

    return [
        group_slice(encoder(example(number, images=images)), responses(lengths))
        for number, (images, lengths) in enumerate(shapes)
    ]


def measure(vlm, inputs):
    """Log-probs, entropies and flat gradient of a loss in which every token has a weight of its own."""
    vlm.zero_grad()
    scores = Pass(vlm, temperature=0.9)(inputs)
    weights = torch.randn(scores.logprobs.shape, generator=torch.Generator().manual_seed(1))
    (scores.logprobs * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in vlm.parameters() if p.grad is not None])
    return scores.logprobs.detach(), scores.entropies, gradient


def assert_same(vlm, groups, *, tolerance=1e-5):
    plain, shared = Plain().inputs(groups), SharedPrefix().inputs(groups)
    logprobs, entropies, gradient = measure(vlm, plain)
    shared_logprobs, shared_entropies, shared_gradient = measure(vlm, shared)
    assert (shared_logprobs - logprobs).abs().max() < 1e-5
    assert (shared_entropies - entropies).abs().max() < 1e-5
    assert (shared_gradient - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shared_equals_plain(model_folder, family, shapes, checkpointing):
    vlm = load_vlm(str(model_folder(family)), gradient_checkpointing=checkpointing)
    assert_same(vlm, build(Encoder(vlm), shapes))


def test_several_layers_of_linear_attention(tmp_path):
    """Three before one with full attention, twice, as in published models, with gradients behind them."""
    shape = Shape(hidden=32, layers=8, vision_layers=1, heads=4, head_dim=8)
    new_model(tmp_path, family=HYBRID, corpus=CORPUS, shape=shape)
    vlm = load_vlm(str(tmp_path), gradient_checkpointing=True)
    assert sum(isinstance(module, GroupedLinearAttention) for module in vlm.modules()) == 6
    assert_same(vlm, build(Encoder(vlm), SHAPES["many lengths"]), tolerance=5e-5)  # rounding, over 8 layers


def test_unknown_linear_attention_is_run_plain(model_folder, monkeypatch):
    """As where a version of transformers calls the cache otherwise: sampling still agrees with training."""
    monkeypatch.setattr(linear, "CACHE_ARGUMENTS", ())
    linear.grouped.cache_clear()
    vlm = load_vlm(str(model_folder(HYBRID)))
    linear.grouped.cache_clear()
    assert not vlm.shares_prefix and isinstance(choose("shared", shares_prefix=False), Plain)
    prompts = [Encoder(vlm)(example(number)) for number in range(2)]
    groups = HfEngine(vlm, prompts_per_batch=2).generate(as_contexts(prompts), Sampling(3, 8, 1.0, seed=1))
    slices = [GroupSlice(prompt, tuple(items)) for prompt, items in zip(prompts, groups, strict=True)]
    with torch.no_grad():
        scores = Pass(vlm)(Plain().inputs(slices))
    sampled = torch.cat([item.logprobs for items in groups for item in items])
    assert (scores.logprobs[scores.logprobs != 0] - sampled).abs().max() < 1e-5
    with pytest.raises(AssertionError, match="neither segments nor a prefix"):
        Pass(vlm)(SharedPrefix().inputs(slices))


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(1, 12), min_size=1, max_size=5)),
        max_size=4,
        min_size=1,
    )
)
def test_any_layout(shared_vlm, shapes):
    assert_same(shared_vlm, build(Encoder(shared_vlm), shapes))


@pytest.fixture(scope="module", params=["qwen3_vl", HYBRID])
def shared_vlm(request, model_folder):
    return load_vlm(str(model_folder(request.param)))


@pytest.mark.parametrize("family", ["qwen3_vl", HYBRID])
@pytest.mark.parametrize("freeze", [["vision", "merger"], ["vision"], ["language"]], ids="+".join)
def test_frozen_parts(model_folder, family, freeze):
    vlm = load_vlm(str(model_folder(family)), freeze=freeze)
    assert_same(vlm, build(Encoder(vlm), SHAPES["several groups"]))


@pytest.mark.parametrize("family", ["qwen3_vl", HYBRID])
def test_adapters(model_folder, family):
    """LoRA adapters in the language model: only they are trained, and the tower's features are cached."""
    vlm = load_vlm(str(model_folder(family)), gradient_checkpointing=True)
    layers = r".*language_model.*\.(q_proj|v_proj|down_proj|in_proj_qkv|out_proj)"
    inject_adapter_in_model(LoraConfig(r=4, target_modules=layers, init_lora_weights=False), vlm.model)
    assert_same(vlm, build(Encoder(vlm), SHAPES["several groups"]))
    assert {name.split(".")[-3] for name, p in vlm.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_B",
    }
    assert vlm.vision.frozen


@pytest.mark.parametrize("family", ["qwen3_vl", HYBRID])
def test_bfloat16_stays_close(model_folder, family):
    """Rounding differs between the layouts; nothing else does."""
    vlm = load_vlm(str(model_folder(family)), dtype="bfloat16")
    groups = build(Encoder(vlm), SHAPES["several groups"])
    logprobs, _, gradient = measure(vlm, Plain().inputs(groups))
    shared_logprobs, _, shared_gradient = measure(vlm, SharedPrefix().inputs(groups))
    assert (shared_logprobs - logprobs).abs().mean() < 0.03
    assert (shared_gradient - gradient).float().norm() < 0.1 * gradient.float().norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_dont_attend_to_each_other(model_folder, family):
    """Our vision attention on many images at once against transformers' own on one at a time."""
    vlm = load_vlm(str(model_folder(family)))
    encode = Encoder(vlm)
    prompts = [encode(example(number, images=images)) for number, images in enumerate((1, 1, 3, 2))]
    together = vlm.vision(prompts)
    vlm.model.set_attn_implementation({"vision_config": "sdpa"})
    one_by_one = Features.join([vlm.vision([prompt]) for prompt in prompts])
    for ours, theirs in zip(
        (together.tokens, *together.deep), (one_by_one.tokens, *one_by_one.deep), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_images_and_prompt_are_packed_once(vlm):
    groups = build(Encoder(vlm), [(2, [5, 1, 9])])
    [prompt], inputs = [group.prompt for group in groups], SharedPrefix().inputs(groups)
    assert inputs.ids.shape == (1, len(prompt.ids) + 15) and inputs.prompts == [prompt]
    assert Plain().inputs(groups).ids.shape == (3, len(prompt.ids) + 9)


def test_a_frozen_tower_encodes_a_prompt_once(model_folder, monkeypatch):
    vlm = load_vlm(str(model_folder()), freeze=["vision", "merger"])
    groups = build(Encoder(vlm), [(1, [5, 3]), (2, [4])])
    calls = []
    vlm.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    for layout in (SharedPrefix(), Plain(), SharedPrefix()):
        Pass(vlm)(layout.inputs(groups))
    assert len(calls) == 1 and len(vlm.vision.cached) == 2
    del groups
    assert len(vlm.vision.cached) == 0


def test_a_trained_tower_encodes_in_every_pass(vlm):
    groups = build(Encoder(vlm), [(1, [5, 3])])
    calls = []
    vlm.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    Pass(vlm)(SharedPrefix().inputs(groups))
    Pass(vlm)(SharedPrefix().inputs(groups))
    assert len(calls) == 2 and not vlm.vision.cached


@given(
    st.lists(st.tuples(st.integers(5, 60), st.lists(st.integers(1, 40), min_size=1, max_size=9)), max_size=9),
    st.integers(20, 400),
    st.sampled_from([SharedPrefix(), Plain()]),
)
def test_packing_drops_nothing_and_stays_within_the_budget(groups, budget, layout):
    bins = layout.pack(groups, budget)
    packed = sorted((group, row) for parts in bins for group, rows in parts for row in rows)
    assert packed == [(g, row) for g, (_, lengths) in enumerate(groups) for row in range(len(lengths))]
    for parts in bins:
        sizes = [(groups[group][0], [groups[group][1][row] for row in rows]) for group, rows in parts]
        responses = sum(len(lengths) for _, lengths in sizes)
        assert tokens(layout, sizes) <= budget or responses == 1


def tokens(layout, sizes) -> int:
    if isinstance(layout, SharedPrefix):
        return sum(prompt + sum(lengths) for prompt, lengths in sizes)
    rows = [prompt + length for prompt, lengths in sizes for length in lengths]
    return len(rows) * max(rows)


def test_packing_repeats_few_prompts():
    """64 groups of 8 responses of very unequal length: under 5 % of the positions are repeated or padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(64, 8, generator=generator) ** 2 * 1000 + 16).int().tolist()
    groups = [(300, row) for row in lengths]
    needed = sum(300 + sum(row) for row in lengths)
    computed = sum(
        300 + sum(groups[group][1][row] for row in rows)
        for parts in SharedPrefix().pack(groups, 16384)
        for group, rows in parts
    )
    assert needed <= computed < 1.05 * needed
