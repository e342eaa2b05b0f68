"""The sentences of a summary: what changed, how certain that is, and what to look at."""

import pytest

from vlm_sapo.config.files import parse
from vlm_sapo.config.load import dump
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.compare import compare
from vlm_sapo.tools.report.findings import (
    describe_comparison,
    describe_comparisons,
    describe_results,
    describe_training,
)

CONFIG = parse(
    dump(
        TrainConfig(
            model={"path": "m"},
            data={"source": "d"},
            reward={"parts": [{"name": "math"}]},
            train={"steps": 60},
        )
    )
)
STEP = {
    "reward/mean": 0.5,
    "reward/zero_variance": 0.1,
    "rollout/responses": 8,
    "response/tokens": 10.0,
    "response/truncated": 0.0,
    "policy/entropy": 0.5,
    "policy/grad_norm": 1.0,
    "policy/effective_update": 0.99,
    "policy/mismatch_mean": 1e-6,
}


def samples(scores: list[float], name: str = "b") -> dict:
    return {name: {(row, str(row)): {"id": str(row), "scores": [score]} for row, score in enumerate(scores)}}


def comparison(before: list[float], after: list[float]):
    [one] = compare(samples(before), samples(after))
    return one


def steps(count: int = 30, **changed) -> list[dict]:
    """`count` equal steps; of the metrics named (`a__b` for a/b) a value, or a function of the step."""
    return [
        {"step": step}
        | STEP
        | {
            name.replace("__", "/"): value(step) if callable(value) else value
            for name, value in changed.items()
        }
        for step in range(1, count + 1)
    ]


def looks(metrics: list[dict], config: dict = CONFIG) -> list[str]:
    return [finding.text for finding in describe_training(metrics, config) if finding.kind == "look"]


def test_a_certain_change_is_claimed_with_its_interval_and_test():
    kind, text = describe_comparison(comparison([0.0] * 12 + [1.0] * 8, [1.0] * 20), "in 40 steps")
    assert kind == "better" and text.startswith("b: pass@1 rose in 40 steps: 0.400 to 1.000 (+0.600, 95 %")
    assert "The same 20 problems both times: 12 better, 0 worse, sign test p = 0.00049." in text
    kind, text = describe_comparison(comparison([1.0] * 20, [0.0] * 12 + [1.0] * 8), "from A to B")
    assert kind == "worse" and "fell from A to B" in text


def test_no_change_is_claimed_where_the_interval_includes_0():
    kind, text = describe_comparison(comparison([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]), "in 4 steps")
    assert kind == "same" and "no measurable change in 4 steps" in text and "which includes 0" in text
    kind, text = describe_comparison(comparison([0.0, 1.0], [0.0, 1.0]), "in 1 step")
    assert kind == "same" and "in 1 step: pass@1 stays 0.500" in text


def test_three_problems_are_too_few_for_a_claim():
    """All three won: the bootstrap interval excludes 0, but p is 0.25."""
    kind, text = describe_comparison(comparison([0.0] * 3, [1.0] * 3), "in 4 steps")
    assert kind == "unsure" and "may be chance" in text and "p = 0.25" in text


def test_many_comparisons_are_said_to_be_many():
    better = comparison([0.0] * 20, [1.0] * 20)
    assert len(describe_comparisons([better] * 2, "now")) == 2
    assert "one interval in 20" in describe_comparisons([better] * 3, "now")[-1].text


def test_a_mean_that_few_large_changes_move_is_not_certain():
    """Graded scores: most problems lose a little, some gain a lot."""
    one = comparison([0.0] * 8 + [0.55] * 40, [1.0] * 8 + [0.5] * 40)
    finding = describe_comparison(one, "from A to B")
    assert (
        finding.kind == "unsure" and "8 better, 40 worse" in finding.text and "don't confirm" in finding.text
    )
    assert "few problems" in describe_comparison(comparison([0.0] * 5, [1.0] * 5), "from A to B").text


def test_evaluations_without_samples_are_compared_by_their_intervals():
    first = {"name": "b", "step": 0, "pass@1": 0.4, "ci95": [0.35, 0.45], "n": 400}
    for score, kind in ((0.6, "better"), (0.2, "worse"), (0.42, "same")):
        last = first | {"step": 9, "pass@1": score, "ci95": [score - 0.05, score + 0.05]}
        [finding] = describe_results([first, last], [])
        assert finding.kind == kind and "no paired test" in finding.text
    few = [row | {"n": 2} for row in (first, first | {"step": 9, "pass@1": 1.0, "ci95": [1.0, 1.0]})]
    assert describe_results(few, [])[0].kind == "unsure"
    assert "evaluated once" in describe_results([first], [])[0].text
    assert "No evaluations" in describe_results([], [])[0].text


def test_a_healthy_run_has_nothing_to_look_at():
    assert looks(steps()) == []
    texts = [finding.text for finding in describe_training(steps(), CONFIG)]
    assert any("No alarm" in text for text in texts)
    assert any("0.500 over the first 10 steps, 0.500 over the last 10 steps" in text for text in texts)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            steps(60, policy__entropy=lambda step: 0.5 if step < 30 else 0.001),
            "Alarm at step 48: entropy has collapsed",
        ),
        (
            steps(response__truncated=lambda step: 0.02 * step),
            "Truncated: 51.0% of the responses of the last",
        ),
        (steps(reward__zero_variance=0.7), "Zero variance: in 70% of the groups"),
        (steps(policy__mismatch_mean=lambda step: 0.01 if step == 7 else 1e-6), "run vlm-sapo check"),
        (steps(policy__effective_update=0.6), "the objective removed 40.0% of the gradient"),
        (steps(policy__skipped_updates=lambda step: int(step < 3)), "2 updates were skipped"),
        (steps(outcome__math__timeout=1), "Reward math: outcome timeout of 30 responses"),
        (steps(outcome__math__no_answer=4), "math found none in 50% of the responses"),
        (steps(30, reward__zero_variance=1.0, policy__grad_norm=0.0), "Nothing was learnt in 30 of 30 steps"),
    ],
)
def test_what_to_look_at(metrics, words):
    assert any(words in text for text in looks(metrics)), looks(metrics)


def test_half_precision_explains_a_larger_mismatch():
    config = CONFIG | {"train": CONFIG["train"] | {"precision": "bf16"}}
    assert looks(steps(policy__mismatch_mean=0.01), config) == []
    assert len(looks(steps(policy__mismatch_mean=0.1), config)) == 1


def test_a_config_of_another_version_is_said_not_to_give_alarms():
    assert "can't be judged" in looks(steps(), CONFIG | {"nonsense": 1})[0]


def test_a_run_on_demonstrations_has_a_trend_of_its_loss():
    [finding] = describe_training([{"step": step, "loss": 3.0 - step} for step in (1, 2)], {"train": {}})
    assert finding.text == "Loss: 2.000 over the first step, 1.000 over the last step."
