"""What an evaluation during a run says of its responses."""

from vlm_sapo.evaluation.periodic import warnings_of


def test_a_warning_says_only_what_is_wrong():
    warnings = warnings_of({"truncated": 0.0, "no_answer": 0.98})
    assert warnings == ["98% of these responses have no answer that could be found"]
    assert len(warnings_of({"truncated": 0.3, "no_answer": 0.3, "outside": 0.3})) == 3
