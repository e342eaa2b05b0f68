"""Weights in checkpoint format: names, layout, adapters, and loading them again."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from tests.conftest import FAMILIES, example, group_slice
from tests.dispatch import LiveBytes
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_the_same_weights(model_folder, tmp_path, family):
    vlm = load_vlm(str(model_folder(family)))
    with torch.no_grad():
        for tensor in {*vlm.model.parameters(), *vlm.model.state_dict(keep_vars=True).values()}:
            tensor += torch.randn_like(tensor)
    vlm.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = vlm.weights()
    assert set(stored) == set(weights) == set(load_file(model_folder(family) / "model.safetensors"))
    assert all(torch.equal(stored[name], weights[name]) for name in stored)
    back = load_vlm(str(tmp_path))
    own = vlm.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in back.model.state_dict().items())


def test_adapters_are_merged(model_folder, tmp_path):
    folder = str(model_folder())
    vlm = load_vlm(folder)
    bare = vlm.weights()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False)
    inject_adapter_in_model(config, vlm.model)
    merged = vlm.weights()
    assert set(merged) == set(bare)
    changed = {name.split(".")[-2] for name in bare if not torch.equal(bare[name], merged[name])}
    assert changed == {"q_proj", "down_proj", "qkv"}
    vlm.save(tmp_path)
    prompt = Encoder(vlm)(example(images=2))
    inputs = Plain().inputs([group_slice(prompt, [[10, 20, 30]])])
    with torch.no_grad():
        with_adapters = Pass(vlm)(inputs).logprobs
        from_folder = Pass(load_vlm(str(tmp_path)))(inputs).logprobs
        without = Pass(load_vlm(folder))(inputs).logprobs
    torch.testing.assert_close(with_adapters, from_folder, atol=1e-5, rtol=0)
    assert (with_adapters - without).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_gets_what_is_saved(model_folder, family, adapted, dtype):
    """One after the other, in the order of the layers: matrices in its dtype, vectors in their own."""
    vlm = load_vlm(str(model_folder(family)))
    if adapted:
        targets = r".*((language|text)_model.*\.(q_proj|down_proj|in_proj_qkv)|\.qkv)"
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), vlm.model)
    saved, announced = vlm.weights(), vlm.stored_weights()
    names = [name for name, _ in vlm.stream_weights(dtype)]
    assert names == [item.name for item in announced] and set(names) == set(saved)
    assert len(names) == len(saved) == len(load_file(model_folder(family) / "model.safetensors"))
    layers = [int(name.split(".")[3]) for name in names if name.startswith("model.language_model.layers.")]
    assert layers == sorted(layers), "vLLM keeps what it gets of a layer until it has the whole layer"
    for item, (name, weight) in zip(announced, vlm.stream_weights(dtype), strict=True):
        kind = dtype if saved[name].dim() > 1 else torch.float32
        assert torch.equal(weight, saved[name].to(kind)) and weight.is_contiguous()
        assert weight.dtype == item.dtype_in(dtype) == kind and weight.shape == item.shape
        dropped = item.drop()
        assert dropped.device.type == "meta" and dropped.shape == item.shape


def test_tied_weights_are_sent_once(model_folder):
    vlm = load_vlm(str(model_folder()))
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    names = [name for name, _ in vlm.stream_weights(torch.bfloat16)]
    assert "lm_head.weight" not in names
    assert names.count("model.language_model.embed_tokens.weight") == 1


def test_a_stream_takes_the_memory_of_one_weight(model_folder):
    """One that is transposed: what was cast and its copy at once, and nothing of those before."""
    vlm = load_vlm(str(model_folder("qwen3_vl_moe")))
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "qkv"], init_lora_weights=False)
    inject_adapter_in_model(config, vlm.model)
    live = LiveBytes()
    total = 0
    with live:
        for _, weight in vlm.stream_weights(torch.bfloat16):
            total += weight.nbytes
    largest = max(math.prod(item.shape) for item in vlm.stored_weights())
    assert live.most <= 2 * 2 * largest < total / 4


def test_unexpanded_ids_have_one_token_per_image(vlm, encoder):
    for images in (0, 1, 2, 3):
        prompt = encoder(example(images=images))
        ids = vlm.unexpanded(prompt)
        assert ids == vlm.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        assert ids.count(vlm.model.config.image_token_id) == images
