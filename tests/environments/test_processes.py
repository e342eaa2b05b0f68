"""Processes of environments: what comes back from them, what they leave, and what ends them."""

import os
import time
from contextlib import closing

import psutil
import pytest
import torch

from tests.environments.played import AskTwice, Leaving, Parent, Statistician
from vlm_sapo.environments.environment import BadObservation, Observation, ToolResult, checked
from vlm_sapo.environments.processes import Environments, Failure, Step
from vlm_sapo.types import Example, ResponseText


def example(number, **columns):
    return Example(f"e{number}", "Why?", "7", columns=columns)


def first_turns(environments, count, *, number=0, **columns):
    [instances] = environments.new([example(number, **columns)], [range(count)])
    return instances, environments.step([Step(item, ResponseText("a turn")) for item in instances])


def test_values_come_back_as_plain_ones():
    """Checkpoints hold no others."""
    with closing(Environments(Statistician, timeout=20.0, workers=2)) as environments:
        _, [answer] = first_turns(environments, 1)
    assert type(answer.text) is str and type(answer.reward) is float
    assert answer.info == {"share": 0.5, "count": 2, "flag": 1, "whole": 1}
    assert {type(value) for value in answer.info.values()} == {int, float}
    assert not answer.done


@pytest.mark.parametrize(
    ("observation", "sentence"),
    [
        (Observation(results=(ToolResult(text=None),)), "must be a str; it is a NoneType"),
        (Observation(text=3), "must be a str; it is a int"),
        (Observation("text", results=(ToolResult("a"),)), "with results must have no text"),
        (Observation(images=("a.png",)), "an image must be a PIL image; it is a str"),
        (Observation(reward=torch.ones(2)), "must be a finite number"),
        (None, "must return an Observation; it returned NoneType"),
    ],
)
def test_what_an_environment_must_not_return(observation, sentence):
    with pytest.raises(BadObservation, match=sentence):
        checked(observation)


def test_processes_are_used_again_but_not_after_an_error():
    with closing(Environments(Leaving, timeout=20.0, workers=2)) as environments:
        instances, answers = first_turns(environments, 2, number=1)
        assert all(isinstance(answer, Observation) for answer in answers)
        before = {item.process.pid for item in instances}
        environments.release(instances)
        instances, answers = first_turns(environments, 3)
        assert [answer.kind for answer in answers] == ["error"] * 3 and "left a mark" in answers[0].detail
        environments.release(instances)
        instances, answers = first_turns(environments, 4, number=1)
        assert all(isinstance(answer, Observation) and not answer.info for answer in answers)
        assert not before & {item.process.pid for item in instances}


def test_idle_processes_and_the_first_one_may_be_ended_by_the_system():
    with closing(Environments(AskTwice, timeout=20.0, workers=2)) as environments:
        instances, _ = first_turns(environments, 2)
        pids = [item.process.pid for item in instances]
        environments.release(instances)
        for pid in pids:
            os.kill(pid, 9)
        time.sleep(0.2)
        instances, answers = first_turns(environments, 2)
        assert all(isinstance(answer, Observation) for answer in answers)
        environments._first.kill()
        environments._first.join()
        _, answers = first_turns(environments, 3)
        assert all(isinstance(answer, Observation) for answer in answers)


def test_what_a_killed_environment_started_ends_with_it(tmp_path):
    with closing(Environments(Parent, timeout=2.0, workers=1)) as environments:
        _, [answer] = first_turns(environments, 1, file=str(tmp_path / "pid"))
        assert answer == Failure("timeout", "no answer within 2 s")
        child = int((tmp_path / "pid").read_text())
        deadline = time.monotonic() + 10
        while _runs(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(child)


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nothing_starts_after_the_end():
    environments = Environments(AskTwice, timeout=20.0, workers=1)
    environments.close()
    with pytest.raises(ValueError, match="closed already"):
        first_turns(environments, 1)


def test_a_hundred_answers_at_a_time():
    with closing(Environments(AskTwice, timeout=20.0, workers=4)) as environments:
        instances, answers = first_turns(environments, 100, number=5)
        assert [answer.reward for answer in answers] == [0.25] * 100
        assert len({item.process.pid for item in instances}) == 100
