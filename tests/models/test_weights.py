"""Weights in checkpoint format: names, layout, adapters, and loading them again."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from tests.conftest import FAMILIES, example, group_slice
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_the_same_weights(model_folder, tmp_path, family):
    vlm = load_vlm(str(model_folder(family)))
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += torch.randn_like(parameter)
    vlm.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = vlm.weights()
    assert set(stored) == set(weights) == set(load_file(model_folder(family) / "model.safetensors"))
    assert all(torch.equal(stored[name], weights[name]) for name in stored)
    back = load_vlm(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(vlm.parameters(), back.parameters(), strict=True))


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


def test_unexpanded_ids_have_one_token_per_image(vlm, encoder):
    for images in (0, 1, 2, 3):
        prompt = encoder(example(images=images))
        ids = vlm.unexpanded(prompt)
        assert ids == vlm.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        assert ids.count(vlm.model.config.image_token_id) == images
