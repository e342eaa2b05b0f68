"""Episodes with any turns, images and lengths: engine and trainer agree, and the shared layout with the plain one.

Each case is another draw; a failing one names its number.
"""

import random

import pytest
import torch

from tests.conftest import example
from tests.environments.played import Rambling
from tests.rollout.test_environment import eager, end_processes, episodes  # noqa: F401 (a fixture)
from tests.training.test_batch import loss_of, make_policy, scored
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.types import Group, Reward, Sampling

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "gemma4")
CASES = [(family, number) for number in range(2) for family in FAMILIES]
MORE = [pytest.param(family, number, marks=pytest.mark.slow) for number in range(2, 6) for family in FAMILIES]


@pytest.mark.parametrize(("family", "number"), [*CASES, *MORE])
def test_episodes_of_any_form(family, number, model_folder):
    dice = random.Random(number)
    vlm = eager(load_vlm(str(model_folder(family))))
    engine = episodes(
        vlm,
        Rambling,
        turns=dice.randint(2, 4),
        images=dice.randint(1, 5),
        turn_tokens=dice.choice((None, 3, 12)),
    )
    encode = Encoder(vlm)
    prompts = [encode(example(row, images=dice.randrange(3))) for row in range(dice.randint(1, 3))]
    sampling = Sampling(dice.randint(2, 4), dice.randint(40, 500), dice.choice((0.7, 1.0)), seed=number)
    sampled = engine.generate(as_contexts(prompts), sampling)
    again = engine.generate(as_contexts(prompts), sampling)
    for one, other in zip(
        *([item for items in way for item in items] for way in (sampled, again)), strict=True
    ):
        assert torch.equal(one.ids, other.ids) and one.reward == other.reward
    items = [item for group in sampled for item in group]
    groups = [
        Group(prompt, tuple(group), tuple(Reward(dice.random(), {}) for _ in group))
        for prompt, group in zip(prompts, sampled, strict=True)
    ]
    gradients = []
    for layout in (SharedPrefix(), Plain()):
        policy = make_policy(None, vlm=vlm, layout=layout, temperature=sampling.temperature)
        with torch.no_grad():
            scores = policy.run(
                [GroupSlice(*pair) for pair in zip(prompts, map(tuple, sampled), strict=True)]
            )
        for item, logprobs in zip(items, scores.logprobs, strict=True):
            assert (logprobs[: len(item.ids)] - item.logprobs).abs().max() < 3e-5
            assert not logprobs[: len(item.ids)][~item.mask].any()
        batch = scored(policy, groups)
        for micro in batch.fit(10**6, layout):
            passed, _ = policy.forward(micro)
            loss_of()(passed, micro, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trained if p.grad is not None]))
        policy.optimizer.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < 2e-5 * gradients[1].norm()
