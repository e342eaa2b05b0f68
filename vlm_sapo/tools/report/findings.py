"""Says in sentences what a run or a comparison shows: what changed and how certain that is, what to look at,
and what is in order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlm_sapo.config.load import check
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.alarms import SOLVED, Alarms
from vlm_sapo.reporting.console import SilentConsole

if TYPE_CHECKING:
    from vlm_sapo.tools.compare import Comparison

Record = Mapping[str, Any]
WINDOW = 10
"""Steps at the beginning and at the end of a run whose means are compared."""
FEW = 6
"""Problems below which no sign test can be certain."""
SIGNIFICANT = 0.05
"""Largest p-value of the sign test at which a change is called certain."""
MANY_COMPARISONS = 3
"""From so many comparisons on, a page says that some intervals exclude 0 by chance."""
TRUNCATED_SHARE, ZERO_VARIANCE_SHARE, NO_ANSWER_SHARE = 0.05, 0.5, 0.25
"""Shares over the last steps that are worth a look."""
MISMATCH, EXACT_MISMATCH = 0.05, 1e-4
"""Mean differences of log-probs between engine and trainer that rounding explains: in half precision, and
where both compute in float32."""
REMOVED_SHARE = 0.1
"""Share of the gradient that the objective removes, from which on updates are far off-policy."""


class Finding(NamedTuple):
    """A sentence of the summary."""

    kind: Literal["better", "worse", "same", "unsure", "note", "look", "ok"]
    text: str


def describe_comparison(comparison: Comparison, when: str) -> Finding:
    """How a benchmark's result changed. `when` says between what, as in `from A to B`."""
    low, high = comparison.ci95
    values = f"{comparison.first:.3f} to {comparison.second:.3f}"
    changed = comparison.wins + comparison.losses
    same = f"The same {counted(comparison.n, 'problem')} both times"
    if not changed:
        return Finding(
            "same",
            f"{comparison.benchmark}: no measurable change {when}: pass@1 stays {comparison.first:.3f}. "
            f"{same}, and no problem's score changed.",
        )
    interval = f"{comparison.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    test = f"{same}: {comparison.wins} better, {comparison.losses} worse, sign test p = {comparison.p:.2g}"
    if low <= 0 <= high:
        return Finding(
            "same",
            f"{comparison.benchmark}: no measurable change {when}: pass@1 {values} ({interval}, which "
            f"includes 0). {test}.",
        )
    verb, kind = ("rose", "better") if low > 0 else ("fell", "worse")
    claim = f"{comparison.benchmark}: pass@1 {verb} {when}: {values} ({interval})."
    if changed < FEW:
        return Finding("unsure", f"{claim} But few problems changed, which may be chance. {test}.")
    if comparison.p > SIGNIFICANT or (comparison.wins > comparison.losses) != (low > 0):
        return Finding("unsure", f"{claim} But the numbers of better and worse don't confirm it. {test}.")
    return Finding(kind, f"{claim} {test}.")


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def describe_comparisons(
    comparisons: Sequence[Comparison], when: str | Callable[[str], str]
) -> list[Finding]:
    """A sentence for each benchmark, and one on chance where there are many. `when` may be a function of the
    benchmark's name."""
    findings = [
        describe_comparison(item, when if isinstance(when, str) else when(item.benchmark))
        for item in comparisons
    ]
    claimed = [finding for finding in findings if finding.kind in ("better", "worse")]
    if claimed and len(findings) >= MANY_COMPARISONS:
        findings.append(
            Finding(
                "note",
                f"{len(findings)} results are compared at once: without any change, one interval in 20 "
                "excludes 0 by chance.",
            )
        )
    return findings


def describe_unpaired(before: Record, after: Record) -> Finding:
    """How a result changed whose samples are not known, so that only the two intervals are."""
    difference = after["pass@1"] - before["pass@1"]
    half = math.hypot(*(row["ci95"][1] - row["ci95"][0] for row in (before, after))) / 2
    low, high = difference - half, difference + half
    steps = counted(after["step"] - before["step"], "step")
    text = (
        f"pass@1 {before['pass@1']:.3f} to {after['pass@1']:.3f} in {steps} ({difference:+.3f}, 95 % "
        f"interval about {low:+.3f} to {high:+.3f}). The samples are missing, so there is no paired test."
    )
    if after["n"] < FEW:
        return Finding("unsure", f"{after['name']}: {text} These are few problems.")
    if low <= 0 <= high:
        return Finding("same", f"{after['name']}: no measurable change: {text}")
    return Finding("better" if low > 0 else "worse", f"{after['name']}: {text}")


