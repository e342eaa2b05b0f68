"""The embedded engine against the trainer's log-probs and transformers' own generation."""

import copy
import itertools
from contextlib import closing

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from tests.conftest import FAMILIES, example, own_inputs
from tests.conftest import response as response_of
from tests.models.shortages import SHORTAGES
from vlm_sapo.models import decoding
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.decoding import BufferedLayer, new_cache
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain
from vlm_sapo.rewards.pool import RewardPool, Scoring, items_of
from vlm_sapo.rollout.engine import RolloutError, as_contexts
from vlm_sapo.rollout.hf import HfEngine, sample
from vlm_sapo.rollout.scoring import sample_and_score
from vlm_sapo.types import Context, Sampling


@pytest.fixture(params=FAMILIES)
def setting(request, model_folder):
    vlm = load_vlm(str(model_folder(request.param)))
    encoder = Encoder(vlm)
    prompts = [encoder(example(number, images=count)) for number, count in enumerate((1, 2, 0))]
    return vlm, prompts


@torch.no_grad()
def test_logprobs_are_the_trainers(setting):
    vlm, prompts = setting
    groups = HfEngine(vlm, prompts_per_batch=8).generate(as_contexts(prompts), Sampling(4, 12, 0.8, seed=5))
    for prompt, responses in zip(prompts, groups, strict=True):
        assert len(responses) == 4
        inputs = Plain().inputs([GroupSlice(prompt, tuple(responses))])
        scores = Pass(vlm, temperature=0.8)(inputs)
        for row, response in zip(scores.logprobs, responses, strict=True):
            assert torch.allclose(row[: len(response.ids)], response.logprobs, atol=2e-5)


def test_responses_do_not_depend_on_how_prompts_are_batched(setting):
    vlm, prompts = setting
    together = HfEngine(vlm, prompts_per_batch=3).generate(as_contexts(prompts), Sampling(3, 8, 1.0, seed=1))
    alone = HfEngine(vlm, prompts_per_batch=1).generate(as_contexts(prompts), Sampling(3, 8, 1.0, seed=1))
    other = HfEngine(vlm, prompts_per_batch=3).generate(as_contexts(prompts), Sampling(3, 8, 1.0, seed=2))

    def ids(groups):
        return [response.ids.tolist() for group in groups for response in group]

    assert ids(together) == ids(alone) != ids(other)


def ids_of(groups) -> list[list[int]]:
    return [response.ids.tolist() for group in groups for response in group]


def test_prefill_in_several_passes_changes_nothing(setting, monkeypatch):
    """Also for responses so far, and for the experts of an MoE model."""
    vlm, prompts = setting
    engine = HfEngine(vlm, prompts_per_batch=3, experts=bool(vlm.routers))
    contexts, sampling = as_contexts(prompts), Sampling(3, 8, 1.0, seed=1)
    whole = engine.generate(contexts, sampling)
    branch, longest = max(enumerate(whole[0]), key=lambda item: len(item[1].ids))
    begun = response_of(longest.ids[:-1].tolist(), prompts[0])
    contexts = [Context(prompts[0], (begun,), (branch,)), *contexts[1:]]
    continued = engine.generate(contexts, sampling)
    sizes = []
    hidden = vlm.hidden
    monkeypatch.setattr(vlm, "hidden", lambda **given: sizes.append(given["ids"].shape) or hidden(**given))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", len(prompts[0].ids) + 4)
    for before, again in ((whole, as_contexts(prompts)), (continued, contexts)):
        sizes.clear()
        groups = engine.generate(again, sampling)
        assert ids_of(groups) == ids_of(before)
        assert [length for _, length in sizes if length > 1] == [
            len(item.prompt.ids) + sum(len(response.ids) for response in item.responses) for item in again
        ]
        for group, other in zip(groups, before, strict=True):
            for item, same in zip(group, other, strict=True):
                assert torch.allclose(item.logprobs, same.logprobs, atol=1e-5)
                assert item.experts is None or torch.equal(item.experts, same.experts)


