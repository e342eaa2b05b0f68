"""The doctor: its findings in rows that are broken on purpose, and in real ones."""

import json

import pytest
import yaml
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from tests.conftest import SHARED, numbered_image
from vlm_sapo.cli import app

REAL = SHARED / "data"


def sketch(number: int) -> Image.Image:
    """A different image for every number."""
    image = Image.new("RGB", (96, 96), "white")
    canvas = ImageDraw.Draw(image)
    for index in range(6):
        x, y = (number * 37 + index * 29) % 80, (number * 53 + index * index * 17) % 80
        canvas.ellipse((x, y, x + 8 + number % 9, y + 14), outline="black", width=3)
        canvas.line((x, y, (x * 7 + number * 11) % 96, (y * 5 + 40) % 96), fill="navy", width=3)
    return image


class Case:
    def __init__(self, folder, model):
        self.folder, self.model, self.rows, self.held_out = folder, model, [], []

    def add(self, number: int, rows=None, **changes) -> None:
        name = changes.pop("image", f"{number}.png")
        if not (self.folder / name).exists() and name == f"{number}.png":
            sketch(number).save(self.folder / name)
        row = {"id": f"r{number}", "problem": f"Question {number}?", "answer": str(number), "image": name}
        (self.rows if rows is None else rows).append(row | changes)

    def run(self, *overrides, against: str = "", **config):
        for name, rows in (("train", self.rows), ("test", self.held_out)):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": {"path": str(self.model)},
            "data": {"source": str(self.folder / "train.jsonl")},
            "rollout": {"max_tokens": 8},
            "reward": {"parts": [{"name": "auto"}], "workers": 1},
            "train": {"steps": 1},
        } | config
        if self.held_out:
            values["eval"] = {"data": {"source": str(self.folder / "test.jsonl")}}
        (self.folder / "c.yaml").write_text(yaml.safe_dump(values))
        out = self.folder / "findings.json"
        options = ["--out", str(out), *(["--against", against] if against else [])]
        result = CliRunner().invoke(app, ["doctor", str(self.folder / "c.yaml"), *overrides, *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        report = json.loads(out.read_text())
        return result, report, {(f["where"].rpartition("/")[2], f["name"]): f for f in report["findings"]}


@pytest.fixture
def case(tmp_path, model_folder):
    rows = Case(tmp_path, model_folder())
    for number in range(12):
        rows.add(number)
    return rows


def test_good_rows_have_no_findings(case):
    for number in range(20, 26):
        case.add(number, case.held_out)
    result, report, findings = case.run()
    assert result.exit_code == 0 and not findings
    assert report["sets"]["held-out"]["rows"] == report["sets"]["held-out"]["usable"] == 6
    assert "nothing would break the run" in result.output


def test_rows_that_are_held_out_are_reported(case):
    sketch(1).save(case.folder / "twin.bmp")
    case.add(13, image="twin.bmp")
    case.add(14)
    result, report, findings = case.run("data.holdout=4")
    assert result.exit_code == 0 and not findings
    assert report["sets"]["held-out"]["rows"] == 4 and report["holdout"]["trained_rows"] == 10
    assert report["holdout"]["images"] + report["holdout"]["trained_images"] == 13
    assert "data.holdout: 4 rows with" in result.output and "none of the images is on both" in result.output


def test_rows_that_would_break_a_run_give_exit_code_1(case):
    sketch(13).save(case.folder / "whole.png")
    (case.folder / "torn.png").write_bytes((case.folder / "whole.png").read_bytes()[:200])
    case.add(12, image="missing.png")
    case.add(13, image="torn.png")
    case.add(14, answer="")
    case.add(15, problem="<image> and <image>?")
    case.add(16, problem="word " * 500)
    case.add(17, choices=["red", "blue"], answer="green")
    result, report, findings = case.run("data.max_prompt_tokens=600")
    assert result.exit_code == 1
    unreadable = findings["train.jsonl", "unreadable rows"]
    assert unreadable["count"] == 4 and unreadable["level"] == "breaks"
    assert unreadable["rows"][0] == "r12" and "missing.png" in unreadable["text"]
    assert findings["train.jsonl", "prompts over the limit"]["rows"] == ["r16"]
    gold = findings["train.jsonl", "gold answers rejected"]
    assert gold["rows"] == ["r17"] and "none of the options" in gold["text"]
    assert report["sets"][str(case.folder / "train.jsonl")]["usable"] == 13
    skipping, _, findings = case.run("data.max_prompt_tokens=600", "data.on_error=skip")
    assert findings["train.jsonl", "unreadable rows"]["level"] == "warning" and skipping.exit_code == 1


def test_a_prompt_that_leaves_no_room_for_the_response(case):
    result, _, findings = case.run("rollout.max_tokens=5000")
    assert result.exit_code == 1 and findings["train.jsonl", "over the context"]["count"] == 12


def test_suspicious_rows_are_reported(case):
    case.add(12, problem="The answer is 12, so?")
    case.add(13, problem="Of 1,913 people ...?", answer="1,913")
    case.add(14, image="0.png", problem="Question 0?", answer="5")
    case.add(15, image="1.png", problem="Question 1?", answer="1")
    Image.new("RGB", (40, 40), "white").save(case.folder / "16.png")
    case.add(16)
    case.rows.append({"id": "r17", "problem": "What does the figure show?", "answer": "9", "image": None})
    result, _, findings = case.run()
    assert result.exit_code == 0
    expected = {
        "answer in the prompt": ["r12"],
        "answer's text in the prompt": ["r13"],
        "answers contradict": ["r0", "r14"],
        "rows repeated": ["r1", "r15"],
        "blank pictures": ["r16"],
        "picture missing": ["r17"],
    }
    assert {name: finding["rows"] for (_, name), finding in findings.items()} == expected


def test_a_frequent_answer_and_a_reward_that_accepts_anything_are_reported(case):
    for row in case.rows[:9]:
        row["answer"] = "7"
    mine = "def any_answer(response, example): return 1.0 + 0 * example.images[0].getpixel((0, 0))[0]\n"
    (case.folder / "mine.py").write_text(mine)
    reward = {"parts": [{"name": f"{case.folder}/mine.py:any_answer"}], "workers": 1}
    _, _, findings = case.run(reward=reward)
    assert findings["train.jsonl", "one answer prevails"]["count"] == 9
    assert findings["train.jsonl", "wrong answers accepted"]["count"] == 12


def test_evaluation_images_in_training_are_reported(case):
    """The same file, another size and compression, and a benchmark's own rows."""
    case.add(3, case.held_out, id="h3", problem="Another question?")
    sketch(4).resize((143, 143)).save(case.folder / "h4.jpg", quality=70)
    case.add(4, case.held_out, id="h4", image="h4.jpg")
    case.add(30, case.held_out)
    sketch(5).save(case.folder / "b5.png")
    row = {"id": "b5", "question": "Why?", "answer": "1", "image": "b5.png"}
    (case.folder / "bench.jsonl").write_text(json.dumps(row) + "\n")
    result, _, findings = case.run(against=f"mmk12={case.folder}/bench.jsonl")
    leaked = findings["train.jsonl", "pictures of held-out in training"]
    assert leaked["rows"] == ["r3", "r4"] and "1 with the same pixels, 1 nearly" in leaked["text"]
    assert findings["train.jsonl", "pictures of benchmark mmk12 in training"]["rows"] == ["r5"]
    assert result.exit_code == 0


def test_no_false_alarms(case):
    """Instructions, layout rewards, thin lines, the gold -7, benchmarks that no run uses."""
    case.add(12, answer="-7", problem="Put your final answer in \\boxed{}. The answer is a whole number.")
    case.add(13, problem="Give it in <answer> </answer> tags.")
    thin = Image.new("RGB", (3000, 3000), "white")
    ImageDraw.Draw(thin).polygon([(300, 2700), (1500, 300), (2700, 2700)], outline="black", width=1)
    thin.save(case.folder / "thin.png")
    case.add(14, image="thin.png")
    (case.folder / "bench.jsonl").write_text(
        json.dumps({"question": "long " * 3000, "answer": "1", "image": None}) + "\n"
    )
    reward = {"parts": [{"name": "format", "weight": 0.1}, {"name": "auto"}], "workers": 1}
    result, _, findings = case.run(
        "data.max_prompt_tokens=4000",
        "data.template='{problem} Answer in \\boxed{}.'",
        against=f"mmk12={case.folder}/bench.jsonl",
        reward=reward,
    )
    assert result.exit_code == 0
    assert {name for _, name in findings} <= {"pictures much reduced"}


def test_images_that_could_not_be_compared_are_named(case):
    row = {"id": "b1", "question": "Why?", "answer": "1", "image": "gone.png"}
    (case.folder / "bench.jsonl").write_text(json.dumps(row) + "\n")
    result, _, findings = case.run(against=f"mmk12={case.folder}/bench.jsonl")
    finding = findings["benchmark mmk12", "pictures not compared"]
    assert result.exit_code == 0 and finding["rows"] == ["b1"] and "gone.png" in finding["text"]


def test_a_benchmark_is_checked_against_its_own_max_tokens(case):
    (case.folder / "bm.yaml").write_text(
        f"about: b\nsource: {case.folder}/train.jsonl\nmax_tokens: 100000\nverifier: {{name: auto}}\n"
    )
    result, _, findings = case.run(f"eval.benchmarks=[{case.folder}/bm.yaml]", "eval.limit=2")
    assert result.exit_code == 1 and findings["benchmark bm", "over the context"]["count"] == 2


@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not here")
def test_real_rows(case):
    """A figure of Geometry3K's training split is nearly one of its test split."""
    path = str(REAL / "geometry3k_formalgeo7k/problems.jsonl")
    data = {"recipe": "formalgeo", "source": path, "max_prompt_tokens": 8000}
    result, _, findings = case.run("model.max_pixels=40000", data=data, against=f"geometry3k={path}")
    assert result.exit_code == 0
    assert "1457 and 2528" in findings["formalgeo", "pictures of benchmark geometry3k in training"]["text"]


def test_transparent_images_get_a_white_background(tmp_path):
    from vlm_sapo.data.images import decode

    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(1, (5, 5, 10, 10))
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    image = decode("p.png", tmp_path)
    assert (
        image.mode == "RGB"
        and image.getpixel((0, 0)) == (255, 255, 255)
        and image.getpixel((7, 7)) == (0, 0, 0)
    )
    assert decode(numbered_image(), tmp_path).mode == "RGB"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_gold_boxes_are_checked_in_the_familys_coordinates(tmp_path, model_folder, family):
    rows = Case(tmp_path, model_folder(family))
    for number in range(4):
        rows.add(number, answer=str([10 + number, 20, 70, 90]))
    reward = {"parts": [{"name": "box"}], "workers": 1}
    result, _, findings = rows.run(reward=reward)
    assert result.exit_code == 0 and ("train.jsonl", "gold answers rejected") not in findings
    rows.add(4, answer="[60, 10, 20, 70]")
    rows.add(5, answer=str({"x": 60, "y": 10, "width": 20}))
    result, _, findings = rows.run(reward=reward)
    finding = findings["train.jsonl", "gold answers rejected"]
    assert result.exit_code == 1 and finding["rows"] == ["r4", "r5"] and finding["level"] == "breaks"
    assert "with gold_layout=xywh it would be" in finding["text"]


def test_gold_boxes_in_pixels_of_several_images_are_a_finding(case):
    case.rows[0] |= {"image": ["0.png", "1.png"], "answer": "[10, 20, 70, 90]"}
    case.rows[1:] = []
    result, _, findings = case.run(reward={"parts": [{"name": "box"}], "workers": 1})
    assert "has 2 images; use thousand or unit" in findings["train.jsonl", "gold answers rejected"]["text"]
