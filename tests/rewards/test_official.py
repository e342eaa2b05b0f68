"""The benchmark authors' rules, on cases and against their recorded verdicts."""

import json

import pytest
from typer.testing import CliRunner

from tests.conftest import SHARED
from vlm_sapo.cli import app
from vlm_sapo.rewards.verifiers import official
from vlm_sapo.rewards.verifiers.answers import NoAnswer
from vlm_sapo.types import Example


def row(answer: str, **columns) -> Example:
    return Example(id="1", problem="p", answer=answer, columns=columns)


@pytest.mark.parametrize(
    ("rule", "gold", "columns", "response", "score"),
    [
        ("mathvision", "B", {"options": ["1", "2"]}, r"\boxed{B}", 1),
        ("mathvision", "B", {"options": ["1", "2"]}, r"\boxed{2}", 1),
        ("mathvision", "B", {"options": ["1", "2"]}, r"\boxed{(A)}", 0),
        ("mathvision", "0.5", {}, r"The answer is $\frac{1}{2}$.", 1),
        ("mathvision", "1/60", {}, r"\boxed{1/55}", 1),
        ("mathvision", "3", {}, r"\boxed{4}", 0),
        ("mathvista", "red", {"choices": ["red", "blue"]}, "The answer is (A) red", 1),
        ("mathvista", "red", {"choices": ["red", "blue"]}, "The answer is bleu", 0),
        ("mathvista", "5", {"answer_type": "integer"}, "5.0", 1),
        ("mathvista", "1.46", {"answer_type": "float", "precision": 1.0}, "1.5", 1),
        ("dynamath", "17.0", {"answer_type": "float"}, '{"solution": "s", "short answer": "17.0009"}', 1),
        ("dynamath", "17.0", {"answer_type": "float"}, '{"short answer": 17.002}', 0),
        ("dynamath", "B", {"answer_type": "multiple choice"}, '{"short answer": "B"}', 1),
        ("dynamath", "May, June", {"answer_type": "text"}, '{"short answer": "may"}', 1),
        ("we_math", "C", {}, "Answer: <<C. 3>>", 1),
        ("we_math", "C", {}, "Answer: B or C", 0),
        ("mmmu", "B", {"options": "['one', 'two']"}, "I take (A), no, (B)", 1),
        ("mmmu", "60", {"options": "[]", "answer_type": "short"}, "about 60 Mbps", 1),
        ("mmmu_pro", "J", {"options": [str(n) for n in range(10)]}, "so\nAnswer: J", 1),
        ("letters", "A, C", {}, "The answer is C and A", 1),
        ("letters", "A, C", {}, "The answer is C", 0),
        ("chartqa", "100", {}, "104", 1),
        ("chartqa", "100", {}, "106", 0),
        ("chartqa", "0.25", {}, "25%", 1),
        ("chartqa", "Yes", {}, "yes", 1),
        ("chartqa", "Yes", {}, "Yes.", 1),
        ("chartqa", "Yes", {}, "Yes and no", 0),
        ("chartqa", "Blue", {}, r"\boxed{\text{Blue}}", 1),
        ("chartqa", "Blue", {}, r"\boxed{\text{Dark blue}}", 0),
        ("chartqa", "0", {}, "0.0", 0),
    ],
)
def test_cases_of_the_rules(rule, gold, columns, response, score):
    assert vars(official)[rule](response, row(gold, **columns)) == score


def test_no_option_named_is_no_answer():
    with pytest.raises(NoAnswer):
        official.mmmu("I can't say", row("B", options="['one', 'two']"))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "verifier_truth").exists(), reason="the truth files are not here")
@pytest.mark.parametrize(
    ("source", "rule", "columns", "target"),
    [
        ("mathvision", "mathvision", "response", 0.98),
        ("mathvista", "mathvista", "extraction,response", 0.99),
        ("mmmu_val", "mmmu", "response", 0.99),
        ("mmmu_pro", "mmmu_pro", "response", 0.98),
        ("logicvista", "letters", "extraction,response", 0.99),
    ],
)
def test_the_rules_agree_with_the_recorded_verdicts(tmp_path, source, rule, columns, target):
    lines = (SHARED / "verifier_truth/triples.jsonl").read_text().splitlines()
    unflagged = [
        line for line in lines if (row := json.loads(line))["source"] == source and not row.get("flags")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(unflagged) + "\n")
    name, out = f"vlm_sapo.rewards.verifiers.official:{rule}", tmp_path / "out.jsonl"
    options = ["--reward", name, "--response", columns, "--out", str(out), "--timeout", "2"]
    result = CliRunner().invoke(app, ["score", str(tmp_path / "rows.jsonl"), *options])
    assert result.exit_code == 0, result.exception
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum((row["score"] >= 0.5) == row["verdict"] for row in rows) / len(rows) >= target
