"""Samples to numbers: pass@1 with its interval, pass@k, majority, breakdowns, the authors' own metric."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlm_sapo.rewards.verifiers.normalize import normalize

RESAMPLES = 2000
PASS_SCORE = 0.5
"""A response with at least this score counts as correct in pass@k."""
WARNING_SHARE = 0.1
"""Share of truncated responses, or of responses without an answer, that a reader of the numbers is told."""
OUTSIDE = (
    "the boxes of {:.0%} of the responses lie outside their image, so they may be in other coordinates than "
    "the model's family writes; set verifier.args.coordinates"
)
"""The warning where many boxes do."""


class Metric(Protocol):
    """A benchmark's own score, from the records and the key of their scores."""

    def __call__(self, records: list[dict], key: str, /) -> dict: ...


@dataclass(frozen=True)
class Measure:
    """What is computed from the samples of an evaluation."""

    part: str
    """The reward part that is our verdict."""
    official: str | None = None
    """The part that is the authors' rule."""
    by: tuple[str, ...] = ()
    """Columns by whose values the scores are broken down."""
    metric: Metric | None = None


def summarize(records: list[dict], measure: Measure) -> dict:
    """The numbers of a list of records, one per problem with lists over its samples.

    `pass@1` is the mean of our verdict over samples and problems, `ci95` its bootstrap interval over
    problems; `official` has both by the authors' rule, and on how many responses the two differ;
    `episodes` has turns, calls, images and failures as means over responses, if there is one.
    """
    scores = [record["scores"] for record in records]
    count = min(map(len, scores))
    result = {
        "pass@1": float(_means(scores).mean()),
        "ci95": bootstrap(_means(scores)),
        "n": len(records),
        "samples": count,
    }
    for k in (2**power for power in range(1, 20) if count > 1 and 2**power <= count):
        result[f"pass@{k}"] = pass_at(scores, k)
    if count > 1 and _can_vote(records):
        result[f"majority@{count}"] = float(np.mean([majority(record) for record in records]))
    if measure.official:
        result["official"] = _official_numbers(records)
    if measure.metric:
        result["metric"] = measure.metric(records, "official" if measure.official else "scores")
    outcomes = [outcome for record in records for outcome in record["outcomes"]]
    result["no_answer"] = outcomes.count("no_answer") / len(outcomes)
    if "outside" in outcomes:
        result["outside"] = outcomes.count("outside") / len(outcomes)
    if any(n for record in records for n in record["tokens"]):  # recorded responses have none
        result["response_tokens"] = float(np.mean([n for record in records for n in record["tokens"]]))
        result["truncated"] = float(np.mean([cut for record in records for cut in record["truncated"]]))
    if counts := [counts for record in records for counts in record.get("counts", ())]:
        names = sorted({name for each in counts for name in each})
        result["episodes"] = {name: float(np.mean([each.get(name, 0) for each in counts])) for name in names}
    if by := {column: _by(records, column) for column in measure.by}:
        result["by"] = by
    return result


def cautions(result: dict, *, limit: int | None, max_tokens: int | None) -> list[str]:
    """What a reader of a benchmark's numbers must know. `max_tokens` is None where it isn't recorded."""
    lines = []
    if limit == result["n"] + result.get("skipped", 0):
        lines.append(f"only the first {limit} problems were evaluated, not the whole benchmark")
    if "skipped" in result:
        lines.append(f"{result['skipped']} problems were skipped, so this is not the whole benchmark")
    if result.get("truncated", 0.0) > WARNING_SHARE:
        share = f"{result['truncated']:.0%}"
        at = "their length limit" if max_tokens is None else f"{max_tokens} tokens; raise --max-tokens"
        lines.append(f"{share} of the responses were truncated at {at}")
    if result["no_answer"] > WARNING_SHARE:
        lines.append(f"no answer was found in {result['no_answer']:.0%} of the responses")
    if result.get("outside", 0.0) > WARNING_SHARE:
        lines.append(OUTSIDE.format(result["outside"]))
    return lines


def _official_numbers(records: list[dict]) -> dict:
    scores = [record["official"] for record in records]
    pairs = [pair for record in records for pair in zip(record["scores"], record["official"], strict=True)]
    return {
        "pass@1": float(_means(scores).mean()),
        "ci95": bootstrap(_means(scores)),
        "differ": sum(own != official for own, official in pairs),
    }


def pass_at(scores: Sequence[Sequence[float]], k: int) -> float:
    """Probability that one of k samples is correct, estimated without bias from n (arXiv 2107.03374): the
    mean over problems of 1 - C(n - c, k) / C(n, k), where c of the n are correct."""
    estimates = []
    for row in scores:
        correct = sum(score >= PASS_SCORE for score in row)
        estimates.append(1 - math.comb(len(row) - correct, k) / math.comb(len(row), k))
    return float(np.mean(estimates))


