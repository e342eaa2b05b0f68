"""Holding rows out by image: no image on both sides, the same split whatever the order, and what is refused."""

import json
import random

import pytest
from PIL import Image

from tests.conftest import SHARED, numbered_image
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.holdout import apply, split
from vlm_sapo.data.images import pixel_digest
from vlm_sapo.data.sources import build_examples
from vlm_sapo.types import RowError

REAL = SHARED / "data"


def write(folder, name: str, rows: list[dict]) -> RowsConfig:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowsConfig(source=str(folder / name))


@pytest.fixture
def rows(tmp_path):
    """30 rows over 20 images: the first ten have two rows each, whose files differ in format but not in pixels,
    every fifth row also shows the next image, and four rows have a text alone, two of them the same."""
    items = []
    for number in range(20):
        image = numbered_image(3)
        image.putpixel((number, 0), (0, 0, 0))
        for ending in ("png", "bmp"):
            image.save(tmp_path / f"{number}.{ending}")
        items.append({"id": f"a{number}", "problem": "Find x.", "answer": "1", "image": f"{number}.png"})
        if number < 10:
            items.append({"id": f"b{number}", "problem": "Find y.", "answer": "1", "image": f"{number}.bmp"})
    for number in (5, 15):
        images = [f"{number}.png", f"{number + 1}.bmp"]
        items.append(
            {"id": f"c{number}", "problem": "Which?", "answer": "1", "images": images, "image": None}
        )
    texts = ["2 + 2?", "2 +  2?", "3 + 3?", "4 + 4?"]
    blank = "blank.png"
    Image.new("RGB", (30, 30), "white").save(tmp_path / blank)
    items += [{"id": f"t{n}", "problem": text, "answer": "1", "image": blank} for n, text in enumerate(texts)]
    return items


def ids(examples) -> set[str]:
    return {examples.key(index) for index in range(len(examples))}


def digests(examples) -> set[str]:
    images = [image.convert("RGB") for example in examples for image in example.images]
    return {pixel_digest(image) for image in images if image.size != (30, 30)}


def test_no_image_is_on_both_sides(rows, tmp_path):
    tasks = {"a": build_examples(write(tmp_path, "a.jsonl", rows))}
    parts = split(tasks, 12)
    sides = apply(parts, tasks, mixture=False)
    trained, held_out = sides.trained["a"], sides.held_out["held-out"]
    assert len(held_out) == 12 and len(trained) == len(rows) - 12
    assert ids(trained) | ids(held_out) == {row["id"] for row in rows}
    assert not digests(trained) & digests(held_out)
    assert (len(digests(held_out)), len(digests(trained))) == (parts.images, parts.trained_images)
    for pair in ({"t0", "t1"}, {"a5", "b5", "c5", "a6", "b6"}, {"a15", "c15", "a16"}):
        assert pair <= ids(trained) or pair <= ids(held_out)
    assert held_out[0].task == "held-out" and trained[0].task == str(tmp_path / "a.jsonl")


def test_the_split_is_that_of_the_content(rows, tmp_path):
    """Neither the order of rows nor another file of the same pixels changes it."""
    mixed = [row | {"image": str(row["image"]).replace(".png", ".bmp")} for row in rows if row["image"]]
    mixed = [row for row in mixed if row["image"] != "blank.bmp"]
    held_out = []
    for name, items in (("a.jsonl", mixed), ("b.jsonl", random.Random(0).sample(mixed, len(mixed)))):
        tasks = {"a": build_examples(write(tmp_path, name, items))}
        held_out.append(ids(apply(split(tasks, 0.3), tasks, mixture=False).held_out["held-out"]))
    assert held_out[0] == held_out[1] and 0 <= round(0.3 * len(mixed)) - len(held_out[0]) <= 1


def test_the_tasks_of_a_mixture_share_no_image(rows, tmp_path):
    first = [row for row in rows if not row["id"].startswith("b")]
    second = [row for row in rows if row["id"].startswith("b")]
    tasks = {
        name: build_examples(write(tmp_path, f"{name}.jsonl", r))
        for name, r in (("one", first), ("two", second))
    }
    sides = apply(split(tasks, 4), tasks, mixture=True)
    assert sides.held_out.keys() == {"held-out/one", "held-out/two"}
    assert all(3 <= len(part) <= 4 for part in sides.held_out.values())
    trained, held_out = (
        set().union(*map(digests, part.values())) for part in (sides.trained, sides.held_out)
    )
    assert not trained & held_out


def test_a_filter_and_a_limit_come_first(rows, tmp_path):
    section = write(tmp_path, "a.jsonl", rows).model_copy(
        update={"filter": {"problem": "Find x."}, "limit": 8}
    )
    tasks = {"a": build_examples(section)}
    sides = apply(split(tasks, 0.25), tasks, mixture=False)
    everything = ids(sides.trained["a"]) | ids(sides.held_out["held-out"])
    assert everything == {f"a{number}" for number in range(8)} and len(sides.held_out["held-out"]) == 2


def test_rows_that_cannot_be_read_stay_in_training(rows, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    rows += [{"id": f"x{n}", "problem": "?", "answer": "1", "image": "torn.png"} for n in range(3)]
    tasks = {"a": build_examples(write(tmp_path, "a.jsonl", rows))}
    sides = apply(split(tasks, len(rows) - 4), tasks, mixture=False)
    assert {"x0", "x1", "x2"} <= ids(sides.trained["a"])
    with pytest.raises(ValueError, match="of a's 36 it would hold out 36; use a number from 1 to 35"):
        split(tasks, 36)  # the other three can't be trained on


def test_missing_images_are_named(rows, tmp_path):
    rows = [row | {"image": f"elsewhere/{row['id']}.png", "images": None} for row in rows]
    tasks = {"a": build_examples(write(tmp_path, "a.jsonl", rows))}
    with pytest.raises(RowError, match=r"elsewhere/a0.png does not exist"):
        split(tasks, 4)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (
            36,
            r"\(36\) must leave rows on both sides; of a's 36 it would hold out 36; use a number from 1 to 35",
        ),
        (0.01, r"\(0.01\) must leave .* it would hold out 0; use a number from 1"),
    ],
)
def test_a_side_without_rows_is_refused(rows, tmp_path, size, sentence):
    tasks = {"a": build_examples(write(tmp_path, "a.jsonl", rows))}
    with pytest.raises(ValueError, match=sentence):
        split(tasks, size)


def test_rows_that_all_share_an_image_cannot_be_split(tmp_path):
    numbered_image(3).save(tmp_path / "a.png")
    rows = [{"id": n, "problem": f"{n}?", "answer": "1", "image": "a.png"} for n in range(6)]
    tasks = {"a": build_examples(write(tmp_path, "a.jsonl", rows))}
    with pytest.raises(
        ValueError, match="no group of them has 2 rows or fewer; raise it, or give held-out rows"
    ):
        split(tasks, 2)


@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not here")
def test_real_figures_with_several_questions_stay_together():
    """Geometry3K has figures with several questions, two of them as other files."""
    section = RowsConfig(
        recipe="formalgeo", source=str(REAL / "geometry3k_formalgeo7k/problems.jsonl"), filter={}
    )
    tasks = {"a": build_examples(section)}
    sides = apply(split(tasks, 0.3), tasks, mixture=False)
    trained, held_out = sides.trained["a"], sides.held_out["held-out"]
    assert not digests(trained) & digests(held_out) and len(held_out) == round(0.3 * len(tasks["a"]))
