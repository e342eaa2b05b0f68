"""Episodes: who wrote which tokens, when they end, and that the environment's tokens have no loss."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import FAMILIES, example
from tests.training.test_batch import loss_of, make_policy, scored
from vlm_sapo.algo.objectives import k3
from vlm_sapo.distributed import Interrupted, World
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.reporting.metrics import traces
from vlm_sapo.rollout.engine import RolloutError, as_contexts
from vlm_sapo.rollout.environment import Episodes, Observation
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.sampler import with_environment
from vlm_sapo.training.policy import collect_stats
from vlm_sapo.types import Context, Group, Reward, Sampling

QUESTION = "Are you sure? <|im_end|>"
"""With the name of a special token, which must stay plain text."""


class AskTwice:
    """Asks until the third turn, which it rewards."""

    def reset(self, example):
        self.seen = []

    def step(self, response):
        self.seen.append(response)
        last = len(self.seen) == 3
        return Observation(QUESTION, done=last, reward=1.0 if last else 0.25)


def episodes(vlm, make=AskTwice, *, max_turns=8):
    engine = HfEngine(vlm, prompts_per_batch=8)
    return Episodes(engine, Encoder(vlm), make, max_turns=max_turns, world=World())


def eager(vlm):
    """The model with a bias to end its turns, so that episodes have several."""
    head = vlm.model.lm_head
    bias = torch.zeros(head.weight.shape[0])
    bias[Encoder(vlm).turn_end] = 6.0
    head.register_forward_hook(lambda _, __, output: output + bias)
    return vlm


@pytest.fixture(params=FAMILIES)
def vlm(request, model_folder):
    return eager(load_vlm(str(model_folder(request.param))))


def sample(vlm, engine, *, group=4, max_tokens=120):
    encode = Encoder(vlm)
    prompts = [encode(example(number, images=number % 3)) for number in range(3)]
    return prompts, engine.generate(as_contexts(prompts), Sampling(group, max_tokens, 1.0, seed=1))


def test_responses_say_who_wrote_what(vlm):
    prompts, groups = sample(vlm, episodes(vlm))
    opening = prompts[0].text.rpartition("?")[2].partition("\n")[2] or prompts[0].text.rpartition("?")[2]
    several = 0
    for prompt, responses in zip(prompts, groups, strict=True):
        for item in responses:
            assert item.spans[0].start == 0 and item.spans[-1].end == len(item.ids) <= 120
            assert all(a.end == b.start for a, b in zip(item.spans, item.spans[1:], strict=False))
            for span in item.spans:
                assert item.mask[span.start : span.end].all() == (span.source == "policy")
                assert not (span.source == "environment" and item.mask[span.start : span.end].any())
            assert not item.logprobs[~item.mask].any() and not item.ids[item.mask].eq(-1).any()
            asked = [span for span in item.spans if span.source == "environment"]
            for span in asked:
                text = vlm.tokenizer.decode(item.ids[span.start : span.end])
                assert QUESTION in text and text.endswith(opening)
                assert int(item.ids[span.start - 1]) == Encoder(vlm).turn_end
            assert item.text.count("\n") >= len(asked) - 1 and QUESTION not in item.text
            first = torch.tensor([int(prompt.positions.max()) + 1 + i for i in range(len(item.ids))])
            assert torch.equal(item.positions, first.expand(3, -1))
            several += len(item.turns) == 3 and item.finish == "stop"
            if len(item.turns) == 3 and item.finish == "stop":
                assert item.reward == 1.5
    assert several > 2


def test_each_turn_is_sampled_from_what_was_said_before(vlm):
    """The engine's log-probs of all turns are those of a training pass over the whole episode."""
    prompts, groups = sample(vlm, episodes(vlm))
    policy = make_policy(None, vlm=vlm, layout=SharedPrefix())
    for prompt, responses in zip(prompts, groups, strict=True):
        with torch.no_grad():
            scores = policy.run([GroupSlice(prompt, tuple(responses))])
        for item, logprobs in zip(responses, scores.logprobs, strict=True):
            assert (logprobs[: len(item.ids)] - item.logprobs).abs().max() < 2e-5


