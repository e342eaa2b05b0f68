"""What every family must support, from a row with images to saved weights; with tiny and real processors."""

import copy
import dataclasses
import itertools
import json
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.conftest import ALL_FAMILIES as FAMILIES
from tests.conftest import CORPUS, SHARED, example, group_slice, numbered_image, own_inputs, slow_but
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.families import FAMILIES as FAMILIES_TABLE
from vlm_sapo.models.families.family import LlavaFamily
from vlm_sapo.models.families.qwen import qwen3_5_text
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain
from vlm_sapo.models.weights import hf_state_dict, save_model
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.tools.new_model import Shape, model_config, new_model
from vlm_sapo.types import Sampling

SHAPE = Shape(hidden=64, layers=4, vision_layers=2, heads=2, head_dim=32)
"""Qwen3.5: three layers of linear attention before one of full attention, a quarter of each head rotated."""
REAL = {
    "Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen3-VL-2B-Instruct": "qwen3_vl",
    "Qwen3-VL-2B-Thinking": "qwen3_vl",
    "Qwen3-VL-30B-A3B-Thinking": "qwen3_vl_moe",
}
CONFIGS = SHARED / "processors" / "configs"
NAMES = {
    "Qwen2-VL-2B": "Qwen2-VL-2B",
    "Qwen3-VL-30B-A3B-Thinking": "Qwen3-VL-30B-A3B-Thinking",
    "Qwen3-VL-Embedding-8B": "Qwen3-VL-8B-Instruct",
}
"""Listed checkpoints, and a config of theirs."""
needs_shared = pytest.mark.skipif(not CONFIGS.is_dir(), reason="no real processors at ../shared/processors")

TINY = pytest.mark.parametrize("name", FAMILIES, indirect=True)


