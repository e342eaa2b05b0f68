"""Episodes: who wrote which tokens, when they end, and that the environment's tokens have no loss."""

import time
from dataclasses import replace

import psutil
import pytest
import torch

from tests.conftest import FAMILIES, example
from tests.environments.played import (
    QUESTION,
    AskTwice,
    Echo,
    Endless,
    EndsEarly,
    Faulty,
    Moody,
    Mute,
    NoPicture,
    Painter,
    Unlucky,
    Unready,
)
from tests.training.test_batch import loss_of, make_policy, scored
from vlm_sapo.algo.objectives import k3
from vlm_sapo.distributed import World
from vlm_sapo.environments.processes import Environments
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain, SharedPrefix
from vlm_sapo.reporting.metrics import environment_metrics, traces
from vlm_sapo.rollout.engine import RolloutError, as_contexts
from vlm_sapo.rollout.environment import Episodes, Limits
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.sampler import with_environment
from vlm_sapo.training.policy import collect_stats
from vlm_sapo.types import Context, Group, Reward, Sampling

OPEN: list[Environments] = []
"""Those of a test, which end with it."""


@pytest.fixture(autouse=True)
def end_processes():
    yield
    while OPEN:
        OPEN.pop().close()


def environments(make, **options):
    OPEN.append(Environments(make, **{"timeout": 20.0, "workers": 2} | options))
    return OPEN[-1]


def episodes(vlm, make=AskTwice, *, world=None, timeout=20.0, **limits):
    return Episodes(
        HfEngine(vlm, prompts_per_batch=8),
        Encoder(vlm),
        environments(make, timeout=timeout),
        limits=Limits(**{"turns": 8} | limits),
        world=world or World(),
        warn=WARNED.append,
    )


WARNED: list[str] = []


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


@pytest.mark.parametrize("make", [AskTwice, Painter])
def test_the_loss_on_the_environments_tokens_is_zero_and_layouts_agree(vlm, make):
    prompts, sampled = sample(vlm, episodes(vlm, make, images=3), max_tokens=260)
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
    _, groups = sample(vlm, episodes(vlm, turns=1))
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


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (NoPicture, "row e0: .*an image must be a PIL image; it is a object"),
        (Mute, "row e0: .* must return an Observation; it returned str"),
        (Faulty, "row e0: rollout.environment failed for all 12 responses: KeyError: 'score'"),
        (Unlucky, "row e0: .* OSError: no simulator"),
        (Endless, "row e0: .*the reward of an Observation must be a finite number"),
    ],
)
def test_an_environment_that_always_fails_is_named_with_its_row(kind, sentence, model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    with pytest.raises(RolloutError, match=sentence):
        sample(vlm, episodes(vlm, kind))


def test_an_environment_without_a_method_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"Unready has no step: add it"):
        environments(Unready).start()


def test_every_turn_begins_as_the_template_opens_it(model_folder):
    """A template that opens the thinking of each turn: the environment and the reward read it each time."""
    vlm = eager(load_vlm(str(model_folder())))
    prompts = [replace(Encoder(vlm)(example()), opening="<think>\n")]
    engine = episodes(vlm, Echo)
    [responses] = engine.generate(as_contexts(prompts), Sampling(8, 400, 1.0, seed=1))
    assert max(len(item.turns) for item in responses) > 1
    for item in responses:
        assert item.text.count("<think>\n") == len(item.turns)
        for span in item.spans:
            if span.source == "environment":
                assert r"'<think>\n" in vlm.tokenizer.decode(item.ids[span.start : span.end])


def test_a_turn_ends_with_the_stop_token_that_the_template_writes(model_folder):
    """Whatever the tokenizer's end of sequence is; without one every episode would end at its first turn, and
    nothing say so."""
    vlm = load_vlm(str(model_folder()))
    own, vlm.tokenizer.eos_token = vlm.tokenizer.eos_token_id, "<|endoftext|>"
    assert Encoder(vlm).turn_end == own
    vlm.stops.remove(own)
    with pytest.raises(ValueError, match=r"its end \(<\|endoftext\|>, a token that ends responses\)"):
        Encoder(vlm).answer([("more", ())])


class OtherWorld(World):
    """One process that records what it says of its failures."""

    def __init__(self):
        super().__init__()
        self.failures = []

    def fail_everywhere(self, error):
        self.failures.append(error)


