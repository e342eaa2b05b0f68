"""The quick start's world: nine cells with coloured shapes, and questions about them.

Every row is drawn from its index, so a split needs no files: `rows(split="train", size=1000)` is a sequence
of dicts with `id, problem, images, answer, kind`, `choices` where the answer is one of a few words, and
`demonstration` for the cold start. A layout belongs to the held-out splits or to the training splits by its
checksum, so no held-out picture has a layout that was ever trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw

COLORS = {"red": (214, 48, 49), "green": (39, 160, 83), "blue": (52, 101, 220), "yellow": (240, 196, 25)}
SHAPES = ("circle", "square", "triangle")
KINDS = ("count_color", "count_shape", "color_at", "shape_at", "more_color", "more_shape")
CELL = 16
SPLITS = {"train": 1, "cold_start": 2, "test": 3, "validation": 4}
HELD_OUT = ("test", "validation")
Layout = dict[int, tuple[str, str]]
"""Cell number 1..9 in reading order -> (colour, shape)."""


class Rows(Sequence):
    """A split as a sequence of rows, each drawn when it is asked for."""

    def __init__(self, split: str, size: int, seed: int = 0, look_share: float = 1.0):
        if split not in SPLITS:
            raise ValueError(f"data.args.split ({split}) must be one of {', '.join(SPLITS)}")
        self.split, self.size, self.seed, self.look_share = split, size, seed, look_share

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{SPLITS[self.split]}/{index}")
        layout = draw_layout(rng, held_out=self.split in HELD_OUT)
        kind = KINDS[index % len(KINDS)]
        row = ask(rng, layout, kind)
        look = rng.random() < self.look_share
        picture = draw_picture(rng, layout)
        return {
            "id": f"{self.split}-{index}",
            "images": [picture],
            "kind": kind,
            "demonstration": demonstrate(rng, layout, row, look),
            **row,
        }


def rows(split: str = "train", size: int = 4096, seed: int = 0, look_share: float = 1.0) -> Rows:
    """The split's rows. `look_share` of the demonstrations list what they see; the others guess."""
    return Rows(split, size, seed, look_share)


def draw_layout(rng: random.Random, held_out: bool) -> Layout:
    """Two to five shapes in nine cells, from the held-out fifth of all layouts or from the rest."""
    while True:
        cells = sorted(rng.sample(range(1, 10), rng.randint(2, 5)))
        layout = {cell: (rng.choice(list(COLORS)), rng.choice(SHAPES)) for cell in cells}
        if (zlib.crc32(repr(layout).encode()) % 5 == 0) == held_out:
            return layout


def draw_picture(rng: random.Random, layout: Layout) -> Image.Image:
    """48 x 48 RGB: shapes of varying size, place and shade on a light background."""
    shade = rng.randint(225, 255)
    picture = Image.new("RGB", (3 * CELL, 3 * CELL), (shade, shade, shade))
    draw = ImageDraw.Draw(picture)
    for cell, (color, shape) in layout.items():
        row, column = divmod(cell - 1, 3)
        side = rng.randint(9, 13)
        left = column * CELL + rng.randint(1, CELL - side - 1)
        top = row * CELL + rng.randint(1, CELL - side - 1)
        box = (left, top, left + side, top + side)
        fill = tuple(max(0, min(255, channel + rng.randint(-18, 18))) for channel in COLORS[color])
        if shape == "circle":
            draw.ellipse(box, fill=fill)
        elif shape == "square":
            draw.rectangle(box, fill=fill)
        else:
            draw.polygon([(left, top + side), (left + side, top + side), (left + side / 2, top)], fill=fill)
    return picture


def ask(rng: random.Random, layout: Layout, kind: str) -> dict:
    """A question of a kind: gold answer, choices where there are any, and `target`, what it asks about."""
    if kind.endswith("_at"):
        cell = rng.choice(list(layout))
        color, shape = layout[cell]
        if kind == "color_at":
            return {
                "problem": f"Which color is the shape in cell {cell}?",
                "answer": color,
                "choices": list(COLORS),
                "target": [cell],
            }
        return {
            "problem": f"Which shape is in cell {cell}?",
            "answer": shape,
            "choices": list(SHAPES),
            "target": [cell],
        }
    names = list(COLORS) if kind.endswith("color") else list(SHAPES)
    first, second = rng.sample(names, 2)
    plural = "{} shapes" if kind.endswith("color") else "{}s"
    count = {name: sum(name in thing for thing in layout.values()) for name in (first, second)}
    if kind.startswith("count"):
        problem = f"How many {plural.format(first)} are there?"
        return {"problem": problem, "answer": str(count[first]), "target": [first]}
    problem = f"Are there more {plural.format(first)} than {plural.format(second)}?"
    answer = "yes" if count[first] > count[second] else "no"
    return {"problem": problem, "answer": answer, "choices": ["yes", "no"], "target": [first, second]}


def demonstrate(rng: random.Random, layout: Layout, row: dict, look: bool) -> str:
    """A demonstration: name what is in the cells and keep count, or guess at once without looking.

    The count stands behind the word that it counts: `4 red 1 circle` for a color, `4 red circle 1` for
    a shape; the cell that was asked for is `4 yes red circle`.
    """
    if not look:
        return f"I guess \\boxed{{{rng.choice(row.get('choices') or ['0', '1', '2', '3'])}}}"
    counts = dict.fromkeys(row["target"], 0)
    seen = []
    for cell, (color, shape) in layout.items():
        for name in counts:
            counts[name] += name in (color, shape)
        tally = " ".join(map(str, counts.values()))
        if row["target"][0] in SHAPES:
            seen.append(f"{cell} {color} {shape} {tally}")
        elif row["target"][0] in COLORS:
            seen.append(f"{cell} {color} {tally} {shape}")
        else:
            seen.append(f"{cell} {'yes' if cell in counts else 'no'} {color} {shape}")
    return f"I see {', '.join(seen)}. So \\boxed{{{row['answer']}}}"


def corpus() -> Iterator[str]:
    """Texts that the tiny tokenizer is trained on: the world's own words and some ordinary sentences."""
    for row in Rows("cold_start", 2000, look_share=0.7):
        yield row["problem"]
        yield row["demonstration"]
    yield from ("Find x.", "What is the area of the triangle?", "The answer is 12.") * 5
