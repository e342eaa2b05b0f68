import pytest

from tests.conftest import example
from vlm_sapo.data.stream import PromptStream
from vlm_sapo.types import RowError

EXAMPLES = [example(number, pictures=0) for number in range(7)]


def identity(item):
    return item


def fail_on_three(item):
    if item.id == "e3":
        raise RowError("row e3 is bad")
    return item


def ids(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order():
    stream = PromptStream(EXAMPLES, identity, seed=0)
    first, second = ids(stream.take(7)), ids(stream.take(7))
    assert sorted(first) == sorted(second) == sorted(ids(EXAMPLES))
    assert first != second
    assert first != ids(PromptStream(EXAMPLES, identity, seed=1).take(7))


def test_the_order_goes_on_where_it_stopped():
    whole = ids(PromptStream(EXAMPLES, identity, seed=3).take(20))
    stream = PromptStream(EXAMPLES, identity, seed=3)
    stream.take(5)
    resumed = PromptStream(EXAMPLES, identity, seed=3)
    resumed.position = stream.position
    assert ids(resumed.take(15)) == whole[5:]


def test_bad_rows_stop_or_are_counted():
    with pytest.raises(RowError, match="e3"):
        PromptStream(EXAMPLES, fail_on_three, seed=0).take(7)
    stream = PromptStream(EXAMPLES, fail_on_three, seed=0, skip=True)
    assert "e3" not in ids(stream.take(12))
    assert stream.skipped == 2


def test_a_set_without_a_usable_row_ends():
    with pytest.raises(RowError):
        PromptStream([EXAMPLES[3]], fail_on_three, seed=0, skip=True).take(1)
