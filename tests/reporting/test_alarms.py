"""When the alarms warn of a collapse, and when not."""

import random

import pytest

from vlm_sapo.config.run import AlarmsConfig as Section
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.console import Console

HEALTHY = {
    "policy/entropy": 1.0,
    "response/tokens": 100.0,
    "reward/mean": 0.5,
    "policy/grad_norm": 0.2,
    "response/identical": 0.1,
}
COLLAPSED = [
    ("policy/entropy", 0.05, "entropy has collapsed: "),
    ("response/tokens", 900.0, "responses have 500 tokens over the last 4 steps, 100 at the start"),
    ("response/tokens", 5.0, "responses have "),
    ("reward/mean", 0.1, "the reward has fallen to 0.200 over the last 4 steps, from 0.500"),
    ("policy/grad_norm", 9.0, "gradients have a norm of 4.6 over the last 4 steps, 0.2 at the start"),
    ("response/identical", 0.95, "of responses equal another one of their group over the last 4 steps"),
]
"""An alarm compares the window's mean, so it comes as soon as that crosses the threshold."""


def build(stop=None) -> Alarms:
    thresholds = Section(window=4).model_dump(exclude={"stop"})
    return Alarms(Console(), **thresholds, stop=stop)


def watch(alarms, count, start=0, **changed):
    for step in range(start, start + count):
        alarms({"step": step} | HEALTHY | changed)


@pytest.mark.parametrize(("name", "value", "text"), COLLAPSED)
def test_a_collapse_is_warned_of_once_and_can_stop_the_run(name, value, text, capsys):
    reasons = []
    alarms = build(reasons.append)
    watch(alarms, 8)
    assert capsys.readouterr().out == ""
    watch(alarms, 8, start=8, **{name: value})
    output = capsys.readouterr().out
    assert output.count("warning") == len(reasons) == 1
    watch(alarms, 1, start=16, **{name: value})
    assert text in reasons[0]
    assert capsys.readouterr().out == ""
    watch(alarms, 8, start=17)
    watch(alarms, 8, start=25, **{name: value})
    assert capsys.readouterr().out.count("warning") == 1


def test_no_alarm_for_noise_and_slow_change(capsys):
    alarms = build()
    for step in range(60):
        factor = (0.3 if step % 3 else 2.4) * (1 + step / 60)
        alarms({"step": step} | {name: value * factor for name, value in HEALTHY.items()})
    assert capsys.readouterr().out == ""


def test_no_alarm_when_a_run_starts_to_learn(capsys):
    """No gradient at first, then small gradients; a reward near 0."""
    alarms, dice = build(), random.Random(0)
    for step in range(400):
        norm, reward = (0.0, 0.0) if step < 8 else (0.03, dice.gauss(0, 0.02))
        alarms({"step": step} | HEALTHY | {"policy/grad_norm": norm, "reward/mean": reward})
    assert capsys.readouterr().out == ""


def test_an_alarm_that_comes_and_goes_warns_once(capsys):
    alarms = build()
    watch(alarms, 8)
    for step in range(8, 60):
        alarms({"step": step} | HEALTHY | {"policy/entropy": 0.098 if step % 3 else 0.103})
    assert capsys.readouterr().out.count("entropy has collapsed") == 1


def test_a_resumed_run_compares_with_its_first_steps(capsys):
    alarms = build()
    alarms.resume([{"step": step} | HEALTHY for step in range(6)])
    watch(alarms, 4, start=6, **{"policy/entropy": 0.01})
    assert capsys.readouterr().out.count("entropy has collapsed") == 1
    again = build()
    again.resume(
        [{"step": step} | HEALTHY | ({"policy/entropy": 0.01} if step > 5 else {}) for step in range(10)]
    )
    watch(again, 2, start=10, **{"policy/entropy": 0.01})
    assert capsys.readouterr().out == ""


def test_no_alarm_for_steps_without_an_update(capsys):
    alarms = build()
    for step in range(9):
        alarms({"step": step, "reward/mean": 0.0, "response/tokens": 100.0})
    assert capsys.readouterr().out == ""
