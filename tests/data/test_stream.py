"""The order of prompts: shuffled, resumable, mixed by share."""

import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest

from tests.conftest import example
from vlm_sapo.data.stream import PromptStream, TaskMixture, ThreadedPreparation
from vlm_sapo.types import Prompt, RowError

EXAMPLES = [example(number, images=0) for number in range(7)]


def identity(item):
    return item


def fail_on_three(item):
    if item.id == "e3":
        raise RowError("row e3 is bad")
    return item


def ids(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


def single_task(examples, encode, **options) -> TaskMixture:
    return TaskMixture({"a": PromptStream(examples, encode, **options)}, {"a": 1.0}, minibatch=1)


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order():
    stream = single_task(EXAMPLES, identity, seed=0)
    first, second = ids(stream.take(7)), ids(stream.take(7))
    assert sorted(first) == sorted(second) == sorted(ids(EXAMPLES))
    assert first != second
    assert first != ids(single_task(EXAMPLES, identity, seed=1).take(7))


def test_the_order_resumes_where_it_stopped():
    whole = ids(single_task(EXAMPLES, identity, seed=3).take(20))
    stream = single_task(EXAMPLES, identity, seed=3)
    stream.take(5)
    resumed = single_task(EXAMPLES, identity, seed=3)
    resumed.restore(stream.state())
    assert ids(resumed.take(15)) == whole[5:]


def test_bad_rows_stop_the_stream_or_are_counted():
    with pytest.raises(RowError, match="e3"):
        single_task(EXAMPLES, fail_on_three, seed=0).take(7)
    stream = single_task(EXAMPLES, fail_on_three, seed=0, skip=True)
    assert "e3" not in ids(stream.take(12))
    assert stream.skipped == 2


def test_a_task_without_a_usable_row_is_an_error():
    with pytest.raises(RowError):
        single_task([EXAMPLES[3]], fail_on_three, seed=0, skip=True).take(1)


def mixture(shares: dict[str, float], minibatch: int, encode=identity, preparation=None) -> TaskMixture:
    streams = {
        task: PromptStream(
            [replace(example(number, images=0), task=task) for number in range(5 + index)],
            encode,
            seed=task,
            skip=True,
        )
        for index, task in enumerate(shares)
    }
    return TaskMixture(streams, shares, minibatch=minibatch, preparation=preparation)


@pytest.mark.parametrize(
    ("shares", "size"),
    [
        ({"a": 0.6, "b": 0.4}, 4),
        ({"a": 0.6, "b": 0.4}, 5),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 8),
        ({"a": 0.97, "b": 0.03}, 8),
        ({"a": 0.357, "b": 0.243, "c": 0.21, "d": 0.19}, 8),
    ],
)
def test_every_minibatch_holds_each_tasks_share(shares, size):
    """Rounded up or down in each, and exact over all: 40 steps of 4 mini-batches."""
    stream, total = mixture(shares, size), Counter()
    for _ in range(40):
        prompts = stream.take(4 * size)
        for start in range(0, len(prompts), size):
            counts = Counter(prompt.task for prompt in prompts[start : start + size])
            assert all(abs(counts[task] - share * size) < 1 for task, share in shares.items())
            total += counts
    assert all(abs(total[task] - share * 160 * size) < 1 for task, share in shares.items())


def test_a_mixture_resumes_where_it_stopped():
    shares = {"a": 0.7, "b": 0.3}
    whole = [(p.task, p.id) for p in mixture(shares, 4).take(48)]
    first, second = mixture(shares, 4), mixture(shares, 4)
    first.take(12)
    second.restore(first.state())
    assert [(p.task, p.id) for p in second.take(36)] == whole[12:]


def test_a_mixture_counts_bad_rows_and_replaces_them_within_the_task():
    def encode(item):
        if item.task == "b" and item.id == "e3":
            raise RowError("row e3 is bad")
        return Prompt(item, "", "", None, None, (), None, None)

    stream = mixture({"a": 0.5, "b": 0.5}, 4, encode)
    prompts = stream.take(24)
    assert stream.skipped == 2 and stream.state()["b"]["skipped"] == 2
    further = stream.next_prompts({slot: prompts[slot].example.task for slot in (1, 3)})
    assert [(slot, p.example.task) for slot, p in further.items()] == [(1, "a"), (3, "b")]
    assert stream.taken == {"a": 12, "b": 12}


