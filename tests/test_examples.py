"""The examples of docs/examples, each used by a real run, and the Python interface."""

import json
import subprocess
import sys

import pytest

import vlm_sapo
from tests.conftest import ROOT
from tests.training.conftest import short_run
from vlm_sapo.training.loss import build_loss

EXAMPLES = {
    "reward": ["reward.parts=[{name: docs/examples/reward.py:main_colour, args: {partly: 0.5}}]"],
    "dataset": ["data.source=docs/examples/dataset.py:rows", "data.args={size: 8}"],
    "objective": [
        "algo.objective={type: own, function: docs/examples/objective.py:bell, args: {width: 0.1}}"
    ],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains(name, model_folder, tmp_path):
    assert len((ROOT / f"docs/examples/{name}.py").read_text().splitlines()) < 40
    config = short_run(tmp_path, model_folder(), "train.steps=2", "eval.data=null", *EXAMPLES[name])
    assert vlm_sapo.train(config)["steps"] == 2
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert all("reward/mean" in json.loads(line) for line in lines)


def test_the_reward_looks_at_the_picture():
    from PIL import Image, ImageDraw

    from docs.examples.reward import main_colour
    from vlm_sapo.types import Example

    image = Image.new("RGB", (50, 50), (240, 240, 240))
    ImageDraw.Draw(image).rectangle((0, 0, 30, 30), fill=(220, 50, 45))
    ImageDraw.Draw(image).rectangle((40, 40, 45, 45), fill=(50, 90, 220))
    example = Example("1", "Which colour?", "red", images=(image,))
    answers = {answer: main_colour(rf"\boxed{{{answer}}}", example) for answer in ("Red", "blue", "green")}
    assert answers == {"Red": 1.0, "blue": 0.3, "green": 0.0} and main_colour("none", example) == 0.0


def test_the_objective_falls_like_a_bell():
    import torch

    from docs.examples.objective import bell
    from vlm_sapo.algo.diagnostics import effective_update

    log_ratio = torch.tensor([[-0.5, 0.0, 0.5, 1.0]], dtype=torch.float64)
    found = effective_update(bell, log_ratio, torch.tensor([[2.0]], dtype=torch.float64))
    assert torch.allclose(found, (-((log_ratio / 0.5) ** 2) / 2).exp())


def test_the_python_interface(model_folder, tmp_path):
    config = vlm_sapo.load_config("quickstart", "train.steps=7", f"run.dir={tmp_path}/run")
    assert config.train.steps == 7 and vlm_sapo.load_sft_config("cold_start").train.steps
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "1", "question": "1+1?", "answer": "2", "image": None}) + "\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"id": "1", "response": r"\boxed{2}"}) + "\n")
    results = vlm_sapo.evaluate("mmk12", data=str(rows), responses=str(answers), out=tmp_path / "eval")
    assert results["mmk12"]["pass@1"] == 1.0
    with pytest.raises(ValueError, match="give --model, or --responses"):
        vlm_sapo.evaluate("mmk12")
    with pytest.raises(AttributeError):
        vlm_sapo.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["{type: own, function: docs/examples/objective.py:none}"], "algo.objective.function"),
        (
            ["{type: own, function: docs/examples/objective.py:bell, args: {widht: 1}}"],
            "algo.objective.args .*widht",
        ),
    ],
)
def test_an_objective_that_does_not_fit_is_named(overrides, sentence):
    config = vlm_sapo.load_config("quickstart", *(f"algo.objective={each}" for each in overrides))
    with pytest.raises(ValueError, match=sentence):
        build_loss(
            config.algo.objective.model_dump(), ratio="token", reduction="token_mean", kl=0.0, max_tokens=8
        )


def test_another_type_takes_no_fields_of_the_first():
    config = vlm_sapo.load_config("quickstart", "algo.objective.type=own", "algo.objective.function=a.py:b")
    assert config.algo.objective.model_dump() == {"type": "own", "function": "a.py:b", "args": {}}
    with pytest.raises(ValueError, match="algo.objective.function is missing"):
        vlm_sapo.load_config("quickstart", "algo.objective.type=own")


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from vlm_sapo.rewards.pool import Reward\nfrom vlm_sapo.types import Example, Response\n"
        "print(Reward([{'name': 'math'}], workers=1)([(Response('1'), Example('1', 'p', '1'))]))\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0 and "if __name__ == '__main__'" in done.stderr
