"""Runs on servers: synchronous and one step ahead, resumed, and after servers failed; and further ahead on the
policy itself."""

import json
import random
import re
import threading

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import slow_but
from tests.rollout.model_server import HANG_UP, ModelServer
from tests.training.conftest import short_run
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.reporting import step_report as reporter
from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.rollout.sampler import Sampler
from vlm_sapo.training.checks import ParityError
from vlm_sapo.training.trainer import train

STEPS = 4
BOTH = [pytest.param(0, marks=pytest.mark.slow), 1]


@pytest.fixture
def server(model_folder):
    model_server = ModelServer(model_folder())
    yield model_server
    model_server.close()


@pytest.fixture
def settings(model_folder, tmp_path, server):
    (tmp_path / "reward.py").write_text("def even(response, example):\n    return float(len(response) % 2)\n")

    def make(name, *overrides):
        engine = {"type": "vllm_server", "servers": [server.url], "patience": 1.0, "timeout": 20.0}
        values = {
            "run": {"dir": str(tmp_path / name)},
            "model": {"path": str(model_folder())},
            "data": {"source": "data/shapes.py:rows", "args": {"size": 20}, "max_prompt_tokens": 256},
            "rollout": {"group": 4, "max_tokens": 8, "engine": engine, "ahead": 1},
            "reward": {"parts": [{"name": f"{tmp_path}/reward.py:even"}], "workers": 1},
            "train": {"steps": STEPS, "lr": 1e-2, "prompts_per_step": 4, "minibatches": 2},
            "log": {"rollouts": 4},
            "checkpoint": {"every": 2},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return configfile.load(cfg.TrainConfig, str(path), list(overrides))

    return make


def rows(folder, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def numbers(folder) -> list[dict]:
    """The metrics but for durations, and for the comparisons that a resumed run makes more often."""
    apart = re.compile("time/|memory/|parity/|rollout/tokens_per_second")
    return [{name: value for name, value in row.items() if not apart.match(name)} for row in rows(folder)]


def asked(folder) -> list[list[str]]:
    """The rows of each step."""
    logged = rows(folder, "rollouts.jsonl")
    return [[row["id"] for row in logged if row["step"] == step] for step in range(1, STEPS + 1)]


@pytest.mark.slow
def test_prefetching_keeps_the_order_of_the_data_and_logs_the_staleness(settings, tmp_path):
    train(settings("ahead"))
    train(settings("same", "rollout.ahead=0"))
    assert asked(tmp_path / "ahead") == asked(tmp_path / "same")
    behind = [row["rollout/updates_behind"] for row in rows(tmp_path / "ahead")]
    assert behind[0] == 0 and all(0 < count <= 2 for count in behind[1:])
    assert not any(row["rollout/updates_behind"] for row in rows(tmp_path / "same"))
    first, second = rows(tmp_path / "ahead")[:2]
    assert first["minibatch0/ratio_max"] == 1.0 != second["minibatch0/ratio_max"], "staleness is in the ratio"
    ahead, same = numbers(tmp_path / "ahead"), numbers(tmp_path / "same")
    assert ahead[0] == same[0] and ahead[1] != same[1]


def test_prefetched_responses_are_of_the_weights_a_step_before(settings, tmp_path, server):
    """The server saw its requests and new weights in this order."""
    train(settings("run", "eval.every=0"))
    routes = [route for route, _ in server.requests if route in ("collective_rpc", "inference/v1/generate")]
    order = "".join("W" if route == "collective_rpc" else "g" for route in routes)
    one = "W" + "gggg" + "gggg" + "Wgg"  # a step sampled, the next prefetched, changed weights tried
    two = "W" + "gggg" + "gg"  # new weights, the next drawn, a few for the comparison
    assert order == one + two + "W" + "gggg" + "W"


@pytest.mark.slow
def test_evaluations_in_between_change_nothing(settings, tmp_path, server):
    held_out = "eval.data={source: 'data/shapes.py:rows', args: {split: test, size: 6}}"
    train(settings("plain"))
    train(settings("measured", held_out, "eval.every=1"))
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "measured")
    assert len(rows(tmp_path / "measured", "evaluations.jsonl")) == STEPS + 1
    final = load_vlm(str(tmp_path / "measured/final"))
    for own, served in zip(final.parameters(), server.vlm.parameters(), strict=True):
        assert torch.equal(own, served), "the last evaluation was not of the last weights"


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_resumed_run_equals_the_whole_one(settings, tmp_path, monkeypatch):
    options = ("rollout.resample=1",)
    train(settings("whole", *options))

    def stop(record, rewards):
        if record["step"] == 3:
            raise Stopped
        return ""

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(reporter, "headline", stop)
        train(settings("resumed", *options))
    train(settings("resumed", *options))
    assert numbers(tmp_path / "resumed") == numbers(tmp_path / "whole")
    assert asked(tmp_path / "resumed") == asked(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_dead_server_leaves_a_checkpoint_to_resume_from(settings, tmp_path, server, ahead, capsys):
    """It dies in step 3, after which no checkpoint is due, and comes back with its first weights."""
    options = (f"rollout.ahead={ahead}", "checkpoint.every=0")
    train(settings("whole", *options))

    def die_later(route, body):
        steps = rows(tmp_path / "broken") if (tmp_path / "broken/metrics.jsonl").exists() else []
        return HANG_UP if len(steps) >= 2 else None

    server.fault = die_later
    with pytest.raises(RolloutError, match="no server of .* answered"):
        train(settings("broken", *options))
    assert "a checkpoint after" in capsys.readouterr().out
    saved = {path.name for path in (tmp_path / "broken/checkpoints").iterdir()}
    assert saved <= {"step_000002", "step_000003"} and len(saved) == 1
    server.fault = lambda route, body: None
    server.restart()
    train(settings("broken", *options))
    assert asked(tmp_path / "broken") == asked(tmp_path / "whole"), "a row was lost or used twice"
    assert numbers(tmp_path / "broken")[:2] == numbers(tmp_path / "whole")[:2]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_an_engine_that_fails_a_later_comparison_loses_no_row(settings, tmp_path, server, ahead, capsys):
    """From step 3 on its log-probs are nonsense. Its responses of that step are not trained on."""
    options = (f"rollout.ahead={ahead}", "checkpoint.every=0", "rollout.check_every=1")
    train(settings("whole", *options))

    def nonsense(route, body):
        steps = rows(tmp_path / "broken") if (tmp_path / "broken/metrics.jsonl").exists() else []
        if route != "inference/v1/generate" or len(steps) < 2:
            return None
        answer = server.act(route, body)
        for number, item in enumerate(answer["choices"][0]["logprobs"]["content"]):
            item["logprob"] -= 3.0 * (number % 3)
        return answer

    server.fault = nonsense
    with pytest.raises(ParityError, match="disagree at step 3: .*Likely cause: positions"):
        train(settings("broken", *options))
    assert "a checkpoint after" in capsys.readouterr().out
    server.fault = lambda route, body: None
    train(settings("broken", *options))
    assert asked(tmp_path / "broken") == asked(tmp_path / "whole")
    if not ahead:
        assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_an_outage_in_a_comparison_changes_nothing(settings, tmp_path, server):
    """A comparison asks for two responses, a step for four. What the step sampled is in the checkpoint."""
    train(settings("whole", "checkpoint.every=0"))
    steps = tmp_path / "broken/metrics.jsonl"

    def out(route, body):
        probing = route == "inference/v1/generate" and body["sampling_params"]["n"] == 2
        return HANG_UP if probing and steps.is_file() and len(rows(tmp_path / "broken")) == 1 else None

    server.fault = out
    with pytest.raises(RolloutError, match="no server of .* answered"):
        train(settings("broken", "checkpoint.every=0"))
    server.fault = lambda route, body: None
    train(settings("broken", "checkpoint.every=0"))
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert asked(tmp_path / "broken") == asked(tmp_path / "whole")


def test_each_of_many_servers_is_compared(settings, model_folder, server):
    """The third one's log-probs are those of another temperature, say."""
    more = [ModelServer(model_folder()) for _ in range(2)]

    def off(route, body):
        if route != "inference/v1/generate":
            return None
        answer = more[1].act(route, body)
        for choice in answer["choices"]:
            for item in choice["logprobs"]["content"]:
                item["logprob"] -= 2.0
        return answer

    more[1].fault = off
    urls = ", ".join(f"'{item.url}'" for item in (server, *more))
    with pytest.raises(ParityError, match=f"on {more[1].url} alone the mean is 2"):
        train(settings("run", f"rollout.engine.servers=[{urls}]"))
    for item in more:
        item.close()


def test_uncorrected_staleness_gives_a_warning(settings, capsys):
    train(settings("run", "train.old_logprobs=recompute", "train.steps=1"))
    assert "the loss does not correct for the older weights" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["masked", pytest.param("truncated", marks=pytest.mark.slow)])
def test_correction_weights_responses_of_older_weights(settings, tmp_path, kind):
    low = ", low: 0.5" if kind == "masked" else ""
    correction = f"algo.correction={{type: {kind}, level: token, high: 1.05{low}}}"
    train(settings("run", correction))
    first, *later = rows(tmp_path / "run")
    assert abs(first["minibatch0/correction_mean"] - 1) < 1e-5 and first["minibatch0/correction_cut"] == 0
    assert any(row["minibatch0/correction_cut"] > 0 for row in later)
    assert all(0 < row["policy/correction_ess"] <= 1 + 1e-6 for row in later)
    assert all(row["minibatch0/ratio_max"] == 1.0 for row in later), "old log-probs are the policy's own"
    assert all(row["minibatch0/mismatch_mean"] > 1e-3 for row in later)


@pytest.mark.slow
def test_servers_that_come_and_go_change_nothing(model_folder, settings, server, tmp_path):
    """One of two at a time, at random moments, back with its first weights."""
    options = ("train.steps=24", "rollout.ahead=1", "rollout.engine.patience=30")
    train(settings("whole", *options))
    other, done, restarts = ModelServer(model_folder()), threading.Event(), []

    def disturb():
        dice = random.Random(0)
        while not done.wait(dice.uniform(0.1, 0.4)):
            gone = dice.choice([server, other])
            gone.close()
            done.wait(dice.uniform(0.0, 0.2))
            gone.open(gone.port)
            restarts.append(gone)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        urls = f"rollout.engine.servers=[{server.url},{other.url}]"
        train(settings("disturbed", *options, urls))
    finally:
        done.set()
        thread.join()
        other.close()
    assert len(restarts) >= 4
    assert numbers(tmp_path / "disturbed") == numbers(tmp_path / "whole")
    assert rows(tmp_path / "disturbed", "rollouts.jsonl") == rows(tmp_path / "whole", "rollouts.jsonl")


FURTHER = ("rollout.ahead=3", "train.old_logprobs=rollout", "train.steps=7", "train.minibatches=2")


@pytest.fixture
def further(model_folder, tmp_path):
    """A run that samples from the policy itself, three steps ahead."""

    def make(name, *overrides):
        (tmp_path / name).mkdir(exist_ok=True)
        options = ("checkpoint.every=1", "checkpoint.keep_last=9", "eval.data=null", "log.rollouts=4")
        return short_run(tmp_path / name, model_folder(), *FURTHER, *options, *overrides)

    return make


@pytest.mark.slow
def test_three_steps_ahead_responses_are_three_steps_old(further, tmp_path):
    train(further("ahead"))
    train(further("same", "rollout.ahead=0"))
    ahead, same = numbers(tmp_path / "ahead/run"), numbers(tmp_path / "same/run")
    updates = [sum("grad_norm" in key and "minibatch" in key for key in row) for row in ahead]
    assert sum(updates) > 7
    done = [sum(updates[:step]) for step in range(7)]
    assert [row["rollout/updates_behind"] for row in ahead] == [
        done[step] - done[max(0, step - 3)] for step in range(7)
    ]
    ids = [
        [row["id"] for row in rows(tmp_path / name / "run", "rollouts.jsonl")] for name in ("ahead", "same")
    ]
    assert ids[0] == ids[1], "the same rows in the same order"
    assert ahead[0] == same[0] and ahead[1] != same[1]
    assert ahead[0]["minibatch0/ratio_max"] == 1.0 != ahead[4]["minibatch0/ratio_max"]


@pytest.mark.parametrize("interrupted", slow_but("update", of=["update", "sample"]))
def test_a_run_three_steps_ahead_resumes_to_the_number(further, tmp_path, monkeypatch, interrupted):
    """It fails while it logs step 4, or while it samples step 6 before it trains step 3."""
    train(further("whole"))

    def stop(self, step, version, sample=Sampler.sample):
        if step == 6:
            raise Stopped
        return sample(self, step, version)

    def headline(record, rewards):
        if record["step"] == 4:
            raise Stopped
        return ""

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if interrupted == "sample":
            patch.setattr(Sampler, "sample", stop)
        else:
            patch.setattr(reporter, "headline", headline)
        train(further("resumed"))
    train(further("resumed"))
    assert numbers(tmp_path / "resumed/run") == numbers(tmp_path / "whole/run")
