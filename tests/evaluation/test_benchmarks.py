"""Benchmark definitions on their own rows: problems, images, verdicts, the authors' scores."""

import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import ROOT, SHARED
from vlm_sapo.cli import app
from vlm_sapo.config.data import BenchmarkConfig
from vlm_sapo.evaluation.benchmarks import build_benchmark, build_benchmarks, read_definition
from vlm_sapo.evaluation.results import versions, we_math, worst_case
from vlm_sapo.plugins import resolve
from vlm_sapo.rewards.verifiers.table import VERIFIERS

NAMES = sorted(path.stem for path in (ROOT / "eval/benchmarks").glob("*.yaml"))
REAL = SHARED / "data"
FOLDERS = {
    "mathvision": "mathvision",
    "mmk12": "mmk12_test",
    "dynamath": "dynamath_seed",
    "wemath": "wemath",
    "geometry3k": "geometry3k_formalgeo7k",
    "sroie": "sroie_docqa",
    "bccd": "bccd_counting_grounding",
    "bccd_boxes": "bccd_counting_grounding",
}
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real rows are not here")
P = {"bytes": b"", "path": None}
HUB = {
    "mathvista": {
        "pid": "1", "query": "Hint: ...\nQuestion: How many?", "decoded_image": P, "image": "images/1.jpg",
        "choices": None, "answer": "3", "answer_type": "integer", "question_type": "free_form", "precision": None,
    },
    "mathverse": {
        "sample_index": "1", "problem_index": "1", "problem_version": "Vision Only", "image": P, "answer": "B",
        "question_type": "multi-choice", "query_cot": "Reason first. Choices: A:1 B:2", "query_wo": "x",
    },
    "logicvista": {"imagename": "a.png", "image": P, "question": "Which?", "answer": "A, C", "skill": ["deductive"]},
    "mmmu": {
        "id": "v1", "question": "<image 1> or <image 2>?", "options": "['one', '<image 3>']", "image_1": P, "image_2": P,
        "image_3": P, "image_4": None, "answer": "B", "question_type": "multiple-choice",
    },
    "mmmu_pro": {"id": "v1", "question": "See <image 1>.", "options": "['1', '2']", "image_1": P, "answer": "B"},
    "chartqa": {"image": P, "question": "How much?", "answer": "14", "type": "human_test"},
    "olympiadbench": {
        "id": 1, "subfield": "Geometry", "context": None, "question": "Find <image_1>.", "final_answer": ["2", "3"],
        "image_1": P, "answer_type": "Numerical",
    },
    "clevr_count": {"images": [P], "problem": "How many?", "answer": "3"},
    "visulogic": {"id": "1", "question": "Which?", "label": "B", "tag": "Spatial", "image_path": P},
    "docvqa": {"questionId": "1", "question": "Who?", "image": P, "answers": ["A. Smith", "Smith"]},
    "refcoco": {"question_id": "1", "image": P, "question": "q", "answer": ["left man", "man"], "bbox": [1, 2, 3, 4]},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_definition_is_valid(name):
    title, definition = read_definition(name)
    assert title == name and isinstance(definition, BenchmarkConfig)
    for verifier in filter(None, (definition.verifier, definition.official)):
        resolve(verifier.name, field="", builtin=VERIFIERS)
    if name not in FOLDERS and name != "shapes":
        assert name in HUB, "columns of its source, for the next test"


@pytest.mark.parametrize("name", HUB)
def test_a_definition_reads_the_columns_of_its_source(name, tmp_path):
    """Rows with the columns that the hub has, from a local file."""
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").as_posix()
    row = {k: data if v is P else [data] if v == [P] else v for k, v in HUB[name].items()}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [example] = build_benchmark(f"{name}={tmp_path}/rows.jsonl").examples
    assert example.problem and example.answer and example.task == name
    count = {"mmmu": 3}.get(name, 1)
    assert len(example.images) == count and example.problem.count("<image>") in (0, count)


def test_names_variants_and_files():
    assert read_definition("MathVision:testmini")[1].split == "testmini"
    assert read_definition("we-math")[0] == "wemath"
    assert read_definition("mmmu_pro:vision")[1].subset == "vision"
    file = str(ROOT / "data/README.md")
    title, definition = read_definition(f"bccd={file}")
    assert title == "bccd" and definition.args == {"path": file} and definition.split == "test"
    with pytest.raises(ValueError, match="did you mean mathvista"):
        read_definition("mathvist")
    with pytest.raises(ValueError, match="no.jsonl.* there is none"):
        read_definition("bccd=no.jsonl")
    with pytest.raises(ValueError, match="two benchmarks of one name"):
        build_benchmarks(["shapes", "shapes"])


@pytest.fixture
def run(tmp_path, model_folder):
    def evaluate(*options, out="out"):
        result = CliRunner().invoke(app, ["eval", "--out", str(tmp_path / out), *options])
        path = tmp_path / out / "results.json"
        return result, json.loads(path.read_text()) if path.exists() else {}

    return evaluate


@needs_real
@pytest.mark.parametrize("name", FOLDERS)
def test_each_benchmark_on_real_rows(run, name, model_folder, tmp_path):
    data = str(REAL / FOLDERS[name] / "problems.jsonl")
    options = (
        "--benchmark",
        name,
        "--data",
        data,
        "--max-tokens",
        "4",
        "--max-pixels",
        "10000",
        "--limit",
        "12",
    )
    result, results = run("--model", str(model_folder()), *options)
    assert result.exit_code == 0, result.exception
    assert (
        results[name]["n"] == 12
        and results[name]["ci95"][0] <= results[name]["pass@1"] <= results[name]["ci95"][1]
    )
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(records) == 12 and all(record["pictures"] for record in records)


def recorded(tmp_path, responses: dict) -> str:
    path = tmp_path / "responses.jsonl"
    path.write_text(
        "".join(json.dumps({"id": key, "response": text}) + "\n" for key, text in responses.items())
    )
    return str(path)


def real_rows(name: str) -> list[dict]:
    lines = (REAL / FOLDERS[name] / "problems.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@needs_real
@pytest.mark.skipif(not (SHARED / "verifier_truth").exists(), reason="the truth files are not here")
def test_recorded_mathvision_responses_get_the_authors_verdicts(run, tmp_path):
    lines = (SHARED / "verifier_truth/triples.jsonl").read_text().splitlines()
    ids = {row["id"] for row in real_rows("mathvision")}
    truth = {
        row["id"]: row
        for row in map(json.loads, lines)
        if row["source"] == "mathvision" and row["id"] in ids and not row.get("flags")
    }
    assert len(truth) > 8
    responses = recorded(tmp_path, {key: row["response"] for key, row in truth.items()})
    data = str(REAL / "mathvision/problems.jsonl")
    result, results = run(
        "--responses", responses, "--benchmark", "mathvision", "--data", data, "--on-error", "skip"
    )
    assert result.exit_code == 0, result.exception
    official = sum(row["verdict"] for row in truth.values()) / len(truth)
    assert results["mathvision"]["official"]["pass@1"] == pytest.approx(official)
    assert results["mathvision"]["n"] == len(truth) and "response_tokens" not in results["mathvision"]


@needs_real
def test_correct_answers_score_1_and_others_0_in_every_answer_format(run, tmp_path):
    """Every second problem answered right, in the form that its prompt asks for."""
    forms = {
        "mathvision": (lambda row: row["id"], lambda row: row["answer"], r"So \boxed{{{}}}"),
        "mmk12": (lambda row: row["id"], lambda row: row["answer"], r"So \boxed{{{}}}"),
        "dynamath": (
            lambda row: row["id"],
            lambda row: row["answer"],
            '{{"solution": "s", "short answer": "{}"}}',
        ),
        "wemath": (lambda row: f"{row['ID']}/{row['key']}", lambda row: row["answer"], "Thus.\nAnswer: {}"),
    }
    for name, (key, gold, form) in forms.items():
        rows = real_rows(name)
        answers = {
            key(row): form.format(gold(row) if index % 2 == 0 else "H" if name == "wemath" else "-77.5")
            for index, row in enumerate(rows)
        }
        data = str(REAL / FOLDERS[name] / "problems.jsonl")
        responses = recorded(tmp_path, answers)
        result, results = run("--responses", responses, "--benchmark", name, "--data", data, out=name)
        assert result.exit_code == 0, result.exception
        assert "are no rows of" not in result.output
        share = (len(rows) + 1) // 2 / len(rows)
        assert results[name]["pass@1"] == pytest.approx(share), name
        if "official" in results[name]:
            assert results[name]["official"]["pass@1"] == pytest.approx(share), name


def test_bad_rows_are_named_before_generation(run, tmp_path, model_folder):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.png")
    good = {
        "id": "1",
        "question": "<image1>?",
        "options": [],
        "answer": "3",
        "image": "a.png",
        "level": 1,
        "subject": "x",
    }
    cases = {
        "does not exist": good | {"image": "b.png"},
        "field answer is empty": good | {"answer": ""},
        "none of the options": good | {"options": ["a", "b"], "answer": "E"},
        "the model's context of": good | {"question": "why " * 9000},
    }
    for words, bad in cases.items():
        (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad | {"id": "bad"}) + "\n")
        options = (
            "--model",
            str(model_folder()),
            "--benchmark",
            "mathvision",
            "--data",
            str(tmp_path / "rows.jsonl"),
        )
        result, results = run(*options, "--max-tokens", "4")
        assert result.exit_code != 0 and not results
        assert words in str(result.exception) and "row bad" in str(result.exception)
        assert not (tmp_path / "out/samples.jsonl").exists()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "1", "text": "x"}) + "\n")
    result, _ = run(
        "--model", str(model_folder()), "--benchmark", "mmk12", "--data", str(tmp_path / "rows.jsonl")
    )
    assert "data.columns.problem (question)" in str(result.exception)
    result, _ = run(
        "--model", str(model_folder()), "--benchmark", "mmk12", "--data", str(tmp_path / "no.jsonl")
    )
    assert "there is none" in str(result.exception)


