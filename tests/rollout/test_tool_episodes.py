"""Calls of tools within responses: what is written behind a turn, and how a response ends when a tool or a call
goes wrong. The turns are given; everything else is real."""

import json
from functools import partial

import pytest
import torch

from tests.conftest import example
from tests.rollout.test_environment import end_processes, environments  # noqa: F401 (a fixture)
from vlm_sapo.config.load import load
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.distributed import World
from vlm_sapo.environments.tools import ToolEnvironment
from vlm_sapo.models.encode import Encoder
from vlm_sapo.rollout.build import build_tools
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.environment import Demonstrations, Episodes, Limits, play
from vlm_sapo.types import RowError, Sampling

OWN = "tests/environments/own_tools.py"
ANSWER = r"It is \boxed{7}."


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def section(**fields):
    return RolloutConfig.model_validate({"environment": fields}).environment


@pytest.fixture
def encode(vlm):
    tools = build_tools(section(tools=["zoom", f"{OWN}:misbehave"], format="hermes"), vlm)
    return Encoder(vlm, tools=tools, max_pixels=64 * 64)


def says(
    encode, *turns, tools=("zoom", "python", f"{OWN}:misbehave"), timeout=20.0, max_tokens=4000, **limits
):
    """The response of these turns."""
    prompt = encode(example(0, images=1))
    make = partial(ToolEnvironment, list(tools), "json")
    engine = Episodes(
        Demonstrations(encode, lambda _: turns),
        encode,
        environments(make, timeout=timeout),
        limits=Limits(**{"turns": 4} | limits),
        world=World(),
        warn=lambda text: None,
    )
    engine.answered = True
    [[response]] = engine.generate(as_contexts([prompt]), Sampling(1, max_tokens, 1.0, seed=0))
    return response


def answers(encode, response):
    return [
        encode.decode(response.ids[span.start : span.end])
        for span in response.spans
        if span.source == "environment"
    ]


def test_a_zoom_is_shown_and_only_the_models_tokens_are_its(encode):
    first = "I look. " + call("zoom", box=[0, 0, 500, 500])
    response = says(encode, first, ANSWER)
    assert response.finish == "stop" and [span.source for span in response.spans] == [
        "policy", "environment", "policy",
    ]  # fmt: skip
    assert [encode.decode(turn) for turn in response.turns] == [first, ANSWER]
    assert response.text == f"{first}\n{ANSWER}"
    [answer] = answers(encode, response)
    assert "<tool_response>" in answer and answer.rstrip().endswith("assistant")
    [inputs] = response.images
    assert len(inputs.images) == 1 and inputs.images[0].width * inputs.images[0].height <= 64 * 64
    assert response.counts == {"calls": 1, "images": 1, "turns": 2}
    image = encode.vlm.model.config.image_token_id
    assert int((response.ids == image).sum()) == int(inputs.grid.prod(-1).sum()) // 4
    assert not response.mask[response.ids == image].any()


def test_two_calls_in_a_turn_get_two_answers(encode):
    first = call("zoom", box=[0, 0, 500, 500]) + call("python", code="1 + 1")
    [answer] = answers(encode, says(encode, first, ANSWER))
    assert answer.count("<tool_response>") == 2 and "\n2\n" in answer


@pytest.mark.parametrize(
    ("how", "options", "finish", "count"),
    [
        ("hang", {"timeout": 1.0}, "timeout", "timeout"),
        ("exit", {}, "error", "error"),
        ("ten", {"images": 8}, "images", "limit/images"),
        ("long", {"max_tokens": 400}, "length", "limit/length"),
        ("raise", {}, "stop", "tool_errors"),
        ("huge", {}, "stop", "tool_errors"),
        ("pixel", {}, "stop", "images"),
        ("nonsense", {}, "stop", "calls"),
    ],
)
def test_a_tool_that_misbehaves(encode, how, options, finish, count):
    response = says(encode, call("misbehave", how=how), ANSWER, **options)
    assert response.finish == finish and response.counts[count] == 1
    assert torch.isnan(response.logprobs[response.mask]).all()  # the turns that were there are kept
    assert len(response.turns) == (2 if finish == "stop" else 1)