def test_adapters_are_inlined_while_sampling(encoder, model_folder, monkeypatch):
    """Also when sampling fails. Those of the vision tower stay: without them, it would look frozen, and the features
    of these weights would be cached for later ones."""
    lora = Adapters(base="a", rank=4, parts=("language", "vision"))
    vlm = load_vlm(str(model_folder()), lora=lora)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    prompts = [encoder(example(number)) for number in range(2)]
    layers, engine = adapters.layers(vlm.model), HfEngine(vlm, prompts_per_batch=2)
    seen = []
    decode = engine._decode

    def watched(*args):
        seen.append(set(adapters.layers(vlm.model)))
        return decode(*args)

    monkeypatch.setattr(engine, "_decode", watched)
    groups = engine.generate(as_contexts(prompts), Sampling(3, 12, 1.0, seed=1))
    assert seen == [{name for name in layers if "visual" in name}] and seen[0] and not vlm.vision.cached
    for prompt, responses in zip(prompts, groups, strict=True):
        scores = Pass(vlm)(Plain().inputs([GroupSlice(prompt, tuple(responses))]))
        for row, item in zip(scores.logprobs, responses, strict=True):
            assert torch.allclose(row[: len(item.ids)], item.logprobs, atol=2e-5)
    monkeypatch.setattr(engine, "_decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(as_contexts(prompts), Sampling(3, 12, 1.0, seed=1))
    assert adapters.layers(vlm.model) == layers


def test_autocast_decides_how_adapters_are_inlined(encoder, model_folder):
    """Float32 weights that compute in bfloat16 would round merged adapters away."""
    vlm = load_vlm(str(model_folder()), lora=Adapters(base="a", rank=4))
    engine = HfEngine(vlm, prompts_per_batch=1, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    kinds = set()
    engine._decode = lambda *args: kinds.update(type(module) for module in vlm.modules()) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.generate(as_contexts([encoder(example())]), Sampling(2, 4, 1.0, seed=0))
    assert adapters.Folded in kinds


def test_buffers_for_keys_and_values_change_no_bit(setting, monkeypatch):
    """Against transformers' own cache, with branches that leave and buffers that grow, also behind responses
    so far."""
    vlm, prompts = setting
    vlm.stops = list(range(0, vlm.vocabulary, 7))  # responses of many lengths
    engine, sampling = HfEngine(vlm, prompts_per_batch=3), Sampling(6, 30, 1.0, seed=2)
    contexts = as_contexts(prompts)

    def both():
        monkeypatch.setattr(decoding, "CACHE_BLOCK", 4)
        ours = engine.generate(contexts, sampling)
        with monkeypatch.context() as patched:
            layers = [
                DynamicLayer() if isinstance(layer, BufferedLayer) else layer
                for layer in new_cache(vlm).layers
            ]
            patched.setattr(decoding, "new_cache", lambda vlm: Cache(layers=copy.deepcopy(layers)))
            return ours, engine.generate(contexts, sampling)

    ours, theirs = both()
    lengths = {len(ids) for ids in ids_of(ours)}
    assert len(lengths) > 5 and max(lengths) > 8, "branches leave at different times, after the buffers grew"
    for _ in range(2):
        assert ids_of(ours) == ids_of(theirs)
        for group, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(group, other, strict=True))
        branch, longest = max(enumerate(ours[0]), key=lambda item: len(item[1].ids))
        begun = response_of(longest.ids[:-1].tolist(), prompts[0])
        contexts = [Context(prompts[0], (begun,), (branch,)), *as_contexts(prompts)[1:]]
        ours, theirs = both()


def test_a_token_does_not_copy_the_cache(vlm, encoder):
    """The storage of keys and values stays until the block is full."""
    cache, places = decoding.new_cache(vlm), set()
    for _ in range(decoding.CACHE_BLOCK):
        keys, values = cache.update(torch.ones(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1 and keys.shape == (3, 2, decoding.CACHE_BLOCK, 8) and bool((keys == 1).all())
    grown, _ = cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    assert grown.data_ptr() != keys.data_ptr() and torch.equal(grown[:, :, :-1], keys)


def test_keys_are_stored_in_the_precision_of_attention(vlm, encoder, monkeypatch):
    """Under autocast: half the memory, and the same bits."""
    vlm.stops = []
    contexts, sampling = as_contexts([encoder(example())]), Sampling(4, 12, 1.0, seed=2)
    engine = HfEngine(vlm, prompts_per_batch=1, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    caches = []
    new_cache = decoding.new_cache
    monkeypatch.setattr(decoding, "new_cache", lambda vlm: caches.append(new_cache(vlm)) or caches[-1])
    [ours] = engine.generate(contexts, sampling)
    assert {layer.keys.dtype for cache in caches for layer in cache.layers} == {torch.bfloat16}
    config = vlm.model.config.get_text_config()
    monkeypatch.setattr(decoding, "new_cache", lambda vlm: DynamicCache(config=config))
    [theirs] = engine.generate(contexts, sampling)
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(ours, theirs, strict=True))
    assert ids_of([ours]) == ids_of([theirs])


def test_a_batch_counted_in_responses_takes_more_prompts_with_fewer_of_each(vlm, encoder, monkeypatch):
    """An evaluation with one response per problem fills the batch; the tokens are the same in any batch."""
    contexts = as_contexts([encoder(example(number)) for number in range(5)])
    engine, sizes = HfEngine(vlm, sequences_per_batch=12), []
    generate = engine._generate

    def counted(contexts, seeds, sampling):
        sizes.append(len(contexts))
        return generate(contexts, seeds, sampling)

    monkeypatch.setattr(engine, "_generate", counted)
    for group, batches in {1: [5], 4: [3, 2], 5: [2, 2, 1], 16: [1, 1, 1, 1, 1]}.items():
        sampling = Sampling(group, 5, 1.0, seed=3)
        sizes.clear()
        groups = engine.generate(contexts, sampling)
        assert sizes == batches and engine.problems_at_once(group) == max(1, 12 // group)
        assert ids_of(groups) == ids_of(HfEngine(vlm, prompts_per_batch=1).generate(contexts, sampling))
    assert HfEngine(vlm, prompts_per_batch=2).problems_at_once(16) == 2


def test_out_of_memory_halves_a_batch_that_is_counted_in_responses(vlm, encoder, monkeypatch):
    prompts = [encoder(example(number)) for number in range(5)]
    said, sizes = [], []
    engine = HfEngine(vlm, sequences_per_batch=12, warn=said.append)
    generate = engine._generate

    def small(contexts, seeds, sampling):
        sizes.append(len(contexts) * sampling.group)
        if sizes[-1] > 6:
            raise torch.OutOfMemoryError("no room. Advice")
        return generate(contexts, seeds, sampling)

    monkeypatch.setattr(engine, "_generate", small)
    sampled = engine.generate(as_contexts(prompts), Sampling(3, 6, 1.0, seed=0))
    expected = HfEngine(vlm, prompts_per_batch=1).generate(as_contexts(prompts), Sampling(3, 6, 1.0, seed=0))
    assert ids_of(sampled) == ids_of(expected) and sizes == [12, 6, 6, 3]
    assert engine.problems_at_once(1) == 6 and "set rollout.sequences_per_batch=6" in said[0]


def test_vision_tokens_are_never_sampled_and_stops_end(setting):
    vlm, prompts = setting
    with torch.no_grad():  # make vision and stop tokens the likeliest by far
        vlm.model.lm_head.weight[vlm.banned] = 50 * vlm.model.lm_head.weight[vlm.stops[0]].sign()
        vlm.model.lm_head.weight[vlm.stops] *= 3
    groups = HfEngine(vlm, prompts_per_batch=8).generate(as_contexts(prompts), Sampling(16, 10, 2.0, seed=0))
    for response in (response for group in groups for response in group):
        ids = response.ids.tolist()
        assert not set(ids) & set(vlm.banned)
        assert not set(ids[:-1]) & set(vlm.stops)
        assert response.finish == ("stop" if ids[-1] in vlm.stops else "length")
        assert response.finish == "stop" or len(ids) == 10


@torch.no_grad()
def test_the_coldest_sample_is_greedy_generation(setting):
    vlm, prompts = setting
    [[response]] = HfEngine(vlm, prompts_per_batch=1).generate(
        as_contexts(prompts[1:2]), Sampling(1, 10, 1e-4, seed=0)
    )
    prompt = prompts[1]
    vlm.eval()
    expected = vlm.model.generate(
        **own_inputs(vlm, prompt, prompt.ids[None]),
        max_new_tokens=10,
        do_sample=False,
        suppress_tokens=vlm.banned,
    )
    assert expected[0, len(prompt.ids) :].tolist() == response.ids.tolist()


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0, float("-inf")]]).expand(20000, -1)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logprobs = sample(logits, uniforms)
    shares = torch.bincount(ids, minlength=5) / 20000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.01)
    assert torch.equal(logprobs, logits[0].log_softmax(-1)[ids])
    edges, _ = sample(logits[:2], torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert edges.tolist() == [0, 3]


def test_prompts_that_do_not_fit_together_are_answered_in_turn(vlm, encoder, monkeypatch):
    """The same responses; the second time at once in the size that fits."""
    prompts = [encoder(example(number)) for number in range(5)]
    expected = HfEngine(vlm, prompts_per_batch=8).generate(as_contexts(prompts), Sampling(3, 6, 1.0, seed=0))
    said, sizes, room, errors = [], [], [2], itertools.cycle(SHORTAGES[1:])
    engine = HfEngine(vlm, prompts_per_batch=8, warn=said.append)
    generate = engine._generate

    def small(contexts, seeds, sampling):
        sizes.append(len(contexts))
        if len(contexts) > room[0]:
            raise next(errors)
        return generate(contexts, seeds, sampling)

    monkeypatch.setattr(engine, "_generate", small)
    for tried in ([5, 2, 2, 1], [2, 2, 1]):
        sizes.clear()
        sampled = engine.generate(as_contexts(prompts), Sampling(3, 6, 1.0, seed=0))
        assert [[item.ids.tolist() for item in group] for group in sampled] == [
            [item.ids.tolist() for item in group] for group in expected
        ]
        assert sizes == tried
    assert len(said) == 1 and "set rollout.prompts_per_batch=2" in said[0]
    room[0] = 0
    with pytest.raises(RolloutError, match="responses to row e0 do not fit"):
        engine.generate(as_contexts(prompts), Sampling(3, 6, 1.0, seed=0))


def test_groups_are_scored_while_others_are_sampled(vlm, encoder, monkeypatch):
    """The first batch's groups reach the reward before the second batch is sampled."""
    engine, events = HfEngine(vlm, prompts_per_batch=2), []
    generate, add = engine._generate, Scoring.add
    monkeypatch.setattr(engine, "_generate", lambda *args: (events.append("sample"), generate(*args))[1])
    monkeypatch.setattr(Scoring, "add", lambda self, items: (events.append(len(items)), add(self, items))[1])
    with closing(RewardPool([{"name": "math"}], workers=1)) as pool:
        prompts = [encoder(example(number)) for number in range(3)]
        groups, scores = sample_and_score(engine, pool, prompts, Sampling(4, 6, 1.0, seed=0))
        expected = pool([item for pair in zip(prompts, groups, strict=True) for item in items_of(*pair)])
    assert events[:6] == ["sample", 4, 4, "sample", 4, 12]
    assert [score for group in scores for score in group] == expected
