"""Evaluation: scores and their interval, resuming after an interruption, unusable rows."""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import example
from vlm_sapo.evaluation.evaluate import Evaluation
from vlm_sapo.evaluation.results import Measure, bootstrap, majority, pass_at, summarize
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rollout.environment import environment_turn
from vlm_sapo.types import Prompt, Response, RowError, Sampling

MEASURE = Measure("accuracy")
SAMPLING = Sampling(2, 8, 1.0, 7)


@pytest.fixture(scope="module")
def reward():
    with closing(RewardPool([{"name": "math", "label": "accuracy"}], workers=1)) as pool:
        yield pool


class FakeEngine:
    """An engine that answers the gold answer on the first of two responses and runs on at the second."""

    def __init__(self, stop_at=None):
        self.slots, self.stop_at = [], stop_at

    def generate(self, contexts, sampling):
        self.slots.append(sampling.slots)
        if len(self.slots) == self.stop_at:
            raise KeyboardInterrupt
        return [[response("\\boxed{2}", "stop"), response("hmm", "length")] for _ in contexts]


def response(text: str, finish: str):
    ids = torch.tensor([1, 2, 3] if finish == "stop" else [1] * 5)
    return Response.sampled(torch.zeros(3, 1), ids, torch.zeros(len(ids)), text=text, finish=finish)


def encode(row) -> Prompt:
    if row.id == "e3":
        raise RowError("row e3: no")
    return Prompt(row, "", "", None, None, row.images, None, None)


def test_scores_are_means_over_samples_and_problems(reward, tmp_path):
    engine = FakeEngine()
    rows = [example(number, kind="a" if number else "b") for number in range(3)]
    measure = Measure("accuracy", by=("kind",))
    result, records = Evaluation(engine, encode, reward, SAMPLING, measure, batch=2).run(
        rows, SampleFile(tmp_path, "b")
    )
    assert result["pass@1"] == 0.5 and result["n"] == 3 and result["samples"] == 2
    assert result["pass@2"] == 1.0 and result["majority@2"] == 1.0 and result["no_answer"] == 0.5
    assert result["by"] == {"kind": {"a": {"pass@1": 0.5, "n": 2}, "b": {"pass@1": 0.5, "n": 1}}}
    assert result["response_tokens"] == 4.0 and result["truncated"] == 0.5
    assert [record["scores"] for record in records] == [[1.0, 0.0]] * 3
    assert [record["outcomes"] for record in records] == [["graded", "no_answer"]] * 3
    assert [record["answers"] for record in records] == [["2", None]] * 3, "hmm is not marked, so no answer"
    assert engine.slots == [(0, 1), (2,)]  # a problem's samples depend on its row alone


class TalkingEngine:
    """An environment answered the first of two responses with an image, and no other."""

    def __init__(self, encode):
        self.encode = encode

    def generate(self, contexts, sampling):
        return [self._group(context.prompt) for context in contexts]

    def _group(self, prompt):
        first, second = (self.encode.respond(prompt, text) for text in ("How many?", "12"))
        answer = self.encode.answer([("red", (Image.new("RGB", (48, 48), "red"),))])
        first = first.continued(environment_turn(first, answer))
        first = first.continued(self.encode.respond(prompt.followed_by(first), "2"))
        return [replace(first, counts={"turns": 2, "calls": 1}), replace(second, counts={"turns": 1})]


def test_samples_have_the_turns_and_counts_of_an_environment(reward, encoder, tmp_path):
    rows = [example(number) for number in range(2)]
    samples = SampleFile(tmp_path, "b")
    result, records = Evaluation(TalkingEngine(encoder), encoder, reward, SAMPLING, MEASURE).run(
        rows, samples
    )
    assert result["episodes"] == {"calls": 0.5, "turns": 1.5}
    for record in records:
        assert record["counts"] == [{"turns": 2, "calls": 1}, {"turns": 1}]
        first, second = record["turns"]
        assert [turn["by"] for turn in first] == ["policy", "environment", "policy"] and second == []
        assert "red" in first[1]["text"] and first[2]["text"] == "2"
        [name] = first[1]["pictures"]
        assert (tmp_path / name).is_file()
    plain, records = Evaluation(FakeEngine(), encode, reward, SAMPLING, MEASURE).run(
        rows, SampleFile(tmp_path / "plain", "b")
    )
    assert "episodes" not in plain and not {"turns", "counts"} & records[0].keys()


