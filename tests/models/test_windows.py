"""Layers with a window, of which some are shorter than a response, and layers that take the keys of others:
layouts, sampling and continuing against transformers' own forward, with images that see themselves and
without."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.conftest import CORPUS, SMALL, example, group_slice, own_inputs, response
from vlm_sapo.models.attention import window_mask
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.tools.new_model import new_model
from vlm_sapo.tools.plan.simulate import ModelSpec, outline
from vlm_sapo.types import Context, Sampling

SAMPLING = Sampling(3, 16, 1.0, seed=3)
ROUNDING = 5e-5
"""Norms of small keys make rounding large: at one token float32 differs from float64 by 8e-6 in transformers'
forward and by 2.3e-5 in decoding; at most others by less than 1e-6."""
SETTINGS = [(1, "vision"), (5, "vision"), (5, None), (70, "vision"), (1000, "vision")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    new_model(folder, family="gemma4", corpus=CORPUS, shape=replace(SMALL, layers=4))
    return folder


@pytest.fixture(params=SETTINGS, ids=lambda setting: f"{setting[0]} {setting[1]}")
def vlm(request, whole, tmp_path):
    """Its text prompts have 20 tokens or so, those with images 86 and 150; two of its four layers take the
    keys of others."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    window, images = request.param
    config["text_config"] |= {"sliding_window": window, "use_bidirectional_attention": images}
    (folder / "config.json").write_text(json.dumps(config))
    return load_vlm(str(folder))


def prompts_of(vlm):
    encoder = Encoder(vlm)
    return [encoder(example(number, images=images)) for number, images in enumerate((1, 0, 2))]


@torch.no_grad()
def own_logprobs(vlm, prompt, ids):
    """By transformers' own forward of the row alone."""
    row = torch.cat([prompt.ids, ids])[None]
    logits = vlm.model(**own_inputs(vlm, prompt, row)).logits[0, len(prompt.ids) - 1 : -1]
    logits[:, vlm.banned] = float("-inf")
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@torch.no_grad()
def test_what_is_sampled_and_continued_has_transformers_log_probs(vlm):
    vlm.stops = []
    prompts, engine = prompts_of(vlm), HfEngine(vlm, prompts_per_batch=3)
    groups = engine.generate(as_contexts(prompts), SAMPLING)
    for prompt, responses in zip(prompts, groups, strict=True):
        for item in responses:
            assert (own_logprobs(vlm, prompt, item.ids) - item.logprobs).abs().max() < ROUNDING
    cut = [
        Context(prompt, tuple(response(item.ids[:length].tolist(), prompt) for item in group), (0, 1, 2))
        for prompt, group, length in zip(prompts, groups, (3, 9, 1), strict=True)
    ]
    for again, whole in zip(engine.generate(cut, SAMPLING), groups, strict=True):
        for item, expected in zip(again, whole, strict=True):
            assert len(item.ids) == SAMPLING.max_tokens and torch.equal(item.ids, expected.ids)
            assert (item.logprobs[9:] - expected.logprobs[9:]).abs().max() < ROUNDING


def test_layouts_have_the_log_probs_and_gradients_of_transformers(vlm):
    generator = torch.Generator().manual_seed(0)
    groups = [
        group_slice(
            prompt, [torch.randint(100, 200, (length,), generator=generator) for length in (14, 3, 9)]
        )
        for prompt in prompts_of(vlm)
    ]
    results = []
    for layout in (Plain(), SharedPrefix()):
        vlm.zero_grad()
        logprobs = Pass(vlm)(layout.inputs(groups)).logprobs
        logprobs.square().sum().backward()
        gradient = torch.cat([item.grad.flatten() for item in vlm.parameters() if item.grad is not None])
        results.append((logprobs.detach(), gradient))
    (plain, gradient), (shared, other) = results
    assert (plain - shared).abs().max() < 1e-5 and (gradient - other).norm() < 1e-5 * gradient.norm()
    rows = [(group.prompt, item.ids) for group in groups for item in group.responses]
    for found, (prompt, ids) in zip(shared, rows, strict=True):
        assert (found[: len(ids)] - own_logprobs(vlm, prompt, ids)).abs().max() < 1e-5


def test_an_image_sees_its_later_tokens_beyond_the_window_and_no_other_image():
    """Text, an image of two tokens, text, an image of three: rows of what each token attends to."""
    images = torch.tensor([-1, 0, 0, -1, 1, 1, 1])
    mask = window_mask(7, 2, images, device=torch.device("cpu"))
    expected = [
        "1000000",
        "1110000",
        "0110000",
        "0011000",
        "0001111",
        "0000111",
        "0000011",
    ]  # fmt: skip
    assert ["".join(str(int(item)) for item in row) for row in mask] == expected


def test_what_gemma_is_refused_for(whole, tmp_path):
    """Before weights are loaded, also by a plan; nothing but null ids is left out of the bans."""
    shutil.copytree(whole, tmp_path / "model")
    path, settings = tmp_path / "model/config.json", json.loads((whole / "config.json").read_text())
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    for changed, words in (
        ({"use_bidirectional_attention": "all"}, "must be vision or null"),
        (moe, "dense"),
    ):
        path.write_text(json.dumps(settings | {"text_config": settings["text_config"] | changed}))
        for load in (load_vlm, lambda folder: outline(ModelSpec(folder, "float32", False, False))):
            with pytest.raises(ValueError, match=words):
                load(str(path.parent))
    path.write_text(json.dumps(settings | {"audio_token_id": None}))
    assert None not in load_vlm(str(path.parent)).banned
    for pixels in ({"max_pixels": 100}, {"max_pixels": 100, "min_pixels": 50}):
        with pytest.raises(ValueError, match=r"max_pixels \(100\) must be at least .*; raise it$"):
            Encoder(load_vlm(str(path.parent)), **pixels)


def test_the_first_token_is_not_doubled(whole, tmp_path):
    """Where the tokenizer would write it too, as published ones of some models do."""
    vlm = load_vlm(str(whole))
    expected = Encoder(vlm)(example()).ids
    vlm.tokenizer.bos_token = "<bos>"
    first = vlm.tokenizer.convert_tokens_to_ids("<bos>")
    vlm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", first)]
    )
    assert vlm.tokenizer("x")["input_ids"][0] == first
    assert torch.equal(Encoder(vlm)(example()).ids, expected)


def test_the_slice_of_a_group_needs_its_own_images(vlm):
    """Two groups of the same prompt in one row: their images are other images."""
    prompt = prompts_of(vlm)[0]
    one = GroupSlice(prompt, (response([100, 101], prompt),))
    alone = Pass(vlm)(SharedPrefix().inputs([one])).logprobs
    both = Pass(vlm)(SharedPrefix().inputs([one, one])).logprobs
    assert (both - alone).abs().max() < 1e-6