def test_a_missing_image_is_named(tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.png")
    row = {"id": "7", "question": "<image 1> <image 2>?", "options": "[]", "answer": "3", "image_1": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="row 7 .* image 2: .*NoneType"):
        build_benchmark(f"mmmu={tmp_path}/rows.jsonl").examples[0]


def test_a_folder_with_other_settings_is_refused(run, model_folder):
    options = ("--model", str(model_folder()), "--benchmark", "shapes", "--max-tokens", "4")
    first, results = run(*options, "--limit", "4")
    assert first.exit_code == 0 and results["shapes"]["n"] == 4
    again, same = run(*options, "--limit", "4")
    assert again.exit_code == 0 and same == results
    other, _ = run(*options, "--limit", "5")
    assert "differ in limit" in str(other.exception)


@pytest.fixture(scope="module")
def bfloat16_model(model_folder, tmp_path_factory):
    """The tiny model as a published one is stored."""
    folder = tmp_path_factory.mktemp("bfloat16")
    shutil.copytree(model_folder(), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("options", "dtype"), [((), "bfloat16"), (("--dtype", "float32"), "float32")])
def test_weights_have_the_checkpoints_dtype_by_default(run, bfloat16_model, options, dtype):
    common = ("--benchmark", "shapes", "--max-tokens", "4", "--limit", "2")
    result, results = run("--model", str(bfloat16_model), *common, *options)
    assert result.exit_code == 0, result.output
    assert results["shapes"]["dtype"] == dtype
    assert ("weights in bfloat16, as the checkpoint's config says" in result.output) == (dtype == "bfloat16")


def test_a_dtype_that_torch_does_not_have_is_named(run, model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "auto"}))
    result, _ = run("--benchmark", "shapes", "--model", str(tmp_path / "model"))
    assert re.search(
        r"has a config.json that can't be read .*auto.*; correct or remove its dtype", str(result.exception)
    )


