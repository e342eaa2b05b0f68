"""What a family's models were trained to write, from the encoder to a box's score."""

import re
from dataclasses import replace

import pytest
from transformers import AutoProcessor

from tests.conftest import ALL_FAMILIES as FAMILIES
from tests.conftest import ROOT, SHARED, example, response
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.families import FAMILIES as TABLE
from vlm_sapo.models.families import THOUGHT_TAGS
from vlm_sapo.models.loading import load_outline
from vlm_sapo.rewards.verifiers.boxes import Outside, box
from vlm_sapo.types import ResponseText

REAL = {
    "Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen3-VL-2B-Thinking": "qwen3_vl",
    "Qwen3-VL-30B-A3B-Thinking": "qwen3_vl_moe",
}
EXPECTED = {"qwen2_5_vl": "resized", "gemma4": "thousand_yx"}
"""Coordinates by family; the others write 0 to 1000."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_box_in_the_familys_coordinates_scores_1(name, model_folder):
    row = example()
    width, height = row.images[0].size
    row = replace(row, answer=f"[0, 0, {width / 2}, {height * 3 / 4}]")
    vlm = load_outline(str(model_folder(name)))
    prompt = Encoder(vlm, min_pixels=96 * 96, max_pixels=96 * 96 * 2)(row)
    [(wide, high)] = [image.size for image in prompt.images]
    assert (wide, high) != (width, height)
    boxes = {
        "thousand": [0, 0, 500, 750],
        "thousand_yx": [0, 0, 750, 500],
        "resized": [0, 0, wide / 2, high * 3 / 4],
    }
    sampled = response([1, 2], prompt)
    scores = {}
    for coordinates, corners in boxes.items():
        answer = ResponseText.of(prompt, replace(sampled, text=rf"\boxed{{{corners}}}"))
        try:
            scores[coordinates] = box(answer, row, threshold=0.9)
        except Outside:
            scores[coordinates] = 0
    own = EXPECTED.get(name, "thousand")
    assert prompt.coordinates == TABLE[name].coordinates == own
    assert scores.pop(own) == 1 and set(scores.values()) == {0}


def test_the_documents_name_every_familys_conventions():
    text = (ROOT / "docs/families.md").read_text()
    for name, family in TABLE.items():
        [line] = [line for line in text.splitlines() if re.match(rf"\|[^|]*`{name}`[^|]*\| `", line)]
        _, coordinates, thoughts, tools = [cell.strip(" `") for cell in line.strip("|").split("|")]
        assert coordinates == family.coordinates
        assert thoughts.startswith(THOUGHT_TAGS[0]) == family.thinks
        assert tools == (family.tool_calls or "none")


@pytest.mark.skipif(not (SHARED / "processors").is_dir(), reason="no real processors at ../shared/processors")
@pytest.mark.parametrize("name", REAL)
def test_the_real_chat_templates_agree(name):
    processor = AutoProcessor.from_pretrained(SHARED / "processors" / name)
    family, template = TABLE[REAL[name]], processor.chat_template
    assert (THOUGHT_TAGS[0] in template) == family.thinks
    calls = "xml" if "<function=" in template else "json" if "<tool_call>" in template else None
    assert calls == family.tool_calls


def test_no_shipped_file_spells_out_what_the_family_says():
    files = [path for name in ("configs", "data", "eval/benchmarks") for path in (ROOT / name).glob("*.yaml")]
    spelled = [path.name for path in files if re.search(r"(?<!gold_)\bcoordinates:", path.read_text())]
    assert len(files) > 20 and not spelled
