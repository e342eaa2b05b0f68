"""A thinking model was rewarded for an answer that it considered and dropped, or before it had finished thinking.

Source: https://github.com/PrimeIntellect-ai/verifiers/pull/213
"""

import pytest

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.table import VERIFIERS


@pytest.mark.parametrize("finding", ["marked", "stated"])
@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"<think>Is it \boxed{58}? No.</think> <answer>59</answer>", 1),
        (r"<think>Is it \boxed{59}? No.</think> <answer>58</answer>", 0),
        (r"The lengths add up to \boxed{59} </think> \boxed{58}", 0),  # the template opened the thought
        (r"<think>one</think> \boxed{58} <think>two</think> \boxed{59}", 1),
        (r"<thinking>\boxed{58}</thinking>\boxed{59}", 1),
        (r"<REASONING>\boxed{58}</REASONING>\boxed{59}", 1),
        (r"<think>It must be \boxed{59}", "no_answer"),
        (r"[THINK]\boxed{58}[/THINK] \boxed{59}", 1),
        (r"<seed:think>\boxed{59}</seed:think> \boxed{58}", 0),
        (r"<|begin_of_thought|>\boxed{59}<|end_of_thought|> \boxed{58}", 0),
        (r"<think type='x'> \boxed{59}", "no_answer"),
        (r"<think>short</think> <think>again \boxed{59}", "no_answer"),
        (r"<think>It is \boxed{59}.</think>", "no_answer"),
    ],
)
def test_only_what_follows_the_last_thought_is_read(response, score, finding):
    for name in ("math", "number", "count", "exact", "auto"):
        assert graded(VERIFIERS[name], response, example("59"), finding=finding) == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>The answer is A. Hm, the answer is B.</think> The answer is C.", 1),
        ("<think>The answer is C.</think> The answer is B.", 0),
        ("<think>The answer is C.", "no_answer"),
    ],
)
def test_statements_in_thoughts_are_not_read_either(response, score):
    assert graded(VERIFIERS["choice"], response, example("C"), finding="stated") == score