def test_the_runs_reward_needs_a_run(run, model_folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("source: data/shapes.py:rows\nverifier: {name: run}\n")
    result, _ = run("--model", str(model_folder()), "--benchmark", str(tmp_path / "mine.yaml"))
    assert "mine: verifier (run) is the reward of a training run" in str(result.exception)
    (tmp_path / "mine.yaml").write_text("source: x\nverifier: {name: run, args: {finding: stated}}\n")
    with pytest.raises(ValueError, match="verifier run is the run's whole reward and takes neither args nor"):
        read_definition(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--benchmark", "shapes"), "give --model"),
        (("--benchmark", "a,b", "--data", "c", "--model", "m"), "for one benchmark"),
        (
            ("--benchmark", "shapes", "--model", "m", "--engine", "vlm"),
            "must be one of hf, vllm, vllm_server",
        ),
        (
            ("--benchmark", "shapes", "--model", "m", "--engine", "vllm", "--engine-args", "{tensor: 2}"),
            "did you mean `engine.tensor_parallel`",
        ),
        (("--benchmark", "nothing", "--model", "m"), "mathvista"),
        (("--benchmark", "shapes", "--responses", "no.jsonl"), "there is none"),
    ],
)
def test_command_line_errors(run, options, words):
    result, _ = run(*options)
    assert words in str(result.exception)