def test_a_group_is_reported_when_its_episodes_are_over(vlm, monkeypatch):
    """With all turns and rewards, and before the others are, where these take longer."""

    class EndsEarly(AskTwice):
        def reset(self, example):
            super().reset(example)
            self.done = example.id == "e2"

        def step(self, response):
            return Observation(done=True) if self.done else super().step(response)

    engine, order, before = episodes(vlm, EndsEarly), [], []
    encode, sample_turn = Encoder(vlm), engine._continue

    def context(index: int) -> Context:
        return Context(encode(example(index)), report=lambda responses: order.append((index, responses)))

    def count_and_continue(*args) -> None:
        before.append(len(order))
        sample_turn(*args)

    monkeypatch.setattr(engine, "_continue", count_and_continue)
    groups = engine.generate(list(map(context, range(4))), Sampling(2, 120, 1.0, seed=1))
    assert sorted(index for index, _ in order) == list(range(4))
    for index, responses in order:
        assert all(one is other for one, other in zip(responses, groups[index], strict=True))
    assert before and before[0] >= 1


def test_an_episode_does_not_depend_on_the_others(vlm):
    _, together = sample(vlm, episodes(vlm))
    encode = Encoder(vlm)
    alone = episodes(vlm).generate(
        as_contexts([encode(example(2, images=2))]), Sampling(4, 120, 1.0, seed=1, slots=(2,))
    )
    for one, other in zip(together[2], alone[0], strict=True):
        assert torch.equal(one.ids, other.ids)


def test_the_loss_on_the_environments_tokens_is_zero_and_layouts_agree(vlm):
    prompts, sampled = sample(vlm, episodes(vlm))
    groups = [
        Group(prompt, tuple(items), tuple(Reward(float(index % 2), {}) for index in range(len(items))))
        for prompt, items in zip(prompts, sampled, strict=True)
    ]
    gradients = []
    for layout in (SharedPrefix(), Plain()):
        policy = make_policy(None, vlm=vlm, layout=layout)
        batch = scored(policy, groups)
        for micro in batch.fit(10**6, layout):
            passed, _ = policy.forward(micro)
            (slope,) = torch.autograd.grad(loss_of()(passed, micro, batch), passed.logprobs)
            assert not slope[~micro.mask].any() and slope[micro.mask].any()
        for trace in traces(
            collect_stats(policy._accumulate(batch, loss_of()), 1.0, reused=False), loss_of()
        ).values():
            assert not trace.effective[trace.entropy == 0].any() and trace.effective.any()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trained if p.grad is not None]))
        policy.optimizer.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    assert batch.num_tokens == sum(int(item.mask.sum()) for items in sampled for item in items)


