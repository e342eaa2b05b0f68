"""Runs from Python: rows in memory, functions and callbacks."""

import json
import subprocess
import sys
import threading
from contextlib import closing
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import yaml

import vlm_sapo
from tests.conftest import ROOT, numbered_image
from tests.fixtures.trl_reward import odd_length
from vlm_sapo.api import _with_objects
from vlm_sapo.config.load import check, load
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.data.memory import usable_rows
from vlm_sapo.data.sources import build_examples
from vlm_sapo.fingerprint import fingerprint_function, fingerprint_rows
from vlm_sapo.plugins import passing
from vlm_sapo.rewards.functions import config_parts
from vlm_sapo.rewards.parts import RewardError, build_part
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.types import Example, ResponseText

LIMIT = 3


def memory(count: int = 8, first: int = 0) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": "How many shapes?"}],
            "image": numbered_image(number),
            "solution": str(number),
        }
        for number in range(first, first + count)
    ]


def config(folder, model, *, steps: int = 4, **sections) -> dict:
    return {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "rollout": {"group": 4, "max_tokens": 8},
        "reward": {"workers": 1},
        "train": {"steps": steps, "prompts_per_step": 4, "minibatches": 2, "lr": 1e-3},
        "checkpoint": {"every": 2},
    } | sections


class Events(vlm_sapo.Callback):
    def __init__(self):
        self.events = []

    def on_step(self, step, metrics):
        assert metrics["time/step"] > 0
        self.events.append(("step", step))

    def on_rollouts(self, step, rollouts):
        assert {line["step"] for line in rollouts} == {step} and all("reward" in line for line in rollouts)
        self.events.append(("rollouts", step))

    def on_evaluation(self, step, name, metrics):
        assert 0 <= metrics["pass@1"] <= 1
        self.events.append((name, step))

    def on_checkpoint(self, step, path):
        assert (path / "manifest.json").is_file()
        self.events.append(("checkpoint", step))


class Fails(vlm_sapo.Callback):
    def on_step(self, step, metrics):
        if step == 3:
            raise LookupError("no such service")


def metrics(folder) -> list:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "time" not in k and "seconds" not in k} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    """A run of a function in this module and one that no other process can import."""
    folder, bonus, seen = tmp_path_factory.mktemp("whole"), 0.5, Events()

    def short(response, example):
        return bonus * (len(response) < 12)

    summary = vlm_sapo.train(
        config(folder, model_folder()),
        dataset=memory(),
        eval_dataset=memory(4, first=8),
        reward=[odd_length, short, {"name": "length", "weight": 0.1, "args": {"allowed": 4, "buffer": 2}}],
        callbacks=[seen],
    )
    return folder, short, seen, summary


def test_rows_functions_and_callbacks(whole):
    folder, _, seen, summary = whole
    assert summary["eval_after/held-out"]["n"] == 4 and summary["steps"] == 4
    step = [[("rollouts", number), ("step", number)] for number in range(1, 5)]
    assert seen.events == [
        ("held-out", 0),
        *step[0],
        *step[1],
        ("checkpoint", 2),
        *step[2],
        *step[3],
        ("held-out", 4),
        ("checkpoint", 4),
    ]
    stored = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert [part["label"] for part in stored["reward"]["parts"]] == ["odd_length", "short", None]
    assert [part["name"] for part in stored["reward"]["parts"]] == [
        "tests.fixtures.trl_reward:odd_length",
        "python:short",
        "length",
    ]
    assert stored["data"]["source"] == "python:dataset" and stored["data"]["fingerprint"]
    assert {"reward/odd_length", "reward/short", "reward/length"} <= metrics(folder)[0].keys()


def test_a_trl_function_that_reads_messages_of_rows_without_them_is_told(tmp_path):
    example = Example("1", "How many?", "3", columns={"solution": "3"})
    part = build_part({"name": "tests.fixtures.trl_reward:odd_length"})
    with pytest.raises(TypeError, match=r"completions are texts here, .* no column `prompt`"):
        part.function([ResponseText("abc")], [example])


