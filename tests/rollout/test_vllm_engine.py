"""How `VllmEngine` uses vLLM: what it asks of it, when it sleeps, and how weights get to it."""

import sys

import pytest
import torch

from tests.conftest import example
from tests.rollout.vllm_stand_in import StandInEngine, StandInLlm, modules
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

    def build(longest=512, max_pixels=None, **options) -> VllmEngine:
        needs = EngineNeeds(
            vlm,
            "model",
            longest=longest,
            dtype="bfloat16",
            prompts_per_batch=4,
            warn=print,
            max_pixels=max_pixels,
        )
        return VllmEngine(needs, dtype="bfloat16", **options)

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
