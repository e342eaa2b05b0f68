"""Boxes whose sides are named by keys were no answer, or their sizes were read as corners.

Source: https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/1373
"""

import json

import pytest
from PIL import Image

from vlm_sapo.rewards.verifiers.answers import BadGold, NoAnswer
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

IMAGE = Image.new("RGB", (500, 400), "white")
SAME = [
    {"x1": 50, "y1": 60, "x2": 210, "y2": 260},
    {"xmin": 50, "ymin": 60, "xmax": 210, "ymax": 260},
    {"x_min": 50, "y_min": 60, "x_max": 210, "y_max": 260},
    {"left": 50, "top": 60, "right": 210, "bottom": 260},
    {"x": 50, "y": 60, "width": 160, "height": 200},
    {"x": 50, "y": 60, "w": 160, "h": 200, "label": "the kettle"},
    {"bbox_2d": [50, 60, 210, 260], "label": "the kettle"},
    {"bbox": [50, 60, 210, 260]},
    {"box": {"left": 50, "top": 60, "width": 160, "height": 200}},
    [50, 60, 210, 260],
]
OTHER = [
    {"x1": 50, "y1": 60, "x2": 160, "y2": 200},  # sizes under the keys of corners
    {"x": 50, "y": 60, "width": 210, "height": 260},  # and corners under those of sizes
    {"bbox": [50, 60, 160, 200]},
    [50, 60, 160, 200],
]
UNCLEAR = [
    {"x1": 50, "y1": 60, "x2": 210},
    {"x1": 50, "y1": 60, "width": 160, "height": 200},
    {"x1": 50, "y1": 60, "x2": 210, "y2": "the edge"},
    {"x1": 50, "y1": 60, "x2": 210, "y2": 260, "bbox_2d": [50, 60, 210, 260]},
    {"p": 50, "q": 60, "r": 210, "s": 260},
]


def grade(gold, answer, **args) -> float:
    """The score of an answer in a tag, in pixels of the image, with a threshold of 0.9."""
    row = Example(id="1", problem="Where is the kettle?", answer=gold, images=(IMAGE,))
    args = {"coordinates": "original", "threshold": 0.9} | args
    return VERIFIERS["box"](ResponseText(f"<answer>{answer}</answer>"), row, **args)


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
@pytest.mark.parametrize("written", SAME, ids=str)
def test_the_same_box_in_golds_and_answers(written, write):
    assert grade(write(written), "[50, 60, 210, 260]") == 1
    assert grade("[50, 60, 210, 260]", write(written)) == 1
    assert grade(write([written]), write([written])) == 1


@pytest.mark.parametrize("written", SAME[:6], ids=str)
def test_keys_count_more_than_the_layout(written):
    assert grade(str(written), str(written), layout="xywh", gold_layout="xywh") == 1
    assert grade("[50, 60, 160, 200]", str(written), gold_layout="xywh") == 1


@pytest.mark.parametrize("written", OTHER, ids=str)
def test_another_box_stays_wrong(written):
    assert grade("[50, 60, 210, 260]", json.dumps(written)) == 0
    assert grade(str(written), "[50, 60, 210, 260]") == 0


@pytest.mark.parametrize("written", UNCLEAR, ids=str)
def test_keys_that_do_not_say_a_box_are_refused(written):
    with pytest.raises(NoAnswer):
        grade("[50, 60, 210, 260]", json.dumps(written))
    with pytest.raises(BadGold, match="the gold answer"):
        grade(str(written), "[50, 60, 210, 260]")


def test_several_boxes():
    golds = [{"x": 10, "y": 10, "width": 90, "height": 40}, {"x1": 200, "y1": 100, "x2": 400, "y2": 300}]
    right = [{"bbox_2d": [200, 100, 400, 300]}, {"left": 10, "top": 10, "right": 100, "bottom": 50}]
    assert grade(str(golds), json.dumps(right)) == 1
    assert grade(str(golds), json.dumps(right[:1])) == 0.5
    assert grade(str(golds), json.dumps(golds[:1] * 2)) == 0.5
