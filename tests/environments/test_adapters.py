"""Environments of other libraries: each adapter plays a real environment of its package, where it is installed.

The packages conflict, so these tests are run by hand, each in an environment with its package:
python -m pytest --noconftest tests/environments/test_adapters.py
"""

import base64
import io
import json
import multiprocessing
import signal
import socket
import sys
import time
import types
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vlm_sapo.environments.adapters import reading
from vlm_sapo.environments.adapters.gymnasium import GymnasiumEnvironment, gymnasium_rows
from vlm_sapo.environments.adapters.openenv import OpenEnvEnvironment, openenv_rows
from vlm_sapo.environments.adapters.verifiers import ROW, VerifiersEnvironment, _row, verifiers_rows
from vlm_sapo.types import Example, ResponseText

PAGE = Path(__file__).resolve().parents[2] / "docs/environments.md"
MOVES = {"left": 0, "down": 1, "right": 2, "up": 3}
LAKE = {"id": "FrozenLake-v1", "actions": MOVES, "kwargs": {"is_slippery": False}}
WAY = ["down", "down", "right", "right", "down", "right"]
TALL = Image.new("RGB", (3, 5), (10, 20, 30))


def example(**columns):
    return Example("0", "?", "-", columns=columns)


def say(text):
    return ResponseText(text)


def base64_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def data_url(color, size=(32, 24)):
    return "data:image/png;base64," + base64_png(Image.new("RGB", size, color))


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        ("I go \\boxed{left}", "left"),
        ("\\boxed{left}, no, \\boxed{ Right }.", "right"),
        ("<action>left</action> or \\boxed{\\text{up}}", "up"),
        ("\\boxed{up} or <action>\nleft\n</action>", "left"),
        ("up, or left? Left.", "left"),
        ("<think>\\boxed{left} or left</think>\\boxed{up}", "up"),
        ("<think>left</think>Upwards", None),
        ("right \\boxed{jump}", None),
        ("", None),
        ("<think>I go \\boxed{left}", None),
    ],
)
def test_actions_are_read(turn, action):
    assert reading.read_action(turn, list(MOVES))[0] == action


def test_longer_names_win():
    assert reading.read_action("I turn left now", ["left", "turn left"])[0] == "turn left"
    assert reading.read_action("12", ["1", "2", "12"])[0] == "12"


def pixels(image):
    return [[list(image.getpixel((x, y))) for x in range(image.width)] for y in range(image.height)]


@pytest.mark.parametrize(
    "value",
    [
        base64_png(TALL),
        "data:image/png;base64," + base64_png(TALL),
        pixels(TALL),
        [base64_png(TALL)],
        [pixels(TALL)],
        TALL,
    ],
)
def test_images_are_decoded(value):
    [image] = reading.read_images(value, "screen")
    assert image.size == (3, 5) and image.convert("RGB").getpixel((1, 1)) == (10, 20, 30)


def test_values_without_images():
    assert reading.read_images(None, "screen") == () == reading.read_images([], "screen")
    assert reading.read_images([[0, 255]], "screen")[0].mode == "L"
    assert len(reading.read_images([base64_png(TALL), data_url("red")], "screen")) == 2


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("cat.png", "base64"),
        (base64_png(TALL)[:40], "base64"),
        ([[[0.5, 0, 0]]], "whole numbers"),
        ([[[0, 300, 0]]], "whole numbers"),
        ([[[1, 2], [1, 2]]], "shape 1 x 2 x 2"),
        ({"a": 1}, "base64"),
    ],
)
def test_what_is_no_image(value, problem):
    with pytest.raises(ValueError, match=f"^screen.*{problem}"):
        reading.read_images(value, "screen")


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (lambda: GymnasiumEnvironment("FrozenLake-v1"), "gymnasium", "environments"),
        (lambda: gymnasium_rows("FrozenLake-v1", 1), "gymnasium", "environments"),
        (lambda: OpenEnvEnvironment("http://127.0.0.1:1"), "openenv", "openenv"),
        (lambda: openenv_rows("http://127.0.0.1:1", 1), "openenv", "openenv"),
        (lambda: VerifiersEnvironment("wordle"), "verifiers", "verifiers"),
        (lambda: verifiers_rows("wordle"), "verifiers", "verifiers"),
    ],
)
def test_a_missing_package_is_named(make, package, extra, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}.*pip install 'vlm-sapo\[{extra}\]'"):
        make()


