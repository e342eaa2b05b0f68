"""Recipes and mixtures in a config: how fields are merged, what is refused, and real rows."""

import json

import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, SHARED
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.data import DataConfig, RowsConfig
from vlm_sapo.data.sources import build_examples, build_stream

RECIPES = sorted(path.stem for path in (ROOT / "data").glob("*.yaml"))
REAL = SHARED / "data"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real rows are not here")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_names_its_source(name):
    try:
        rows = RowsConfig(recipe=name)
    except ValueError as error:
        assert "source is missing" in str(error)
        rows = RowsConfig(recipe=name, source="rows.jsonl")
    assert "{problem}" in rows.template and rows.task == name


def test_fields_beside_a_recipe_override_it():
    rows = RowsConfig(recipe="bccd_count", args={"path": "a.jsonl"}, verifier={"args": {"finding": "stated"}})
    assert rows.args == {"path": "a.jsonl"} and rows.split == "train"
    assert rows.verifier.name == "count" and rows.verifier.args == {"finding": "stated"}
    assert RowsConfig(recipe="bccd_count", source="kept.jsonl", args=None, split=None).split is None
    assert RowsConfig.model_validate(rows.model_dump()) == rows  # a stored config reads the same


def config(tmp_path, data, *overrides):
    values = {"model": {"path": "m"}, "data": data, "reward": "auto", "train": {"steps": 1}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return configfile.load(cfg.TrainConfig, str(tmp_path / "c.yaml"), overrides)


def test_a_list_is_a_mixture(tmp_path):
    tasks = [{"recipe": "geometry3k", "share": 0.6}, {"recipe": "clevr_count", "share": 0.4}]
    loaded = config(tmp_path, tasks)
    assert [(task.task, task.share) for task in loaded.data.tasks] == [
        ("geometry3k", 0.6),
        ("clevr_count", 0.4),
    ]
    (tmp_path / "c.yaml").write_text(configfile.dump(loaded))
    assert configfile.load(cfg.TrainConfig, str(tmp_path / "c.yaml")) == loaded


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"recipe": "geometry3k"}], "share is missing"),
        ([{"recipe": "geometri3k", "share": 1}], "geometry3k"),
        ([{"recipe": "shapes", "share": 1}, {"recipe": "shapes", "share": 1}], "two tasks of one name"),
        (
            {"mixture": [{"recipe": "shapes", "share": 1}], "template": "x {problem}"},
            "template next to mixture",
        ),
        ({"recipe": "sroie", "template": "x"}, "must contain {problem}"),
        ({"recipe": "refcoco"}, "source is missing"),
        ({"sorce": "a"}, "did you mean `data.source`"),
    ],
)
def test_errors_name_the_field(tmp_path, data, words):
    with pytest.raises(ValueError) as error:
        config(tmp_path, data)
    assert words in str(error.value)


def test_held_out_rows_use_the_prompt_of_training_rows(tmp_path):
    data = {
        "source": "a.jsonl",
        "template": "Q: {problem}",
        "system": "Be brief.",
        "verifier": {"name": "count"},
    }
    rows = config(tmp_path, data, "eval.data.source=b.jsonl").eval.data[0]
    assert (rows.template, rows.system, rows.verifier.name) == ("Q: {problem}", "Be brief.", "count")
    rows = config(tmp_path, data, "eval.data.source=b.jsonl", "eval.data.template=A {problem}").eval.data[0]
    assert rows.template == "A {problem}" and rows.system == "Be brief."


def test_a_split_column_of_a_jsonl_file_selects_the_split(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    rows = [{"q": f"{n}?", "a": n, "pic": "a.png", "part": "test" if n % 2 else "train"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"problem": ["question", "q"], "answer": "a", "images": ["image", "pic"], "split": "part"}
    examples = build_examples(RowsConfig(source=str(tmp_path / "rows.jsonl"), split="test", columns=columns))
    assert [row.answer for row in examples] == ["1", "3", "5"] and examples[0].images[0].size == (40, 40)


def local(recipe: str) -> dict:
    folder = {"formalgeo": "geometry3k_formalgeo7k", "sroie": "sroie_docqa"}.get(
        recipe, "bccd_counting_grounding"
    )
    path = str(REAL / folder / "problems.jsonl")
    return (
        {"recipe": recipe, "source": path}
        if recipe == "formalgeo"
        else {"recipe": recipe, "args": {"path": path}}
    )


@needs_real
def test_a_mixture_of_real_tasks():
    tasks = [
        local(name) | {"share": share} for name, share in (("formalgeo", 2), ("bccd_count", 1), ("sroie", 1))
    ]
    stream = build_stream(DataConfig(mixture=tasks), lambda item: item, seed=0, minibatch=8)
    assert len(stream) == 120 + 120 + 68
    taken = stream.take(32)
    for start in range(0, 32, 8):
        names = [row.task for row in taken[start : start + 8]]
        assert [names.count(name) for name in ("formalgeo", "bccd_count", "sroie")] == [4, 2, 2]
    by_task = {row.task: row for row in taken}
    assert by_task["formalgeo"].problem.count(".") <= 1 and "\\boxed" in by_task["formalgeo"].template
    assert by_task["bccd_count"].verifier == ("count", {}) and by_task["bccd_count"].images[0].size == (
        640,
        480,
    )


def test_nested_mappings_are_merged(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "source: a.jsonl\nverifier: {name: box, args: {threshold: 0.7, coordinates: resized}}\nargs: {a: 1}\n"
    )
    recipe = {"recipe": str(tmp_path / "r.yaml")}
    rows = RowsConfig(**recipe, verifier={"args": {"coordinates": "thousand"}})
    assert rows.verifier.args == {"threshold": 0.7, "coordinates": "thousand"} and rows.task == "r"
    assert RowsConfig(**recipe, verifier={"name": "count"}).verifier.args == {}
    without = RowsConfig(**recipe, args=None)
    assert without.args == {} and RowsConfig.model_validate(without.model_dump()) == without
