"""The quick start's world: the same rows always, no layout in two worlds, demonstrations that verify."""

import re

import pytest

from vlm_sapo.plugins import resolve
from vlm_sapo.rewards.verifiers import auto
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


def test_looking_demonstrations_are_right_and_guesses_often_wrong():
    looks, guesses = shapes("cold_start", 300, look_share=1.0), shapes("cold_start", 300, look_share=0.0)
    assert all(auto(row["demonstration"], as_example(row)) == 1.0 for row in looks)
    share = sum(auto(row["demonstration"], as_example(row)) for row in guesses) / 300
    assert 0.2 < share < 0.5


def test_held_out_layouts_are_never_trained_on():
    def layouts(split):
        thing = re.compile(r"(\d) (?:yes |no )?(red|green|blue|yellow) (?:\d )*(circle|square|triangle)")
        return {tuple(thing.findall(row["demonstration"])) for row in shapes(split, 2000)}

    trained = layouts("train") | layouts("cold_start")
    assert len(trained) > 3000 and all(2 <= len(layout) <= 5 for layout in trained)
    assert not trained & (layouts("test") | layouts("validation"))


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="data.args.split"):
        shapes("dev")