def majority(record: dict) -> float:
    """The score of the answer that most samples give, by normalized spelling; the first sampled one on a tie.
    Samples without an answer have no vote."""
    normalized = [
        None if answer is None else normalize(answer, "compact").strip(".") for answer in record["answers"]
    ]
    votes = Counter(answer for answer in normalized if answer is not None)
    if not votes:
        return 0.0
    return float(record["scores"][normalized.index(votes.most_common(1)[0][0])])


def _can_vote(records: list[dict]) -> bool:
    """Whether there are answers to vote on: not with a verifier that graded responses without one, such as a
    function of the user's own."""
    answered = any(answer is not None for record in records for answer in record["answers"])
    return answered or not any("graded" in record["outcomes"] for record in records)


def bootstrap(means: np.ndarray) -> list[float]:
    """95 % percentile interval of the mean over problems ([n] problem means), 2000 resamples, fixed seed."""
    resamples = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.quantile(means[resamples].mean(1), [0.025, 0.975])
    return [float(low), float(high)]


def _means(scores: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([np.mean(row) for row in scores])


def _by(records: list[dict], column: str) -> dict[str, dict]:
    values: dict[str, list[float]] = {}
    for record in records:
        value = str(record["columns"].get(column, "none"))
        values.setdefault(value, []).append(float(np.mean(record["scores"])))
    return {
        value: {"pass@1": float(np.mean(means)), "n": len(means)} for value, means in sorted(values.items())
    }


def versions(records: list[dict], key: str) -> dict:
    """MathVerse: the mean over its versions of the mean over each one's problems."""
    scores = defaultdict(list)
    for record in records:
        scores[record["columns"]["problem_version"]].append(np.mean(record[key]))
    means = {name: float(np.mean(values)) for name, values in sorted(scores.items())}
    return {"mean_of_versions": float(np.mean(list(means.values()))), **means}


def worst_case(records: list[dict], key: str) -> dict:
    """DynaMath: a question counts if all its variants (rows of one id) are correct; `average` counts rows."""
    questions = defaultdict(list)
    for record in records:
        questions[record["id"]].append(record[key])
    variants = max(map(len, questions.values()))
    complete = [rows for rows in questions.values() if len(rows) == variants]
    worst = [np.mean([min(sample) for sample in zip(*rows, strict=True)]) for rows in complete]
    average = [np.mean(row) for rows in questions.values() for row in rows]
    return {
        "average": float(np.mean(average)),
        "worst_case": float(np.mean(worst)),
        "questions": len(complete),
        "variants": variants,
        "incomplete_questions": len(questions) - len(complete),
    }


def we_math(records: list[dict], key: str) -> dict:
    """We-Math's four-way score over groups of sub-problems and their composite (`ID`, `key`), strict and
    loose.

    IK: some sub-problem wrong and the composite wrong; IG: all correct and the composite wrong; CM and RM
    share the groups whose composite is correct: strict CM needs every sub-problem correct, loose CM one, and
    the others are RM. Score: (groups - IG / 2 - RM - IK) / groups. Groups with a missing row are left out and
    counted.
    """
    groups: dict[str, dict[str, list]] = defaultdict(dict)
    for record in records:
        groups[record["columns"]["ID"]][record["columns"]["key"].rpartition("_")[2]] = record[key]
    complete = {
        name: rows
        for name, rows in groups.items()
        if set(rows) == {"multi", *map(str, range(1, int(name[0]) + 1))}
    }
    result: dict = {"groups": len(complete), "incomplete_groups": len(groups) - len(complete)}
    for mode in ("strict", "loose") if complete else ():
        counts = dict.fromkeys(("CM", "RM", "IG", "IK"), 0.0)
        for rows in complete.values():
            samples = len(rows["multi"])
            for sample in range(samples):
                steps = [scores[sample] >= 1 for step, scores in rows.items() if step != "multi"]
                counts[_mastery(steps, rows["multi"][sample] >= 1, mode)] += 1 / samples
        shares = {name: count / len(complete) for name, count in counts.items()}
        score = 1 - shares["IG"] / 2 - shares["RM"] - shares["IK"]
        result[mode] = {"score": score, **shares}
    return result


def _mastery(steps: list[bool], composite: bool, mode: str) -> str:
    if not composite:
        return "IG" if all(steps) else "IK"
    return "CM" if (all(steps) if mode == "strict" else any(steps)) else "RM"


METRICS = {"versions": versions, "worst_case": worst_case, "we_math": we_math}
