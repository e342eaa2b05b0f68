"""Turns of a response as the logs have them: who spoke, what, and which images came with it."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.conftest import FAMILIES, example
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.reporting.images import save_images
from vlm_sapo.reporting.step_report import LoggedGroup, StepReport, image_tokens, rollout_lines
from vlm_sapo.reporting.transcript import transcript
from vlm_sapo.rollout.environment import environment_turn
from vlm_sapo.types import Group, Reward

RED, BLUE, GREEN = (Image.new("RGB", (48, 48), color) for color in ("red", "blue", "green"))


def conversation(encode, answers):
    """A prompt, and a response of a turn before each answer and one after the last."""
    prompt = encode(example(images=1))
    response = encode.respond(prompt, "How many 0?")
    for number, answer in enumerate(answers, 1):
        response = response.continued(environment_turn(response, encode.answer([answer])))
        turn = encode.respond(prompt.followed_by(response), f"Find {number}.")
        response = response.continued(turn)
    return prompt, replace(response, counts={"turns": len(answers) + 1})


def name_of(images):
    return [",".join(map(str, image.getpixel((0, 0)))) for image in images]


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_answer_that_they_came_with(family, model_folder):
    """Also where other answers have none, and with the ids that the tokenizer's names of tokens give."""
    vlm = load_vlm(str(model_folder(family)))
    encode = Encoder(vlm)
    answers = [("red 12", ()), ("blue", (RED, BLUE)), ("Find", ()), ("green", (GREEN,))]
    _, response = conversation(encode, answers)
    assert vlm.model.config.image_token_id in image_tokens(vlm.tokenizer)
    for tokens in (image_tokens(vlm.tokenizer), {vlm.model.config.image_token_id}):
        turns = transcript(response, encode.decode, name_of, tokens)
        assert [turn["by"] for turn in turns] == ["policy", "environment"] * 4 + ["policy"]
        shown = {index: turn["pictures"] for index, turn in enumerate(turns) if turn["pictures"]}
        assert shown == {3: name_of((RED, BLUE)), 7: name_of((GREEN,))}
        assert turns[0]["text"] == "How many 0?" and "red 12" in turns[1]["text"]


def test_spans_of_one_speaker_are_one_turn(encoder):
    prompt, response = conversation(encoder, [("red", (RED,)), ("blue", (BLUE,))])
    first = response.spans[0]
    halves = (replace(first, end=2), replace(first, start=2, weights_version=1))
    both = replace(response, spans=(*halves, *response.spans[1:]))
    tokens = image_tokens(encoder.vlm.tokenizer)
    expected = transcript(response, encoder.decode, name_of, tokens)
    assert transcript(both, encoder.decode, name_of, tokens) == expected and len(expected) == 5
    single = encoder.respond(prompt, "How many?")
    assert transcript(single, encoder.decode, name_of, tokens) == []


def test_logs_have_turns_counts_and_the_policys_tokens(encoder, tmp_path):
    prompt, several = conversation(encoder, [("red", (RED,))])
    single = encoder.respond(prompt, "How many?")
    group = Group(prompt, (several, single), (Reward(1.0, {}), Reward(0.0, {})))
    report = StepReport.__new__(StepReport)
    report.tokenizer, report.image_tokens = encoder.vlm.tokenizer, image_tokens(encoder.vlm.tokenizer)
    report.folder = type("Folder", (), {"path": tmp_path})
    turns = [report._turns(item) for item in group.responses]
    item = LoggedGroup(0, group.without_images(), [0.0, 0.0], [], [([], [])] * 2, turns)
    first, second = rollout_lines(item)
    assert first["counts"] == {"turns": 2} and [turn["by"] for turn in first["turns"]] == [
        "policy",
        "environment",
        "policy",
    ]
    [name] = first["turns"][1]["pictures"]
    assert (tmp_path / name).is_file() and [name] == save_images(tmp_path, several.images[0].images)
    assert not {"turns", "counts"} & second.keys()
    limit = len(several.ids) - 2
    policy = report._trace(item, limit, {})["policy"]
    assert policy == [several.mask[:limit].int().tolist(), []] and torch.tensor(policy[0]).min() == 0
