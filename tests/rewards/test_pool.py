"""Rewards in worker processes: functions that hang, crash or raise, and every kind of custom function."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import numbered_image
from vlm_sapo.rewards.parts import RewardError, build_part
from vlm_sapo.rewards.pool import RewardPool, load_images, share_images
from vlm_sapo.types import Example, ResponseText

CUSTOM = """
import asyncio, os, time

def kind(response, example, limit=10):
    return float(len(response) < limit) if example.columns["kind"] == "a" else 0.5

def broken(response, example):
    return example.columns["nothing"]

def words(response, example):
    return "good"

def endless(response, example):
    return float("nan")

def sleeps(response, example):
    if "sleep" in response:
        time.sleep(1000)
    return 1.0

def dies(response, example):
    if "die" in response:
        os._exit(7)
    return 1.0

def computes(response, example):
    return float(9 ** 9 ** 9 ** 9) if "power" in response else 1.0

def parts(response, example):
    return {"short": 0.25, "polite": 0.5}

def width(response, example):
    return float(example.images[0].size[0] + example.images[0].getpixel((0, 0))[0] + response.tokens)

def many(responses, examples, scale=1.0):
    return [scale * len(response) for response in responses]

def too_few(responses, examples):
    return [1.0]

async def waits(response, example):
    await asyncio.sleep(1000 if "sleep" in response else 0.2)
    return 1.0

def leaves(response, example):
    if "leave" in response:
        raise SystemExit(0)
    return 1.0

async def cancels(response, example):
    if "cancel" in response:
        raise asyncio.CancelledError
    return 1.0

def process(response, example):
    return float(os.getpid())

def first_sleeps(response, example):
    if not os.path.exists(example.columns["log"]):
        open(example.columns["log"], "w").close()
        time.sleep(1000)
    return 1.0

LOOPS = []

async def same_loop(response, example):
    LOOPS.append(asyncio.get_running_loop())
    return float(len(set(map(id, LOOPS))))

def halves(responses, examples):
    import numpy
    if any("die" in response for response in responses):
        os._exit(1)
    return numpy.ones(len(responses), dtype=numpy.float32) / 2

def together(responses, examples):
    return [100 * len(responses) + place for place in range(len(responses))]

async def judges(response, example):
    if "sleep" in response:
        await asyncio.sleep(1000)
    return float(len(response))

def counts(response, example):
    with open(example.columns["log"], "a") as file:
        file.write("x")
    return 1.0
