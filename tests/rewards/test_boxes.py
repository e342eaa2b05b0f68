"""Coordinates of boxes: from the model's family, from the arguments, or refused; gold boxes that can't be right."""

import json

import pytest
from PIL import Image

from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.answers import BadGold, NoAnswer
from vlm_sapo.rewards.verifiers.boxes import Outside, box, needs_family, point_in_box
from vlm_sapo.types import Example, ResponseText

IMAGE = Image.new("RGB", (640, 320))
GOLD = "[64, 64, 320, 256]"
IN = {
    "resized": "[32, 32, 160, 128]",
    "original": "[64, 64, 320, 256]",
    "thousand": "[100, 200, 500, 800]",
    "thousand_yx": "[200, 100, 800, 500]",
    "unit": "[0.1, 0.2, 0.5, 0.8]",
}
"""The gold box in each kind of coordinates."""


def row(answer: str = GOLD, **fields) -> Example:
    return Example(id="r7", problem="p", answer=answer, images=(IMAGE,), **fields)


def response(answer: str, coordinates=None) -> ResponseText:
    return ResponseText(rf"\boxed{{{answer}}}", resized=((320, 160),), coordinates=coordinates)


@pytest.mark.parametrize("family", IN)
@pytest.mark.parametrize("written", IN)
def test_a_box_is_read_in_the_familys_coordinates(family, written):
    answer = response(IN[written], family)
    try:
        assert box(answer, row()) == float(family == written)
    except Outside:
        assert family != written
    assert box(answer, row(), coordinates=written) == 1
    assert point_in_box(answer, row(), coordinates=written) == 1
    assert point_in_box(response(IN[family], family), row()) == 1


def test_y_before_x():
    """Lists and points of models that write so; keys say it themselves, and a config may say another layout."""
    family = "thousand_yx"
    for answer in (
        '{"box_2d": [200, 100, 800, 500], "label": "cup"}',
        '{"x1": 100, "y1": 200, "x2": 500, "y2": 800}',
    ):
        assert box(response(answer, family), row()) == 1
    assert box(response("[100, 200, 500, 800]", family), row(), layout="xyxy") == 1
    tall = row("[64, 32, 128, 288]")  # 0.1 to 0.2 by 0.1 to 0.9
    assert point_in_box(response("[700, 150]", family), tall) == 1
    assert point_in_box(response("[150, 700]", family), tall) == 0
    assert point_in_box(response('{"x": 150, "y": 700}', family), tall) == 1
    for other in ('"width": 1000', '"label": "top: red"', '"left": "yes"'):
        text = f'```json\n{{"point": [700, 150], {other}}}\n```'
        assert point_in_box(ResponseText(text, resized=((320, 160),), coordinates=family), tall) == 1
    gold = row("[200, 100, 800, 500]")
    assert (
        box(response(IN["thousand"], "thousand"), gold, gold_layout="yxyx", gold_coordinates="thousand") == 1
    )


def test_without_a_model_the_coordinates_must_be_said():
    for verifier in (box, point_in_box):
        with pytest.raises(ValueError, match="must say which coordinates.*thousand"):
            verifier(response(IN["thousand"]), row())
    assert needs_family("box", {"threshold": 0.5}) and not needs_family("box", {"coordinates": "unit"})
    assert not needs_family("math", {})


def test_verdicts_of_two_families_are_kept_apart():
    with_pool = RewardPool([{"name": "box"}], workers=1)
    pairs = [(response(IN["thousand"], family), row()) for family in ("thousand", "resized", "thousand")]
    rewards = [with_pool([pair])[0] for pair in pairs]
    assert [reward.total for reward in rewards] == [1, 0, 1]
    assert [reward.outcomes["box"] for reward in rewards] == ["graded", "outside", "graded"]
    with_pool.close()


@pytest.mark.parametrize(
    ("answer", "outside"),
    [
        ("[1200, 200, 1500, 800]", True),
        ("[-300, 200, 500, 800]", True),
        ("[[1200, 200, 1500, 800], [100, 200, 500, 800]]", False),
        ("[950, 200, 1090, 800]", False),
    ],
)
def test_an_answer_that_lies_outside_the_image_is_counted_apart(answer, outside):
    if not outside:
        assert box(response(answer, "thousand"), row()) < 1
        return
    with pytest.raises(Outside) as error:
        box(response(answer, "thousand"), row())
    assert isinstance(error.value, NoAnswer) and error.value.outcome == "outside"
    with pytest.raises(Outside):
        point_in_box(response("(1200, 500)", "thousand"), row())


@pytest.mark.parametrize(
    ("gold", "args", "words"),
    [
        ("[300, 100, 200, 150]", {}, "with gold_layout=xywh it would be"),
        ("[300, 100, 700, 900]", {}, "with gold_coordinates=thousand it would be"),
        ("[0.1, 0.2, 0.5, 0.8]", {}, "with gold_coordinates=unit it would be"),
        ("[5000, 100, 6000, 300]", {}, "mend the row"),
        ("{'x1': 3, 'y1': 4, 'x2': 5}", {}, "names the sides x1, y1, x2;"),
        ("{'a': 3, 'b': 4, 'c': 5, 'd': 6}", {}, "must contain boxes of four numbers, or mappings"),
        ("the mug", {}, "must contain boxes"),
    ],
)
def test_gold_boxes_that_cannot_be_right_are_bad_golds(gold, args, words):
    with pytest.raises(BadGold) as error:
        box(response(IN["thousand"], "thousand"), row(gold), **args)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_keys_in_golds_and_answers_whatever_the_layout():
    gold = str({"x": 64, "y": 64, "width": 256, "height": 192})
    corners = json.dumps({"x1": 64, "y1": 64, "x2": 320, "y2": 256})
    for gold_layout in ("xyxy", "xywh"):
        for layout in ("xyxy", "xywh"):
            args = {"gold_layout": gold_layout, "layout": layout, "coordinates": "original"}
            assert box(response(corners), row(gold), **args) == 1
            assert box(response(gold), row(corners), **args) == 1
    assert box(response("[64, 64, 256, 192]"), row(gold), coordinates="original", threshold=0.6) == 0
    with pytest.raises(NoAnswer, match="names the sides"):
        box(response('{"x1": 64, "y1": 64, "x2": 320}'), row(gold), coordinates="original")


def test_stated_json_may_be_long_and_unmarked():
    text = json.dumps([{"bbox_2d": [100, 200, 500, 800], "label": "the mug that stands " * 8}])
    answer = ResponseText(text, coordinates="thousand")
    assert box(answer, row(), finding="stated") == 1
    for finding, unmarked in (
        ("marked", text),
        ("stated", f"Boxes in such images look like {text}, I think."),
    ):
        with pytest.raises(NoAnswer):
            box(ResponseText(unmarked, coordinates="thousand"), row(), finding=finding)
