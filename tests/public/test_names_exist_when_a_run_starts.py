"""A reward function that doesn't exist, or doesn't take its arguments, ended a run at its first reward.

Source: a trial of this project's shipped recipes: `chartqa` named a verifier that wasn't there.
"""

import json

import pytest

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.benchmarks import build_benchmark
from vlm_sapo.plugins import MOVED, resolve
from vlm_sapo.rewards.parts import resolve_reward


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "How tall is the bar?", "answer": "4"}) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ({"name": "chartqaa"}, r"data.verifier.name \(chartqaa\) must be one of .*did you mean 'chartqa'"),
        (
            {"name": "mine.py:area"},
            r"data.verifier.name \(mine.py:area\) must name a Python file that exists",
        ),
        ({"name": "number", "args": {"relativ": 0.05}}, r"data.verifier.args .* must fit number.*'relativ'"),
        ({"name": "number", "args": {"relative": "much"}}, r"data.verifier.args.relative \('much'\)"),
        (
            {"name": "judge", "args": {"url": "http://127.0.0.1:9/v1", "model": "m"}},
            r"name an async one such as judge",
        ),
    ],
)
def test_a_verifier_of_rows_is_looked_up_when_the_rows_are_opened(rows, verifier, message):
    with pytest.raises(ValueError, match=message):
        build_examples(RowsConfig(source=rows, verifier=verifier))
    assert len(build_examples(RowsConfig(source=rows, verifier={"name": "chartqa"}))) == 1


def test_the_official_rule_of_a_benchmark_too(rows, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"about: mine\nsource: {rows}\nofficial: {{name: we_mth}}\n")
    with pytest.raises(ValueError, match=r"mine: official.name \(we_mth\)"):
        build_benchmark(str(path))


@pytest.mark.parametrize("module", MOVED)
def test_modules_that_moved_are_known_by_their_earlier_names(module):
    assert resolve(f"{module}:__doc__", field="reward.parts.0.name")


def test_stored_names_of_scorers_go_on():
    assert resolve_reward("vlm_sapo.rewards.official:chartqa", {}, field="--reward")
    assert resolve_reward("vlm_sapo.rewards.text:format", {}, field="--reward")
    assert resolve_reward("vlm_sapo.rewards.mathematics:math", {"finding": "stated"}, field="--reward")
    with pytest.raises(ValueError, match="No module named"):
        resolve_reward("vlm_sapo.rewards.offical:chartqa", {}, field="--reward")
