"""A drawn world: cells with coloured shapes, and questions about them. The quick start's level has nine
cells; the hard one, on which methods are compared, has sixteen with more shapes, longer listings and sums.

Every row is drawn from its index, so a split needs no files: `rows(split="train", size=1000)` is a sequence
of dicts with `id, problem, images, answer, kind`, `words` where the answer is one of a few, and
`demonstration` for the cold start. A layout belongs to the held-out splits or to the training splits by its
checksum, so no held-out image has a layout that was ever trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {"red": (214, 48, 49), "green": (39, 160, 83), "blue": (52, 101, 220), "yellow": (240, 196, 25)}
SHAPES = ("circle", "square", "triangle")
WORDS = {*COLORS, *SHAPES}
CELL = 16
SPLITS = {"train": 1, "cold_start": 2, "test": 3, "validation": 4}
HELD_OUT = ("test", "validation")
Layout = dict[int, tuple[str, str]]
"""Cell number 1, 2, ... in reading order -> (colour, shape)."""


@dataclass(frozen=True)
class Level:
    """How hard the world is."""

    side: int
    """Cells in a row and in a column."""
    fewest: int
    most: int
    """Shapes in an image."""
    kinds: tuple[str, ...]
    """Kinds of questions, in turn."""


LEVELS = {
    "easy": Level(
        3, 2, 5, ("count_color", "count_shape", "color_at", "shape_at", "more_color", "more_shape")
    ),
    "hard": Level(4, 5, 9, ("count_color", "count_shape", "more_color", "more_shape", "add", "add")),
}


class Rows(Sequence):
    """A split as a sequence of rows, each drawn when it is asked for."""

    def __init__(self, split: str, size: int, seed: int = 0, look_share: float = 1.0, level: str = "easy"):
        for name, value, known in (("split", split, SPLITS), ("level", level, LEVELS)):
            if value not in known:
                raise ValueError(f"data.args.{name} ({value}) must be one of {', '.join(known)}")
        self.split, self.size, self.seed, self.look_share = split, size, seed, look_share
        self.level = LEVELS[level]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{SPLITS[self.split]}/{index}")
        layout = draw_layout(rng, self.level, held_out=self.split in HELD_OUT)
        kind = self.level.kinds[index % len(self.level.kinds)]
        row = ask(rng, layout, kind)
        look = rng.random() < self.look_share
        image = draw_image(rng, layout, self.level.side)
        return {
            "id": f"{self.split}-{index}",
            "images": [image],
            "kind": kind,
            "demonstration": demonstrate(rng, layout, row, look),
            **row,
        }


def rows(
    split: str = "train", size: int = 4096, seed: int = 0, look_share: float = 1.0, level: str = "easy"
) -> Rows:
    """The split's rows of a level. `look_share` of the demonstrations list what they see; the others
    guess."""
    return Rows(split, size, seed, look_share, level)


def draw_layout(rng: random.Random, level: Level, held_out: bool) -> Layout:
    """A level's shapes in its cells, from the held-out fifth of all layouts or from the rest."""
    while True:
        cells = sorted(rng.sample(range(1, level.side**2 + 1), rng.randint(level.fewest, level.most)))
        layout = {cell: (rng.choice(list(COLORS)), rng.choice(SHAPES)) for cell in cells}
        if (zlib.crc32(repr(layout).encode()) % 5 == 0) == held_out:
            return layout


def draw_image(rng: random.Random, layout: Layout, cells: int) -> Image.Image:
    """RGB, 16 pixels a cell: shapes of varying size, position and shade on a light background."""
    shade = rng.randint(225, 255)
    image = Image.new("RGB", (cells * CELL, cells * CELL), (shade, shade, shade))
    draw = ImageDraw.Draw(image)
    for cell, (color, shape) in layout.items():
        row, column = divmod(cell - 1, cells)
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
    return image


def ask(rng: random.Random, layout: Layout, kind: str) -> dict:
    """A question of a kind: gold answer, words where it is one of a few, `target`, what it asks about, and
    `sum`, the step before the answer where there is one."""
    if kind.endswith("_at"):
        cell = rng.choice(list(layout))
        color, shape = layout[cell]
        if kind == "color_at":
            return {
                "problem": f"Which color is the shape in cell {cell}?",
                "answer": color,
                "words": list(COLORS),
                "target": [cell],
            }
        return {
            "problem": f"Which shape is in cell {cell}?",
            "answer": shape,
            "words": list(SHAPES),
            "target": [cell],
        }
    if kind == "add":
        first, second = rng.choice(list(COLORS)), rng.choice(SHAPES)
    else:
        first, second = rng.sample(list(COLORS) if kind.endswith("color") else list(SHAPES), 2)
    plural = "{} shapes" if first in COLORS else "{}s"
    count = {name: sum(name in thing for thing in layout.values()) for name in (first, second)}
    if kind == "add":
        problem = f"How many are the {first} shapes plus the {second}s?"
        return {
            "problem": problem,
            "answer": str(sum(count.values())),
            "sum": f"{count[first]} + {count[second]} = ",
            "target": [first, second],
        }
    if kind.startswith("count"):
        problem = f"How many {plural.format(first)} are there?"
        return {"problem": problem, "answer": str(count[first]), "target": [first]}
    problem = f"Are there more {plural.format(first)} than {plural.format(second)}?"
    answer = "yes" if count[first] > count[second] else "no"
    return {"problem": problem, "answer": answer, "words": ["yes", "no"], "target": [first, second]}


def demonstrate(rng: random.Random, layout: Layout, row: dict, look: bool) -> str:
    """A demonstration: name what is in the cells and keep count, or guess at once without looking.

    The count stands behind the word that it counts: `4 red 1 circle` for a color, `4 red circle 1` for
    a shape; the cell that was asked for is `4 yes red circle`. Counts of two kinds are added up at the end.
    """
    if not look:
        guesses = row.get("words") or ["0", "1", "2", "3"]
        return f"I guess \\boxed{{{rng.choice(guesses)}}}"
    counts = dict.fromkeys(row["target"], 0)
    seen = []
    for cell, thing in layout.items():
        words = [str(cell)] if counts.keys() & WORDS else [f"{cell} {'yes' if cell in counts else 'no'}"]
        for word, kind in zip(thing, (COLORS, SHAPES), strict=True):
            for name in counts:
                counts[name] += name == word
            words += [word, *(str(count) for name, count in counts.items() if name in kind)]
        seen.append(" ".join(words))
    return f"I see {', '.join(seen)}. So {row.get('sum', '')}\\boxed{{{row['answer']}}}"


def corpus(level: str = "easy") -> Iterator[str]:
    """Texts that the tiny tokenizer is trained on: the world's own words and some ordinary sentences."""
    for row in Rows("cold_start", 2000, look_share=0.7, level=level):
        yield row["problem"]
        yield row["demonstration"]
    yield from ("Find x.", "What is the area of the triangle?", "The answer is 12.") * 5


def hard_corpus() -> Iterator[str]:
    """The same for the hard level."""
    return corpus("hard")