def test_a_run_goes_on_with_the_same_objects_only(whole, tmp_path, model_folder):
    folder, short, _, _ = whole
    values = config(folder, model_folder(), steps=5)
    parts = [odd_length, short, {"name": "length", "weight": 0.1, "args": {"allowed": 4, "buffer": 2}}]
    with pytest.raises(
        ValueError, match="data: the rows or the function that the program passes here have changed"
    ):
        vlm_sapo.train(values, dataset=memory(9), eval_dataset=memory(4, first=8), reward=parts)
    with pytest.raises(ValueError, match=r"reward\.parts"):
        vlm_sapo.train(values, dataset=memory(), eval_dataset=memory(4, first=8), reward=odd_length)
    stored = load(
        TrainConfig, str(folder / "run/config.yaml"), ["run.overwrite=true", f"run.dir={tmp_path}/o"]
    )
    with pytest.raises(ValueError, match=r"python:\w+\) is an object of the Python program.*pass it again"):
        vlm_sapo.train(stored)
    same = vlm_sapo.train(
        values
        | {
            "train": values["train"] | {"schedule": "constant"},
            "run": values["run"] | {"accept_changes": True},
        },
        dataset=memory(),
        eval_dataset=memory(4, first=8),
        reward=parts,
    )
    assert same["steps"] == 5


def test_a_failing_callback_stops_the_run_which_then_resumes(whole, tmp_path, model_folder):
    folder, short, _, _ = whole
    call = {
        "dataset": datasets.Dataset.from_list(memory()),
        "eval_dataset": memory(4, first=8),
        "reward": [odd_length, short, {"name": "length", "weight": 0.1, "args": {"allowed": 4, "buffer": 2}}],
    }
    values = config(tmp_path, model_folder())
    after = Events()
    with pytest.raises(LookupError, match="no such service") as failure:
        vlm_sapo.train(values, **call, callbacks=[Fails(), after])
    assert "raised by Fails.on_step after step 3; the same call resumes a run" in failure.value.__notes__[0]
    assert ("step", 3) not in after.events and ("step", 2) in after.events
    assert (tmp_path / "run/checkpoints/step_000003").is_dir()
    vlm_sapo.train(values, **call)
    whole_run = metrics(folder)[:4]
    assert [line["reward/mean"] for line in metrics(tmp_path)] == [line["reward/mean"] for line in whole_run]


def test_a_failure_after_the_last_step_is_raised_too(tmp_path, model_folder):
    class Late(vlm_sapo.Callback):
        def on_evaluation(self, step, name, metrics):
            if step == 1:
                raise OSError("the service is gone")

    rows = {"dataset": memory(4), "eval_dataset": memory(2), "reward": "math"}
    values = config(tmp_path, model_folder(), steps=1, checkpoint={"every": 0})
    with pytest.raises(OSError, match="the service is gone"):
        vlm_sapo.train(values, **rows, callbacks=[Late()])
    assert (tmp_path / "run/summary.json").is_file()


@pytest.mark.parametrize(
    ("objects", "sentence"),
    [
        ({"dataset": (row for row in memory(2))}, r"dataset \(generator\) must have a length; pass list"),
        ({"dataset": []}, "dataset must have rows; it is empty"),
        ({"dataset": [*memory(2), "three"]}, "dataset must have mappings as rows; row 2 is str"),
        ({"dataset": {"train": memory(2)}}, "must be one list of rows; pass one of train"),
        ({"dataset": ["text"]}, "must have mappings .* its first is str"),
        ({"dataset": {1, 2}}, r"df.to_dict\('records'\)"),
        ({"dataset": memory(2), "reward": 3}, r"reward \(3\) must be a function, the name of a verifier"),
        ({"dataset": memory(2), "reward": "maths"}, r"reward.parts.0.name \(maths\).*did you mean 'math'"),
    ],
)
def test_what_is_no_rows_or_function_is_refused(objects, sentence, tmp_path, model_folder):
    with pytest.raises(ValueError, match=sentence):
        vlm_sapo.train(config(tmp_path, model_folder()), **({"reward": "math"} | objects))


def test_a_function_that_cannot_be_pickled_is_refused(tmp_path, model_folder):
    lock = threading.Lock()

    def locked(response, example):
        with lock:
            return 1.0

    with pytest.raises(ValueError, match=r"reward.parts.0.name \(python:locked\) can't be sent .* top level"):
        vlm_sapo.train(config(tmp_path, model_folder()), dataset=memory(2), reward=locked)


def test_a_mixture_takes_no_dataset(tmp_path, model_folder):
    values = config(tmp_path, model_folder(), data=[{"source": "a.jsonl", "share": 1}])
    with pytest.raises(ValueError, match="the config's data names several sources"):
        vlm_sapo.train(values, dataset=memory(2), reward="math")


def graded(function, *, columns: dict, responses=("a", "bb")) -> list:
    with passing({"python:f": function}):
        part = build_part({"name": "python:f"})
    images = (numbered_image(),)
    return part.grade([(ResponseText(text), Example("1", "p", "2", images, columns)) for text in responses])


