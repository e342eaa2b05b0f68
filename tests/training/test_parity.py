"""Engine against trainer: each of the usual faults, injected on purpose, is detected and named."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.conftest import example, numbered_image
from tests.training.test_batch import make_policy
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain
from vlm_sapo.reporting.console import Console
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.training.checks import Parity, ParityError, kinds_of, perturbed
from vlm_sapo.types import Group, Reward, RolloutBatch, Sampling

SAMPLING = Sampling(3, 8, 0.7, seed=3)


class Copy(HfEngine):
    """An engine with weights of its own, like vLLM's; `fault` says what is wrong with it."""

    def __init__(self, vlm, fault=""):
        super().__init__(copy.deepcopy(vlm), prompts_per_batch=4)
        self.fault, self.version, self.syncs, self.withheld = fault, None, 0, ()

    def sync(self, vlm):
        if self.version == vlm.version:
            return
        self.version, self.syncs = vlm.version, self.syncs + 1
        if self.fault == "no sync" or (self.fault == "misses one" and self.syncs == 3):
            return
        for (name, own), new in zip(self.vlm.named_parameters(), vlm.parameters(), strict=True):
            if (self.fault == "prepacked" and "mlp" in name) or name in self.withheld:
                continue
            own.data.copy_(new.data)
        self.vlm.vision.cached.clear()

    def generate(self, contexts, sampling):
        prompts = seen = [context.prompt for context in contexts]
        if self.fault == "other pixels":
            seen = [p if p.pixels is None else replace(p, pixels=p.pixels.flip(0)) for p in prompts]
        if self.fault == "positions":
            seen = [
                replace(p, positions=p.positions + torch.arange(p.positions.shape[1]) // 9) for p in prompts
            ]
        groups = super().generate(as_contexts(seen), sampling)
        if self.fault in ("raw", "unbanned", "rounding", "nonsense"):
            groups = [self._scored(p, items, sampling) for p, items in zip(seen, groups, strict=True)]
        return groups

    @torch.no_grad()
    def _scored(self, prompt, responses, sampling):
        banned = self.vlm.banned
        self.vlm.banned = [] if self.fault == "unbanned" else banned
        temperature = 1.0 if self.fault == "raw" else sampling.temperature
        inputs = Plain().inputs([GroupSlice(prompt, tuple(responses))])
        logprobs = Pass(self.vlm, temperature)(inputs).logprobs
        self.vlm.banned = banned
        generator = torch.Generator().manual_seed(0)
        size = {"rounding": 0.01, "nonsense": 3.0}.get(self.fault, 0.0)
        return [
            replace(
                item,
                logprobs=row[: len(item.ids)] + size * torch.randn(len(item.ids), generator=generator),
            )
            for row, item in zip(logprobs, responses, strict=True)
        ]


class Rollouts:
    """As much of the real ones as Parity uses."""

    def __init__(self, engine):
        self.engine, self.sampling = engine, SAMPLING

    def wait(self):
        pass


class Run:
    def __init__(self, model_folder, fault="", *, images=1, family="qwen3_vl", every=10):
        self.policy = make_policy(model_folder(family), temperature=SAMPLING.temperature, budget=64)
        with torch.no_grad():  # a fresh tiny model hardly looks at anything
            generator = torch.Generator().manual_seed(1)
            for parameter in self.policy.vlm.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.engine = Copy(self.policy.vlm, fault)
        self.encode = Encoder(self.policy.vlm)
        self.parity = Parity(
            self.policy,
            Rollouts(self.engine),
            self.encode,
            Console(),
            tolerance=1e-4,
            every=every,
        )
        self.examples = [replace(example(n), images=(numbered_image(n),) * images) for n in range(3)]

    def step(self, number):
        """What a step of the trainer does to the weights and the engine."""
        prompts = [self.encode(item) for item in self.examples]
        self.engine.sync(self.policy.vlm)
        responses = self.engine.generate(as_contexts(prompts), SAMPLING)
        groups = [
            Group(prompt, tuple(items), tuple(Reward(0.0, {}) for _ in items))
            for prompt, items in zip(prompts, responses, strict=True)
        ]
        rollout = RolloutBatch(tuple(groups), (0, 1, 2), self.policy.vlm.version, before={}, after={})
        metrics = self.parity(number, rollout)
        with torch.no_grad():
            for parameter in self.policy.vlm.parameters():
                parameter *= 1.1
        self.policy.vlm.version += 1
        return metrics


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_an_engine_that_agrees(model_folder, capsys, family):
    run = Run(model_folder, family=family, every=4)
    saved = {name: value.detach().clone() for name, value in run.policy.vlm.named_parameters()}
    due = [bool(run.step(number)) for number in range(1, 9)]
    assert due == [True, True, False, True, False, False, False, True]
    said = capsys.readouterr().out
    assert said.count("agree on log-probs") == 4 and said.count("changed weights reach the engine") == 1
    assert "hardly" not in said
    for name, value in run.policy.vlm.named_parameters():
        torch.testing.assert_close(value, saved[name] * 1.1**8)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no sync", "weights: new weights do not reach the engine"),
        ("raw", "temperature: "),
        ("unbanned", "banned mass: "),
        ("other pixels", "images: rows without images agree"),
        ("rounding", "dtype: "),
        ("nonsense", "none of the usual causes"),
    ],
)
def test_what_is_wrong_is_named(model_folder, fault, words):
    run = Run(model_folder, fault)
    with pytest.raises(ParityError, match=words) as caught:
        run.step(1)
    assert "rollout.tolerance" in str(caught.value)


def test_an_update_that_got_lost_is_caught_at_the_second_step(model_folder):
    run = Run(model_folder, "misses one")
    assert run.step(1)
    with pytest.raises(
        ParityError, match="weights: the last update did not reach the engine, another one did"
    ):
        run.step(2)


@pytest.mark.slow
def test_only_the_faulty_kinds_are_named(model_folder):
    run = Run(model_folder, "prepacked")
    with pytest.raises(ParityError) as caught:
        run.step(1)
    named = str(caught.value).partition("do not reach the engine: ")[2].split(", ")
    assert named and all("mlp" in kind for kind in named)


@pytest.mark.slow
def test_any_single_kind_that_does_not_arrive_is_caught(model_folder):
    """All kinds are changed at once, and one of them does not reach the engine."""
    run = Run(model_folder)
    run.engine.sync(run.policy.vlm)
    for kind in kinds_of(run.policy.vlm):
        marks = kind.split("#")
        run.engine.withheld = [
            name
            for name, _ in run.policy.vlm.named_parameters()
            if name.startswith(f"model.{marks[0]}") and name.endswith(marks[-1])
        ]
        assert run.engine.withheld
        assert not run.parity.check_weight_update(run.examples).arrived, kind
    run.engine.withheld = ()
    assert run.parity.check_weight_update(run.examples).arrived


def test_the_disturbance_leaves_nothing_behind(model_folder):
    vlm = load_vlm(str(model_folder()))
    saved = {name: value.detach().clone() for name, value in vlm.model.named_parameters()}
    version = vlm.version
    with perturbed(vlm):
        changed = {
            name for name, value in vlm.model.named_parameters() if not torch.equal(value, saved[name])
        }
        assert vlm.version != version
    assert changed == set(kinds_of(vlm).values()) and len(changed) > 20
    assert vlm.version == version
    assert all(torch.equal(value, saved[name]) for name, value in vlm.model.named_parameters())
