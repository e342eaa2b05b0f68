"""What an evaluation during a run says of its responses."""

from vlm_sapo.evaluation.periodic import turns_of, warnings_of


def test_a_warning_says_only_what_is_wrong():
    warnings = warnings_of({"truncated": 0.0, "no_answer": 0.98})
    assert warnings == ["98% of these responses have no answer that could be found"]
    assert len(warnings_of({"truncated": 0.3, "no_answer": 0.3, "outside": 0.3})) == 3


def test_turns_and_calls_are_said_where_there_are_any():
    means = {"turns": 1.625, "calls": 0.583, "images": 0.5}
    assert turns_of({"episodes": means}) == ", 1.6 turns, 0.58 calls per response"
    assert turns_of({"episodes": {"turns": 3.0}}) == ", 3 turns per response"
    assert turns_of({}) == ""