def test_a_newer_verifiers_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", types.SimpleNamespace(__version__="0.4.0"))
    with pytest.raises(ValueError, match=r"verifiers 0\.4\.0.*pip install 'verifiers<0\.4'"):
        VerifiersEnvironment("wordle")


def test_the_snippets_of_the_page_are_configs():
    check = pytest.importorskip("vlm_sapo.config.load", exc_type=ImportError).check
    from vlm_sapo.config.data import DataConfig
    from vlm_sapo.config.rollout import RolloutConfig

    blocks = [part.partition("```")[0] for part in PAGE.read_text().split("```yaml\n")[1:]]
    assert len(blocks) == 4
    for block in map(yaml.safe_load, blocks):
        assert check(RolloutConfig, block["rollout"]).environment.type == "own"
        assert "data" not in block or check(DataConfig, block["data"]).source


def test_rows_of_a_data_set_of_verifiers_are_read():
    """Fields without a value are those that a Dataset adds where parts differ."""
    rows = pytest.importorskip("vlm_sapo.data.rows", exc_type=ImportError)
    from vlm_sapo.config.data import DataConfig

    parts = [
        {"type": "text", "text": "which color?", "image_url": None},
        {"type": "image_url", "text": None, "image_url": {"url": data_url("red", (64, 48))}},
    ]
    raw = {"prompt": [{"role": "user", "content": parts}], "answer": "red", "info": {}}
    tool = types.SimpleNamespace(name="add", description="Adds.", parameters={"type": "object"})
    section = DataConfig(
        source="vlm_sapo.environments.adapters.verifiers:verifiers_rows", template="{problem}"
    )
    read = rows.ExampleSet([_row(raw, [tool])], section)[0]
    assert read.problem == "which color?<image>" and read.answer == "red"
    assert read.images[0].size == (64, 48) and read.system.startswith("# Tools")
    assert read.columns[ROW] == raw


# Gymnasium


@pytest.fixture
def gymnasium():
    pytest.importorskip("pygame")
    return pytest.importorskip("gymnasium")


def test_frozen_lake_is_played_by_images(gymnasium):
    [row] = gymnasium_rows(count=1, seed=7, **LAKE)
    assert "left, down, right, up" in row["problem"] and row["seed"] == 7
    environment = GymnasiumEnvironment(**LAKE)
    environment.reset(example(seed=7))
    assert environment.start[1][0].tobytes() == row["images"][0].tobytes()
    bad = environment.step(say("\\boxed{jump}"))
    assert bad.text.startswith("There is no action 'jump'. The actions are: left, down, right, up.")
    assert bad.info == {"bad_calls": 1} and not bad.done and not bad.images
    answers = [environment.step(say(f"\\boxed{{{move}}}")) for move in WAY]
    assert [answer.done for answer in answers] == [False] * 5 + [True]
    assert [answer.reward for answer in answers] == [0.0] * 5 + [1.0]
    assert all(len(answer.images) == 1 and answer.text == "" for answer in answers)
    assert len({answer.images[0].tobytes() for answer in answers}) == 6


def test_states_as_text_and_a_limit_of_steps(gymnasium):
    environment = GymnasiumEnvironment(**LAKE, show="text", max_steps=2)
    environment.reset(example())
    first, second = (environment.step(say("down")) for _ in range(2))
    assert (first.text, first.images, first.done) == ("Observation: 4", (), False)
    assert second.done and second.info["truncated"] == 1
    both = GymnasiumEnvironment(**LAKE, show="both")
    both.reset(example())
    answer = both.step(say("right"))
    assert answer.text == "Observation: 1" and len(answer.images) == 1


