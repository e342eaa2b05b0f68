"""Calls as models write them, boxes in the coordinates of each family, and what the tools answer."""

import json
import re

import pytest
from PIL import Image

from vlm_sapo.environments.calls import Call, read_calls
from vlm_sapo.environments.environment import MOST_CHARACTERS
from vlm_sapo.environments.tools import BUILTIN, SeenImage, Tool, ToolEnvironment
from vlm_sapo.environments.values import BadCall, Box, Point, to_pixels
from vlm_sapo.types import Example, ResponseText

OWN = "tests/environments/own_tools.py"


def call(name, syntax="json", **arguments):
    if syntax == "json":
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize("syntax", ["json", "xml"])
def test_calls_are_read_in_both_forms(syntax):
    code = "print(1)\nx < 2"
    first, second = call("zoom", syntax, box=[1, 2.5, 3, 4]), call("python", syntax, code=code)
    turn = f"I look. {first}\n{second}"
    box = [1, 2.5, 3, 4] if syntax == "json" else "[1, 2.5, 3, 4]"
    assert read_calls(turn, syntax) == [
        Call("zoom", {"box": box}),
        Call("python", {"code": code}),
    ]
    assert read_calls("The answer is \\boxed{3}", syntax) == []


def test_calls_in_thoughts_are_none():
    thought = f"<think>Shall I {call('zoom', box=[0, 0, 1, 1])}?</think>"
    assert read_calls(thought, "json") == []
    assert len(read_calls(thought + call("crop"), "json")) == 1
    assert read_calls(f"<think>{call('zoom')}", "json") == []


@pytest.mark.parametrize(
    ("turn", "syntax", "sentence"),
    [
        ('<tool_call>\n{"name": "zoom", "argu', "json", "no </tool_call>"),
        ("<tool_call>zoom(1)</tool_call>", "json", "'zoom.1.' is no JSON"),
        ("<tool_call>[1]</tool_call>", "json", "has no name"),
        ('<tool_call>{"arguments": {}}</tool_call>', "json", "has no name"),
        ('<tool_call>{"name": "zoom", "arguments": [1]}</tool_call>', "json", "must be an object"),
        ('<tool_call>{"name": "zoom", "arguments": "{1"}</tool_call>', "json", "are no JSON"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "json", "is no JSON"),
        ("<tool_call>zoom</tool_call>", "xml", "is no call; write\n<tool_call>\n<function="),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(turn, syntax, sentence):
    [error] = read_calls(turn, syntax)
    assert isinstance(error, BadCall) and re.search(sentence, str(error)), str(error)
    assert len(str(error)) < 400


def test_a_call_that_is_cut_by_the_next_is_its_own():
    first, second = read_calls(f'<tool_call>{{"name": "a"\n{call("b")}', "json")
    assert isinstance(first, BadCall) and second == Call("b", {})


@pytest.mark.parametrize(
    ("coordinates", "box"),
    [
        ("resized", [16, 8, 32, 24]),
        ("original", [100, 50, 200, 150]),
        ("thousand", [250, 250, 500, 750]),
        ("thousand_yx", [250, 250, 750, 500]),
        ("unit", [0.25, 0.25, 0.5, 0.75]),
    ],
)
def test_boxes_are_in_the_models_coordinates(coordinates, box):
    expected = (100.0, 50.0, 200.0, 150.0)
    assert to_pixels(Box, box, coordinates, (64, 32), (400, 200)) == expected
    point = to_pixels(Point, box[:2], coordinates, (64, 32), (400, 200))
    assert point == expected[:2]


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([900, 0, 100, 500], "has no area"),
        ([0, 500, 100, 100], "has no area"),
        ([1100, 0, 1200, 500], "lies outside"),
        ([0, 0, 1, 1], "smaller than a pixel"),
        ([0, 0, 100], "a list of 4 numbers"),
        (["0", 0, 100, 100], "numbers only"),
        ([True, 0, 100, 100], "numbers only"),
        (7, "a list of 4 numbers"),
    ],
)
def test_boxes_that_are_none(box, sentence):
    with pytest.raises(BadCall, match=sentence):
        to_pixels(Box, box, "thousand", (64, 64), (400, 400))


