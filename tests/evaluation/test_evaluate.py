"""Evaluation: what a score is, its interval, and rows that cannot be used."""

from contextlib import closing

import numpy as np
import pytest

from tests.conftest import completion, example
from vlm_sapo.evaluation.evaluate import evaluate
from vlm_sapo.evaluation.results import bootstrap, summarize
from vlm_sapo.rewards.pool import Reward
from vlm_sapo.types import Prompt, RowError, Sampling


@pytest.fixture(scope="module")
def reward():
    with closing(Reward([{"name": "math", "label": "accuracy"}], workers=1)) as made:
        yield made


class Parrot:
    """An engine that answers the gold answer on the first of two responses and runs on at the second."""

    def __init__(self):
        self.seeds = []

    def generate(self, prompts, sampling):
        self.seeds.append(sampling.seed)
        return [[said("\\boxed{2}", "stop"), said("hmm", "length")] for _ in prompts]


def said(text: str, finish: str):
    made = completion([1, 2, 3] if finish == "stop" else [1] * 5, finish)
    return type(made)(made.ids, made.logprobs, text, finish)


def encode(row) -> Prompt:
    if row.id == "e3":
        raise RowError("row e3: no")
    return Prompt(row, "", "", None, None, (), None, None)


def test_scores_are_means_over_samples_and_problems(reward):
    engine = Parrot()
    result, records = evaluate(
        engine,
        [example(number) for number in range(3)],
        encode,
        reward,
        Sampling(2, 8, 1.0, 7),
        part="accuracy",
        batch=2,
    )
    assert result["pass@1"] == 0.5 and result["n"] == 3 and result["samples"] == 2
    assert result["response_tokens"] == 4.0 and result["truncated"] == 0.5
    assert [record["scores"] for record in records] == [[1.0, 0.0]] * 3
    assert len(set(engine.seeds)) == 2  # no two batches draw with the same seed


def test_an_unusable_row_stops_or_is_counted(reward):
    rows = [example(number) for number in range(5)]
    sampling = Sampling(2, 8, 1.0, 7)
    with pytest.raises(RowError, match="row e3"):
        evaluate(Parrot(), rows, encode, reward, sampling, part="accuracy")
    result, records = evaluate(Parrot(), rows, encode, reward, sampling, part="accuracy", skip=True)
    assert result["skipped"] == 1 and result["n"] == 4
    assert [record["id"] for record in records] == ["e0", "e1", "e2", "e4"]
    with pytest.raises(ValueError, match="no usable row"):
        evaluate(Parrot(), [example(3)], encode, reward, sampling, part="accuracy", skip=True)


def test_the_interval_is_that_of_the_binomial():
    """300 problems, one sample each, 180 right: .6 with a standard error of .0283."""
    low, high = bootstrap(np.array([1.0] * 180 + [0.0] * 120))
    assert low == pytest.approx(0.6 - 1.96 * 0.0283, abs=0.01)
    assert high == pytest.approx(0.6 + 1.96 * 0.0283, abs=0.01)


def test_certainty_has_no_width():
    records = [{"scores": [1.0], "tokens": [2], "truncated": [False]}] * 4
    assert summarize(records)["ci95"] == [1.0, 1.0]
