"""Paths in a config: beside it, in the working directory, among the shipped files; two different ones."""

import pytest
import yaml
from PIL import Image

from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.benchmarks import build_benchmark, read_definition

ROW = '{"id": "1", "problem": "1 + 1?", "answer": "2"}\n'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a config and its files, and another one to work in."""
    for name in ("project", "work"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "project"
    for name in ("rows.jsonl", "test.jsonl", "bench.jsonl"):
        (folder / name).write_text(ROW)
    (folder / "mine.py").write_text("def f(response, example):\n    return 1.0\n")
    (folder / "recipe.yaml").write_text("source: rows.jsonl\nverifier: {name: mine.py:f}\n")
    (folder / "bench.yaml").write_text("source: bench.jsonl\nverifier: {name: mine.py:f}\n")
    (folder / "model").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def load(folder, *overrides, **sections):
    values = {
        "model": {"path": "model"},
        "data": {"source": "rows.jsonl"},
        "reward": "mine.py:f",
        "train": {"steps": 1},
    } | sections
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return configfile.load(cfg.TrainConfig, str(folder / "c.yaml"), overrides)


def test_files_beside_the_config_are_used_from_everywhere(project, tmp_path, monkeypatch):
    config = load(
        project,
        algo={"objective": {"type": "own", "function": "mine.py:f"}, "advantage": "zscore"},
        eval={
            "data": [{"source": "test.jsonl"}, {"recipe": "recipe.yaml", "name": "other"}],
            "benchmarks": ["bench.yaml", "bench.yaml=rows.jsonl", "mathvista"],
        },
    )
    assert config.model.path == f"{project}/model" and config.data.source == f"{project}/rows.jsonl"
    assert config.data.task == "rows.jsonl"  # logs don't depend on the folder
    assert config.reward.parts[0].name == config.algo.objective.function == f"{project}/mine.py:f"
    first, second = config.eval.data
    assert (first.source, first.task) == (f"{project}/test.jsonl", "test.jsonl")
    assert (second.source, second.verifier.name) == (f"{project}/rows.jsonl", f"{project}/mine.py:f")
    bench = f"{project}/bench.yaml"
    assert config.eval.benchmarks == [bench, f"{bench}={project}/rows.jsonl", "mathvista"]
    assert read_definition(bench)[1].source == f"{project}/bench.jsonl"
    (tmp_path / "stored.yaml").write_text(configfile.dump(config))
    monkeypatch.chdir(tmp_path)
    assert configfile.load(cfg.TrainConfig, str(tmp_path / "stored.yaml")) == config
    assert len(build_examples(config.data.tasks[0])) == len(build_benchmark(bench).examples) == 1


def test_the_working_directory_comes_second_and_holds_for_overrides(project, tmp_path):
    work = tmp_path / "work"
    (work / "here.jsonl").write_text(ROW)
    assert load(project, data={"source": "here.jsonl"}).data.source == f"{work}/here.jsonl"
    config = load(project, "data.source=here.jsonl")
    assert (config.data.source, config.data.task) == (f"{work}/here.jsonl", "here.jsonl")
    assert load(project, "data.source=rows.jsonl").data.source == "rows.jsonl"  # not there: perhaps a hub id
    assert load(project, data={"source": "data/shapes.py:rows"}).data.source == "data/shapes.py:rows"


def test_two_different_files_are_an_error(project, tmp_path):
    twin = tmp_path / "work/rows.jsonl"
    twin.symlink_to(project / "rows.jsonl")
    assert load(project).data.source == f"{project}/rows.jsonl"
    twin.unlink()
    twin.write_text(ROW)
    with pytest.raises(ValueError) as error:
        load(project)
    assert f"data.source (rows.jsonl) must be one file, and there are two: {project}/rows.jsonl" in str(
        error.value
    )
    assert f"{twin} in the working directory" in str(error.value)
    assert load(project, data={"source": str(twin)}).data.source == str(twin)


def test_names_are_no_paths(project):
    """A folder beside the config with the name of a verifier or a recipe changes nothing."""
    for name in ("math", "geometry3k", "shapes"):
        (project / name).mkdir()
    config = load(project, reward="math", data={"recipe": "geometry3k"}, eval={"benchmarks": ["shapes"]})
    assert config.reward.parts[0].name == "math" and config.eval.benchmarks == ["shapes"]
    assert config.data.source == "hiyouga/geometry3k"


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere.py:rows"])
def test_an_error_says_where_it_looked(project, tmp_path, source):
    with pytest.raises(ValueError) as error:
        build_examples(load(project, data={"source": source}).data.tasks[0])
    assert f"looked beside the file that names it, in {tmp_path}/work, and among the shipped" in str(
        error.value
    )


@pytest.mark.parametrize("folder", ["a=b", "c:d", "~"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (tmp_path / folder, tmp_path / "home"):
        path.mkdir()
        Image.new("RGB", (32, 32), "red").save(path / "1.png")
        (path / "rows.jsonl").write_text('{"problem": "<image> 1 + 1?", "answer": "2", "image": "1.png"}\n')
        (path / "bench.yaml").write_text("source: rows.jsonl\nverifier: {name: math}\n")
    monkeypatch.chdir(tmp_path)
    config = load(
        tmp_path, data={"source": f"{folder}/rows.jsonl"}, eval={"benchmarks": [f"{folder}/bench.yaml"]}
    )
    assert build_examples(config.data)[0].images[0].size == (32, 32)
    assert build_benchmark(config.eval.benchmarks[0]).examples[0].answer == "2"
    assert build_benchmark(f"{folder}/bench.yaml={folder}/rows.jsonl").examples[0].answer == "2"


def test_a_mapping_for_eval_data_is_named_as_written(project):
    """One set needs no list, and its errors no number."""
    config = load(project, eval={"data": {"source": "test.jsonl"}})
    assert [(rows.task, rows.source) for rows in config.eval.data] == [("held-out", f"{project}/test.jsonl")]
    with pytest.raises(ValueError, match=r"eval.data.limit \(0\) must be"):
        load(project, "eval.data.limit=0", eval={"data": {"source": "test.jsonl"}})
    with pytest.raises(ValueError, match=r"eval.data.0.limit \(0\) must be"):
        load(project, eval={"data": [{"source": "test.jsonl", "limit": 0}]})
