"""A drawn world for the tool `zoom`: a large image of coloured cells with small marks. In the size in which
the model sees the whole image a mark is two pixels, too few for its shape; enlarged, its cell shows it.

Half of the questions ask for a mark, half for the colour of a cell, which can be seen at once. Every row is
drawn from its index: `rows(split="train", size=1000)` is a sequence of dicts with `id, problem, images,
answer, kind, words, cell` and `demonstration`, the model's turns for the cold start. A layout belongs to the
held-out splits or to the training splits by its checksum.
"""

from __future__ import annotations

import math
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
MARKS = ("circle", "square", "triangle", "cross")
SIDE = 4
"""Cells in a row and in a column."""
CELL = 128
"""Pixels of a cell's side."""
SPLITS = {"train": 1, "cold_start": 2, "test": 3, "validation": 4}
HELD_OUT = ("test", "validation")
KINDS = ("mark", "color")
Layout = dict[int, tuple[str, str]]
"""Cell number 0, 1, ... in reading order -> (colour, mark)."""


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
    """The split's rows. `zoom_share` of the demonstrations zoom and answer; the others guess marks."""
    return Rows(split, size, seed, zoom_share)


def calls(response, example) -> float:
    """A reward part: how often the response calls a tool. With a negative weight, looking has a price."""
    return float(response.count("<tool_call>"))


def draw_layout(rng: random.Random, held_out: bool) -> Layout:
    """Four to six cells, each of another colour, from the held-out fifth of all layouts or from the rest."""
    while True:
        colors = rng.sample(list(COLORS), rng.randint(4, len(COLORS)))
        cells = sorted(rng.sample(range(SIDE**2), len(colors)))
        layout = {cell: (color, rng.choice(MARKS)) for cell, color in zip(cells, colors, strict=True)}
        if (zlib.crc32(repr(layout).encode()) % 5 == 0) == held_out:
            return layout


def draw_image(rng: random.Random, layout: Layout) -> Image.Image:
    """RGB, 512 x 512: coloured cells on a light ground, each with a dark mark of about 14 pixels."""
    shade = rng.randint(215, 250)
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (shade, shade, shade))
    draw = ImageDraw.Draw(image)
    for cell, (color, mark) in layout.items():
        row, column = divmod(cell, SIDE)
        fill = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLORS[color])
        left, top = column * CELL, row * CELL
        draw.rectangle((left + 2, top + 2, left + CELL - 3, top + CELL - 3), fill=fill)
        center = (left + rng.randint(24, CELL - 24), top + rng.randint(24, CELL - 24))
        draw_mark(draw, mark, center, area=rng.uniform(150, 250), fill=(rng.randint(0, 40),) * 3)
    return image


def draw_mark(
    draw: ImageDraw.ImageDraw, mark: str, center: tuple[int, int], *, area: float, fill: tuple[int, int, int]
) -> None:
    """A mark of so many pixels: all shapes darken the image alike."""
    x, y = center
    if mark == "circle":
        half = math.sqrt(area / math.pi)
        draw.ellipse((x - half, y - half, x + half, y + half), fill=fill)
    elif mark == "square":
        half = math.sqrt(area) / 2
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif mark == "triangle":
        half = math.sqrt(area / 2)
        draw.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill=fill)
    else:  # two bars, a third as wide as long
        half = math.sqrt(area * 9 / 5) / 2
        draw.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill=fill)
        draw.rectangle((x - half / 3, y - half, x + half / 3, y + half), fill=fill)


def ask(rng: random.Random, layout: Layout, kind: str) -> dict:
    """A question of a kind, its answer, the words that answer such questions, and its cell."""
    cell = rng.choice(list(layout))
    color, mark = layout[cell]
    if kind == "mark":
        problem, answer, words = f"Which mark is in the {color} cell?", mark, list(MARKS)
    else:
        row, column = divmod(cell, SIDE)
        problem = f"Which color is the cell in row {row + 1}, column {column + 1}?"
        answer, words = color, list(COLORS)
    return {"problem": problem, "answer": answer, "kind": kind, "words": words, "cell": cell}


def demonstrate(rng: random.Random, row: dict, zooms: bool) -> list[str]:
    """The turns of a demonstration: a look at the cell and the answer, or the answer alone, which for a mark
    is a guess."""
    if not zooms:
        return [f"\\boxed{{{rng.choice(row['words']) if row['kind'] == 'mark' else row['answer']}}}"]
    return [zoom_call(row["cell"]), f"I see \\boxed{{{row['answer']}}}"]


def zoom_call(cell: int) -> str:
    """A call that enlarges a cell, in thousandths of the image."""
    row, column = divmod(cell, SIDE)
    size = 1000 // SIDE
    box = [column * size, row * size, (column + 1) * size, (row + 1) * size]
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