def test_an_interrupted_evaluation_resumes(reward, tmp_path):
    """A line separator in a response is no new line, and only the incomplete last line is sampled again."""
    rows = [example(number) for number in (0, 1, 2, 4, 5)]
    whole, _ = Evaluation(FakeEngine(), encode, reward, SAMPLING, MEASURE, batch=2).run(
        rows, SampleFile(tmp_path / "whole", "b")
    )
    path = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        Evaluation(FakeEngine(stop_at=3), encode, reward, SAMPLING, MEASURE, batch=2).run(
            rows, SampleFile(path, "b")
        )
    lines = (path / "samples.jsonl").read_text().split("\n")
    assert [json.loads(line)["id"] for line in lines if line] == ["e0", "e1", "e2", "e4"]
    lines[0] = lines[0].replace("hmm", "h\u2028mm")
    (path / "samples.jsonl").write_text("\n".join(lines)[:-20])
    second = FakeEngine()
    result, records = Evaluation(second, encode, reward, SAMPLING, MEASURE, batch=4).run(
        rows, SampleFile(path, "b")
    )
    assert result == whole and second.slots == [(3, 4)] and len(records) == 5
    assert records[0]["responses"][1] == "h\u2028mm"
    lines = (path / "samples.jsonl").read_text().split("\n")
    assert sorted(json.loads(line)["id"] for line in lines if line) == ["e0", "e1", "e2", "e4", "e5"]
    assert (path / json.loads(lines[0])["pictures"][0]).is_file()


def test_a_last_line_without_newline_is_completed(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"benchmark": "b", "row": 0}')
    SampleFile(tmp_path, "b").add([{"benchmark": "b", "row": 1}])
    assert sorted(SampleFile(tmp_path, "b").done) == [0, 1]


def test_an_unusable_row_stops_or_is_skipped(reward, tmp_path):
    rows = [example(number) for number in range(5)]
    with pytest.raises(RowError, match="row e3"):
        Evaluation(FakeEngine(), encode, reward, SAMPLING, MEASURE).run(rows, SampleFile(tmp_path / "a", "b"))
    result, records = Evaluation(FakeEngine(), encode, reward, SAMPLING, MEASURE, skip=True).run(
        rows, SampleFile(tmp_path / "c", "b")
    )
    assert result["skipped"] == 1 and result["n"] == 4
    assert [record["id"] for record in records] == ["e0", "e1", "e2", "e4"]
    with pytest.raises(ValueError, match="no usable row"):
        Evaluation(FakeEngine(), encode, reward, SAMPLING, MEASURE, skip=True).run(
            rows[3:4], SampleFile(tmp_path / "d", "b")
        )


def test_pass_at_k_has_no_bias():
    """Of 4 samples 1 right: 1 - C(3, 2) / C(4, 2) = 1 / 2; of the 6 pairs, 3 contain it."""
    assert pass_at([[1.0, 0.0, 0.0, 0.0]], 2) == pytest.approx(0.5)
    assert pass_at([[1.0, 0.0, 0.0, 0.0], [1.0] * 4], 1) == pytest.approx(0.625)
    assert pass_at([[0.0] * 3 + [1.0]], 4) == 1.0


def test_no_majority_is_reported_where_a_verifier_reads_no_answers():
    record = {"scores": [1.0, 0.0], "tokens": [0, 0], "answers": [None, None]}
    own = summarize([record | {"outcomes": ["graded", "graded"]}], Measure("own"))
    assert own["pass@1"] == 0.5 and "majority@2" not in own
    silent = summarize([record | {"outcomes": ["no_answer", "no_answer"]}], Measure("accuracy"))
    assert silent["majority@2"] == 0.0, "a model that never answers"


def test_majority_votes_by_normalized_answer():
    record = {"answers": ["4", "$3$", " 3.", None, None], "scores": [0.0, 1.0, 1.0, 0.0, 0.0]}
    assert majority(record) == 1.0
    assert majority({"answers": [None, None], "scores": [0.0, 0.0]}) == 0.0


def test_the_interval_matches_the_binomial():
    """300 problems, one sample each, 180 right: .6 with a standard error of .0283."""
    low, high = bootstrap(np.array([1.0] * 180 + [0.0] * 120))
    assert low == pytest.approx(0.6 - 1.96 * 0.0283, abs=0.01)
    assert high == pytest.approx(0.6 + 1.96 * 0.0283, abs=0.01)


def test_the_interval_of_identical_scores_has_no_width():
    records = [{"scores": [1.0], "tokens": [2], "truncated": [False], "outcomes": ["graded"]}] * 4
    assert summarize(records, MEASURE)["ci95"] == [1.0, 1.0]
