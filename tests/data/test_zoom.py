"""The drawn world of the tool: what can be seen at a glance, and what only after a zoom."""

import importlib.util
import random

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from vlm_sapo.environments import Box
from vlm_sapo.environments.images import zoom as enlarge
from vlm_sapo.environments.tools import ToolEnvironment
from vlm_sapo.types import Example, ResponseText

spec = importlib.util.spec_from_file_location("zoom_world", ROOT / "data/zoom.py")
world = importlib.util.module_from_spec(spec)
spec.loader.exec_module(world)
SHOWN = (64, 64)


def panel(pattern, seed, side):
    """A panel in the size in which it is shown within an image of SHOWN, or alone."""
    image = world.draw_panel(random.Random(seed), (200, 200, 200), pattern)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), float)[2:-2, 2:-2]


def test_patterns_are_alike_until_they_are_enlarged():
    far = [panel(pattern, seed, 16) for pattern in world.PATTERNS for seed in range(8)]
    assert max(np.abs(one - other).max() for one in far for other in far) <= 1.0
    near = {pattern: panel(pattern, 0, 64) for pattern in world.PATTERNS}
    assert all(image.std() > 20 for image in near.values())
    rows, columns = near["rows"], near["columns"]
    assert rows.std(1).mean() < 1 < 20 < rows.std(0).mean()
    assert columns.std(0).mean() < 1 < 20 < columns.std(1).mean()


def test_the_call_of_a_demonstration_shows_the_panel():
    for index in range(0, 16, 2):
        row = world.rows()[index]
        environment = ToolEnvironment(["zoom"], "json")
        environment.reset(Example("1", "", "", tuple(row["images"])))
        turn = ResponseText(row["demonstration"][0], resized=(SHOWN,), coordinates="thousand")
        [[shown]] = [result.images for result in environment.step(turn).results]
        right, below = world.CORNERS[row["corner"]]
        left, top = right * 384, below * 384
        expected = enlarge(row["images"][0], Box(left, top, left + 128, top + 128))
        assert shown.tobytes() == expected.tobytes() and shown.size == (512, 512)


def test_rows_repeat_and_splits_share_no_layout():
    rows = {split: world.rows(split, 200) for split in world.SPLITS}
    assert rows["train"][7]["images"][0].tobytes() == rows["train"][7]["images"][0].tobytes()
    assert {row["kind"] for row in rows["train"]} == set(world.KINDS)
    seen = [world.draw_layout(random.Random(seed), held_out=False) for seed in range(300)]
    held_out = [world.draw_layout(random.Random(seed), held_out=True) for seed in range(300)]
    assert not {repr(layout) for layout in seen} & {repr(layout) for layout in held_out}
    with pytest.raises(ValueError, match=r"data.args.split \(trian\) must be one of"):
        world.rows("trian")