def test_a_failure_is_told_in_the_world_that_the_others_wait_in(model_folder):
    vlm, world = eager(load_vlm(str(model_folder()))), OtherWorld()
    engine = episodes(vlm, Faulty, world=world)
    with pytest.raises(RolloutError) as caught:
        sample(vlm, engine)
    assert world.failures == [caught.value]


def test_failures_end_their_response_and_nothing_else(model_folder):
    """One hangs, one raises, one ends its process: each is counted, the others play on."""
    vlm = eager(load_vlm(str(model_folder())))
    engine, encode = episodes(vlm, Moody, timeout=2.0), Encoder(vlm)
    WARNED.clear()
    contexts = as_contexts([encode(example(number)) for number in range(4)])
    groups = engine.generate(contexts, Sampling(4, 120, 1.0, seed=1))
    finishes = [{item.finish for item in items if len(item.turns) > 1} for items in groups]
    assert "timeout" not in finishes[0] | finishes[2] | finishes[3] and "error" not in finishes[0]
    assert "timeout" in finishes[1] and "error" in finishes[2] and "error" in finishes[3]
    assert len(WARNED) == 1 and "this response ends here" in WARNED[0]
    metrics = environment_metrics([item for items in groups for item in items])
    assert 0 < metrics["environment/timeout"] < 0.3 and 0 < metrics["environment/error"] < 0.6
    again = engine.generate(contexts[:1], Sampling(4, 120, 1.0, seed=1))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(again[0], groups[0], strict=True))


def test_no_process_outlives_its_run(model_folder):
    vlm = eager(load_vlm(str(model_folder())))
    before = set(psutil.Process().children(recursive=True))
    engine = episodes(vlm, Moody, timeout=1.0)
    sample(vlm, engine)
    assert set(psutil.Process().children(recursive=True)) - before
    engine.close()
    deadline = time.monotonic() + 10
    while (left := _playing(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _playing(before):
    children = set(psutil.Process().children(recursive=True)) - before
    return [
        child for child in children if child.is_running() and "forkserver" not in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_an_environment_are_read_as_in_one_prompt(name, model_folder):
    """The engine's log-probs are the trainer's, in both layouts, and ids and positions those that the whole
    conversation has in one piece."""
    vlm = eager(load_vlm(str(model_folder(name))))
    prompts, groups = sample(vlm, episodes(vlm, Painter, images=3), max_tokens=260)
    shown = [item for items in groups for item in items if item.images]
    assert len(shown) > 3 and max(len(item.images) for item in shown) > 1
    for prompt, items in zip(prompts, groups, strict=True):
        for item in items:
            grids = [source.grid for source in (prompt, *item.images) if source.grid is not None]
            whole = torch.cat([prompt.ids, item.ids])
            expected = vlm.rope_positions(whole, torch.cat(grids) if grids else None)
            assert torch.equal(torch.cat([prompt.positions, item.positions], dim=1), expected)
            sizes = vlm.image_sizes(prompt.followed_by(item))
            assert int((whole == vlm.model.config.image_token_id).sum()) == sum(sizes)
            for own in item.images:
                again = Encoder(vlm).inputs(own.images)
                assert torch.equal(again.pixels, own.pixels) and torch.equal(again.grid, own.grid)
    for layout in (SharedPrefix(), Plain()):
        policy = make_policy(None, vlm=vlm, layout=layout)
        with torch.no_grad():
            scores = policy.run([GroupSlice(*pair) for pair in zip(prompts, map(tuple, groups), strict=True)])
        items = [item for group in groups for item in group]
        for item, logprobs in zip(items, scores.logprobs, strict=True):
            assert (logprobs[: len(item.ids)] - item.logprobs).abs().max() < 3e-5


def test_a_frozen_tower_encodes_each_image_once_in_a_step(model_folder, monkeypatch):
    """In all turns, for old log-probs and in updates."""
    vlm = eager(load_vlm(str(model_folder())))
    vlm.freeze(["vision", "merger"])
    encoded, run = [], vlm.vision._run
    monkeypatch.setattr(vlm.vision, "_run", lambda *args: encoded.append(len(args[0])) or run(*args))
    prompts, groups = sample(vlm, episodes(vlm, Painter, images=3), max_tokens=260)
    policy = make_policy(None, vlm=vlm, layout=SharedPrefix())
    with torch.no_grad():
        for _ in range(2):
            policy.run([GroupSlice(*pair) for pair in zip(prompts, map(tuple, groups), strict=True)])
    sources = [*prompts, *(image for items in groups for item in items for image in item.images)]
    expected = sum(len(source.pixels) for source in sources if source.pixels is not None)
    assert sum(encoded) == expected