def describe_results(evaluations: Sequence[Record], comparisons: Sequence[Comparison]) -> list[Finding]:
    """What the evaluations of a run say of it. `comparisons` are of its first and last evaluation."""
    if not evaluations:
        return [Finding("note", "No evaluations, so nothing shows what training changed; set eval.data.")]
    steps = {name: _steps_between(evaluations, name) for name in {row["name"] for row in evaluations}}
    findings = describe_comparisons(comparisons, lambda name: f"in {counted(steps[name], 'step')}")
    compared = {comparison.benchmark for comparison in comparisons}
    for name in dict.fromkeys(row["name"] for row in evaluations):
        rows = [row for row in evaluations if row["name"] == name]
        if name in compared:
            continue
        if len(rows) > 1:
            findings.append(describe_unpaired(rows[0], rows[-1]))
            continue
        low, high = rows[0]["ci95"]
        findings.append(
            Finding(
                "note",
                f"{name}: pass@1 {rows[0]['pass@1']:.3f} after {counted(rows[0]['step'], 'step')} (95 % "
                f"interval {low:.3f} to {high:.3f}); evaluated once, so there is nothing to compare with.",
            )
        )
    return findings


def _steps_between(evaluations: Sequence[Record], name: str) -> int:
    """Steps from the first to the last evaluation of a name."""
    steps = [row["step"] for row in evaluations if row["name"] == name]
    return max(steps) - min(steps)


def describe_training(metrics: Sequence[Record], config: Mapping[str, Any]) -> list[Finding]:
    """What a run's steps show: trends, alarms, and whether shares and differences are as they should be."""
    findings = _trends(metrics)
    if any("reward/mean" in row for row in metrics):
        findings += [*_alarms(metrics, config), *_signal(metrics), *_responses(metrics), *_updates(metrics)]
        findings += _mismatch(metrics, config)
    return findings