"""


def row(answer: str = "3", **columns) -> Example:
    return Example(id="r1", problem="p", answer=answer, columns=columns)


@pytest.fixture
def reward(tmp_path):
    """`reward(name, ..., **options)` builds a pool of built-in verifiers or functions in CUSTOM; closed after
    the test."""
    (tmp_path / "mine.py").write_text(CUSTOM)
    pools = []

    def make(*specs, **options):
        full = [{"name": spec} if isinstance(spec, str) else spec for spec in specs]
        for spec in full:
            if f"def {spec['name']}(" in CUSTOM:
                spec["name"] = f"{tmp_path}/mine.py:{spec['name']}"
        pools.append(RewardPool(full, **{"workers": 2, "timeout": 5.0} | options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


FORMAT = {"name": "format", "args": {"pattern": r"<think>.*</think>.*\\boxed\{.*\}.*"}}


def test_parts_are_weighted_and_named(reward):
    specs = [{"name": "math", "label": "accuracy", "weight": 0.9}, FORMAT | {"weight": 0.1}]
    correct, wrong, unmarked = reward(*specs)(
        [(ResponseText(text), row()) for text in (r"\boxed{3}", r"<think>a</think>\boxed{4}", "three")]
    )
    assert correct.total == pytest.approx(0.9) and correct.parts == {"accuracy": 1.0, "format": 0.0}
    assert wrong.total == pytest.approx(0.1) and wrong.outcomes["accuracy"] == "graded"
    assert unmarked.total == 0 and unmarked.outcomes["accuracy"] == "no_answer"


def test_below_its_gate_a_part_zeroes_the_reward(reward):
    specs = [{"name": "math"}, FORMAT | {"weight": 0.0, "gate": 1.0}]
    below, above = reward(*specs)(
        [(ResponseText(text), row()) for text in (r"\boxed{3}", r"<think>a</think>\boxed{3}")]
    )
    assert (below.total, above.total) == (0.0, 1.0) and below.parts["math"] == 1.0


def test_a_timeout_or_crash_loses_only_its_own_response(reward):
    for name, word, outcome in (("sleeps", "sleep", "timeout"), ("dies", "die", "crash")):
        texts = [f"{word} {n}" if n % 4 == 0 else f"fine {n}" for n in range(8)]
        scores = reward(name, timeout=1.0)([(ResponseText(text), row()) for text in texts])
        assert [score.total for score in scores] == [float(n % 4 > 0) for n in range(8)]
        assert [score.outcomes[name] for score in scores[:2]] == [outcome, "graded"]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9^{9^{9^{9^9}}}}",
        r"\boxed{" + "1+" * 50_000 + "1}",
        r"\boxed{" * 5_000 + "1" + "}" * 5_000,
        r"\boxed{" + r"\frac{1}{" * 500 + "2" + "}" * 500 + "}",
        "x" * 1_000_000,
        "\0\0\\boxed{\0}",
        "\ud800\\boxed{3",
    ],
    ids=["power", "long box", "nested boxes", "nested fractions", "megabyte", "nul", "surrogate"],
)
def test_hostile_responses_never_hang_a_verifier(reward, text):
    hostile, fine = reward("math", timeout=2.0)(
        [(ResponseText(text), row()), (ResponseText(r"\boxed{3}"), row())]
    )
    assert hostile.total == 0.0 and fine.total == 1.0


def outcomes(scores) -> list[tuple]:
    return [(score.total, score.parts, score.outcomes) for score in scores]


@pytest.mark.parametrize(
    "kinds",
    [
        ["math"],
        pytest.param(["sleeps", "together", "judges", "math"], marks=pytest.mark.slow),
        ["judges", "dies"],
    ],
)
def test_scores_do_not_depend_on_when_responses_arrive(reward, kinds):
    """In parts and another order, some twice, some never; with responses that hang, crash and are cached."""
    texts = [r"\boxed{3}", "die", "sleep", r"\boxed{4}", "seen", "a", r"\boxed{3}", "bb", "late"]
    items = [(ResponseText(text), row()) for text in texts]
    scores = []
    for arrivals in ([], [items[3:5], items[:2], items[5:8], items[6:7], [(ResponseText("unused"), row())]]):
        specs = [{"name": kind, "label": kind, "batched": kind == "together"} for kind in kinds]
        grade = reward(*specs, timeout=1.5)
        grade(items[4:5])
        with grade.scoring() as scoring:
            for arrived in arrivals:
                scoring.add(arrived)
            scores.append(outcomes(scoring.results(items)))
    assert scores[0] == scores[1]
    assert (
        "together" not in kinds or scores[0][0][1]["together"] == 700
    )  # one call, of those that are not cached


def test_grading_begins_when_a_response_arrives(reward, tmp_path):
    example = row(log=str(tmp_path / "log"))
    grade = reward("counts")
    with grade.scoring() as scoring:
        scoring.add([(ResponseText("early"), example)])
        deadline = time.monotonic() + 20
        while not (tmp_path / "log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        scoring.results([(ResponseText("early"), example), (ResponseText("late"), example)])
    assert (tmp_path / "log").read_text() == "xx"


def test_what_is_not_graded_ends_with_the_block(reward):
    grade = reward("sleeps", timeout=600.0, workers=1)
    with pytest.raises(OSError), grade.scoring() as scoring:
        scoring.add([(ResponseText("sleep"), row())])
        raise OSError
    assert grade([(ResponseText("awake"), row())])[0].total == 1.0  # or the only worker would still sleep


def test_an_error_is_that_of_the_first_response_whichever_came_first(reward):
    items = [(ResponseText("first"), row()), (ResponseText("second"), row())]
    with reward("broken").scoring() as scoring:
        scoring.add(items[1:])
        with pytest.raises(RewardError, match="'first'"):
            scoring.results(items)


def test_kinds_of_functions(reward):
    [score] = reward({"name": "kind", "args": {"limit": 3}})([(ResponseText("1234"), row(kind="a"))])
    assert score.parts == {"kind": 0.0}
    [score] = reward("parts")([(ResponseText("1"), row())])
    assert score.total == 0.75 and score.parts == {"parts": 0.75, "parts/short": 0.25, "parts/polite": 0.5}
    batched = reward({"name": "many", "batched": True, "args": {"scale": 0.5}})
    assert [s.total for s in batched([(ResponseText("ab"), row()), (ResponseText("abcd"), row())])] == [
        1.0,
        2.0,
    ]


def test_async_functions_run_concurrently(reward):
    texts = ["sleep", *(f"fine {n}" for n in range(20))]
    first, *others = reward("waits", timeout=2.0)([(ResponseText(text), row()) for text in texts])
    assert first.outcomes["waits"] == "timeout" and all(score.total == 1.0 for score in others)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_images_reach_the_worker_unchanged(mode, tmp_path):
    images = tuple(numbered_image(number, size=(30 + number, 20)).convert(mode) for number in range(2))
    item = (ResponseText("r"), row())
    item = (item[0], replace(item[1], images=images))
    [sent, again] = share_images([item, item], str(tmp_path))
    assert sent[1].images is again[1].images and len(list(tmp_path.iterdir())) == 2
    for loaded, image in zip(load_images(sent)[1].images, images, strict=True):
        assert (loaded.mode, loaded.size) == (image.mode, image.size)
        assert loaded.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_function_gets_images_and_token_count(reward):
    example = Example(id="r1", problem="p", answer="3", images=(Image.new("RGB", (30, 20), (5, 0, 0)),))
    assert reward("width")([(ResponseText("r", tokens=7), example)])[0].total == 30 + 5 + 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "KeyError: 'nothing'"),
        ("words", "'good'"),
        ("endless", "nan"),
        ("too_few", "1 values for 2"),
    ],
)
def test_an_exception_names_row_and_response(reward, name, words):
    items = [(ResponseText("the response"), row()), (ResponseText("another"), row())]
    spec = {"name": name, "batched": name == "too_few"}
    with pytest.raises(RewardError) as error:
        reward(spec)(items)
    for word in (name, "row r1", "'the response'", words, "Traceback", "reward.on_error=zero"):
        assert word in str(error.value)
    scores = reward({"name": name.rpartition(":")[2], "batched": name == "too_few"}, on_error="zero")(items)
    assert [(score.total, *score.outcomes.values()) for score in scores] == [(0.0, "error")] * 2


def test_exit_and_cancel_in_a_function_are_errors(reward):
    for name, word in (("leaves", "leave"), ("cancels", "cancel")):
        items = [(ResponseText(word), row()), (ResponseText("stay"), row())]
        with pytest.raises(RewardError, match=name):
            reward(name)(items)
        scores = reward(name, on_error="zero")(items)
        assert [tuple(score.outcomes.values()) for score in scores] == [("error",), ("graded",)]


def test_other_parts_of_a_response_that_times_out_are_graded(reward):
    specs = [{"name": "sleeps"}, {"name": "length", "args": {"allowed": 1, "buffer": 1}}]
    [score] = reward(*specs, timeout=1.0)([(ResponseText("sleep", tokens=9), row())])
    assert score.parts == {"sleeps": 0.0, "length": -1.0} and score.outcomes["sleeps"] == "timeout"


def test_a_crashed_batch_is_graded_one_by_one(reward):
    spec = {"name": "halves", "batched": True}
    scores = reward(spec)([(ResponseText(text), row()) for text in ("fine", "die", "well")])
    assert [score.total for score in scores] == [0.5, 0.0, 0.5]
    assert [*scores[1].outcomes.values()] == ["crash"]


def test_timeouts_are_not_cached(reward, tmp_path):
    item = (ResponseText("r"), row(log=str(tmp_path / "log")))
    grade = reward("first_sleeps", timeout=1.0)
    assert [grade([item])[0].total for _ in range(2)] == [0.0, 1.0]


def test_rows_of_two_splits_may_share_an_id(reward):
    grade = reward("math")
    response = ResponseText(r"\boxed{7}", tokens=3)
    assert [grade([(response, row(gold))])[0].total for gold in ("7", "8")] == [1.0, 0.0]


def test_async_calls_share_one_event_loop(reward):
    grade = reward("same_loop", workers=1)
    assert [grade([(ResponseText(text), row())])[0].total for text in ("a", "b", "c")] == [1.0] * 3


def test_a_row_that_cannot_be_pickled_is_an_error(reward):
    with pytest.raises(RewardError, match="plain values"):
        reward("sleeps")([(ResponseText("r"), row(bad=lambda: 1))])


def test_a_reward_that_cannot_be_set_up_in_a_worker_is_an_error(tmp_path):
    code = (
        "import multiprocessing\nassert not multiprocessing.parent_process(), 'no'\ndef f(r, e): return 1.0\n"
    )
    (tmp_path / "odd.py").write_text(code)
    grade = RewardPool([{"name": f"{tmp_path}/odd.py:f"}], workers=1)
    with closing(grade), pytest.raises(RewardError, match="AssertionError: no"):
        grade([(ResponseText("r"), row())])


def test_verdicts_are_cached(reward, tmp_path):
    counted = reward("counts")
    example = row(log=str(tmp_path / "log"))
    for _ in range(2):
        counted([(ResponseText("same"), example), (ResponseText("same"), example)])
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "maths"}, "did you mean 'math'"),
        ({"name": "no/such.py:f"}, "Python file that exists"),
        ({"name": "no.such.module:f"}, "importable module"),
        ({"name": "json:lods"}, "did you mean 'loads'"),
        ({"name": "anls", "args": {"treshold": 1}}, "unexpected keyword argument 'treshold'"),
        ({"name": "math", "args": {"finding": "maarked"}}, "args.finding ('maarked')"),
        ({"name": "box", "args": {"coordinates": "thousnd"}}, "args.coordinates ('thousnd')"),
    ],
)
def test_unknown_names_and_arguments_are_named(spec, words):
    with pytest.raises(ValueError, match="reward.parts.0") as error:
        build_part(spec)
    assert words in str(error.value)


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that fails once and then says yes to 4."""

    calls = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        Judge.calls += 1
        if Judge.calls == 1:
            self.send_error(503)
            return
        word = "Yes." if "Given answer: 4" in body else "no"
        reply = (
            '{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, '
        )
        reply += f'"finish_reason": "stop", "message": {{"role": "assistant", "content": "{word}"}}}}]}}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_):
        pass


