"""How `VllmEngine` uses vLLM: what it asks of it, when it sleeps, and how weights get to it."""

import sys

import pytest
import torch

from tests.rollout.vllm_stand_in import StandInLlm, modules
from vlm_sapo.rollout import weight_transfer
from vlm_sapo.rollout.engine import EngineNeeds
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.types import Sampling

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