def test_a_box_over_the_edge_is_cut_off():
    assert to_pixels(Box, [-100, 500, 1200, 1000], "thousand", (64, 64), (400, 200)) == (0, 100, 400, 200)


def episode(*tools, syntax="json", coordinates="thousand", size=(400, 200), seen=(64, 32)):
    environment = ToolEnvironment([name if name in BUILTIN else f"{OWN}:{name}" for name in tools], syntax)
    image = Image.new("RGB", size, (255, 255, 255))
    image.paste((255, 0, 0), (size[0] // 2, 0, *size))
    environment.reset(Example("1", "Look.", "7", (image,)))
    sizes = [seen]

    def step(text):
        observation = environment.step(ResponseText(text, resized=tuple(sizes), coordinates=coordinates))
        sizes.extend(item.size for result in observation.results for item in result.images)
        return observation

    return step


def test_a_turn_without_calls_ends_the_episode():
    observation = episode("zoom")("It is \\boxed{7}")
    assert observation.done and observation.results == () and observation.info["calls"] == 0


def test_zoom_shows_a_part_as_large_as_the_whole():
    step = episode("zoom", "crop", "rotate")
    observation = step(call("zoom", box=[0, 0, 250, 500]) + call("crop", box=[500, 0, 1000, 500]))
    assert not observation.done and observation.info | {} == {
        "calls": 2, "bad_calls": 0, "tool_errors": 0, "images": 2,
    }  # fmt: skip
    [zoomed], [cropped] = (result.images for result in observation.results)
    assert zoomed.size == (200, 200) and zoomed.getpixel((5, 5)) == (255, 255, 255)
    assert cropped.size == (200, 100) and cropped.getpixel((50, 50)) == (255, 0, 0)
    again = step(call("rotate", image=3, degrees=90))
    assert again.results[0].images[0].size == (100, 200)


def test_the_other_tools():
    step = episode("draw_box", "measure", "python")
    [marked] = step(call("draw_box", box=[250, 250, 750, 750])).results[0].images
    assert marked.getpixel((100, 100)) == (255, 0, 0) and marked.getpixel((50, 20)) == (255, 255, 255)
    [line] = step(call("measure", start=[0, 0], end=[750, 1000])).results
    assert line.text.startswith("length 360.6 pixels of 400x200, -33.7 degrees")
    [printed] = step(call("python", code="print(6 * 7)\nopen('/etc/passwd')")).results
    assert printed.text.startswith("42\n") and "PermissionError" in printed.text


def test_a_tool_of_ones_own():
    step = episode("brightness", "locate")
    texts = [
        result.text
        for result in step(
            call("brightness")
            + call("brightness", box=[500, 0, 1000, 1000], scale=2)
            + call("locate", point=[500, 500], label="middle")
        ).results
    ]
    assert texts == ["255.0", "152.0", '["middle", [200.0, 100.0]]']


@pytest.mark.parametrize(
    ("turn", "sentence"),
    [
        (call("look"), "there is no tool 'look'; the tools are zoom, brightness"),
        (call("zoom"), "zoom needs box"),
        (call("zoom", box=[0, 0, 500, 500], size=2), "no parameter 'size'; it has image, box"),
        (call("zoom", image=2, box=[0, 0, 500, 500]), r"image \(2\) must be the number of an image, from 1"),
        (call("zoom", image="one", box=[0, 0, 500, 500]), r"image \(one\) must be the number"),
        (call("zoom", box=[500, 0, 0, 500]), "box: .* has no area: .left, top, right, bottom., each from 0"),
        (call("brightness", scale="high"), r"scale \(high\): input should be a valid number"),
    ],
)
def test_wrong_calls_are_answered(turn, sentence):
    step = episode("zoom", "brightness")
    observation = step(turn)
    [result] = observation.results
    assert re.search(sentence, result.text), result.text
    assert result.text.startswith("error: ") and not observation.done
    assert observation.info["bad_calls"] == 1 and observation.info["tool_errors"] == 0


@pytest.mark.parametrize(
    ("how", "sentence", "images", "errors"),
    [
        ("raise", "^error: RuntimeError: no luck with this$", 0, 1),
        ("pixel", "^$", 1, 0),
        ("huge", "^error: an image may have 67,108,864 pixels; this one is 20000x20000", 0, 1),
        ("ten", "^$", 10, 0),
        ("long", r"more characters are left out\)$", 0, 0),
        ("nonsense", "^<object object", 0, 0),
        ("nothing", "^$", 0, 0),
    ],
)
def test_what_a_tool_may_do_wrong(how, sentence, images, errors):
    observation = episode("misbehave")(call("misbehave", how=how))
    [result] = observation.results
    assert re.search(sentence, result.text) and len(result.images) == images
    assert observation.info["tool_errors"] == errors and len(result.text) < MOST_CHARACTERS + 100


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unhinted", "its parameter image needs a type hint"),
        ("undocumented", "needs a docstring: it tells the model"),
        ("missing", "must name an object that"),
        ("OWN", "must name"),
    ],
)
def test_functions_that_are_no_tools_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tool.of(f"{OWN}:{name}")


