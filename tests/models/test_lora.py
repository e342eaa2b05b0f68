"""LoRA adapters: which layers get them, their effect, and the files that are saved."""

import dataclasses
import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.conftest import CORPUS, SHARED, SMALL, example, group_slice
from vlm_sapo.distributed import Interrupted, deferring_signals
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.packing import Plain
from vlm_sapo.tools.new_model import new_model

FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "glm4v",
    "internvl",
    "gemma4",
    "lfm2_vl",
)
EVERYWHERE = ("language", "merger", "vision")


@pytest.fixture
def make(model_folder):
    def build(family="qwen3_vl", **options):
        settings = {"base": str(model_folder(family)), "rank": 4, "alpha": 8.0, **options}
        return load_vlm(str(model_folder(family)), lora=Adapters(**settings))

    return build


def logprobs(vlm) -> torch.Tensor:
    prompt = Encoder(vlm)(example(images=2))
    with torch.no_grad():
        return Pass(vlm)(Plain().inputs([group_slice(prompt, [[10, 20, 30, 40]])])).logprobs


def with_random_adapters(vlm):
    """The model with adapters that have an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return vlm


def trained(vlm) -> set[str]:
    return {name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_are_all_that_is_trained(make, model_folder, family):
    vlm = make(family, parts=EVERYWHERE)
    assert torch.equal(logprobs(vlm), logprobs(load_vlm(str(model_folder(family)))))
    assert trained(vlm) and all(".lora_" in name for name in trained(vlm))
    assert not any(word in name for name in trained(vlm) for word in ("lm_head", ".gate.lora", "expert_gate"))
    assert all(parameter.dtype == torch.float32 for parameter in vlm.parameters())


def test_parts_select_their_layers(make):
    for parts, marks in ((("language",), {"language"}), (("merger",), {"merger"}), (("vision",), {"blocks"})):
        names = trained(make(parts=parts))
        assert {
            mark for mark in ("language", "merger", "blocks") if any(mark in name for name in names)
        } == marks


def test_adapters_of_half_precision_weights_are_float32(model_folder):
    vlm = load_vlm(str(model_folder()), dtype="bfloat16", lora=Adapters(base="a"))
    kinds = {name: parameter.dtype for name, parameter in vlm.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_weights_and_adapters_match_the_trained_model(make, model_folder, tmp_path, family):
    """The merged model and the adapter, read back by transformers and peft without this package."""
    vlm = with_random_adapters(make(family, parts=EVERYWHERE))
    trained_logprobs = logprobs(vlm)
    with adapters.disabled(vlm.model):
        assert torch.equal(logprobs(vlm), logprobs(load_vlm(str(model_folder(family)))))
    assert torch.equal(logprobs(vlm), trained_logprobs)
    vlm.save(tmp_path / "merged")
    vlm.save_adapter(tmp_path / "adapter")
    torch.testing.assert_close(
        logprobs(load_vlm(str(tmp_path / "merged"))), trained_logprobs, atol=1e-4, rtol=0
    )
    again = load_vlm(str(model_folder(family)), lora=Adapters(base="a", folder=tmp_path / "adapter"))
    assert torch.equal(logprobs(again), trained_logprobs) and trained(again) == trained(vlm)

    base = AutoModelForImageTextToText.from_pretrained(model_folder(family))
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    names = dict(peft.named_parameters())
    for name, layer in adapters.layers(vlm.model).items():
        weight = adapters.merged(layer, lambda item: item)
        assert weight.shape == adapters.weight_shape(layer)
        torch.testing.assert_close(names[f"{name}.weight"], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the tensor names of real checkpoints")
def test_adapters_have_the_names_of_a_published_checkpoint(make, tmp_path):
    make(parts=EVERYWHERE).save_adapter(tmp_path)
    index = SHARED / "processors/configs/Qwen3-VL-Embedding-8B.index.json.names"
    published = {re.sub(r"\.\d+\.", ".#.", name) for name in json.loads(index.read_text())["weight_map"]}
    for name in load_file(tmp_path / adapters.FILE):
        bare = re.sub(r"\.lora_[AB]\.weight$", ".weight", name.removeprefix("base_model.model."))
        assert re.sub(r"\.\d+\.", ".#.", bare) in published


def test_an_adapter_of_another_model_is_refused(make, model_folder, tmp_path):
    make().save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="was trained on .*qwen3_vl.* and model.path is other/model"):
        adapters.check(tmp_path / "a", "other/model")
    adapters.check(tmp_path / "a", str(model_folder()))
    with pytest.raises(ValueError, match=r"model.lora.adapter .* must be a folder with adapter_config.json"):
        adapters.check(tmp_path, "other/model")
    wider = dataclasses.replace(SMALL, hidden=48)
    new_model(tmp_path / "wider", family="qwen3_vl", corpus=CORPUS, shape=wider)
    for folder in (tmp_path / "wider", model_folder("qwen3_5")):
        with pytest.raises(ValueError, match="belongs to another base model"):
            load_vlm(str(folder), lora=Adapters(base="b", folder=tmp_path / "a"))


def modules_and_weights(vlm):
    modules = dict(vlm.named_modules())
    return modules, {name: parameter.clone() for name, parameter in vlm.named_parameters()}


def assert_unchanged(vlm, before):
    modules, weights = before
    now = dict(vlm.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is module for name, module in modules.items())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in vlm.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_inlined_adapters_compute_the_same_and_leave_as_they_came(make, family, dtype):
    vlm = with_random_adapters(make(family, parts=EVERYWHERE))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        before, expected = modules_and_weights(vlm), logprobs(vlm)
        with adapters.disabled(vlm.model):
            effect = (logprobs(vlm) - expected).abs().max()
        with adapters.inlined(vlm.model, dtype):
            assert not adapters.attached(vlm.model)
            difference = (logprobs(vlm) - expected).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.3 * effect) and effect > 1e-2
    assert_unchanged(vlm, before)
    with autocast:
        assert torch.equal(logprobs(vlm), expected)
    with pytest.raises(ZeroDivisionError), adapters.inlined(vlm.model, dtype):
        raise ZeroDivisionError
    assert_unchanged(vlm, before)


def test_a_young_adapters_change_is_not_rounded_away():
    """After a few updates it is under half a unit in the last place of most bfloat16 weights."""
    base = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(torch.bfloat16)
    with torch.no_grad():
        base[0].weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    adapters.add(base, ["0"], rank=32, alpha=64.0, base="a")
    layer = base[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.bernoulli_(generator=torch.Generator().manual_seed(1)).sub_(0.5).mul_(
            4e-5
        )
    inputs = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with adapters.inlined(base, torch.bfloat16):
        folded = base[0]
        change = inputs.to(torch.bfloat16) @ folded.down @ folded.up
    exact = inputs @ delta.T
    assert (change - exact).norm() < 0.01 * exact.norm()
    merged = (layer.get_base_layer().weight + delta).to(torch.bfloat16).float()
    kept = inputs @ (merged - layer.get_base_layer().weight.float()).T
    assert (kept - exact).norm() > 0.5 * exact.norm(), "a merged weight would have lost most of it"


def test_a_signal_while_adapters_are_inlined_is_raised_after_they_are_back(make):
    vlm = with_random_adapters(make())
    before = modules_and_weights(vlm)
    inline = adapters._inline

    def interrupted(layer, dtype):
        deferring_signals.raise_or_defer(Interrupted("signal"))
        return inline(layer, dtype)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapters, "_inline", interrupted)
        with pytest.raises(Interrupted), adapters.inlined(vlm.model, torch.float32):
            raise AssertionError("the signal comes first")
    assert_unchanged(vlm, before)
    with pytest.raises(Interrupted), adapters.inlined(vlm.model, torch.float32):
        deferring_signals.raise_or_defer(Interrupted("signal"))
    assert_unchanged(vlm, before)


def test_four_bits(model_folder, tmp_path):
    """Only the adapted linear layers are quantized; gradients reach all adapters; saved weights are full."""
    plain = load_vlm(str(model_folder()))
    vlm = with_random_adapters(load_vlm(str(model_folder()), lora=Adapters(base="a", rank=4, bits=4)))
    packed = {name for name, parameter in vlm.model.named_parameters() if parameter.dtype == torch.uint8}
    assert packed and all("language_model.layers" in name and "base_layer" in name for name in packed)
    prompt = Encoder(vlm)(example(images=1))
    inputs = Plain().inputs([group_slice(prompt, [[10, 20, 30, 40]])])
    logprobs_4bit = Pass(vlm)(inputs).logprobs
    logprobs_4bit.sum().backward()
    assert all(parameter.grad is not None for parameter in vlm.parameters() if parameter.requires_grad)
    vlm.save(tmp_path)
    with adapters.inlined(vlm.model, torch.float32):
        assert not adapters.attached(vlm.model)
        torch.testing.assert_close(Pass(vlm)(inputs).logprobs, logprobs_4bit, atol=1e-4, rtol=0)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    merged = load_vlm(str(tmp_path))
    torch.testing.assert_close(Pass(merged)(inputs).logprobs, logprobs_4bit, atol=1e-3, rtol=0)
    with adapters.disabled(vlm.model), torch.no_grad():
        rounded = (Pass(vlm)(inputs).logprobs - Pass(plain)(inputs).logprobs).abs().mean()
    assert 0 < rounded < 0.5
    assert set(merged.weights()) == set(plain.weights())
    streamed, weights = dict(vlm.stream_weights(torch.bfloat16)), vlm.weights()
    for item in vlm.stored_weights():
        expected = weights[item.name].to(item.dtype_in(torch.bfloat16))
        assert torch.equal(streamed[item.name], expected) and item.shape == expected.shape


def test_an_adapter_saved_by_peft_can_be_trained_further(make, model_folder, tmp_path):
    with_random_adapters(make()).save_adapter(tmp_path / "ours")
    base = AutoModelForImageTextToText.from_pretrained(model_folder())
    PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_vlm(str(model_folder()), lora=Adapters(base="a", folder=tmp_path / "theirs"))
    assert trained(again) == trained(make())
    with pytest.raises(ValueError, match="changes model.language_model.*, which model.freeze freezes"):
        load_vlm(
            str(model_folder()), lora=Adapters(base="a", folder=tmp_path / "theirs"), freeze=["language"]
        )


def test_adapters_beyond_plain_lora_are_refused(make, model_folder, tmp_path):
    make().save_adapter(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, value in (("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {field: value}))
        with pytest.raises(ValueError, match=f"must be plain LoRA, .* sets {field}="):
            adapters.check(tmp_path, str(model_folder()))
