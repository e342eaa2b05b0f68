"""The console line of a step."""

import pytest

from vlm_sapo.reporting.step_report import headline

RECORD = {
    "reward/mean": 0.5,
    "response/truncated": 0.25,
    "response/tokens": 12.0,
    "time/step": 1.0,
    "rollout/tokens_per_second": 480.0,
    "memory/host_peak_gb": 1.25,
}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, "no learning signal: all rewards equal within every group"),
        ({"policy/skipped_updates": 1}, "update skipped: not finite"),
        ({"policy/effective_update": 1.0, "policy/entropy": 0.5}, "entropy 0.500  unclipped 100 %"),
        ({"policy/effective_update": 0.997, "policy/entropy": 0.5}, "entropy 0.500  unclipped 99.7 %"),
    ],
)
def test_a_step_says_what_was_trained(metrics, words):
    line = headline(RECORD | metrics, [0.5])
    assert line.startswith("reward 0.500  tokens 12.0 (25% truncated)  ") and f"  {words}  1.0 s" in line


def test_rewards_are_compared_with_those_of_ten_steps_before():
    assert "reward 0.500 (last 10 steps +0.250 against the 10 before)  tok" in headline(
        RECORD, [0.25] * 10 + [0.5] * 10
    )