def test_a_tool_that_forgets_its_image_is_an_error():
    observation = episode("forgetful")(call("forgetful"))
    [result] = observation.results
    assert result.text == "error: forgetful must return an image; it returned NoneType"
    assert observation.info["tool_errors"] == 1 and observation.problem in result.text


def test_the_first_traceback_goes_to_the_user():
    observation = episode("misbehave")(call("misbehave", how="raise") + call("misbehave", how="huge"))
    assert "own_tools.py" in observation.problem and "RuntimeError: no luck" in observation.problem
    assert observation.info["tool_errors"] == 2


def test_texts_stay_texts_and_other_values_may_be_written_as_text():
    """As the xml form writes them; and null where a parameter may be left out."""
    step = episode("locate", "brightness", "python", syntax="xml")
    texts = [
        step(call(name, "xml", **arguments)).results[0].text
        for name, arguments in (
            ("locate", {"point": [500, 500], "label": "2024"}),
            ("python", {"code": "42"}),
            ("brightness", {"box": None, "scale": 2, "image": 1}),
        )
    ]
    assert texts == ['["2024", [200.0, 100.0]]', "42\n", "510.0"]


def test_an_image_that_is_not_shown_has_no_number():
    """What the model couldn't see isn't counted, and the episode goes on."""
    environment = ToolEnvironment(["zoom", f"{OWN}:misbehave", "crop"], "json")
    environment.reset(Example("1", "Look.", "7", (Image.new("RGB", (400, 200)),)))

    def step(text, *sizes):
        return environment.step(ResponseText(text, resized=sizes, coordinates="thousand"))

    step(call("misbehave", how="line") + call("crop", box=[0, 0, 500, 500]), (64, 32))
    sizes = ((64, 32), (0, 0), (32, 16))
    [second] = step(call("crop", image=2, box=[0, 0, 500, 1000]), *sizes).results
    assert second.images[0].size == (100, 100)
    [third] = step(call("crop", image=4, box=[0, 0, 500, 1000]), *sizes, (16, 16)).results
    assert "from 1 to 3" in third.text


def test_an_image_that_the_model_cannot_name():
    tool = Tool.of("zoom")
    with pytest.raises(BadCall, match="from 1 to 0"):
        tool.run({"box": [0, 0, 1, 1]}, [], "unit")
    seen = [SeenImage(Image.new("L", (10, 10)), (10, 10))]
    assert tool.run({"box": [0, 0, 1, 1]}, seen, "unit").images[0].mode == "RGB"
