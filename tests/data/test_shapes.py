"""The drawn world: the same rows always, no layout in two worlds, demonstrations that verify."""

import re
from collections import Counter

import pytest

from vlm_sapo.plugins import resolve
from vlm_sapo.rewards.verifiers.table import auto
from vlm_sapo.types import Example

shapes = resolve("data/shapes.py:rows", field="test")


def as_example(row) -> Example:
    return Example(id=row["id"], problem=row["problem"], answer=row["answer"], columns=row)


def test_rows_are_the_same_every_time():
    first, second = shapes("train", 30), shapes("train", 60)
    for index in range(30):
        one, two = first[index], second[index]
        assert one["images"][0].tobytes() == two["images"][0].tobytes()
        assert {k: v for k, v in one.items() if k != "images"} == {
            k: v for k, v in two.items() if k != "images"
        }


def test_demonstrations_that_look_are_correct_and_guesses_often_wrong():
    looks, guesses = shapes("cold_start", 300, look_share=1.0), shapes("cold_start", 300, look_share=0.0)
    assert all(auto(row["demonstration"], as_example(row)) == 1.0 for row in looks)
    share = sum(auto(row["demonstration"], as_example(row)) for row in guesses) / 300
    assert 0.2 < share < 0.5


THING = re.compile(r"(\d+) (?:yes |no )?(red|green|blue|yellow) (?:\d )*(circle|square|triangle)")


@pytest.mark.parametrize(("level", "fewest", "most"), [("easy", 2, 5), ("hard", 5, 9)])
def test_held_out_layouts_are_never_trained_on(level, fewest, most):
    def layouts(split):
        return {tuple(THING.findall(row["demonstration"])) for row in shapes(split, 2000, level=level)}

    trained = layouts("train") | layouts("cold_start")
    assert len(trained) > 3000 and all(fewest <= len(layout) <= most for layout in trained)
    assert not trained & (layouts("test") | layouts("validation"))


def test_the_hard_levels_demonstrations_list_count_and_add_up():
    """Every listing is held against the answer by a count of its own; three tasks, equally often."""
    kinds = Counter()
    for row in shapes("cold_start", 600, level="hard"):
        things = THING.findall(row["demonstration"])
        counts = [sum(name in thing for thing in things) for name in row["target"]]
        task = row["kind"].partition("_")[0]
        kinds[task] += 1
        more = "yes" if counts[0] > counts[-1] else "no"
        assert row["answer"] == {"count": str(counts[0]), "more": more, "add": str(sum(counts))}[task]
        assert auto(row["demonstration"], as_example(row)) == 1.0
        assert row["images"][0].size == (64, 64)
        if task == "add":
            assert f"So {counts[0]} + {counts[1]} = \\boxed{{{sum(counts)}}}" in row["demonstration"]
    assert kinds == {"count": 200, "more": 200, "add": 200}


def test_a_demonstration_of_the_hard_level():
    assert shapes("train", 5, level="hard")[4]["demonstration"] == (
        "I see 1 red 0 square 1, 4 green 0 square 2, 6 red 0 triangle 2, 9 blue 1 circle 2, "
        "11 yellow 1 circle 2, 14 green 1 square 3, 15 blue 2 square 4. So 2 + 4 = \\boxed{6}"
    )


@pytest.mark.parametrize(("name", "value"), [("split", "dev"), ("level", "harder")])
def test_an_unknown_split_or_level_is_named(name, value):
    with pytest.raises(ValueError, match=f"data.args.{name} \\({value}\\) must be one of"):
        shapes(**{name: value})