def test_the_judge_retries_and_its_verdicts_are_cached(reward):
    Judge.calls = 0
    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        args = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m"}
        judge = reward({"name": "judge", "args": args}, timeout=20.0)
        items = [(ResponseText(rf"\boxed{{{n}}}"), row("four")) for n in (4, 5)]
        assert [score.total for score in judge(items)] == [1.0, 0.0]
        assert [score.total for score in judge(items)] == [1.0, 0.0] and Judge.calls == 3
        server.shutdown()


def test_a_judge_that_does_not_answer_is_named_when_the_pool_starts(reward):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    for address in (url, "localhost/v1"):
        with pytest.raises(
            ValueError, match=r"reward.parts.0.args.url \(.*v1\) must be an endpoint that answers"
        ):
            reward({"name": "judge", "args": {"url": address, "model": "m"}})


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_the_system_kills_are_started_again(reward, workers):
    """As for their memory; here while no response is graded."""
    grade = reward("process", workers=workers)
    for _ in range(4):
        items = [(ResponseText(f"{number} {os.urandom(4)}"), row()) for number in range(6)]
        scores = grade(items)
        assert [score.outcomes["process"] for score in scores] == ["graded"] * 6
        processes = {int(score.total) for score in scores}
        for process in processes:
            os.kill(process, signal.SIGKILL)
        while any(Path(f"/proc/{process}").exists() for process in processes):
            time.sleep(0.01)