def _trends(metrics: Sequence[Record]) -> list[Finding]:
    findings = []
    for metric, text in (
        ("reward/mean", "Training reward: {} (problems differ from step to step: a trend, not a test)."),
        ("loss", "Loss: {}."),
    ):
        values = [row[metric] for row in metrics if row.get(metric) is not None]
        if len(values) > 1:
            size = min(WINDOW, len(values) // 2)
            steps = "step" if size == 1 else f"{size} steps"
            first, last = _mean(values[:size]), _mean(values[-size:])
            means = f"{first:.3f} over the first {steps}, {last:.3f} over the last {steps}"
            findings.append(Finding("note", text.format(means)))
            break
    return findings


def _alarms(metrics: Sequence[Record], config: Mapping[str, Any]) -> list[Finding]:
    """The alarms that the run raised, by its own thresholds."""
    try:
        alarms = Alarms.of(check(TrainConfig, config), SilentConsole())
    except ValueError as error:
        reason = str(error).split("\n")[0]
        return [Finding("look", f"Alarms can't be judged: config.yaml is of another version ({reason}).")]
    raised = [(row["step"], name, text) for row in metrics for name, text in alarms.add(row).items()]
    findings = [
        Finding("look", f"{'Step' if name == SOLVED else 'Alarm at step'} {step}: {text}.")
        for step, name, text in raised
    ]
    if conclusion := alarms.learning.conclusion():
        findings.insert(0, Finding("look", f"{conclusion[0].upper()}{conclusion[1:]}."))
    return findings or [Finding("ok", "No alarm was raised.")]


def _signal(metrics: Sequence[Record]) -> list[Finding]:
    first, last, steps = _ends(metrics, "reward/zero_variance")
    text = f"in {last:.0%} of the groups of the last {steps} all rewards were equal, so they taught nothing"
    if last >= ZERO_VARIANCE_SHARE:
        return [
            Finding(
                "look",
                f"Zero variance: {text} ({first:.0%} over the first {steps}); these rows are too easy or too "
                "hard: see vlm-sapo filter and rollout.resample.",
            )
        ]
    return [Finding("ok", f"Zero variance: {text} ({first:.0%} over the first {steps}).")]


def _responses(metrics: Sequence[Record]) -> list[Finding]:
    _, truncated, steps = _ends(metrics, "response/truncated")
    text = f"Truncated: {truncated:.1%} of the responses of the last {steps} reached the length limit"
    look = truncated >= TRUNCATED_SHARE
    remedy = ", often before they answer: raise rollout.max_tokens" if look else ""
    findings = [Finding("look" if look else "ok", f"{text}{remedy}.")]
    outcomes = Counter(
        {
            name: sum(row.get(name, 0) for row in metrics)
            for name in dict.fromkeys(name for row in metrics for name in row if name.startswith("outcome/"))
        }
    )
    for name, count in outcomes.items():
        part, _, outcome = name.removeprefix("outcome/").rpartition("/")
        if outcome != "no_answer":
            findings.append(
                Finding("look", f"Reward {part}: outcome {outcome} of {count} responses in all steps.")
            )
        elif (share := _answerless(metrics, name)) is not None and share >= NO_ANSWER_SHARE:
            findings.append(
                Finding(
                    "look",
                    f"No answer: {part} found none in {share:.0%} of the responses of the last {steps}; does "
                    "data.template ask for the form that the verifier reads?",
                )
            )
    return findings


def _answerless(metrics: Sequence[Record], name: str) -> float | None:
    """Share of the last steps' responses without an answer; None for older runs, which don't tell."""
    rows = [row for row in metrics[-WINDOW:] if row.get("rollout/responses")]
    if not rows:
        return None
    return sum(row.get(name, 0) for row in rows) / sum(row["rollout/responses"] for row in rows)


def _updates(metrics: Sequence[Record]) -> list[Finding]:
    findings = []
    if skipped := sum(row.get("policy/skipped_updates", 0) for row in metrics):
        findings.append(
            Finding("look", f"{skipped:.0f} updates were skipped because a number was not finite.")
        )
    if any("policy/effective_update" in row for row in metrics):
        _, remaining, steps = _ends(metrics, "policy/effective_update")
        text = f"Off-policy: the objective removed {1 - remaining:.1%} of the gradient over the last {steps}"
        if 1 - remaining >= REMOVED_SHARE:
            findings.append(Finding("look", f"{text}; use fewer mini-batches or a lower train.lr."))
        else:
            findings.append(Finding("ok", f"{text}."))
    return findings


def _mismatch(metrics: Sequence[Record], config: Mapping[str, Any]) -> list[Finding]:
    differences = [row["policy/mismatch_mean"] for row in metrics if "policy/mismatch_mean" in row]
    if not differences:
        return []
    exact = (
        config["rollout"]["engine"]["type"] == "hf"
        and config["model"]["dtype"] == "float32"
        and config["train"]["precision"] == "no"
    )
    if not all(map(math.isfinite, differences)):
        text = "Train/inference mismatch: not a number in some steps; look at the log-probs in traces.jsonl."
        return [Finding("look", text)]
    worst = max(differences)
    text = (
        "Train/inference mismatch: log-probs of the same tokens differ by "
        f"{_mean(differences):.1e} on average, by {worst:.1e} in the worst step"
    )
    behind = max(row.get("rollout/updates_behind", 0) for row in metrics)
    if behind:
        late = counted(round(behind), "update")
        return [Finding("note", f"{text}; responses were sampled up to {late} before, which is part of it.")]
    if worst > (EXACT_MISMATCH if exact else MISMATCH):
        return [Finding("look", f"{text}; rounding alone doesn't explain that: run vlm-sapo check.")]
    return [Finding("ok", f"{text}, no more than rounding explains.")]


def _ends(metrics: Sequence[Record], name: str) -> tuple[float, float, str]:
    """A metric's mean over the first and the last steps, and how many these are in words."""
    values = [row[name] for row in metrics if row.get(name) is not None]
    size = max(1, min(WINDOW, len(values) // 2))
    return _mean(values[:size]), _mean(values[-size:]), "step" if size == 1 else f"{size} steps"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