def test_trls_signature_gets_columns_and_images():
    def function(prompts, completions, solution, images, factor=2, **others):
        assert prompts == ["p", "p"] and solution == ["2", "2"] and images[0][0].size == (48, 48)
        assert others["kind"] == ["x", "x"]
        return [factor * len(text) if len(text) < 2 else None for text in completions]

    first, second = graded(function, columns={"solution": "2", "kind": "x"})
    assert (first.value, first.outcome) == (2.0, "graded")
    assert (second.value, second.outcome) == (0.0, "not_applicable")


def test_trls_signature_gets_messages_where_the_prompt_has_them():
    prompt = [{"role": "user", "content": "p"}]

    def function(prompts, completions):
        assert prompts == [prompt]
        return [len(turns[-1]["content"]) for turns in completions]

    [verdict] = graded(function, columns={"prompt": prompt}, responses=["abc"])
    assert verdict.value == 3.0


def test_a_missing_column_is_named():
    [verdict, _] = graded(lambda completions, solutoin: [0.0, 0.0], columns={"solution": "2"})
    assert (
        "asks for `solutoin`, which is no column of these rows; they have answer, problem, solution"
        in verdict.detail
    )


def test_an_async_function_of_trls_signature_is_refused():
    async def function(completions):
        return [0.0]

    with pytest.raises(ValueError, match="async function f must take"):
        graded(function, columns={})


def test_rows_of_datasets_are_read_as_rows_of_a_list(tmp_path, model_folder):
    from vlm_sapo.config.data import RowsConfig

    kinds = []
    for rows in (memory(3), datasets.Dataset.from_list(memory(3))):
        with passing({"python:dataset": rows}):
            kinds.append(list(build_examples(RowsConfig(source="python:dataset"))))
    for one, two in zip(*kinds, strict=True):
        assert (one.problem, one.answer) == (two.problem, two.answer)
        assert one.images[0].tobytes() == two.images[0].tobytes()


def test_equal_completions_are_all_passed_to_trls_functions():
    """As a reward for diversity needs."""

    def rare(completions):
        return [1 / completions.count(text) for text in completions]

    responses = [ResponseText(text) for text in "aaab"]
    with passing({"python:rare": rare}), closing(RewardPool([{"name": "python:rare"}], workers=1)) as pool:
        for _ in range(2):
            scores = pool([(text, Example("1", "p", "2")) for text in responses])
            assert [score.total for score in scores] == pytest.approx([1 / 3] * 3 + [1])


def test_messages_are_passed_on_from_any_form_of_a_prompt():
    from vlm_sapo.config.data import RowsConfig

    parts = [{"type": "image", "image": numbered_image()}, {"type": "text", "text": "How many?"}]
    rows = [{"prompt": [{"role": "user", "content": parts}], "answer": "2"}]
    rows.append(rows[0] | {"prompt": json.dumps([{"role": "user", "content": "How many?"}])})
    with passing({"python:dataset": rows}):
        one, two = build_examples(RowsConfig(source="python:dataset"))
    assert (
        one.columns["prompt"][0]["content"][1]["text"] == two.columns["prompt"][0]["content"] == "How many?"
    )
    assert one.images and not any("bytes" in part for part in one.columns["prompt"][0]["content"])


def test_functions_are_named_apart():
    def scorer(weight):
        return lambda response, example: weight

    parts, passed = config_parts([scorer(1), scorer(2), {"name": partial(scorer(3)), "label": "third"}])
    assert [part["label"] for part in parts] == ["reward", "reward_2", "third"]
    assert list(passed) == ["python:reward", "python:reward_2", "python:third"]
    assert len({part["fingerprint"] for part in parts}) == 3
    again, _ = config_parts([scorer(1), scorer(2), {"name": partial(scorer(3)), "label": "third"}])
    assert parts == again


