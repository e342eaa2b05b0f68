"""A grounding evaluation read boxes in the coordinates of another model family, and scored perfect answers 0.

Source: https://github.com/EvolvingLMMs-Lab/lmms-eval/issues/892
"""

import json

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from vlm_sapo.cli import app

SIZE = (320, 200)
BOXES = {"a": (32, 20, 160, 120), "b": (200, 50, 300, 190), "c": (0, 100, 80, 200)}
"""Left, top, right, bottom of a red block, in pixels."""
MAX_PIXELS = 160 * 96


@pytest.fixture
def case(tmp_path, model_folder):
    """`case(family, boxes, *options, gold)`: evaluates recorded boxes as those of a family; the command's
    result, and that of the benchmark."""

    def evaluate(family, boxes, *options, gold=lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1]):
        rows, answers = [], []
        for name, block in BOXES.items():
            image = Image.new("RGB", SIZE, "white")
            ImageDraw.Draw(image).rectangle(block, fill="red")
            image.save(tmp_path / f"{name}.png")
            fields = {"question_id": name, "answer": ["the red block"], "image": f"{name}.png"}
            rows.append(fields | {"bbox": gold(*block)})
            text = json.dumps([{"bbox_2d": boxes(*block), "label": "the red block"}])
            answers.append({"id": name, "response": f"```json\n{text}\n```"})
        for stem, lines in (("rows", rows), ("answers", answers)):
            (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        model = ["--model", str(model_folder(family)), "--max-pixels", str(MAX_PIXELS)] if family else []
        files = ["--data", f"{tmp_path}/rows.jsonl", "--responses", f"{tmp_path}/answers.jsonl"]
        out = tmp_path / "out"
        command = ["eval", "--benchmark", "refcoco", *files, *model, "--out", str(out), *options]
        result = CliRunner().invoke(app, command)
        path = out / "results.json"
        return result, json.loads(path.read_text())["refcoco"] if path.exists() else {}

    return evaluate


def thousand(*block):
    return [round(1000 * side / length) for side, length in zip(block, SIZE * 2, strict=True)]


def pixels_seen(*block):
    """Pixels of the resized image, 160 x 96."""
    return [round(side * new / old) for side, new, old in zip(block, (160, 96) * 2, SIZE * 2, strict=True)]


@pytest.mark.parametrize(
    ("family", "boxes", "score"),
    [
        ("qwen2_vl", thousand, 1.0),
        ("qwen2_5_vl", pixels_seen, 1.0),
        ("qwen3_vl", thousand, 1.0),
        ("qwen3_vl_moe", thousand, 1.0),
        ("qwen3_5", thousand, 1.0),
        ("qwen2_5_vl", thousand, 0.0),
        ("qwen3_vl", pixels_seen, 0.0),
        ("qwen3_vl", lambda *block: list(block), 0.0),
    ],
)
def test_boxes_are_read_in_the_familys_coordinates(case, family, boxes, score):
    result, numbers = case(family, boxes)
    assert result.exit_code == 0, result.exception
    assert numbers["pass@1"] == score


def test_boxes_outside_their_images_are_warned_of(case):
    result, numbers = case("qwen2_5_vl", thousand)
    assert numbers["outside"] == 1.0
    assert "the boxes of 100% of the responses lie outside" in " ".join(result.output.split())


def test_without_a_model_the_coordinates_are_asked_for(case):
    result, numbers = case(None, thousand)
    assert not numbers and "give --model with the model that wrote them" in str(result.exception)