def test_actions_by_number_and_those_that_do_not_fit(gymnasium):
    environment = GymnasiumEnvironment("FrozenLake-v1", kwargs={"is_slippery": False}, show="text")
    environment.reset(example())
    assert environment.step(say("<action>2</action>")).text == "Observation: 1"
    for actions, problem in (({"left": 9}, "actions.left"), ({True: 0}, "quote it"), ({}, "at least one")):
        environment = GymnasiumEnvironment("FrozenLake-v1", actions, show="text")
        with pytest.raises(ValueError, match=problem):
            environment.reset(example())
    with pytest.raises(ValueError, match="show"):
        GymnasiumEnvironment("FrozenLake-v1", show="all")
    with pytest.raises(ValueError, match="id"):
        gymnasium_rows("FrozenPond-v1", 1)


def test_frozen_lake_in_processes_of_its_own(gymnasium):
    from vlm_sapo.environments.processes import Environments, Step

    environments = Environments(partial(GymnasiumEnvironment, **LAKE), timeout=60.0, workers=2)
    try:
        [instances] = environments.new([example(seed=1)], [[0, 1]])
        for move in WAY:
            answers = environments.step([Step(instance, say(move)) for instance in instances])
        assert [(answer.done, answer.reward) for answer in answers] == [(True, 1.0)] * 2
        assert answers[0].images[0].tobytes() == answers[1].images[0].tobytes()
    finally:
        environments.close()


# OpenEnv


def serve(listener):
    """A server: a red square goes to a green one, and `jump` is a move that fails."""
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Move(Action):
        move: str

    class Seen(Observation):
        text: str = ""
        screenshot: str | None = None
        grid: list | None = None

    class Walk(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **kwargs):
            self.at, self.goal = 0, 2 + (seed or 0) % 2
            return self._seen()

        def step(self, action, timeout_s=None, **kwargs):
            self.at += {"right": 1, "left": -1}[action.move]
            return self._seen(1.0 if self.at == self.goal else -0.1)

        def _seen(self, reward=None):
            grid = [
                [
                    [255, 0, 0] if x == self.at else [0, 255, 0] if x == self.goal else [0] * 3
                    for x in range(4)
                ]
            ]
            image = Image.new("RGB", (4, 1))
            image.putdata([tuple(pixel) for pixel in grid[0]])
            text, done = f"at {self.at}, goal at {self.goal}", self.at == self.goal
            return Seen(text=text, screenshot=base64_png(image), grid=grid, reward=reward, done=done)

        @property
        def state(self):
            return State()

    app = create_fastapi_app(Walk, Move, Seen, max_concurrent_envs=2)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("openenv")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    process = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
    process.start()
    listener.close()
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()


def test_a_server_of_openenv_is_played(server):
    [row] = openenv_rows(server, 1, problem="Go to the green square.", images="screenshot", seed=1)
    assert row["problem"] == "Go to the green square.\nat 0, goal at 3" and row["images"][0].size == (4, 1)
    environment = OpenEnvEnvironment(server, action="move", images=["screenshot", "grid"])
    environment.reset(example(seed=1))
    answer = environment.step(say("I go \\boxed{right}"))
    assert (answer.text, answer.reward, answer.done) == ("at 1, goal at 3", -0.1, False)
    screenshot, grid = answer.images
    assert (
        list(screenshot.getdata()) == list(grid.getdata()) == [(0, 0, 0), (255, 0, 0), (0, 0, 0), (0, 255, 0)]
    )
    bad = environment.step(say("jump"))
    assert bad.text.startswith("error: ") and bad.info == {"step_errors": 1}
    assert environment.step(say("<think>left?</think>right")).text == "at 2, goal at 3"
    last = environment.step(say("right"))
    assert last.done and last.reward == 1.0 and environment.session is None