@pytest.fixture(
    scope="module",
    params=[*FAMILIES, *(pytest.param(name, marks=[needs_shared, pytest.mark.slow]) for name in REAL)],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """A tiny model of a family behind its tiny processor, or behind a real one."""
    path = tmp_path_factory.mktemp(name)
    if name in FAMILIES:
        new_model(path, family=name, corpus=CORPUS, shape=SHAPE)
        return path
    processor = AutoProcessor.from_pretrained(SHARED / "processors" / name)
    shape = dataclasses.replace(SHAPE, patch=processor.image_processor.patch_size)
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(model_config(REAL[name], shape, tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    save_model(model, path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    """The model, for tests that leave it as it was."""
    return load_vlm(str(folder))


def prompts_of(vlm):
    """Three prompts of unequal length, with two, one and no images; one is longer than 64 tokens, a chunk of
    linear attention."""
    encoder = Encoder(vlm, min_pixels=32 * 32, max_pixels=128 * 128)
    rows = [example(1, images=2, problem="<image>Compare<image>these. " + "How many? " * 20)]
    return [encoder(row) for row in (*rows, example(2), example(3, images=0))]


def groups_of(vlm):
    """The prompts with responses of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = ((7, 1), (4,), (2, 5))
    return [
        group_slice(prompt, [torch.randint(10, 200, (length,), generator=generator) for length in responses])
        for prompt, responses in zip(prompts_of(vlm), lengths, strict=True)
    ]


def plain(vlm, prompt, responses, temperature=1.0):
    """Log-probs of each response by the training pass, prompts not shared."""
    scores = Pass(vlm, temperature)(Plain().inputs([GroupSlice(prompt, tuple(responses))]))
    return [row[: len(item.ids)] for row, item in zip(scores.logprobs, responses, strict=True)]


def own_logprobs(vlm, model, prompt, response):
    """By transformers' own forward of one row that is padded with three tokens."""
    ids = torch.cat([prompt.ids, response, torch.full((3,), 11)])[None]
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    logits = model(**own_inputs(vlm, prompt, ids, mask)).logits[0, len(prompt.ids) - 1 : -4]
    banned_mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
    banned_mask[vlm.banned] = True
    logprobs = logits.masked_fill(banned_mask, float("-inf")).log_softmax(-1)
    return logprobs.gather(-1, response[:, None])[:, 0]


def ids_of(groups):
    return [item.ids.tolist() for responses in groups for item in responses]


def test_a_row_with_images(name, loaded):
    vlm = loaded
    assert vlm.shares_prefix
    chat = vlm.family.chat
    assert vlm.banned == vlm.tokenizer.convert_tokens_to_ids([*chat.ids.values(), *chat.unlisted])
    assert vlm.tokenizer.convert_tokens_to_ids(chat.ends[0]) in vlm.stops
    prompt = prompts_of(vlm)[0]
    image = prompt.ids == vlm.model.config.image_token_id
    assert int(image.sum()) == sum(vlm.family.image_tokens(vlm.model.config, prompt.grid)) > 0
    assert prompt.positions.shape == (3, len(prompt.ids)) and len(prompt.ids) > 64
    in_space = (prompt.positions[1:, image] != prompt.positions[:1, image]).any()
    assert in_space != isinstance(vlm.family, LlavaFamily)
    assert (prompt.positions[1:, ~image] == prompt.positions[:1, ~image]).all()
    assert vlm.unexpanded(prompt).count(vlm.model.config.image_token_id) == 2


@needs_shared
@pytest.mark.parametrize(
    "name", slow_but("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-2B-Thinking", of=REAL), indirect=True
)
def test_tokens_of_a_real_processor(loaded, name):
    encoder = Encoder(loaded)
    prompt = encoder(dataclasses.replace(example(), images=(numbered_image(0, (300, 420)),)))
    patch = encoder.vlm.processor.image_processor.patch_size
    assert int((prompt.ids == encoder.vlm.model.config.image_token_id).sum()) == {14: 165, 16: 117}[patch]
    assert prompt.opening == ("<think>\n" if name.endswith("Thinking") else "")
    assert encoder.respond(prompt, "yes").ids[-1] == encoder.vlm.tokenizer.eos_token_id


def check_sampled(vlm, prompts, groups):
    """Sampled at temperature .8 with the training pass's own log-probs, and no vision token among them."""
    for prompt, responses in zip(prompts, groups, strict=True):
        expected = plain(vlm, prompt, responses, temperature=0.8)
        for logprobs, item in zip(expected, responses, strict=True):
            assert (logprobs - item.logprobs).abs().max() < 1e-5
            assert not set(item.ids.tolist()) & set(vlm.banned)
            assert item.text.startswith(prompt.opening)


@torch.no_grad()
def test_rollout(loaded):
    vlm, prompts = loaded, prompts_of(loaded)
    head = vlm.model.lm_head.weight
    saved = head[vlm.banned]
    head[vlm.banned] = 20 * head[10:11]  # often the likeliest
    groups = HfEngine(vlm, prompts_per_batch=3).generate(as_contexts(prompts), Sampling(2, 4, 0.8, seed=5))
    assert len(groups) == 3 and all(len(responses) == 2 for responses in groups)
    check_sampled(vlm, prompts, groups)
    head[vlm.banned] = saved


@TINY
@torch.no_grad()
def test_dropping_finished_branches_and_batching_change_nothing(folder):
    vlm = load_vlm(str(folder))
    prompts, sampling = prompts_of(vlm), Sampling(4, 12, 0.8, seed=5)
    free = HfEngine(vlm, prompts_per_batch=3).generate(as_contexts(prompts), sampling)
    sampled = [item.ids.tolist() for responses in free for item in responses[:2]]
    vlm.stops += [ids[len(ids) // (2 + row % 2)] for row, ids in enumerate(sampled)]
    groups = HfEngine(vlm, prompts_per_batch=3).generate(as_contexts(prompts), sampling)
    check_sampled(vlm, prompts, groups)
    for responses in groups:
        assert len({tuple(item.ids.tolist()) for item in responses}) == 4
        assert len({len(item.ids) for item in responses}) > 1, "no branch left before the others"
    assert ids_of(HfEngine(vlm, prompts_per_batch=1).generate(as_contexts(prompts), sampling)) == ids_of(
        groups
    )
    other = dataclasses.replace(sampling, seed=6)
    assert ids_of(HfEngine(vlm, prompts_per_batch=2).generate(as_contexts(prompts), other)) != ids_of(groups)


def backward(vlm, groups):
    """Log-probs [N, T] by the training pass, after a backward pass with a weight [N, T] for each."""
    logprobs = Pass(vlm)(Plain().inputs(groups)).logprobs
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    (logprobs * weights).sum().backward()
    return logprobs.detach(), weights


def test_the_training_pass_matches_transformers(folder, loaded):
    """A padded batch of all rows against one row at a time: neighbours and padding change nothing."""
    vlm = loaded
    vlm.zero_grad()
    groups = groups_of(vlm)
    logprobs, weights = backward(vlm, groups)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    rows = [(group.prompt, response.ids) for group in groups for response in group.responses]
    for row, (prompt, response) in enumerate(rows):
        expected = own_logprobs(vlm, model, prompt, response)
        assert (logprobs[row, : len(response)] - expected).abs().max() < 1e-5
        (expected * weights[row, : len(response)]).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values() if gradient is not None]).norm()
    for key, parameter in vlm.model.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        if parameter.grad is not None:
            assert (parameter.grad - gradients[key]).norm() < 1e-5 * norm, key


@TINY
def test_checkpointing_changes_nothing(folder):
    plainly, checkpointed = (load_vlm(str(folder), gradient_checkpointing=on) for on in (False, True))
    logprobs, _ = backward(plainly, groups_of(plainly))
    recomputed, _ = backward(checkpointed, groups_of(plainly))
    assert torch.equal(recomputed, logprobs)
    for one, other in zip(plainly.parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@TINY
def test_an_update_changes_samples_and_saved_weights(folder, tmp_path):
    vlm = load_vlm(str(folder))
    inputs, prompts = Plain().inputs(groups_of(vlm)), prompts_of(vlm)
    before = Pass(vlm)(inputs).logprobs
    old = copy.deepcopy(vlm.weights())
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=1e-2)
    before.sum().neg().backward()
    optimizer.step()
    vlm.version += 1
    with torch.no_grad():
        after = Pass(vlm)(inputs).logprobs
        [[sampled], *_] = HfEngine(vlm, prompts_per_batch=3).generate(
            as_contexts(prompts), Sampling(1, 6, 1.0, seed=0)
        )
        [expected] = plain(vlm, prompts[0], [sampled])
    assert after.sum() > before.sum() + 1
    assert (expected - sampled.logprobs).abs().max() < 2e-5
    vlm.save(tmp_path)
    trained = {name for name, _ in vlm.model.named_parameters()}
    unused = [key for key in trained & old.keys() if torch.equal(vlm.weights()[key], old[key])]
    assert all("deepstack" in key or "k_proj.bias" in key for key in unused), unused
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(
        torch.equal(own, loaded)
        for own, loaded in zip(vlm.model.parameters(), model.parameters(), strict=True)
    )
    with torch.no_grad():
        again = Pass(load_vlm(str(tmp_path)))(inputs).logprobs
        first = groups_of(vlm)[0]
        response = first.responses[0].ids
        own = own_logprobs(vlm, model, first.prompt, response)
    assert torch.equal(again, after)
    assert (own - after[0, : len(response)]).abs().max() < 2e-5


def outline(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_named_as_in_published_checkpoints(name):
    """An embedding model has no head, and its names are otherwise those of the family."""
    index = json.loads((CONFIGS / f"{name}.index.json.names").read_text())
    weights = hf_state_dict(outline(AutoConfig.from_pretrained(CONFIGS / f"{NAMES[name]}.json")))
    if "Embedding" in name:
        del weights["lm_head.weight"]
    assert set(weights) == set(index["weight_map"])
    assert sum(weight.numel() for weight in weights.values()) * 2 == index["metadata"]["total_size"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if "moe" in name])
def test_experts_are_laid_out_as_in_published_checkpoints(family, tmp_path):
    """Qwen3-VL-30B-A3B: gate_up_proj [experts, hidden, 2 x width]; Qwen3.5-397B-A17B: [experts, 2 x width,
    hidden]."""
    new_model(tmp_path, family=family, corpus=CORPUS, shape=SHAPE)
    vlm = load_vlm(str(tmp_path))
    text = vlm.model.config.text_config
    up, down = (
        (2 * text.moe_intermediate_size, text.hidden_size),
        (text.hidden_size, text.moe_intermediate_size),
    )
    turn = slice(None, None, -1) if FAMILIES_TABLE[family].experts_transposed else slice(None)
    weights, layer = vlm.weights(), "model.language_model.layers.1.mlp.experts"
    assert weights[f"{layer}.gate_up_proj"].shape == (text.num_experts, *up[turn])
    assert weights[f"{layer}.down_proj"].shape == (text.num_experts, *down[turn])


@needs_shared
def test_a_real_model_with_linear_and_full_attention():
    """Qwen3.6-27B: what the tiny model of its family assumes."""
    model = outline(AutoConfig.from_pretrained(CONFIGS / "Qwen3.6-27B.json"))
    text = model.config.get_text_config()
    assert model.num_parameters() == 27_356_728_560
    tiny = qwen3_5_text(Shape(layers=64, head_dim=256))
    assert text.layer_types == tiny["layer_types"] and text.layer_types.count("linear_attention") == 48
    real, small = text.rope_parameters, tiny["rope_parameters"]
    assert real["mrope_interleaved"] and small["mrope_interleaved"]
    assert real["partial_rotary_factor"] == small["partial_rotary_factor"] == 0.25
    assert sum(real["mrope_section"]) == sum(small["mrope_section"]) == 256 // 4 // 2
    weights = hf_state_dict(model)
    assert all(key.startswith(("model.visual.", "model.language_model.", "lm_head.")) for key in weights)


def test_an_unsupported_family_is_refused_before_loading(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model type of model.path .* \(llama\) must be one of qwen2_vl"):
        load_vlm(str(tmp_path))
    with pytest.raises(ValueError, match=r"--family \(qwen9\) must be one of .*qwen3_5_moe \(Qwen3.5-MoE\)"):
        new_model(tmp_path / "new", family="qwen9", corpus=CORPUS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_of_the_default_size_generates(family, tmp_path):
    new_model(tmp_path, family=family, corpus=CORPUS)
    vlm = load_vlm(str(tmp_path))
    groups = HfEngine(vlm, prompts_per_batch=3).generate(
        as_contexts(prompts_of(vlm)), Sampling(2, 4, 1.0, seed=5)
    )
    assert all(len(response.ids) for responses in groups for response in responses)


@TINY
def test_images_get_as_many_tokens_as_from_the_models_own_processor(loaded):
    vlm, encoder = loaded, Encoder(loaded)
    processor, numbers = vlm.processor, random.Random(0)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], tokenize=False, add_generation_prompt=True
    )
    options = vlm.family.engine_processing(vlm.model.config, None)
    whole = {name: value for name, value in options.items() if name == "do_image_splitting"}
    for _ in range(25):
        image = numbered_image(0, (numbers.randint(20, 300), numbers.randint(20, 300)))
        own = processor(text=[text], images=[image], return_tensors="pt", **whole)["input_ids"][0]
        prompt = encoder(dataclasses.replace(example(problem="<image>"), images=(image,)))
        count = encoder.count(own)[1]
        assert encoder.count(prompt.ids)[1] == count > 0, image.size


def test_a_processor_with_other_tiles_is_refused(tmp_path):
    new_model(tmp_path, family="internvl", corpus=CORPUS, shape=SHAPE)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_seq_length": 64}))
    with pytest.raises(ValueError, match="tiles of 64 pixels and 64 tokens, its model of 64 and 16; copy"):
        load_vlm(str(tmp_path))
    path.write_text(json.dumps(settings))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"text_config.model_type of model.path \(llama\) must be qwen2 or"):
        load_vlm(str(tmp_path))


def test_tiles_become_the_same_tiles_again(tmp_path):
    """Also where a processor allows more than its usual 12 of an image."""
    new_model(tmp_path, family="internvl", corpus=CORPUS, shape=SHAPE)
    encoder = Encoder(load_vlm(str(tmp_path)), max_pixels=64 * 64 * 40)
    for width, height in itertools.product((30, 140, 300, 700), repeat=2):
        encoder(dataclasses.replace(example(), images=(numbered_image(0, (width, height)),)))
    with pytest.raises(
        ValueError, match=r"model.max_pixels \(100\) must be at least 4096, the smallest image"
    ):
        Encoder(encoder.vlm, max_pixels=100)


@TINY
def test_demonstrations_end_a_turn_as_the_template_does(loaded):
    encoder, chat = Encoder(loaded), loaded.family.chat
    [end] = {"<|user|>", "<|im_end|>", "<turn|>", "<end_of_utterance>"} & {*chat.ends}
    response = encoder.respond(encoder(example()), "yes")
    assert loaded.tokenizer.decode(response.ids[-1]) == end and encoder.ends_turn(response)
    assert "more" in loaded.tokenizer.decode(encoder.answer([("more", ())]).ids)


@TINY
def test_special_tokens_in_a_problem_never_stand_for_vision_tokens(loaded):
    encoder = Encoder(loaded)
    assert not {*encoder.plain.free} & {*loaded.tokenizer.convert_ids_to_tokens(loaded.banned)}


@TINY
def test_images_stand_where_the_problem_says(loaded):
    """Also where `<image>` is a token of the model."""
    encoder = Encoder(loaded)
    prompt = encoder(example(1, images=2, problem="Compare <image> with <image> please."))
    (first, size), (second, _) = loaded.image_ranges(prompt)
    text = loaded.tokenizer.decode(prompt.ids[first + size : second])
    assert "with" in text and "<image>" not in text and "Compare" not in text


@TINY
def test_a_plan_counts_the_tokens_of_the_largest_image(loaded):
    family, config = loaded.family, loaded.model.config
    for pixels in (128 * 128, 256 * 256):
        encoder = Encoder(loaded, max_pixels=pixels)
        prompt = encoder(dataclasses.replace(example(), images=(numbered_image(0, (500, 500)),)))
        most = family.most_image_tokens(config, pixels)
        assert 0.9 * most < encoder.count(prompt.ids)[1] <= most