def test_episodes_end_at_their_limits(model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    _, groups = sample(vlm, episodes(vlm, max_turns=1))
    assert {item.finish for items in groups for item in items} <= {"turns", "length"}
    _, groups = sample(vlm, episodes(vlm), max_tokens=40)
    assert all(len(item.ids) <= 40 for items in groups for item in items)
    assert "length" in {item.finish for items in groups for item in items}


def test_the_environments_reward_is_a_part_of_its_own(model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    _, [[first, *_], *_] = sample(vlm, episodes(vlm))
    reward = with_environment(replace(first, reward=0.5), Reward(1.0, {"math": 1.0}))
    assert reward.total == 1.5 and reward.parts == {"math": 1.0, "environment": 0.5}
    assert with_environment(replace(first, reward=None), Reward(1.0, {})) == Reward(1.0, {})
    assert float(k3(torch.tensor(0.0), torch.tensor(0.0))) == 0.0


class Painter(AskTwice):
    def step(self, response):
        return Observation("Look at this", images=(object(),))


class Mute(AskTwice):
    def step(self, response):
        return "go on"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [(Painter, "row e0: the environment returned images"), (Mute, "row e0: .* returned str")],
)
def test_what_an_environment_must_not_return(kind, sentence, model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    with pytest.raises(RolloutError, match=sentence):
        sample(vlm, episodes(vlm, kind))


class Faulty(AskTwice):
    def step(self, response):
        raise KeyError("score")


class Unlucky(AskTwice):
    def reset(self, example):
        raise OSError("no simulator")


class Endless(AskTwice):
    def step(self, response):
        return Observation("again", reward=float("nan"))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Faulty, r"row e0: rollout.environment.function raised KeyError\('score'\)"),
        (Unlucky, r"row e0: rollout.environment.function raised OSError\('no simulator'\)"),
        (Endless, "row e0: the reward of an Observation must be a finite number"),
    ],
)
def test_an_environment_that_fails_is_named_with_its_row(kind, sentence, model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    with pytest.raises(RolloutError, match=sentence):
        sample(vlm, episodes(vlm, kind))


class Stopped(AskTwice):
    def step(self, response):
        raise Interrupted("SIGTERM")


def test_a_signal_during_a_turn_is_no_fault_of_the_environment(model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    with pytest.raises(Interrupted, match="stopped: SIGTERM"):
        sample(vlm, episodes(vlm, Stopped))


class Tensors(AskTwice):
    def step(self, response):
        return replace(super().step(response), reward=torch.tensor(0.5))


def test_rewards_are_plain_numbers(model_folder):
    """Of whatever kind an environment returns: checkpoints and logs hold no others."""
    vlm = eager(load_vlm(str(model_folder())))
    _, groups = sample(vlm, episodes(vlm, Tensors))
    assert {type(item.reward) for items in groups for item in items} == {float}


class Listener(AskTwice):
    heard: tuple[str, ...] = ()

    def step(self, response):
        Listener.heard += (response,)
        return super().step(response)


def test_every_turn_begins_as_the_template_opens_it(model_folder):
    """A template that opens the thinking of each turn: the environment and the reward read it each time."""
    vlm = eager(load_vlm(str(model_folder())))
    engine = episodes(vlm, Listener)
    prompts = [replace(Encoder(vlm)(example()), opening="<think>\n")]
    [responses] = engine.generate(as_contexts(prompts), Sampling(4, 120, 1.0, seed=1))
    assert max(len(item.turns) for item in responses) > 1
    assert all(text.startswith("<think>\n") for text in Listener.heard)
    for item in responses:
        assert item.text.count("<think>\n") == len(item.turns)


def test_a_turn_ends_with_the_stop_token_that_the_template_writes(model_folder):
    """Whatever the tokenizer's end of sequence is; without one every episode would end at its first turn, and
    nothing say so."""
    vlm = load_vlm(str(model_folder()))
    own, vlm.tokenizer.eos_token = vlm.tokenizer.eos_token_id, "<|endoftext|>"
    assert Encoder(vlm).turn_end == own
    vlm.stops.remove(own)
    with pytest.raises(ValueError, match=r"its end \(<\|endoftext\|>, a token that ends responses\)"):
        Encoder(vlm).user_turn("more")


class OtherWorld(World):
    """One process that records what it says of its failures."""

    def __init__(self):
        super().__init__()
        self.failures = []

    def fail_everywhere(self, error):
        self.failures.append(error)


def test_a_failure_is_told_in_the_world_that_the_others_wait_in(model_folder):
    vlm, world = eager(load_vlm(str(model_folder()))), OtherWorld()
    engine = Episodes(HfEngine(vlm, prompts_per_batch=8), Encoder(vlm), Faulty, max_turns=2, world=world)
    with pytest.raises(RolloutError) as caught:
        sample(vlm, engine)
    assert world.failures == [caught.value]
