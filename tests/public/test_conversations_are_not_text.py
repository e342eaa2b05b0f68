"""A column that holds a conversation or a mapping was trained as Python's notation of it, the reply included.

Source: https://github.com/om-ai-lab/VLM-R1/issues/64
"""

import json

import pytest
from PIL import Image

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import RowError

QUESTION, REPLY, GOLD = "Which lamp is lit?", "Let me see, the third one", "3"


def read(folder, row: dict) -> ExampleSet:
    Image.new("RGB", (40, 30), "teal").save(folder / "lamp.png")
    (folder / "lamps.jsonl").write_text(json.dumps(row) + "\n")
    return ExampleSet(open_rows(f"{folder}/lamps.jsonl"), RowsConfig(source=f"{folder}/lamps.jsonl"))


def chat(*, names=("role", "content"), roles=("user", "assistant"), text=f"<image>{QUESTION}") -> list[dict]:
    return [dict(zip(names, turn, strict=True)) for turn in zip(roles, (text, REPLY), strict=True)]


SHAREGPT = {"names": ("from", "value"), "roles": ("human", "gpt")}
CASES = {
    "messages, solution": {"messages": chat(), "solution": GOLD, "images": ["lamp.png"]},
    "messages, answer": {"messages": chat(), "answer": 3, "image": "lamp.png"},
    "messages with parts": {
        "messages": chat(text=[{"type": "image", "image": "lamp.png"}, {"type": "text", "text": QUESTION}]),
        "solution": GOLD,
    },
    "conversations, label": {"conversations": chat(**SHAREGPT), "label": GOLD, "image": "lamp.png"},
    "conversations of roles": {"conversations": chat(), "label": GOLD, "image": "lamp.png"},
    "prompt, ground truth of a mapping": {
        "prompt": chat()[:1],
        "reward_model": {"style": "rule", "ground_truth": GOLD},
        "images": [{"path": "lamp.png"}],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_question_and_gold_are_read(name, tmp_path):
    [example] = read(tmp_path, CASES[name])
    assert example.problem == f"<image>{QUESTION}" and example.answer == GOLD
    assert len(example.images) == 1


def test_a_reply_is_the_gold_only_where_no_column_has_one(tmp_path):
    row = {"conversations": chat(**SHAREGPT), "image": "lamp.png"}
    examples = read(tmp_path, row)
    assert examples[0].answer == REPLY and "no column of answers" in examples.format
    assert read(tmp_path, row | {"answer": GOLD})[0].answer == GOLD
    with pytest.raises(RowError, match="field answer is empty"):
        read(tmp_path, row | {"answer": ""})[0]


NEAR_MISSES = {
    "a mapping": ({"problem": {"question": QUESTION}, "answer": GOLD}, "field problem holds a mapping"),
    "pairs": ({"conversations": [["human", QUESTION]], "answer": GOLD}, "field conversations holds a list"),
    "other roles": ({"messages": chat(roles=("teacher", "pupil")), "answer": GOLD}, "role teacher"),
    "other names": (
        {"conversations": chat(names=("who", "said")), "answer": GOLD},
        "field conversations holds a list of dict",
    ),
    "two questions": ({"messages": [*chat(), *chat()], "answer": GOLD}, "one user's turn is read"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_such_conversation_is_refused(name, tmp_path):
    row, sentence = NEAR_MISSES[name]
    with pytest.raises(RowError, match=f"row 0 of .*lamps.jsonl: .*{sentence}"):
        read(tmp_path, row | {"image": "lamp.png"})[0]


def test_text_that_looks_like_a_list_stays_text(tmp_path):
    for text in (
        "[1, 2, 3] is sorted. Which is the median?",
        '[{"x": 1}] What is x?',
        "['a', 'b'] Which is first?",
    ):
        assert read(tmp_path, {"problem": text, "answer": GOLD})[0].problem == text
