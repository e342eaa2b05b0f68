"""How `VllmEngine` uses vLLM: what it asks of it, when it sleeps, and how weights get to it."""

import sys

import pytest
import torch

from tests.conftest import example
from tests.rollout.vllm_stand_in import StandInEngine, StandInLlm, modules
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.rollout import weight_transfer
from vlm_sapo.rollout.engine import EngineNeeds, RolloutError, as_contexts
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.types import Context, Sampling

SAMPLING = Sampling(4, 12, 0.8, seed=5)


@pytest.fixture
def engine(vlm, monkeypatch):
    """`engine(...)`: one on a GPU, as far as it can tell."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def build(longest=512, max_pixels=None, model=vlm, warn=print, dtype="bfloat16", **options) -> VllmEngine:
        needs = EngineNeeds(
            model,
            "model",
            longest=longest,
            dtype="bfloat16",
            sequences_per_batch=16,
            warn=warn,
            max_pixels=max_pixels,
        )
        return VllmEngine(needs, dtype=dtype, **options)

    return build


def test_a_process_without_prompts_goes_back_to_sleep(engine, vlm):
    """It falls asleep only when it is wholly awake: vLLM would leave parts as they are."""
    built = engine()
    assert built.llm.calls == ["sleep"]
    built.llm.calls.clear()
    built.sync(vlm)
    assert built.generate([], SAMPLING) == []
    assert built.llm.calls[:2] == ["wake weights", "reload_weights"]
    assert built.llm.calls[-2:] == ["wake kv_cache", "sleep"]
    built.llm.calls.clear()
    built.sync(vlm)
    assert built.generate([], SAMPLING) == []
    assert built.llm.calls == [], "it has these weights and sleeps"


def test_the_trainer_keeps_its_threads(engine, monkeypatch):
    monkeypatch.setattr(StandInLlm, "threads", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_vllm_is_told_how_much_it_has_to_do(engine):
    arguments = engine(max_pixels=500_000).llm.arguments
    assert arguments["mm_processor_kwargs"] == {"do_resize": False, "max_pixels": 500_000}
    assert arguments["max_num_seqs"] == 256 and arguments["max_num_batched_tokens"] == 8192
    arguments = engine(longest=10_000, options={"max_num_seqs": 64}).llm.arguments
    assert arguments["mm_processor_kwargs"] == {"do_resize": False}
    assert arguments["max_num_seqs"] == 64 and arguments["max_num_batched_tokens"] == 10_000


@pytest.mark.parametrize("gpus", [1, 2])
def test_weights_come_in_the_dtype_of_the_engine(engine, vlm, monkeypatch, gpus):
    """One after the other in this process; to several GPUs through files."""
    monkeypatch.setattr(weight_transfer, "SHARD_BYTES", 2**14)
    built = engine(tensor_parallel=gpus)
    built.sync(vlm)
    received, expected = dict(built.llm.weights), dict(vlm.stream_weights(torch.bfloat16))
    assert len(built.llm.weights) == len(received) and received.keys() == expected.keys()
    assert all(torch.equal(received[name], weight) for name, weight in expected.items())
    assert {item.dtype for item in received.values() if item.dim() > 1} == {torch.bfloat16}
    read = [call for call in built.llm.calls if call.startswith("read")]
    assert not read if gpus == 1 else int(read[0].split()[1]) > 5


@pytest.fixture
def prompts(encoder):
    return [encoder(example(number, images=count)) for number, count in enumerate((1, 0, 2))]


def test_images_arrive_as_the_trainers_pixels(engine, vlm, prompts, monkeypatch):
    """Neither images nor their sizes are processed again, and a group is one request."""
    monkeypatch.setattr(StandInEngine, "token", vlm.stops[0])
    built = engine()
    assert built.llm.arguments["mm_device_do_normalize"] is False
    built.generate(as_contexts(prompts), SAMPLING)
    one, text, two = built.llm.llm_engine.added
    assert text == {"prompt_token_ids": prompts[1].ids.tolist()}
    for sent, prompt in ((one, prompts[0]), (two, prompts[2])):
        assert sent["prompt_token_ids"] == prompt.ids.tolist()
        tensors, fields = sent["items"]
        assert torch.equal(tensors["pixel_values"], prompt.pixels.bfloat16())
        assert torch.equal(tensors["image_grid_thw"], prompt.grid)
        assert fields["pixel_values"] == ("flat", "image", prompt.grid.prod(-1).tolist())
        image_token = vlm.model.config.image_token_id
        inside = {start + step for start, length in sent["ranges"]["image"] for step in range(length)}
        assert inside == {index for index, token in enumerate(prompt.ids.tolist()) if token == image_token}
        assert len(sent["hashes"]["image"]) == len(sent["ranges"]["image"]) == len(prompt.images)
    assert len({*one["hashes"]["image"], *two["hashes"]["image"]}) == 3


def test_groups_are_reported_as_they_finish_and_returned_in_order(engine, vlm, prompts, monkeypatch):
    monkeypatch.setattr(StandInEngine, "token", vlm.stops[0])
    built, reports = engine(), []

    def context(index: int) -> Context:
        return Context(prompts[index], report=lambda responses: reports.append((index, responses)))

    groups = built.generate(list(map(context, range(3))), SAMPLING)
    assert [index for index, _ in reports] == [2, 1, 0]
    assert all(responses == groups[index] and len(responses) == 4 for index, responses in reports)


@pytest.mark.parametrize(
    ("fault", "words"), [("longest", "row e2: the prompt is too long"), ("fails_at", "died")]
)
def test_after_a_fault_no_request_is_left(engine, vlm, prompts, monkeypatch, fault, words):
    """One that was left would be answered in the next call."""
    monkeypatch.setattr(StandInEngine, "token", vlm.stops[0])
    built = engine()
    with monkeypatch.context() as patch:
        patch.setattr(StandInEngine, fault, {"longest": len(prompts[2].ids) - 1, "fails_at": 2}[fault])
        with pytest.raises((RolloutError, RuntimeError), match=words):
            built.generate(as_contexts(prompts), SAMPLING)
    assert not built.llm.llm_engine.requests and built.llm.calls[-1] == "sleep"
    assert len(built.generate(as_contexts(prompts), SAMPLING)) == 3


def adapted(model_folder, family="qwen3_vl", **shape):
    return load_vlm(str(model_folder(family)), dtype="bfloat16", lora=Adapters("base", rank=4, **shape))


def test_small_changes_of_adapters_arrive(engine, model_folder, tmp_path):
    """Those of a first update, of which merging into bfloat16 weights leaves next to nothing."""
    vlm = adapted(model_folder)
    base = {name: weight.clone() for name, weight in vlm.stream_weights(torch.bfloat16)}
    built = engine(model=vlm)
    assert built.llm.arguments["enable_lora"] and built.llm.arguments["max_lora_rank"] == 8
    built.sync(vlm)
    with torch.no_grad():
        for layer in adapters.layers(vlm.model).values():
            layer.lora_B["default"].weight.fill_(1e-7)
    merged = dict(vlm.stream_weights(torch.bfloat16))
    moved = sum(int((weight != base[name]).sum()) for name, weight in merged.items() if "_proj" in name)
    assert moved < 0.01 * sum(weight.numel() for name, weight in merged.items() if "_proj" in name)
    vlm.version += 1
    built.sync(vlm)
    expected = vlm.adapter_weights()
    assert built.llm.adapter.keys() == expected.keys() and len(expected) > 20
    assert all(torch.equal(built.llm.adapter[name], weight) for name, weight in expected.items())
    assert built.llm.adapter_config["r"] == 4 and built.llm.adapter_config["lora_alpha"] == 32
    assert built.llm.calls.count("reset_encoder_cache") == 2 and "reload_weights" not in built.llm.calls
    built.generate([Context(Encoder(vlm)(example(images=0)))], SAMPLING)
    order = [call for call in built.llm.calls if "lora" in call or "generate" in call]
    assert order == ["add_lora 1", "remove_lora 1", "add_lora 2", "generate with policy-2"]
    folder = built.adapter.folder
    assert folder.is_dir()
    built.close()
    assert not folder.exists()


def test_an_engine_without_adapters_uses_its_weights(engine, vlm):
    built = engine()
    assert "enable_lora" not in built.llm.arguments
    built.generate([Context(Encoder(vlm)(example(images=0)))], SAMPLING)
    assert "generate with the base" in built.llm.calls


@pytest.mark.parametrize(
    ("family", "shape", "reason"),
    [
        ("qwen3_vl", {"parts": ("language", "vision")}, "these change vision"),
        ("qwen3_vl", {"bits": 4}, "not to those of 4 bits"),
        ("qwen3_vl", {"rank": 1024}, "ranks up to 512"),
        ("qwen3_vl_moe", {}, "untested with experts"),
        ("qwen3_5", {}, "linear attention"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_merged(engine, model_folder, family, shape, reason):
    vlm = load_vlm(str(model_folder(family)), dtype="bfloat16", lora=Adapters("base", **{"rank": 4} | shape))
    warnings = []
    built = engine(model=vlm, warn=warnings.append)
    built.sync(vlm)
    assert "reload_weights" in built.llm.calls and "enable_lora" not in built.llm.arguments
    assert len(warnings) == 1 and reason in warnings[0] and "algo.correction" in warnings[0]
    with pytest.raises(
        ValueError, match=r"rollout.engine.adapter \(native\) must be merged here: .*" + reason
    ):
        engine(model=vlm, adapter="native")
    assert engine(model=vlm, adapter="merged", warn=None).adapter is None


def test_float32_engines_get_merged_adapters(engine, model_folder):
    """They round nothing away, and merged weights are faster."""
    vlm = adapted(model_folder)
    assert engine(model=vlm, dtype="float32", warn=None).adapter is None
    assert engine(model=vlm, dtype="float32", adapter="native").adapter is not None
