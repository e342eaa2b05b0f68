"""Scores of benchmarks that are not the mean over problems: `(records, key) -> numbers`.

`key` names the scores in a record that are counted, `official` where the benchmark has a rule of its own.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np


def versions(records: list[dict], key: str) -> dict:
    """MathVerse: the mean over its versions of the mean over each one's problems."""
    found = defaultdict(list)
    for record in records:
        found[record["columns"]["problem_version"]].append(np.mean(record[key]))
    means = {name: float(np.mean(values)) for name, values in sorted(found.items())}
    return {"mean_of_versions": float(np.mean(list(means.values()))), **means}


def worst_case(records: list[dict], key: str) -> dict:
    """DynaMath: a question counts where all its variants (rows of one id) are right; `average` counts
    rows."""
    found = defaultdict(list)
    for record in records:
        found[record["id"]].append(record[key])
    variants = max(map(len, found.values()))
    whole = [rows for rows in found.values() if len(rows) == variants]
    worst = [np.mean([min(sample) for sample in zip(*rows, strict=True)]) for rows in whole]
    average = [np.mean(row) for rows in found.values() for row in rows]
    return {
        "average": float(np.mean(average)),
        "worst_case": float(np.mean(worst)),
        "questions": len(whole),
        "variants": variants,
        "incomplete_questions": len(found) - len(whole),
    }


def we_math(records: list[dict], key: str) -> dict:
    """We-Math's four-way score over groups of sub-problems and their composite (`ID`, `key`), strict and
    loose.

    IK: some sub-problem wrong and the composite wrong; IG: all right and the composite wrong; CM and RM share
    the groups whose composite is right: strict CM needs every sub-problem right, loose CM one, and the others
    are RM. Score: (groups - IG / 2 - RM - IK) / groups. Groups that miss a row are left out and counted.
    """
    groups: dict[str, dict[str, list]] = defaultdict(dict)
    for record in records:
        groups[record["columns"]["ID"]][record["columns"]["key"].rpartition("_")[2]] = record[key]
    whole = {
        name: rows
        for name, rows in groups.items()
        if set(rows) == {"multi", *map(str, range(1, int(name[0]) + 1))}
    }
    result: dict = {"groups": len(whole), "incomplete_groups": len(groups) - len(whole)}
    for mode in ("strict", "loose") if whole else ():
        counts = dict.fromkeys(("CM", "RM", "IG", "IK"), 0.0)
        for rows in whole.values():
            samples = len(rows["multi"])
            for place in range(samples):
                steps = [scores[place] >= 1 for step, scores in rows.items() if step != "multi"]
                counts[_mastery(steps, rows["multi"][place] >= 1, mode)] += 1 / samples
        shares = {name: count / len(whole) for name, count in counts.items()}
        score = 1 - shares["IG"] / 2 - shares["RM"] - shares["IK"]
        result[mode] = {"score": score, **shares}
    return result


def _mastery(steps: list[bool], composite: bool, mode: str) -> str:
    if not composite:
        return "IG" if all(steps) else "IK"
    return "CM" if (all(steps) if mode == "strict" else any(steps)) else "RM"


METRICS = {"versions": versions, "worst_case": worst_case, "we_math": we_math}
