"""docs/cards.md is what `vlm-sapo plan` says: one cell of each kind of model in the slow suite."""

import pytest

from docs import cards
from tests.conftest import ROOT

PAGE = (ROOT / "docs/cards.md").read_text()
ENTRIES = cards.read(PAGE)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Qwen2.5-VL-3B", "Qwen3-VL-2B", "Qwen3-VL-30B-A3B", "Qwen3.5-4B"])
def test_a_models_largest_entry_is_what_plan_says(model):
    """All of them take many minutes: `python docs/cards.py` writes them anew."""
    card = next(card for card in reversed(cards.CARDS) if (card, model) in ENTRIES)
    assert ENTRIES[card, model] == cards.entry(card, model)


def test_the_page_is_made_of_its_entries():
    """Every card and model has a line, with a command where it fits."""
    assert cards.page(ENTRIES) == PAGE
    for entry in ENTRIES.values():
        assert (entry.short == "-") == ("doesn't fit" in entry.row) == (not entry.commands)
