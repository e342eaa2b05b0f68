"""A drawn world for the tool `zoom`: a large image of one colour with a grey panel of a pattern in each
corner. Where the model sees 64 x 64 of the whole image, a pattern's period is one pixel, and all patterns are
the same grey area; enlarged, a panel shows its own.

Half of the questions ask for a pattern, half for the colour of the ground, which is seen at once. Every row
is drawn from its index: `rows(split="train", size=1000)` is a sequence of dicts with `id, problem, images,
answer, kind, words, corner` and `demonstration`, the model's turns for the cold start. A layout belongs to
the held-out splits or to the training splits by its checksum.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw

from vlm_sapo.environments.calls import FORMS
from vlm_sapo.environments.tools import Tool
from vlm_sapo.models.tool_chat import ToolChat, schema_of

COLORS = {
    "red": (226, 88, 88),
    "green": (92, 190, 110),
    "blue": (96, 140, 232),
    "yellow": (240, 208, 72),
    "purple": (178, 112, 214),
    "orange": (244, 154, 70),
}
PATTERNS = ("rows", "columns", "checks", "dots")
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
"""By name, whether it is right, and whether it is below."""
SIDE = 512
"""Pixels of the image's side, of which a panel has a quarter."""
PANEL = SIDE // 4
PERIOD = 8
"""Pixels from one line of a pattern to the next: one pixel where the model sees 64 x 64 of the whole."""
SPLITS = {"train": 1, "cold_start": 2, "test": 3, "validation": 4}
HELD_OUT = ("test", "validation")
KINDS = ("pattern", "color")
Layout = tuple[str, dict[str, str]]
"""The ground's colour, and the pattern in each corner."""


class Rows(Sequence):
    """A split as a sequence of rows, each drawn when it is asked for."""

    def __init__(self, split: str, size: int, seed: int = 0, zoom_share: float = 1.0):
        if split not in SPLITS:
            raise ValueError(f"data.args.split ({split}) must be one of {', '.join(SPLITS)}")
        self.split, self.size, self.seed, self.zoom_share = split, size, seed, zoom_share

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{SPLITS[self.split]}/{index}")
        layout = draw_layout(rng, held_out=self.split in HELD_OUT)
        row = ask(rng, layout, KINDS[index % len(KINDS)])
        return {
            "id": f"{self.split}-{index}",
            "images": [draw_image(rng, layout)],
            "demonstration": demonstrate(rng, row, zooms=rng.random() < self.zoom_share),
            **row,
        }


def rows(split: str = "train", size: int = 4096, seed: int = 0, zoom_share: float = 1.0) -> Rows:
    """The split's rows. `zoom_share` of the demonstrations zoom and answer; the others guess patterns."""
    return Rows(split, size, seed, zoom_share)


def calls(response, example) -> float:
    """A reward part: how often the response calls a tool. With a negative weight, looking has a price."""
    return float(response.count("<tool_call>"))


def draw_layout(rng: random.Random, held_out: bool) -> Layout:
    """A colour and four patterns, from the held-out fifth of all layouts or from the rest."""
    while True:
        layout = rng.choice(list(COLORS)), {corner: rng.choice(PATTERNS) for corner in CORNERS}
        if (zlib.crc32(repr(layout).encode()) % 5 == 0) == held_out:
            return layout


def draw_image(rng: random.Random, layout: Layout) -> Image.Image:
    """RGB, 512 x 512: panels of 128 x 128 in the corners of a ground, in varying shades."""
    color, patterns = layout
    ground = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLORS[color])
    image = Image.new("RGB", (SIDE, SIDE), ground)
    for corner, pattern in patterns.items():
        right, below = CORNERS[corner]
        panel = draw_panel(rng, (rng.randint(170, 250),) * 3, pattern)
        image.paste(panel, (right * (SIDE - PANEL), below * (SIDE - PANEL)))
    return image


def draw_panel(rng: random.Random, fill: tuple[int, int, int], pattern: str) -> Image.Image:
    """A panel with dark lines, checks or dots on half of its area, so that all patterns are equally dark."""
    panel = Image.new("RGB", (PANEL, PANEL), fill)
    draw, half = ImageDraw.Draw(panel), PERIOD // 2
    dark = tuple(channel * 2 // 5 for channel in fill)
    x0, y0 = rng.randrange(-PERIOD, 0), rng.randrange(-PERIOD, 0)
    for step in range(0, PANEL + 2 * PERIOD, PERIOD):
        if pattern == "rows":
            draw.rectangle((0, y0 + step, PANEL, y0 + step + half - 1), fill=dark)
        elif pattern == "columns":
            draw.rectangle((x0 + step, 0, x0 + step + half - 1, PANEL), fill=dark)
        for other in range(0, PANEL + 2 * PERIOD, PERIOD):
            x, y = x0 + step, y0 + other
            if pattern == "checks":
                draw.rectangle((x, y, x + half - 1, y + half - 1), fill=dark)
                draw.rectangle((x + half, y + half, x + 2 * half - 1, y + 2 * half - 1), fill=dark)
            elif pattern == "dots":  # of 32 of the 64 pixels of a period
                draw.rectangle((x, y + 1, x + 5, y + 4), fill=dark)
                draw.rectangle((x + 1, y, x + 4, y + 5), fill=dark)
    return panel


def ask(rng: random.Random, layout: Layout, kind: str) -> dict:
    """A question of a kind, its answer, the words that answer such questions, and a corner: where the answer
    is, or any if it is everywhere."""
    color, patterns = layout
    corner = rng.choice(list(CORNERS))
    if kind == "pattern":
        problem = f"Which pattern has the {corner} panel?"
        answer, words = patterns[corner], list(PATTERNS)
    else:
        problem, answer, words = "Which color has the ground?", color, list(COLORS)
    return {"problem": problem, "answer": answer, "kind": kind, "words": words, "corner": corner}


def demonstrate(rng: random.Random, row: dict, zooms: bool) -> list[str]:
    """The turns of a demonstration: a look at the corner and the answer, or the answer alone, which for a
    pattern is a guess."""
    if not zooms:
        return [f"\\boxed{{{rng.choice(row['words']) if row['kind'] == 'pattern' else row['answer']}}}"]
    return [zoom_call(row["corner"]), f"I see \\boxed{{{row['answer']}}}"]


def zoom_call(corner: str) -> str:
    """A call that enlarges a corner's panel, in thousandths of the image."""
    right, below = CORNERS[corner]
    box = [750 * right, 750 * below, 750 * right + 250, 750 * below + 250]
    return f'<tool_call>\n{{"name": "zoom", "arguments": {{"box": {box}}}}}\n</tool_call>'


def corpus() -> Iterator[str]:
    """Texts that the tiny tokenizer is trained on: the world's own words and what describes the tool."""
    tools = ToolChat((schema_of(Tool.of("zoom"), "thousand"),), native=False)
    [system, _] = tools.conversation([{"role": "user", "content": ""}])
    for row in Rows("cold_start", 1000, zoom_share=0.5):
        yield row["problem"]
        yield from row["demonstration"]
        yield system["content"]
    yield from (f"<tool_response>\n\n</tool_response> error: {FORMS['json']}", "The answer is 12.") * 5