def we_math_records(verdicts: dict[str, list[float]]) -> list[dict]:
    records = []
    for group, scores in verdicts.items():
        names = [*(str(number) for number in range(1, len(scores))), "multi"]
        for name, score in zip(names, scores, strict=True):
            columns = {"ID": group, "key": f"{group[0]}steps_{name}"}
            records.append({"id": f"{group}/{name}", "columns": columns, "scores": [score]})
    return records


def test_we_math_four_way_score():
    """One group of each: by hand strict CM 1, RM 2, IG 1, IK 1 of 5; loose CM 2, RM 1."""
    verdicts = {
        "2steps_1": [1, 1, 1],  # complete mastery
        "2steps_2": [1, 0, 1],  # strict rote memorization, loose mastery
        "2steps_3": [0, 0, 1],  # rote memorization
        "3steps_1": [1, 1, 1, 0],  # inadequate generalization
        "3steps_2": [1, 0, 1, 0],  # insufficient knowledge
    }
    records = [*we_math_records(verdicts), *we_math_records({"2steps_9": [1, 1, 1]})[:2]]
    numbers = we_math(records, "scores")
    assert numbers["groups"] == 5 and numbers["incomplete_groups"] == 1
    strict, loose = numbers["strict"], numbers["loose"]
    assert [round(strict[name] * 5) for name in ("CM", "RM", "IG", "IK")] == [1, 2, 1, 1]
    assert strict["score"] == pytest.approx((5 - 0.5 - 2 - 1) / 5)
    assert [round(loose[name] * 5) for name in ("CM", "RM", "IG", "IK")] == [2, 1, 1, 1]
    assert loose["score"] == pytest.approx((5 - 0.5 - 1 - 1) / 5)


def test_worst_case_and_versions():
    """Question 3 lacks a variant: it counts in the average alone."""
    scores = {"1": ([1.0, 0.0], [1.0, 1.0]), "2": ([0.0, 1.0], [1.0, 1.0]), "3": ([1.0, 1.0],)}
    rows = [{"id": name, "scores": row} for name, variants in scores.items() for row in variants]
    numbers = worst_case(rows, "scores")
    assert numbers["average"] == pytest.approx(0.8) and numbers["worst_case"] == 0.5
    assert (numbers["questions"], numbers["variants"], numbers["incomplete_questions"]) == (2, 2, 1)
    rows = [
        {"columns": {"problem_version": v}, "scores": [s]} for v, s in (("a", 1.0), ("a", 0.0), ("b", 1.0))
    ]
    assert versions(rows, "scores")["mean_of_versions"] == 0.75


