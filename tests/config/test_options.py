"""Options of `eval` and `score`: one definition for help, command line and Python."""

import inspect
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import vlm_sapo
from tests.conftest import ROOT
from vlm_sapo.cli import app
from vlm_sapo.config.evaluation import EvalOptions, ScoreOptions
from vlm_sapo.config.load import check


@pytest.mark.parametrize(("command", "section"), [("eval", EvalOptions), ("score", ScoreOptions)])
def test_every_field_is_an_option_with_its_help(command, section):
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    for name, field in section.model_fields.items():
        assert section.field_label([name]) in text and field.description.split(".")[0][:40] in text, name


def test_the_signature_of_evaluate_has_the_options_with_defaults():
    parameters = inspect.signature(vlm_sapo.evaluate).parameters
    assert list(parameters) == list(EvalOptions.model_fields)
    assert parameters["samples"].default == 1 and parameters["model"].default is None
    assert parameters["benchmark"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"modle": "x"}, "unknown field `--modle`; did you mean `--model`?"),
        ({"model": "x", "samples": 0}, "--samples (0) must be a whole number of at least 1"),
        ({"model": "x", "top_p": 1.5}, "--top-p (1.5) must be a number greater than 0 and at most 1"),
        (
            {"model": "x", "dtype": "int8"},
            "--dtype ('int8') must be `float32`, `bfloat16`, `float16` or null",
        ),
        ({}, "give --model, or --responses"),
        ({"model": "x", "engine_args": "[1]"}, "--engine-args ([1]) must be a YAML mapping"),
    ],
)
def test_errors_of_evaluate_name_the_option(options, sentence):
    with pytest.raises(ValueError) as error:
        vlm_sapo.evaluate("shapes", **options)
    assert sentence in str(error.value)


def test_settings_that_decide_the_numbers():
    options = check(EvalOptions, {"benchmark": "a,b", "model": "m", "samples": 4, "engine": "vllm"})
    assert options.names == ["a", "b"] and options.settings["temperature"] == 1.0
    assert not {"out", "batch", "benchmark"} & options.settings.keys()
    engine = options.model_copy(update={"engine_args": "{tensor_parallel: 2}"})
    assert engine.settings["engine"] == "vllm {tensor_parallel: 2}"
    assert engine.engine_config().tensor_parallel == 2 and engine.engine_config().gpu_memory == 0.9


def test_names_of_the_package_are_listed_and_it_runs_as_a_module():
    assert {"evaluate", "load_config", "load_sft_config", "sft", "train"} <= set(dir(vlm_sapo))
    command = [sys.executable, "-m", "vlm_sapo", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "new-model" in done.stdout and "..." not in done.stdout.replace("[ARGS]...", "")
