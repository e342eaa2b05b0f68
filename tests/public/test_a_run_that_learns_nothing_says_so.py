"""A run whose groups have equal rewards throughout ended with "done", like any other.

Source: https://github.com/modelscope/ms-swift/issues/4547
"""

import pytest

from vlm_sapo.config.run import AlarmsConfig
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.console import Console

EQUAL = {"reward/zero_variance": 1.0, "response/identical": 0.1, "response/truncated": 0.1}
LEARNS = {"reward/zero_variance": 0.5, "policy/grad_norm": 0.3, "reward/mean": 0.4}


def watched(steps: list[dict], **options) -> tuple[Alarms, list[str]]:
    """The alarms after a run with these metrics, and the reasons to stop that they gave."""
    reasons: list[str] = []
    thresholds = AlarmsConfig().model_dump(exclude={"stop"})
    alarms = Alarms(Console(), **thresholds, stop=reasons.append, **options)
    for number, metrics in enumerate(steps):
        alarms({"step": number + 1} | metrics)
    return alarms, reasons


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ({"reward/mean": 0.0, "outcome/math/no_answer": 60}, "every reward is 0 (no_answer 60 per step)"),
        ({"reward/mean": 0.25}, "every reward is 0.25: read responses and answers"),
        (
            {"reward/mean": 0.2, "reward/accuracy": 0.0, "reward/short": 1.0},
            "every reward is 0.2 (part accuracy 0, part short 1): read responses",
        ),
        ({"reward/mean": 0.0, "response/identical": 1.0}, "responses of a group are the same"),
        ({"reward/mean": 0.3, "reward/zero_variance": 0.6, "response/truncated": 0.9}, "cut off"),
        ({"reward/mean": 0.3, "reward/zero_variance": 0.6, "policy/grad_norm": 0.0}, "the gradient is 0"),
    ],
)
def test_the_alarm_names_the_likely_cause(metrics, cause, capsys):
    alarms, reasons = watched([EQUAL | metrics] * 12)
    assert len(reasons) == 1 and "5 steps in a row taught nothing" in reasons[0] and cause in reasons[0]
    assert "nothing was learnt in 12 of 12 steps" in alarms.learning.conclusion()
    assert capsys.readouterr().out.count("warning") == 1


def test_problems_that_are_always_or_never_solved():
    steps = [EQUAL | {"reward/mean": 0.1 * (number % 3)} for number in range(9)]
    assert "always or never solved" in watched(steps)[0].learning.conclusion()


def test_nearly_every_step_counts_at_the_end():
    steps = [EQUAL | {"reward/mean": 0.0}] * 4 + [LEARNS]
    assert "nothing was learnt in 16 of 20 steps" in watched(steps * 4)[0].learning.conclusion()


@pytest.mark.parametrize(
    "steps",
    [
        [LEARNS] * 12,
        [EQUAL | {"reward/mean": 0.0}] * 4 + [LEARNS] * 8,
        [LEARNS, EQUAL | {"reward/mean": 0.2}] * 8,
        [EQUAL | {"reward/mean": 0.0, "policy/skipped_updates": 4}] * 9,
    ],
    ids=["learns", "starts late", "every second step", "skipped updates, which have their own warning"],
)
def test_no_alarm_for_a_run_that_learns(steps, capsys):
    alarms, reasons = watched(steps)
    assert not reasons and not alarms.learning.conclusion() and not capsys.readouterr().out


def test_a_solved_run_is_no_alarm(capsys):
    alarms, reasons = watched([LEARNS] * 3 + [EQUAL | {"reward/mean": 1.0}] * 20)
    said = capsys.readouterr().out
    assert not reasons and "these rows are solved" in said and "warning" not in said
    assert not alarms.learning.conclusion()
    alarms, reasons = watched([EQUAL | {"reward/mean": 1.0}] * 8, full_reward=2.0)
    assert reasons and "every reward is 1" in alarms.learning.conclusion()  # half of what there is


def test_own_advantages_may_learn_from_equal_rewards():
    steps = [EQUAL | {"reward/mean": 0.0, "policy/grad_norm": 0.2}] * 9
    assert watched(steps)[1] and not watched(steps, rewards_decide=False)[1]
