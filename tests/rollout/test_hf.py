"""The embedded engine against the trainer's log-probs and transformers' own generation."""

import itertools

import pytest
import torch

from tests.conftest import FAMILIES, example
from tests.models.shortages import SHORTAGES
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain
from vlm_sapo.rollout.engine import RolloutError, as_contexts
from vlm_sapo.rollout.hf import HfEngine, sample
from vlm_sapo.types import Sampling


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
    ids = prompt.ids[None]
    vlm.eval()
    expected = vlm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(),
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
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