class Watched:
    """Encodes rows as themselves, notes which and in which threads, and waits for `gate`."""

    def __init__(self, *, bad: str = ""):
        self.bad, self.rows, self.threads = bad, [], set()
        self.gate, self.lock = threading.Event(), threading.Lock()
        self.gate.set()

    def __call__(self, item):
        assert self.gate.wait(10)
        with self.lock:
            self.rows.append(item.id)
            self.threads.add(threading.current_thread().name)
        if item.id == self.bad:
            raise RowError(f"row {item.id} is bad")
        return item


@pytest.mark.parametrize("bad", ["", "e3"])
@pytest.mark.parametrize("threads", [1, 3])
def test_prompts_prepared_ahead_are_those_of_an_order_without(threads, bad):
    """Over steps of which some replace further rows, and a failed one that is taken again."""
    shares = {"a": 0.7, "b": 0.3}

    def run(preparation) -> list:
        taken = []
        with closing(mixture(shares, 4, Watched(bad=bad), preparation)) as stream:
            for step in range(12):
                prompts = stream.take(8)
                if step % 3 == 0:
                    prompts += stream.next_prompts({slot: prompts[slot].task for slot in (1, 5)}).values()
                before = stream.state()
                stream.prefetch(8)
                assert stream.state() == before
                taken.append(([(p.task, p.id) for p in prompts], before))
                if step % 4 == 0:
                    with pytest.raises(OSError), stream.rollback_on_error():
                        stream.take(5)
                        raise OSError
                    assert stream.state() == before
        return taken

    assert run(ThreadedPreparation(threads)) == run(None)


def test_the_next_prompts_are_prepared_once_beside_the_caller():
    encode = Watched()
    with closing(
        TaskMixture({"a": PromptStream(EXAMPLES, encode, seed=0)}, {"a": 1.0}, minibatch=1)
    ) as plain:
        expected = ids(plain.take(6))
    encode = Watched()
    stream = TaskMixture(
        {"a": PromptStream(EXAMPLES, encode, seed=0)},
        {"a": 1.0},
        minibatch=1,
        preparation=ThreadedPreparation(2),
    )
    with closing(stream):
        stream.take(3)
        encode.gate.clear()
        stream.prefetch(3)  # returns at once, although nothing can be prepared yet
        assert len(encode.rows) == 3
        encode.gate.set()
        assert ids(stream.take(3)) == expected[3:]
        assert sorted(encode.rows) == sorted(expected)
        assert all(name.startswith("prompts") for name in encode.threads)


def test_a_bad_row_prepared_ahead_is_an_error_when_its_turn_comes():
    encode = Watched(bad="e3")
    stream = TaskMixture(
        {"a": PromptStream(EXAMPLES, encode, seed=0)},
        {"a": 1.0},
        minibatch=1,
        preparation=ThreadedPreparation(2),
    )
    order = ids(single_task(EXAMPLES, identity, seed=0).take(7))
    turn = order.index("e3")
    with closing(stream):
        for step in range(turn):
            stream.prefetch(turn - step + 1)
            assert ids(stream.take(1)) == [order[step]]
        with pytest.raises(RowError, match="^row e3 is bad$"):
            stream.take(1)


def test_what_was_prepared_ahead_is_dropped_on_restore_and_never_more_than_announced():
    encode = Watched()
    encode.gate.clear()
    preparation = ThreadedPreparation(1)
    stream = TaskMixture(
        {"a": PromptStream(EXAMPLES, encode, seed=0)}, {"a": 1.0}, minibatch=1, preparation=preparation
    )
    before = stream.state()
    stream.prefetch(7)
    stream.prefetch(2)
    stream.restore(before)
    encode.gate.set()
    stream.close()
    assert len(encode.rows) <= 1  # that which was running; the others were never started


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    stream = single_task(EXAMPLES, identity, seed=0)
    stream.preparation = ThreadedPreparation(2)
    stream.take(4)
    own = set(threading.enumerate()) - before
    assert own and all(thread.is_alive() for thread in own)
    stream.close()
    assert not any(thread.is_alive() for thread in own)
