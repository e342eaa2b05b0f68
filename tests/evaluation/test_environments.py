"""`vlm-sapo eval --environment`: benchmarks with several turns."""

import json

import pytest

from tests.conftest import ROOT
from vlm_sapo import evaluate
from vlm_sapo.config.evaluation import EvalOptions

TRAINED = str(ROOT / "data/shapes/cold_start")
ASK = "{function: 'tests/environments/played.py:AskTwice', max_turns: 2, max_turn_tokens: 60}"


def test_a_benchmark_is_played_in_the_environment(tmp_path):
    options = {"model": TRAINED, "limit": 4, "max_tokens": 200, "out": tmp_path}
    result = evaluate("shapes", environment=ASK, **options)["shapes"]
    assert result["n"] == 4 and 1 < result["episodes"]["turns"] <= 2
    [first, *_] = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    speakers = [turn["by"] for turn in first["turns"][0]]
    assert speakers[:2] == ["policy", "environment"] and "Are you sure?" in first["turns"][0][1]["text"]
    with pytest.raises(ValueError, match="samples of shapes that differ in environment"):
        evaluate("shapes", **options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{tools: [zoom], max_turn: 2}", "max_turn"),
        ("[zoom]", "must be a YAML mapping such as"),
        ("quickstart", "or a config whose rollout.environment is one"),
        ("no_such_config", "no config `no_such_config`"),
    ],
)
def test_what_is_no_environment(text, sentence):
    options = EvalOptions(benchmark=["shapes"], model=TRAINED, environment=text)
    with pytest.raises(ValueError, match=sentence):
        options.environment_config()


def test_a_config_names_its_environment():
    options = EvalOptions(benchmark=["shapes"], model=TRAINED, environment="zoom")
    assert (
        options.environment_config().tools == ["zoom"] and options.settings["environment"]["max_turns"] == 2
    )