def test_sessions_end_and_do_not_mix(server):
    """The server has room for two."""
    one, other = (OpenEnvEnvironment(server, action="move") for _ in range(2))
    one.reset(example(seed=0))
    other.reset(example())
    one.step(say("right"))
    assert other.step(say("left")).text == "at -1, goal at 2"
    for _ in range(3):
        one.reset(example(seed=1))
    assert one.step(say("right")).text == "at 1, goal at 3"
    del one, other
    again = OpenEnvEnvironment(server, action="move")
    again.reset(example())
    again.close()


def test_a_server_is_played_in_processes_of_their_own(server):
    from vlm_sapo.environments.processes import Environments, Step

    make = partial(OpenEnvEnvironment, server, action="move", images="screenshot")
    environments = Environments(make, timeout=60.0, workers=2)
    try:
        [instances] = environments.new([example(seed=0)], [[0, 1]])
        for _ in range(2):
            answers = environments.step([Step(instance, say("right")) for instance in instances])
        assert [(answer.done, answer.reward) for answer in answers] == [(True, 1.0)] * 2
    finally:
        environments.close()


def test_whole_actions_and_fields_that_are_missing(server):
    environment = OpenEnvEnvironment(server, action=None, text="text")
    environment.reset(example())
    assert environment.step(say('<action>{"move": "right"}</action>')).text == "at 1, goal at 2"
    assert environment.step(say("right")).info == {"bad_calls": 1}
    assert environment.step(say('{"step": "right"}')).info == {"bad_calls": 1}
    environment = OpenEnvEnvironment(server, images="screen")
    with pytest.raises(ValueError, match=r"images \(screen\).*screenshot"):
        environment.reset(example())


# verifiers


@pytest.fixture
def verifiers():
    module = pytest.importorskip("verifiers")
    if not hasattr(module, "MultiTurnEnv"):
        pytest.skip("this version has no classic environments")
    return module