def test_values_of_the_programs_own_classes_are_the_same_class_in_workers(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from enum import Enum\nfrom vlm_sapo.plugins import passing\n"
        "from vlm_sapo.rewards.pool import RewardPool\nfrom vlm_sapo.types import Example, ResponseText\n"
        "class Kind(Enum):\n    A = 1\n"
        "def is_a(response, example):\n    return float(example.columns['kind'] is Kind.A)\n"
        "if __name__ == '__main__':\n"
        "    with passing({'python:f': is_a}):\n        pool = RewardPool([{'name': 'python:f'}], workers=1)\n"
        "    item = ResponseText('1'), Example('1', 'p', '1', columns={'kind': Kind.A})\n"
        "    print(pool([item])[0].total)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "1.0", done.stderr[-2000:]


def test_a_column_that_cannot_be_sent_is_named(tmp_path, model_folder):
    rows = [row | {"lock": threading.Lock()} for row in memory(4)]
    with pytest.raises(
        RewardError, match=r"row .*: column lock \(lock\) cannot be sent to the reward's processes"
    ):
        vlm_sapo.train(
            config(tmp_path, model_folder(), steps=1), dataset=rows, reward=lambda response, example: 1.0
        )


def test_a_callback_has_its_own_facts_and_may_raise_anything(tmp_path, model_folder):
    class Clears(vlm_sapo.Callback):
        def on_evaluation(self, step, name, metrics):
            metrics["ci95"].clear()

    class Ends(vlm_sapo.Callback):
        def on_evaluation(self, step, name, metrics):
            assert len(metrics["ci95"]) == 2

        def on_step(self, step, metrics):
            raise StopIteration("no more")

    rows = {"dataset": memory(4), "eval_dataset": memory(2), "reward": "math"}
    with pytest.raises(StopIteration, match="no more") as failure:
        vlm_sapo.train(config(tmp_path, model_folder(), steps=2), **rows, callbacks=[Clears(), Ends()])
    assert "raised by" in failure.value.__notes__[0]


@pytest.mark.parametrize("callbacks", [Events(), [Events], [object()], [print]])
def test_what_is_no_callback_is_refused(callbacks, tmp_path, model_folder):
    with pytest.raises(ValueError, match="must be a list of objects of subclasses of vlm_sapo.Callback"):
        vlm_sapo.train(
            config(tmp_path, model_folder()), dataset=memory(2), reward="math", callbacks=callbacks
        )


def test_rows_of_another_split_are_left_out(tmp_path, model_folder):
    rows = [row | {"split": "test" if number else "train"} for number, row in enumerate(memory(3))]
    values = config(tmp_path, model_folder(), data={"split": "train"})
    prepared, objects = _with_objects(TrainConfig, values, rows, None, "math")
    with passing(objects):
        assert len(build_examples(check(TrainConfig, prepared).data.tasks[0])) == 1


def test_fingerprints_are_of_contents():
    def twice(number):
        def inner(response, example, extra=number):
            return LIMIT * number

        return inner

    class Counts:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, response, example):
            return self.weight

    same = [fingerprint_function(make) for make in (twice(1), Counts(1), partial(twice(1), extra=2))]
    assert same == [fingerprint_function(make) for make in (twice(1), Counts(1), partial(twice(1), extra=2))]
    assert not {
        fingerprint_function(make) for make in (twice(2), Counts(2), partial(twice(1), extra=3))
    } & set(same)
    array = {"a": np.arange(6), "t": torch.tensor(1.5), "s": {"x", "y"}, "i": numbered_image()}
    assert fingerprint_rows([array]) == fingerprint_rows([dict(array)])
    assert fingerprint_rows([array]) != fingerprint_rows([array | {"t": torch.tensor(1.25)}])


def test_a_broken_image_of_a_dataset_is_an_error_of_its_row():
    broken = datasets.Dataset.from_list(
        [{"problem": "p", "answer": "1", "image": {"bytes": b"no", "path": None}}]
    )
    rows = usable_rows(broken.cast_column("image", datasets.Image()), "dataset")
    assert rows[0]["image"]["bytes"] == b"no" and fingerprint_rows(rows)


PROGRAM = """
from functools import lru_cache

def weight(word):
    return {factor}

def by_generator(response, example):
    return sum(weight(word) for word in response.split())

def by_inner(response, example):
    return (lambda: (lambda word: weight(word))(response))()

@lru_cache
def cached(word):
    return weight(word)

def by_cache(response, example):
    return cached(response)

class Base:
    __slots__ = ("factor",)

    def score(self):
        return weight("a") * self.factor

class Whole(Base):
    def __call__(self, response, example):
        return self.score()

def by_slots(value):
    whole = Whole()
    whole.factor = value
    return whole
"""


def test_fingerprints_cover_what_a_function_uses_of_its_program():
    def program(factor):
        names = {"__name__": "__main__"}
        exec(PROGRAM.format(factor=factor), names)
        functions = [names[name] for name in ("by_generator", "by_inner", "by_cache")]
        return [*functions, names["by_slots"](1), names["by_slots"](2)]

    one, again, other = (list(map(fingerprint_function, program(factor))) for factor in (1, 1, 2))
    assert one == again and len(set(one)) == len(one)
    assert not set(one) & set(other)