def graded(run, tmp_path, rows: list[dict], answers: dict, *options, benchmark="mmk12", out="out"):
    lines = [json.dumps({"image": None} | row) + "\n" for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data = str(tmp_path / "rows.jsonl")
    return run(
        "--responses",
        recorded(tmp_path, answers),
        "--benchmark",
        benchmark,
        "--data",
        data,
        *options,
        out=out,
    )


def test_other_data_or_responses_in_the_same_folder_are_refused(run, tmp_path):
    rows = [{"id": n, "question": "?", "answer": str(n)} for n in range(3)]
    right = {n: rf"\boxed{{{n}}}" for n in range(3)}
    _, results = graded(run, tmp_path, rows, right)
    assert results["mmk12"]["pass@1"] == 1.0
    result, _ = graded(run, tmp_path, rows, dict.fromkeys(range(3), "none"))
    assert "differ in" in str(result.exception) and "recorded" in str(result.exception)
    changed = [row | {"answer": "9"} for row in rows]
    result, _ = graded(run, tmp_path, changed, right)
    assert "definition" in str(result.exception)
    _, results = graded(run, tmp_path, changed, right, out="other")
    assert results["mmk12"]["pass@1"] == 0.0


def test_recorded_responses_must_match_the_rows(run, tmp_path):
    rows = [{"id": n, "question": "?", "answer": str(n), "image": None} for n in range(2)]
    both = {"id": 0, "responses": [r"\boxed{0}", "x"]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--benchmark", "mmk12", "--data", str(tmp_path / "rows.jsonl"))
    for second, words in (
        ({"id": 1, "response": "y"}, "equally many"),
        ({"id": 1, "responses": "yy"}, "list of texts"),
        ({"id": 1, "response": None}, "list of texts"),
    ):
        (tmp_path / "r.jsonl").write_text(json.dumps(both) + "\n" + json.dumps(second) + "\n")
        result, _ = run("--responses", str(tmp_path / "r.jsonl"), *options)
        assert words in str(result.exception)
    lines = [both, {"id": 1, "responses": ["a", "b"]}, {"id": "nobody", "responses": ["a", "b"]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result, results = run("--responses", str(tmp_path / "r.jsonl"), *options)
    assert (
        results["mmk12"]["pass@1"] == 0.25 and results["mmk12"]["samples"] == 2 and "nobody" in result.output
    )
    rows.append(rows[0])
    result, _ = graded(run, tmp_path, rows, {0: "a", 1: "b"}, out="shared")
    assert "share ids" in str(result.exception)


def test_golds_and_answers_in_the_format_of_their_source(run, tmp_path):
    rows = [
        {"id": "1", "question": "?", "options": "[]", "answer": "['24/7', '3.429']", "question_type": "open"},
        {
            "id": "2",
            "question": "?",
            "options": "['a', 'b']",
            "answer": "B",
            "question_type": "multiple-choice",
        },
    ]
    _, results = graded(run, tmp_path, rows, {"1": "3.429", "2": "B"}, benchmark="mmmu")
    assert results["mmmu"]["pass@1"] == results["mmmu"]["official"]["pass@1"] == 1.0
    rows = [
        {
            "id": "1",
            "question": "?",
            "answer": "0.6666667",
            "answer_type": "float",
            "subject": "s",
            "level": "l",
        },
        {
            "id": "2",
            "question": "?",
            "answer": "D",
            "answer_type": "multiple choice",
            "subject": "s",
            "level": "l",
        },
    ]
    answers = {"1": '{"short answer": "0.667"}', "2": '{"short answer": "Decreasing"}'}
    _, results = graded(run, tmp_path, rows, answers, benchmark="dynamath", out="d")
    assert results["dynamath"]["pass@1"] == results["dynamath"]["official"]["pass@1"] == 0.5


def test_a_users_own_verifier_may_ignore_boxed_answers(run, tmp_path, model_folder):
    (tmp_path / "mine.py").write_text(
        "def f(response, example):\n    return float(example.images[0].getpixel((0, 0))[0] > 9)\n"
    )
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "?", "answer": "x", "image": "a.png"}) + "\n")
    definition = f"about: mine\nsource: {tmp_path}/rows.jsonl\nverifier: {{name: '{tmp_path}/mine.py:f'}}\nmax_tokens: 4\n"
    (tmp_path / "mine.yaml").write_text(definition)
    result, results = run("--model", str(model_folder()), "--benchmark", str(tmp_path / "mine.yaml"))
    assert result.exit_code == 0 and results["mine"]["pass@1"] == 1.0


def test_a_variant_needs_a_column_that_names_the_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"id": "1", "question": "?", "answer": "3", "image": None}) + "\n"
    )
    with pytest.raises(ValueError, match="no column that names the split"):
        build_benchmark(f"mathvision:testmini={tmp_path}/rows.jsonl")


@pytest.mark.parametrize("name", ["mathvista", "wemath", "chartqa", "mathverse", "clevr_count"])
def test_rows_of_another_data_set_are_named(name, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "r7", "other": 1}) + "\n")
    with pytest.raises(ValueError, match="r7|other"):
        build_benchmark(f"{name}={tmp_path}/rows.jsonl")


@pytest.mark.parametrize(("name", "words"), [("sroie", "path"), ("bccd", "path")])
def test_a_source_without_its_file_is_named(name, words):
    with pytest.raises(ValueError, match=words):
        build_benchmark(name)
