"""The examples of docs/examples, each used by a real run, and the Python interface."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vlm_sapo
from tests.conftest import ROOT, example, response
from tests.training.conftest import short_run
from vlm_sapo.training.loss import OwnAdvantage, build_loss

EXAMPLES = {
    "reward": ["reward.parts=[{name: docs/examples/reward.py:main_colour, args: {partly: 0.5}}]"],
    "dataset": ["data.source=docs/examples/dataset.py:rows", "data.args={size: 8}"],
    "objective": [
        "algo.objective={type: own, function: docs/examples/objective.py:bell, args: {width: 0.1}}"
    ],
    "advantage": ["algo.advantage={type: own, function: docs/examples/advantage.py:without_repetition}"],
    "environment": [
        "rollout.environment={function: docs/examples/environment.py:CheckAgain, max_turns: 2}",
        "rollout.max_tokens=96",
    ],
    "engine": [
        "rollout.engine={type: own, function: docs/examples/engine.py:counting, policy_modules: true}",
        "rollout.engine.args.path=PATH/counts.json",
    ],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains(name, model_folder, tmp_path):
    assert len((ROOT / f"docs/examples/{name}.py").read_text().splitlines()) < 60
    options = [option.replace("PATH", str(tmp_path)) for option in EXAMPLES[name]]
    config = short_run(tmp_path, model_folder(), "train.steps=2", "eval.data=null", *options)
    assert vlm_sapo.train(config)["steps"] == 2
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert all("reward/mean" in json.loads(line) for line in lines)


def test_the_reward_reads_the_image():
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
    from docs.examples.objective import bell
    from vlm_sapo.algo.diagnostics import effective_update
    from vlm_sapo.algo.objectives import TokenTensors
    from vlm_sapo.training.loss import Objective

    log_ratio = torch.tensor([[-0.5, 0.0, 0.5, 1.0]], dtype=torch.float64)
    tensors = TokenTensors(
        logprobs=log_ratio - 2,
        old=torch.full_like(log_ratio, -2.0),
        advantages=torch.full_like(log_ratio, 2.0),
        mask=torch.ones_like(log_ratio, dtype=torch.bool),
    )
    update = effective_update(Objective(bell), tensors)
    assert torch.allclose(update, (-((log_ratio / 0.5) ** 2) / 2).exp())


def test_the_advantage_is_less_where_a_token_repeats(encoder):
    from docs.examples.advantage import without_repetition
    from vlm_sapo.training.batch import collate
    from vlm_sapo.types import Group, Reward

    prompt = encoder(example())
    ids = ([5, 5, 7], [5, 7])
    items = tuple(response(row, prompt) for row in ids)
    batch = collate([Group(prompt, items, (Reward(1.0, {}), Reward(0.0, {})))], minibatches=1)
    good, bad = 0.5**0.5, -(0.5**0.5)
    expected = torch.tensor([[good, good - 0.5, good], [bad, bad, bad]], dtype=torch.float64)
    assert torch.allclose(without_repetition(batch, penalty=0.5), expected)


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
            "algo.objective.args .*widht.*can ask for log_ratio, advantage",
        ),
    ],
)
def test_an_objective_that_does_not_fit_is_named(overrides, sentence):
    config = vlm_sapo.load_config("quickstart", *(f"algo.objective={each}" for each in overrides))
    with pytest.raises(ValueError, match=sentence):
        build_loss(config.algo, max_tokens=8)


def test_another_type_takes_no_fields_of_the_first():
    config = vlm_sapo.load_config("quickstart", "algo.objective.type=own", "algo.objective.function=a.py:b")
    assert config.algo.objective.model_dump() == {"type": "own", "function": "a.py:b", "args": {}}
    with pytest.raises(ValueError, match="algo.objective.function is missing"):
        vlm_sapo.load_config("quickstart", "algo.objective.type=own")


def test_a_script_without_a_main_guard_gets_an_error(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from vlm_sapo.rewards.pool import RewardPool\nfrom vlm_sapo.types import Example, ResponseText\n"
        "print(RewardPool([{'name': 'math'}], workers=1)([(ResponseText('1'), Example('1', 'p', '1'))]))\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0 and "if __name__ == '__main__'" in done.stderr
    assert "freeze_support" not in done.stderr  # of multiprocessing, from every worker


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algo.advantage={type: own, function: docs/examples/advantage.py:none}", "algo.advantage.function"),
        (
            "algo.advantage={type: own, function: docs/examples/advantage.py:without_repetition, args: {x: 1}}",
            r"algo.advantage.args \({'x': 1}\) must fit",
        ),
        ("algo.reduction={type: own, function: 'os:getcwd'}", "algo.reduction.args"),
        ("rollout.environment={function: docs/examples/environment.py:None}", "rollout.environment.function"),
        (
            "rollout.environment={function: docs/examples/environment.py:CheckAgain, args: {x: 1}}",
            "rollout.environment.args",
        ),
        ("rollout.engine={type: own, function: docs/examples/engine.py:counting}", "rollout.engine.args"),
        (
            "rollout.engine={type: own, function: docs/examples/engine.py:counting, args: {path: x.json}}",
            r"rollout.engine.policy_modules \(false\) must be what .* says as shares_weights \(true\)",
        ),
    ],
)
def test_functions_of_the_users_are_checked_at_the_start(override, sentence, model_folder, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        vlm_sapo.train(short_run(tmp_path, model_folder(), "eval.data=null", override))


def test_a_reduction_of_ones_own(model_folder, tmp_path):
    """A sum over tokens, divided by the denominators that it asks for."""
    (tmp_path / "mine.py").write_text(
        "def mean(losses, mask, num_tokens, scale=1.0):\n"
        "    return scale * (losses * mask).sum() / num_tokens\n"
    )
    own = f"{{type: own, function: '{tmp_path}/mine.py:mean', args: {{scale: 2.0}}}}"
    losses = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    mask = torch.tensor([[True, True], [True, False]])
    algo = vlm_sapo.load_config("quickstart", f"algo.reduction={own}").algo
    assert float(build_loss(algo, max_tokens=8).reduction(losses, mask, 2, 3)) == 4.0


def test_an_advantage_that_is_no_tensor_is_named():
    advantage = OwnAdvantage(lambda batch: [1.0], "mine.py:advantage")
    batch = SimpleNamespace(mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"\(mine.py:advantage\) must return a tensor \[2\] or \[2, 3\].*list"
    ):
        advantage(batch)
    advantage = OwnAdvantage(lambda batch: torch.full((2,), float("nan")), "mine.py:advantage")
    with pytest.raises(ValueError, match="must return finite advantages"):
        advantage(batch)


@pytest.mark.slow
def test_the_notebook_goes_from_images_to_a_report(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs/examples/own_images.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "store it without outputs"
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(
        output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    before, after = map(float, re.search(r"not trained on: (\S+) before, (\S+) after", printed).groups())
    assert after > before + 0.2, printed
    assert (tmp_path / "runs/own_images/report.html").stat().st_size > 1e5


@pytest.mark.slow
def test_the_script_with_rows_and_callbacks_runs(tmp_path):
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/examples/README.md").read_text(), re.S)
        if "Callback" in block
    ]
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done: 2 steps" in done.stdout and re.search(r"^2 [\d.]+$", done.stdout, re.M)
