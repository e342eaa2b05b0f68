"""A row with a video was trained as text, without an error.

Source: https://github.com/nvidia-cosmos/cosmos-rl/issues/433
"""

import json

import pytest

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.data.stream import PromptStream, TaskMixture
from vlm_sapo.types import RowError

TEXT = {"problem": "Name a prime above 7.", "answer": "11"}
CASES = {
    "a list": TEXT | {"videos": ["swing.mp4"]},
    "a path": TEXT | {"video": "swing.mp4"},
    "frames": TEXT | {"video": [["0.png", "1.png"]]},
    "a sound": TEXT | {"audios": ["bell.wav"]},
    "a mark": TEXT | {"problem": "<video>When does it stop?"},
    "Qwen's token": TEXT | {"problem": "<|vision_start|><|video_pad|><|vision_end|>When does it stop?"},
    "a part": {
        "messages": [{"role": "user", "content": [{"type": "video", "video": "s.mp4"}]}],
        "answer": "1",
    },
    "an address": {
        "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}],
        "answer": "1",
    },
}


def read(folder, *rows) -> ExampleSet:
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))


@pytest.mark.parametrize("name", CASES)
def test_the_row_is_refused_by_name(name, tmp_path):
    with pytest.raises(
        RowError, match="row 0 of .*clips.jsonl: .*(video|audio).* isn't supported yet; filter"
    ):
        read(tmp_path, CASES[name])[0]


def test_on_error_skip_leaves_them_out(tmp_path):
    examples = read(tmp_path, TEXT | {"videos": []}, TEXT | {"videos": ["a.mp4"]}, TEXT)
    stream = PromptStream(examples, lambda example: example, seed=0, skip=True)
    taken = TaskMixture({"a": stream}, {"a": 1.0}, minibatch=1).take(4)
    assert {example.row for example in taken} == {0, 2} and stream.skipped > 0


@pytest.mark.parametrize("value", [None, [], "", False])
def test_rows_whose_video_is_empty_are_read(value, tmp_path):
    assert read(tmp_path, TEXT | {"videos": value, "video": value})[0].answer == "11"


def test_a_text_about_videos_is_read(tmp_path):
    problem = "A video has 24 frames a second. How many frames has a clip of 3 s?"
    assert read(tmp_path, {"problem": problem, "answer": "72", "video_id": "v7"})[0].problem == problem
