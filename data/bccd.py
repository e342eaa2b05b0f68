"""Questions about blood cells under the microscope (BCCD, github.com/Shenggan/BCCD_Dataset), from a file with
one annotated image a line: `image, objects` (name, xmin, ymin, xmax, ymax) and `split`.

Red cells are not asked about: their boxes are incomplete where cells crowd.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

CELLS = {"WBC": "white blood cells", "Platelets": "platelets"}


def counts(path: str) -> list[dict]:
    """How many white cells, how many platelets: two rows per image."""
    return [
        _row(path, row, f"How many {cells} are in the picture?", str(len(_boxes(row, name))), name)
        for row in _annotated_images(path)
        for name, cells in CELLS.items()
    ]


def boxes(path: str) -> list[dict]:
    """Where the white cell is, in pixels, for images that have one."""
    return [
        _row(path, row, "the white blood cell", json.dumps(_boxes(row, "WBC")[0]), "box")
        for row in _annotated_images(path)
        if len(_boxes(row, "WBC")) == 1
    ]


def _row(path: str, row: dict, problem: str, answer: str, kind: str) -> dict:
    image = str((Path(path).parent / row["image"]).resolve())
    return {
        "id": f"{row['id']}-{kind}",
        "problem": problem,
        "answer": answer,
        "image": image,
        "split": row["split"],
        "kind": kind,
    }


def _boxes(row: dict, name: str) -> list[list[int]]:
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [[thing[corner] for corner in corners] for thing in row["objects"] if thing["name"] == name]


def _annotated_images(path: str) -> Iterator[dict]:
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            if not {"image", "objects", "split"} <= row.keys():
                raise ValueError(f"{path}: a row has image, objects and split; this one has {', '.join(row)}")
            yield row
