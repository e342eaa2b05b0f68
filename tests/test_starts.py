"""Every shipped config, recipe and benchmark starts: rows with the hub's columns come to their first reward."""

import json

import pytest
from PIL import Image, ImageDraw

from tests.conftest import ROOT
from tests.evaluation.test_benchmarks import FOLDERS, HUB, P
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.benchmarks import build_benchmark
from vlm_sapo.evaluation.preflight import inspect, try_reward
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_outline
from vlm_sapo.rewards.parts import build_part, combine

CELL = {"name": "WBC", "xmin": 4, "ymin": 4, "xmax": 40, "ymax": 30}
ROWS = {
    "bccd_boxes": {"id": "b", "image": P, "objects": [CELL], "split": "train"},
    "bccd_count": {"id": "b", "image": P, "objects": [CELL], "split": "train"},
    "chartqa": {"image": P, "query": "Which bar is lowest?", "label": ["Rent"], "human_or_machine": 0},
    "clevr_count": {"image": P, "problem": "How many?", "solution": "<answer> 6 </answer>"},
    "docvqa": {"questionId": "1", "question": "Who signed?", "image": P, "answers": ["B. Frei", "Frei"]},
    "formalgeo": {
        "problem_id": 3, "problem_text_en": "As shown. Find y.", "problem_answer": "6", "image": P,
        "geometry3k_split": "train",
    },
    "geometry3k": {"images": [P], "problem": "<image>Find y.", "answer": "6 \\sqrt { 2 }"},
    "geoqa": {"image": P, "problem": "Find the angle.", "solution": "<answer> 65° </answer>"},
    "mmk12": {"image": P, "question": "<image>Find y.", "answer": "6", "subject": "math", "id": "m"},
    "open_r1_8k": {"image": P, "problem": "Find y.", "solution": "<think>t</think> <answer>6</answer>"},
    "refcoco": {"image": P, "problem": "the left cup", "solution": [4, 4, 40, 30]},
    "sroie": {"id": "s", "image": P, "company": "Frei AG", "total": "9.50"},
    "virl39k": {"qid": "v", "image": [P], "question": "<image>Find y.", "answer": "\\boxed{6}"},
}  # fmt: skip
"""By recipe, a row as the hub or the authors' file has it; a new recipe needs one."""
RECIPES = sorted(path.stem for path in (ROOT / "data").glob("*.yaml"))
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
BENCHMARKS = sorted(path.stem for path in (ROOT / "eval/benchmarks").glob("*.yaml"))


@pytest.fixture(scope="module")
def encode(model_folder):
    return Encoder(load_outline(str(model_folder())), min_pixels=784, max_pixels=3136, max_tokens=4096)


class Inline:
    """The reward's parts as a worker calls them, in this process."""

    def __init__(self, specs):
        self.parts = [build_part(spec, number) for number, spec in enumerate(specs)]

    def __call__(self, items):
        return [combine(self.parts, [part.grade([item])[0] for part in self.parts]) for item in items]


def local(rows: RowsConfig, name: str, folder) -> RowsConfig:
    """The section with a local row instead of the hub's."""
    if rows.source in ("data/shapes.py:rows", "data/zoom.py:rows"):
        return rows.model_copy(update={"args": rows.args | {"size": 2}})
    assert name in ROWS, f"data/{name}.yaml needs a row in tests/test_starts.py"
    image = folder / "a.png"
    canvas = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(canvas).rectangle((4, 4, 40, 30), fill="red")
    canvas.save(image)
    row = {
        key: "a.png" if value is P else ["a.png"] if value == [P] else value
        for key, value in ROWS[name].items()
    }
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return rows.at(str(folder / f"{name}.jsonl"))


def check(examples, encode, specs, measured: str) -> None:
    """The gold answer in the prompt's layout earns all, a wrong one nothing from the part that measures."""
    spec = next(item for item in specs if item["label"] == measured)
    trials = try_reward(examples, inspect(examples, encode), Inline(specs), spec)
    assert trials, "no row can be used"
    for trial in trials:
        right, wrong = trial.rewards
        assert set(right.outcomes.values()) == {"graded"}, (trial.right, right.details)
        whole = sum(max(item.get("weight", 1.0), 0.0) for item in specs)
        assert right.total == pytest.approx(whole), trial.right
        assert wrong.parts[measured] == 0, trial.wrong


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name, encode, tmp_path):
    section = RowsConfig(
        recipe=name, **({"source": "x"} if name in ("refcoco", "formalgeo", "virl39k") else {})
    )
    specs = [{"name": "auto", "label": "auto", "args": {}}]
    check(build_examples(local(section, name, tmp_path)), encode, specs, "auto")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config(name, encode, tmp_path):
    if name.endswith("cold_start"):
        config = configfile.load(cfg.SftConfig, name)
        assert len(build_examples(local(config.data.tasks[0], name, tmp_path))) == 2
        return
    config = configfile.load(cfg.TrainConfig, name)
    parts = zip(config.reward.parts, config.reward.labels, strict=True)
    specs = [part.model_dump() | {"label": label} for part, label in parts]
    for task in config.data.tasks:
        recipe = "geometry3k" if task.source == "hiyouga/geometry3k" else task.task
        check(build_examples(local(task, recipe, tmp_path)), encode, specs, config.reward.measured)
    for section in config.eval.data:
        held_out = local(section, "geometry3k", tmp_path).model_copy(update={"split": None})
        check(build_examples(held_out), encode, specs, config.eval.part or config.reward.measured)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name in HUB or name not in FOLDERS])
def test_a_benchmark(name, encode, tmp_path):
    if name == "shapes":
        item = build_benchmark(name, limit=2)
    else:
        Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
        row = {
            key: "a.png" if value is P else ["a.png"] if value == [P] else value
            for key, value in HUB[name].items()
        }
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        item = build_benchmark(f"{name}={tmp_path}/rows.jsonl")
    spec = item.parts[0]
    trials = try_reward(item.examples, inspect(item.examples, encode), Inline([spec]), spec)
    assert [trial.rewards[0].total for trial in trials] == [1] * len(trials) and trials
    assert [trial.rewards[1].total for trial in trials] == [0] * len(trials)