def test_an_image_of_an_impossible_form_is_an_error_that_the_model_reads(encode):
    response = says(encode, call("misbehave", how="line"), ANSWER)
    [answer] = answers(encode, response)
    assert "error: this image can't be shown" in answer and not response.images


def test_the_console_shows_the_first_failure_of_a_tool(encode):
    warned = []
    prompts = [encode(example(number, images=1)) for number in range(3)]
    make = partial(ToolEnvironment, [f"{OWN}:misbehave"], "json")
    engine = Episodes(
        Demonstrations(encode, lambda _: (call("misbehave", how="raise"), ANSWER)),
        encode,
        environments(make),
        limits=Limits(4),
        world=World(),
        warn=warned.append,
    )
    engine.generate(as_contexts(prompts), Sampling(1, 4000, 1.0, seed=0))
    [text] = warned
    assert (
        text.startswith("row e0: a tool failed: with this; the model reads the error") and "own_tools" in text
    )


def test_an_image_that_is_not_shown_ends_nothing(encode):
    turns = (call("misbehave", how="line"), call("zoom", box=[0, 0, 500, 500]), ANSWER)
    response = says(encode, *turns)
    assert response.finish == "stop" and len(response.images) == 1
    assert response.counts == {"calls": 2, "images": 2, "turns": 3}


def test_turns_and_wrong_calls_are_counted(encode):
    turns = [call("look"), '<tool_call>\n{"name": "zo', call("zoom", box=[900, 0, 1, 1]), call("zoom")]
    response = says(encode, *turns, turns=4)
    assert response.finish == "turns" and len(answers(encode, response)) == 3
    assert response.counts == {"calls": 4, "bad_calls": 4, "turns": 4, "limit/turns": 1}
    assert "there is no tool 'look'" in answers(encode, response)[0]
    assert "no </tool_call>" in answers(encode, response)[1]


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        (
            [call("zoom", box=[0, 0, 500, 500])],
            "demonstration has 1 turns, and the environment answers the last",
        ),
        ([ANSWER, "More."], r"demonstration of 2 turns ended after 1 \(stop\)"),
    ],
)
def test_a_demonstration_that_does_not_fit_names_its_row(encode, turns, sentence):
    prompt = encode(example(0, images=1))
    engine = Episodes(
        None,
        encode,
        environments(partial(ToolEnvironment, ["zoom"], "json")),
        limits=Limits(4),
        world=World(),
    )
    with pytest.raises(RowError, match=f"row e0.*: its {sentence}"):
        play(engine, [prompt], {prompt: turns})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tools": ["zom"]}, "rollout.environment.tools .zom. must be one of .* did you mean 'zoom'"),
        ({"tools": ["zoom", "zoom"], "format": "hermes"}, "has zoom twice"),
        ({"tools": [f"{OWN}:unhinted"]}, "parameter image needs a type hint"),
        ({"tools": ["zoom"]}, "rollout.environment.format must be hermes for this model"),
    ],
)
def test_tools_that_cannot_be_offered_stop_at_the_start(vlm, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_tools(section(**fields), vlm)


def test_the_type_may_be_left_out(tmp_path):
    assert section(tools=["zoom"]).type == "tools"
    assert section(function="a.py:B", max_turns=2).type == "own"
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: m}\ndata: {source: d}\nreward: math\ntrain: {steps: 1}\n")
    for text in ("single_turn", "{type: single_turn}", "null"):
        config = load(TrainConfig, str(path), [f"rollout.environment={text}"])
        assert config.rollout.environment is None
    assert section(tools="zoom").tools == ["zoom"]
    with pytest.raises(ValueError, match="rollout.environment.tools"):
        load(TrainConfig, str(path), ["rollout.environment={tools: []}"])