def color_env(turns=8):
    """Which color? Three images one after the other."""
    import verifiers as vf
    from datasets import Dataset

    order = ["red", "green", "blue"]

    class ColorEnv(vf.MultiTurnEnv):
        async def setup_state(self, state):
            state["index"], state["hits"] = 0, 0

        async def env_response(self, messages, state, **kwargs):
            state["hits"] += str(messages[-1].content).strip() == order[state["index"]]
            state["index"] += 1
            if state["index"] == len(order):
                state["final_env_response"] = [{"role": "user", "content": "over"}]
                return state["final_env_response"]
            image = {"type": "image_url", "image_url": {"url": data_url(order[state["index"]])}}
            return [{"role": "user", "content": [{"type": "text", "text": "next: "}, image]}]

    def hit_rate(completion, state, answer, **kwargs):
        return state["hits"] / len(answer.split())

    first = {"type": "image_url", "image_url": {"url": data_url("red")}}
    prompt = [{"role": "user", "content": [{"type": "text", "text": "which color?"}, first]}]
    rows = Dataset.from_list([{"prompt": prompt, "answer": " ".join(order), "example_id": 0}])
    return ColorEnv(dataset=rows, max_turns=turns, rubric=vf.Rubric(funcs=[hit_rate], weights=[1.0]))


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: first
        b: second
    """
    return a + b


def show(color: str):
    """Shows a color."""
    return [{"type": "text", "text": "here"}, {"type": "image_url", "image_url": {"url": data_url(color)}}]


def tool_env():
    import verifiers as vf
    from datasets import Dataset

    async def correct(completion, answer):
        return float(str(completion[-1].content).strip() == answer)

    rows = Dataset.from_list([{"question": "2+3?", "answer": "5"}] * 3)
    rubric = vf.Rubric(funcs=[correct])
    return vf.ToolEnv(tools=[add, show], dataset=rows, max_turns=5, system_prompt="Be short.", rubric=rubric)


COLORS, TOOLS = f"{__file__}:color_env", f"{__file__}:tool_env"


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_multi_turn_env_is_played(verifiers):
    [row] = verifiers_rows(COLORS)
    assert row["prompt"][0]["content"][0] == {"type": "text", "text": "which color?"}
    assert row["answer"] == "red green blue"
    environment = VerifiersEnvironment(COLORS)
    for said, reward in ((["red", "blue", "blue"], 2 / 3), (["red", "green", "blue"], 1.0)):
        environment.reset(example(**{ROW: row[ROW]}))
        answers = [environment.step(say(text)) for text in said]
        assert [answer.done for answer in answers] == [False, False, True]
        assert answers[0].text == "next: <image>" and answers[0].reward is None
        colors = [image.getpixel((0, 0)) for answer in answers for image in answer.images]
        assert colors == [(0, 128, 0), (0, 0, 255)]
        assert answers[2].reward == pytest.approx(reward)
        assert answers[2].info["hit_rate"] == pytest.approx(reward)


def test_an_installed_environment_by_its_name(verifiers, tmp_path, monkeypatch):
    (tmp_path / "three_colors.py").write_text(
        Path(__file__).read_text().replace("def color_env(", "def load_environment(")
    )
    monkeypatch.syspath_prepend(tmp_path)
    environment = VerifiersEnvironment("three-colors", {"turns": 2})
    environment.reset(example(**{ROW: verifiers_rows("three-colors", {"turns": 2})[0][ROW]}))
    assert environment.step(say("red")).text == "next: <image>"


def test_the_environments_own_limit_of_turns(verifiers):
    environment = VerifiersEnvironment(COLORS, {"turns": 1})
    environment.reset(example(**{ROW: verifiers_rows(COLORS, {"turns": 1})[0][ROW]}))
    answer = environment.step(say("red"))
    assert answer.done and answer.reward == 0.0


def test_a_tool_env_is_played(verifiers):
    rows = verifiers_rows(TOOLS, count=2)
    system, user = rows[0]["prompt"]
    assert len(rows) == 2 and user == {"role": "user", "content": "2+3?"}
    assert system["content"].startswith("Be short.\n\n# Tools") and '"name": "add"' in system["content"]
    environment = VerifiersEnvironment(TOOLS)
    environment.reset(example(**{ROW: rows[0][ROW]}))
    answer = environment.step(say(f"I add. {call('add', a=2, b=3)}{call('show', color='red')}"))
    assert (
        answer.text == "<tool_response>\n5\n</tool_response>\n<tool_response>\nhere<image>\n</tool_response>"
    )
    assert answer.images[0].getpixel((0, 0)) == (255, 0, 0) and answer.info == {"calls": 2}
    unknown = environment.step(say(call("subtract")))
    assert unknown.text == "<tool_response>\n'subtract'\n</tool_response>" and not unknown.done
    bad = environment.step(say("<tool_call>add</tool_call>"))
    assert bad.text.startswith("error: ") and bad.info == {"calls": 1, "bad_calls": 1}
    last = environment.step(say("5"))
    assert last.done and last.reward == 1.0 and last.info["total_tool_calls"] == 3


def test_the_runs_signals_stay(verifiers):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    VerifiersEnvironment(COLORS, {"turns": 3})
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_verifiers_environment_refuses(verifiers):
    with pytest.raises(ValueError, match="verifiers_rows"):
        VerifiersEnvironment(COLORS).reset(example())
    with pytest.raises(ValueError, match=r"must be a MultiTurnEnv of verifiers; it is a int"):
        VerifiersEnvironment(f"{__file__}:add", {"a": 1, "b": 2})


def test_a_multi_turn_env_in_processes_of_its_own(verifiers):
    from vlm_sapo.environments.processes import Environments, Step

    row = verifiers_rows(COLORS)[0][ROW]
    environments = Environments(partial(VerifiersEnvironment, COLORS), timeout=60.0, workers=2)
    try:
        [instances] = environments.new([example(**{ROW: row})], [[0, 1]])
        for text in ("red", "green", "blue"):
            answers = environments.step([Step(instance, say(text)) for instance in instances])
        assert [(answer.done, answer.reward) for answer in answers] == [(True, 1.0)] * 2
    finally:
        environments.close()