def test_a_call_that_was_sent_while_the_workers_broke_is_sent_again(reward):
    grade = reward("process", workers=2)
    with grade.scoring() as scoring:
        items = [(ResponseText(str(number)), row()) for number in range(40)]
        for item in items:
            scoring.add([item])
            if item is items[20]:
                [worker] = {int(score.total) for score in grade([(ResponseText("now"), row())])}
                os.kill(worker, signal.SIGKILL)
        scores = scoring.results(items)
    assert {score.outcomes["process"] for score in scores} <= {"graded", "crash"}
    assert sum(score.outcomes["process"] == "crash" for score in scores) <= 1


def test_two_threads_may_start_killed_workers_again(reward):
    grade = reward("process", workers=2)
    [first] = grade([(ResponseText("0"), row())])
    for number in range(2):
        os.kill(int(first.total), signal.SIGKILL)
        while Path(f"/proc/{int(first.total)}").exists():
            time.sleep(0.01)
        with ThreadPoolExecutor(4) as threads:
            items = [[(ResponseText(f"{number} {thread}"), row())] for thread in range(4)]
            scores = [score for [score] in threads.map(grade, items)]
        assert all(score.outcomes["process"] in ("graded", "crash") for score in scores)
        [first] = grade([(ResponseText(f"again {number}"), row())])
