"""docs/cards.md is what `vlm-sapo plan` says: a few cells always, all of them with `make test-slow`."""

import re

import pytest

from docs import cards
from tests.conftest import ROOT

PAGE = (ROOT / "docs/cards.md").read_text()
QUICK = [("1x80GB", "Qwen2.5-VL-3B"), ("8x80GB", "Qwen2.5-VL-3B"), ("1x24GB", "Qwen3-VL-30B-A3B")]


def check(card: str, model: str) -> None:
    """A cell's line and commands stand in the section of its card."""
    section = PAGE.split(f"\n## {card}\n")[1].split("\n## ")[0]
    found = cards.cell(card, model)
    assert cards.row(model, found, card) in section.splitlines(), "python docs/cards.py"
    assert cards.block(model, found) in section


@pytest.mark.parametrize(("card", "model"), QUICK)
def test_a_cell_is_what_plan_says(card, model):
    check(card, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", cards.MODELS)
def test_a_models_cells_are_what_plan_says(model):
    for card in cards.CARDS:
        check(card, model)


def test_the_page_has_every_card_and_model():
    assert PAGE.startswith(cards.HEAD)
    assert tuple(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)) == cards.CARDS
    for section in PAGE.split("\n## ")[1:]:
        names = re.findall(r"^\| ([\w.-]+) \| .*\|$", section, re.MULTILINE)
        assert tuple(names[1:]) == tuple(cards.MODELS)  # the first is the head
        fitting = re.findall(r"^\| ([\w.-]+) \| (?!doesn't fit|trained|---)", section, re.MULTILINE)
        assert re.findall(r"^# ([\w.-]+):", section, re.MULTILINE) == fitting
