"""Boxes and points in texts: lists, and mappings whose keys name the sides."""

import pytest

from vlm_sapo.rewards.verifiers.box_text import UnclearKeys, read_boxes, read_point

BOX = (30.0, 40.0, 130.0, 90.0)


@pytest.mark.parametrize("layout", ["xyxy", "xywh"])
@pytest.mark.parametrize(
    "text",
    [
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 90}',
        "{'x1': 30, 'y1': 40, 'x2': 130, 'y2': 90, 'label': 'mug 7'}",
        '{"y2": 90, "x2": 130, "y1": 40, "x1": 30}',
        '{"x0": 30, "y0": 40, "x1": 130, "y1": 90}',
        '{"xmin": 30, "ymin": 40, "xmax": 130, "ymax": 90}',
        '{"x_min": 30.0, "y_min": 40.0, "x_max": 130.0, "y_max": 90.0}',
        '{"xMin": "30", "yMin": "40", "xMax": "130", "yMax": "90"}',
        '{"left": 30, "top": 40, "right": 130, "bottom": 90}',
        '{"x": 30, "y": 40, "width": 100, "height": 50}',
        "{'x': 30, 'y': 40, 'w': 100, 'h': 50, 'score': 0.9}",
        '{"left": 30, "top": 40, "width": 100, "height": 50}',
        '{"cx": 80, "cy": 65, "w": 100, "h": 50}',
        '{"label": "mug", "box": {"x1": 30, "y1": 40, "x2": 130, "y2": 90}, "score": 0.75}',
        "{x1: 30, y1: 40, x2: 130, y2: 90}",
        "x: 30, y: 40, width: 100, height: 50",
        "The mug: x1=30, y1=40, x2=130, y2=90.",
    ],
)
def test_keys_say_the_layout(text, layout):
    assert read_boxes(text, layout) == [BOX]
    assert read_point(text) == (80.0, 65.0, 5000.0)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("[30, 40, 130, 90]", "xyxy"),
        ("[30, 40, 100, 50]", "xywh"),
        ('{"bbox_2d": [30, 40, 130, 90], "label": "mug"}', "xyxy"),
        ('{"bbox": [30, 40, 100, 50], "id": 3}', "xywh"),
        ('{"box": "30, 40, 130, 90"}', "xyxy"),
        ("(30,40),(130,90)", "xyxy"),
        ("30 40 130 90", "xyxy"),
    ],
)
def test_the_layout_of_a_list_is_that_of_the_verifier(text, layout):
    assert read_boxes(text, layout) == [BOX]
    assert read_boxes(text, "xyxy" if layout == "xywh" else "xywh") != [BOX]


def test_several_boxes_in_several_forms():
    text = '[{"x1": 1, "y1": 2, "x2": 3, "y2": 4}, {"bbox": [5, 6, 7, 8]}, {"x": 9, "y": 9, "w": 1, "h": 2}]'
    assert sorted(read_boxes(text, "xyxy")) == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 10, 11)]
    assert read_point(text.replace('{"bbox": [5, 6, 7, 8]}, ', "").partition(", {")[0]) == (2, 3, 4)


@pytest.mark.parametrize(
    "text",
    [
        '{"x1": 30, "y1": 40, "x2": 130}',
        '{"x": 30, "y": 40, "width": 100}',
        '{"x1": 30, "y1": 40, "width": 100, "height": 50}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 90, "width": 100}',
        '{"left": 30, "top": 40, "x2": 130, "y2": 90}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": "far"}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 9e1}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 90.5.1}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 90%}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": null}',
        '{"x1": [30], "y1": [40], "x2": [130], "y2": [90]}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 90, "X1": 31}',
        '{"x1": 30, "y1": 40, "x2": 130, "y2": 90, "bbox": [1, 2, 3, 4]}',
        '[{"x1": 30, "y1": 40, "x2": 130, "y2": 90}, {"x1": 30}]',
        "x1: 30, y1: 40, x2: 130",
    ],
)
def test_unclear_keys_are_refused(text):
    with pytest.raises(UnclearKeys):
        read_boxes(text, "xyxy")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 30, "b": 40, "c": 130, "d": 90}',
        '{"red": 30, "green": 40, "blue": 130, "alpha": 90}',
        '{"label": "mug"}',
        '{"bbox": [30, 40, 130]}',
        "[30, 40, 130, 90, 7]",
        "nowhere",
    ],
)
def test_no_box(text):
    assert read_boxes(text, "xyxy") == []


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ('{"point_2d": [30, 40], "label": "button 3"}', (30, 40, 0)),
        ('{"x": 30, "y": 40, "label": "button 3"}', (30, 40, 0)),
        ('{"y": 40, "x": 30}', (30, 40, 0)),
        ("x = 30, y = 40", (30, 40, 0)),
        ("30 40", (30, 40, 0)),
        ("[30, 40], [50, 60]", None),
        ("30, 40, 50", None),
        ('{"x1": 30, "y1": 40, "x2": 30, "y2": 90}', None),
        ("nowhere", None),
    ],
)
def test_points(text, point):
    assert read_point(text) == point


@pytest.mark.parametrize(
    "text", ['{"width": 30, "height": 40}', '[{"x": 3, "y": 4}, {"x": 5, "y": 6}]', '{"x": 30, "top": 40}']
)
def test_other_keys_are_no_point(text):
    with pytest.raises(UnclearKeys):
        read_point(text)
