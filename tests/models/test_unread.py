"""Weights that are read after a model was built without memory, against the ordinary load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FAMILIES
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.unread import give_memory
from vlm_sapo.models.vlm import VLM

CPU = torch.device("cpu")
LORA = Adapters("base", rank=4, parts=("vision", "language"))


def read_later(path, **options) -> VLM:
    """A model whose weights are read on their own."""
    vlm = load_vlm(str(path), defer=True, **options)
    assert vlm.device.type == "meta" and vlm.unread is not None
    filled = give_memory(vlm, device=CPU, whole=(), whole_on=CPU)
    vlm.unread.read(vlm.model, filled=filled)
    return vlm


def assert_same(first: VLM, second: VLM) -> None:
    """Parameters, which of them are one, buffers, and names of checkpoints."""
    tensors = [
        dict(vlm.named_parameters(remove_duplicate=False)) | dict(vlm.named_buffers())
        for vlm in (first, second)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert tensor.dtype == other.dtype and tensor.requires_grad == other.requires_grad
        assert torch.equal(tensor, other), name
    assert len(list(first.parameters())) == len(list(second.parameters()))
    one, two = first.weights(), second.weights()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same(model_folder, family, dtype):
    path = model_folder(family)
    assert_same(load_vlm(str(path), dtype=dtype), read_later(path, dtype=dtype))


def test_adapters_are_the_same_and_have_no_effect_yet(model_folder, tmp_path):
    torch.manual_seed(1)
    usual = load_vlm(str(model_folder()), lora=LORA, dtype="bfloat16")
    torch.manual_seed(1)
    later = read_later(model_folder(), lora=LORA, dtype="bfloat16")
    assert_same(usual, later)
    trained = {name: item for name, item in later.named_parameters() if item.requires_grad}
    assert all(".lora_" in name and item.dtype == torch.float32 for name, item in trained.items())
    assert any(bool(item.any()) for item in trained.values())
    with torch.no_grad():
        for item in trained.values():
            item += 1
    later.save_adapter(tmp_path)
    assert_same(later, read_later(model_folder(), lora=Adapters("base", folder=tmp_path), dtype="bfloat16"))


def changed(source, target, change) -> str:
    """A copy of a model folder with other tensors."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def split_experts(weights: dict[str, torch.Tensor]) -> None:
    """Each expert's matrices on their own, as in checkpoints of Qwen3.5-MoE."""
    for name in [name for name in weights if ".mlp.experts." in name]:
        prefix, merged = name.rsplit(".", 1)[0], weights.pop(name)
        for index, own in enumerate(merged):
            parts = {"gate_proj": own[: len(own) // 2], "up_proj": own[len(own) // 2 :]}
            parts = {"down_proj": own} if name.endswith("down_proj") else parts
            weights |= {
                f"{prefix}.{index}.{kind}.weight": item.contiguous().clone() for kind, item in parts.items()
            }


def transpose_experts(weights: dict[str, torch.Tensor]) -> None:
    """As transformers has them, not as checkpoints of Qwen3-VL-MoE."""
    for name in [name for name in weights if ".mlp.experts." in name]:
        weights[name] = weights[name].transpose(1, 2).contiguous()


def new_prefixes(weights: dict[str, torch.Tensor]) -> None:
    """Names since transformers 4.52; the old ones are `visual.` and `model.`."""
    for name in list(weights):
        if name.startswith("visual."):
            weights[f"model.{name}"] = weights.pop(name)
        elif name.startswith("model."):
            weights[name.replace("model.", "model.language_model.", 1)] = weights.pop(name)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_5_moe", split_experts),
        ("qwen3_vl_moe", transpose_experts),
        ("qwen2_5_vl", new_prefixes),
        ("qwen2_vl", new_prefixes),
    ],
)
def test_other_forms_of_checkpoints(model_folder, tmp_path, family, change):
    path = changed(model_folder(family), tmp_path / "model", change)
    later = read_later(path)
    assert_same(load_vlm(path), later)
    usual = dict(load_vlm(str(model_folder(family))).named_parameters())
    assert all(torch.equal(usual[name], item) for name, item in later.named_parameters())


def test_several_files(model_folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(model_folder(), path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, path / file, metadata={"format": "pt"})
    index = {name: file for file, own in files.items() for name in own}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same(load_vlm(str(model_folder())), read_later(path))


@pytest.mark.parametrize("equal", [True, False])
def test_heads_that_are_stored_twice(model_folder, tmp_path, equal):
    """Tied by the config: they are one parameter if their values are the same, else two."""

    def change(weights):
        embedding = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
        weights["lm_head.weight"] = embedding.clone() + (0 if equal else 1)

    path = changed(model_folder(), tmp_path / "model", change)
    settings = json.loads((tmp_path / "model/config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    later = read_later(path)
    assert (later.model.lm_head.weight is later.model.get_input_embeddings().weight) == equal
    assert_same(load_vlm(path), later)


@pytest.mark.parametrize("defer", [False, True])
def test_tensors_that_lack_or_are_too_many_are_named(model_folder, tmp_path, defer):
    path = changed(
        model_folder(), tmp_path / "less", lambda weights: weights.pop("model.visual.pos_embed.weight")
    )
    with pytest.raises(ValueError, match=r"visual.pos_embed.weight is in none of its files \(model.safetens"):
        load_vlm(path, defer=defer)
    path = changed(
        model_folder(), tmp_path / "more", lambda weights: weights.update({"extra.weight": torch.ones(2)})
    )
    with pytest.raises(ValueError, match=r"extra.weight in model.safetensors belongs to no parameter"):
        load_vlm(path, defer=defer)


@pytest.mark.parametrize("defer", [False, True])
def test_weights_that_predict_several_tokens_are_left_out(model_folder, tmp_path, defer):
    """Published Qwen3.5 checkpoints have them (`mtp.*`)."""
    extra = {"mtp.fc.weight": torch.ones(2, 2), "mtp.layers.0.input_layernorm.weight": torch.ones(2)}
    path = changed(model_folder("qwen3_5"), tmp_path / "model", lambda weights: weights.update(extra))
    vlm = read_later(path) if defer else load_vlm(path)
    assert_same(load_vlm(str(model_folder("qwen3_5"))), vlm)
    assert not any("mtp" in name for name in vlm.weights())
