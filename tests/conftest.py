"""Tiny real models, shared by all tests. They are built once per session and never changed in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw
from torch.nn.functional import pad

from tests.versions import record
from vlm_sapo.models import families
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice
from vlm_sapo.models.vlm import VLM
from vlm_sapo.tools.new_model import Shape, new_model
from vlm_sapo.types import Example, Prompt, Response

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
ALL_FAMILIES = tuple(families.FAMILIES)
FAMILIES = tuple(name for name in ALL_FAMILIES if name != "glm46v")
"""Those whose code differs; GLM-4.6V is GLM-4.1V with another processor."""
SMALL = Shape(hidden=32, layers=2, vision_layers=2, heads=4, head_dim=8)
# The same examples every time; `--hypothesis-profile=deep` tries more, and others.
settings.register_profile(
    "same",
    derandomize=True,
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("deep", settings.get_profile("same"), derandomize=False, max_examples=20_000)
settings.load_profile("same")
CORPUS = ["How many red shapes are there? \\boxed{2}", "Find x. The answer is 12."] * 20


def pytest_sessionfinish(session, exitstatus):
    """`RECORD_VERSIONS="make test" make test` records the versions that all of these tests passed with."""
    tests = os.environ.get("RECORD_VERSIONS")
    if tests and exitstatus == 0 and "PYTEST_XDIST_WORKER" not in os.environ:
        record(tests)


def slow_but(*default, of):
    """The values of a parameter, in the slow suite but for `default`."""
    return [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in of]


LONGEST = ("test_kill.py", "test_gpu.py")
"""Files whose slow tests take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that the other workers don't wait for one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps one precision per process; each test may set its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """`model_folder(family)`: a folder with a tiny model of the family."""
    folders: dict[str, Path] = {}

    def make(family: str = "qwen3_vl") -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            new_model(folders[family], family=family, corpus=CORPUS, shape=SMALL)
        return folders[family]

    return make


@pytest.fixture
def vlm(model_folder) -> VLM:
    return load_vlm(str(model_folder()))


@pytest.fixture
def encoder(vlm) -> Encoder:
    return Encoder(vlm)


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def numbered_image(number: int = 0, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """An image of rectangles that differs by number."""
    image = Image.new("RGB", size, (240, 240, 240))
    canvas = ImageDraw.Draw(image)
    for index in range(number + 1):
        canvas.rectangle(
            (5 * index, 3 * index, 5 * index + 9, 3 * index + 12), fill=(40 * index % 255, 90, 200)
        )
    return image


def example(number: int = 0, *, images: int = 1, problem: str = "How many red shapes are there?", **columns):
    rendered = tuple(numbered_image(number + index, (48, 48 - 16 * (index % 2))) for index in range(images))
    return Example(id=f"e{number}", problem=problem, answer="2", images=rendered, columns=columns)


def response(ids: list[int], prompt: Prompt, finish: str = "stop") -> Response:
    """A response of a single turn, with log-probs of zero."""
    return Response.sampled(
        prompt.positions, torch.tensor(ids), torch.zeros(len(ids)), text="", finish=finish
    )


def group_slice(prompt: Prompt, rows: Sequence[Sequence[int] | torch.Tensor]) -> GroupSlice:
    """A prompt with responses of these ids."""
    return GroupSlice(prompt, tuple(response([int(token) for token in ids], prompt) for ids in rows))


def own_inputs(vlm: VLM, prompt: Prompt, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
    """What transformers' own forward takes for a row [1, L] that begins with a prompt: what the processor makes
    of its text and images anew."""
    area = max((image.width * image.height for image in prompt.images), default=0)
    options = vlm.family.engine_processing(vlm.model.config, area or None) if prompt.images else {}
    images = [list(prompt.images)] if prompt.images else None
    inputs = dict(vlm.processor(text=[prompt.text], images=images, return_tensors="pt", **options))
    assert torch.equal(inputs["input_ids"][0], prompt.ids)
    later = ids.shape[1] - len(prompt.ids)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, later))
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


@dataclass(frozen=True)
class Rows:
    prompts: list[Prompt]
    responses: list[Response]

    @property
    def slices(self) -> list[GroupSlice]:
        """Each prompt with its response."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [GroupSlice(prompt, (response,)) for prompt, response in pairs]


@pytest.fixture
def rows(encoder) -> Rows:
    """Four prompts with 0 to 2 images and responses of unequal length."""
    prompts = [encoder(example(number, images=count)) for number, count in enumerate((1, 2, 0, 1))]
    lengths = (5, 1, 9, 3)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(10, 200, (length,), generator=generator).tolist() for length in lengths]
    return Rows(prompts, [response(row, prompt) for row, prompt in zip(ids, prompts, strict=True)])
