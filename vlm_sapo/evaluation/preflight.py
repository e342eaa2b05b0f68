"""Checks every row before training or an evaluation uses it: its images, its prompt, its gold answer."""

from __future__ import annotations

import json
import os
import string
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from vlm_sapo.data.images import is_blank, pixel_digest
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.models.encode import Encoder
from vlm_sapo.rewards.pool import RewardPool, without_pixels
from vlm_sapo.rewards.verifiers.answers import Ungraded, gold_answer
from vlm_sapo.rewards.verifiers.box_text import Box
from vlm_sapo.rewards.verifiers.boxes import BOX_VERIFIERS, in_coordinates
from vlm_sapo.rewards.verifiers.choice import gold_options, read_options
from vlm_sapo.rewards.verifiers.layout import ResponseLayout
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.rewards.verifiers.table import own_verifier
from vlm_sapo.rewards.verifiers.text import gold_texts
from vlm_sapo.types import Coordinates, Example, ResponseText, Reward, RowError

THUMBNAIL_SIDE = 32
"""Pixels of the grey thumbnail that confirms near-duplicates."""
ROWS_AHEAD = 64
"""Rows that are read ahead of the current one."""
WRONG_BOX_SHIFT = 2.0
"""Images by which a box is moved that must score 0."""
FAILURES = ("error", "crash", "timeout")
"""Outcomes of a function that has given no value."""
TRIED_ROWS = 4
"""Rows on which every part of the reward is tried."""
ROWS_PER_GRADING = 256
"""Rows whose gold answers are graded at once; their images are in memory if a user's function grades."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies an image."""

    exact: str
    """Digest of size and pixels."""
    perceptual: int
    """64-bit perceptual hash."""
    thumbnail: np.ndarray
    """[THUMBNAIL_SIDE ** 2] float32 greys, centred and of length 1; zeros for an image of one colour."""
    blank: bool
    """Whether the image has one colour only."""


@dataclass(frozen=True)
class Inspected:
    """A row, without its pixels."""

    index: int
    id: str
    example: Example | None
    """With image sizes instead of images; None if the row could not be read."""
    error: str = ""
    tokens: int = 0
    image_tokens: int = 0
    resized: tuple[tuple[int, int], ...] = ()
    """Width and height of the images as the model sees them."""
    coordinates: Coordinates | None = None
    """How the model writes boxes."""
    prints: tuple[Fingerprint, ...] = ()
    gold: str = ""
    """What is wrong with the gold answer; empty if it scores 1."""
    wrong: str = ""
    """A wrong answer that scores above 0, and its score."""
    failure: str = ""
    """The error with which the reward ended on one of both."""


def inspect(
    examples: ExampleSet,
    encode: Encoder,
    *,
    fingerprints: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Inspected]:
    """Every row, read on all cores; with `fingerprints` also those of its images. Prompts longer than
    `encode.max_tokens` are errors. A row never stops it: what is wrong is in `error`."""
    unlimited = Encoder(
        encode.vlm,
        min_pixels=encode.bounds[0],
        max_pixels=encode.bounds[1],
        max_tokens=float("inf"),
        tools=encode.tools,
    )
    rows: list[Inspected] = []
    pending: deque[Future[Inspected]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index in range(len(examples) + ROWS_AHEAD):
            if index < len(examples):
                pending.append(pool.submit(_inspect, index, examples, encode, unlimited, fingerprints))
            if index >= ROWS_AHEAD:
                rows.append(pending.popleft().result())
                if progress:
                    progress(len(rows))
    return rows


def _inspect(
    index: int, examples: ExampleSet, encode: Encoder, unlimited: Encoder, fingerprints: bool
) -> Inspected:
    key = examples.key(index)
    try:
        example = examples[index]
    except RowError as error:
        return Inspected(index, key, None, str(error))
    _, light = without_pixels((ResponseText(""), example))
    prints = tuple(map(fingerprint, example.images)) if fingerprints else ()
    try:
        prompt = unlimited(example)
    except RowError as error:
        return Inspected(index, key, light, str(error), prints=prints)
    tokens, image_tokens = encode.count(prompt.ids)
    error = ""
    try:
        encode.check_length(example, tokens, image_tokens)
    except RowError as problem:
        error = str(problem)
    return Inspected(
        index,
        key,
        light,
        error,
        tokens,
        image_tokens,
        resized=tuple(image.size for image in prompt.images),
        coordinates=prompt.coordinates,
        prints=prints,
    )


def fingerprint(image: Image.Image) -> Fingerprint:
    """What identifies an image, whatever its file format."""
    rgb = image.convert("RGB")
    grey = rgb.convert("L")
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    thumbnail = np.asarray(grey.resize(size, Image.Resampling.BOX), dtype=np.float32).ravel()
    centred = thumbnail - thumbnail.mean()
    length = np.linalg.norm(centred)
    return Fingerprint(
        exact=pixel_digest(rgb),
        perceptual=int(str(imagehash.phash(grey)), 16),
        thumbnail=centred / max(length, 1e-9),
        blank=is_blank(rgb),
    )


def check_golds(
    examples: ExampleSet, rows: Sequence[Inspected], reward: RewardPool, spec: Mapping[str, Any]
) -> list[Inspected]:
    """The rows with `gold` and `wrong` filled in: how the reward's part `spec` grades the gold answer and a
    wrong one. A user's functions get the images."""
    label, name, args = spec["label"], spec["name"], spec["args"]
    probes = {row.index: _probe(row, name, args) for row in rows if row.tokens}
    unreadable = {index: probe for index, probe in probes.items() if isinstance(probe, str)}
    readable = [row for row in rows if row.index in probes.keys() - unreadable.keys()]
    needs_images = not all(part.builtin for part in reward.parts)
    rewards: list[Reward] = []
    for start in range(0, len(readable), ROWS_PER_GRADING):
        items = []
        for row in readable[start : start + ROWS_PER_GRADING]:
            example = examples[row.index] if needs_images else row.example
            items += [(response, example) for response in probes[row.index]]
        rewards += reward(items)
    checked = {
        row.index: _checked(row, probes[row.index], gold, wrong, label)
        for row, gold, wrong in zip(readable, rewards[::2], rewards[1::2], strict=True)
    }
    return [
        replace(row, gold=unreadable[row.index]) if row.index in unreadable else checked.get(row.index, row)
        for row in rows
    ]


@dataclass(frozen=True)
class Trial:
    """What the whole reward says of the gold answer, in the layout that the row's prompt asks for, and of a
    wrong one."""

    row: Inspected
    right: ResponseText
    wrong: ResponseText
    rewards: tuple[Reward, Reward]


def try_reward(
    examples: ExampleSet, rows: Sequence[Inspected], reward: RewardPool, spec: Mapping[str, Any]
) -> list[Trial]:
    """Trials of some rows; `spec` is the part that reads their gold answers. The workers grade, as in
    training."""
    trials = []
    for row in [row for row in rows if row.tokens and not row.error][:TRIED_ROWS]:
        probe = _probe(row, spec["name"], spec["args"])
        if not isinstance(probe, str):
            example = examples[row.index]
            scores = reward([(response, example) for response in probe])
            trials.append(Trial(row, *probe, rewards=tuple(scores)))
    return trials


def _probe(row: Inspected, name: str, args: Mapping[str, Any]) -> tuple[ResponseText, ResponseText] | str:
    """A right and a wrong response, which show whether the row's gold answer can be graded; or why there are
    none."""
    model = ResponseText("", tokens=1, resized=row.resized, coordinates=row.coordinates)
    try:
        return gold_response(row.example, name, args, model), wrong_response(row.example, name, args, model)
    except Ungraded as error:
        return str(error) or error.outcome
    except ValueError as error:  # boxes in pixels of several images
        return str(error)


def _checked(
    row: Inspected, probe: tuple[ResponseText, ResponseText], gold: Reward, wrong: Reward, label: str
) -> Inspected:
    """The row with what the part `label` said of both responses."""
    right, other = probe
    if failure := failure_of(gold, label) or failure_of(wrong, label):
        return replace(row, failure=failure)
    answer, problem = row.example.answer[:60], ""
    value, outcome = gold.parts[label], gold.outcomes[label]
    if value < 1:
        why = f"scores {value:g}" if outcome == "graded" else gold.details[label] or outcome
        problem = f"the gold answer {answer!r}, given as {str(right)[:80]!r}: {why}"
    accepted = f"{str(other)[:60]!r} scores {wrong.parts[label]:g} for the gold {answer!r}"
    return replace(row, gold=problem, wrong=accepted if wrong.parts[label] > 0 and not problem else "")


def failure_of(reward: Reward, label: str) -> str:
    """How a part of the reward ended without a value, with its error's last line; empty if it has one."""
    outcome, lines = reward.outcomes[label], reward.details[label].strip().splitlines()
    return f"{outcome}: {lines[-1] if lines else ''}" if outcome in FAILURES else ""


TEXT_VERIFIERS = ("anls", "chartqa", "edit_distance", "exact", "short")
"""Verifiers whose gold answer may be a list of accepted texts."""


def gold_response(example: Example, name: str, args: Mapping[str, Any], model: ResponseText) -> ResponseText:
    """The gold answer as a response in the layout that the prompt asks for, which the verifier `name` must
    score 1; `model` has the images' sizes as the model sees them, and its coordinates. Raises BadGold."""
    name, args = own_verifier(example, name, args)
    answer = gold_answer(example.answer)
    if name in BOX_VERIFIERS:
        answer = _written(in_coordinates(model, example, args))
    elif name.rpartition(":")[2] in TEXT_VERIFIERS:
        answer = gold_texts(replace(example, answer=answer))[0]
    elif name == "json_fields":
        return model.with_text(answer)
    return model.with_text(ResponseLayout.asked(example).write(answer))


def wrong_response(example: Example, name: str, args: Mapping[str, Any], model: ResponseText) -> ResponseText:
    """A response that the verifier `name` must score 0. Raises BadGold."""
    name, args = own_verifier(example, name, args)
    answer = "nothing of the kind"
    number = read_number(gold_answer(example.answer))
    if name in BOX_VERIFIERS:
        answer = _written(in_coordinates(model, example, args, shift=WRONG_BOX_SHIFT))
    elif name == "choice":
        letters, gold = string.ascii_uppercase[: len(read_options(example)) or None], gold_options(example)
        answer = next((letter for i, letter in enumerate(letters) if i not in gold), answer)
    elif number is not None and name.rpartition(":")[2] not in TEXT_VERIFIERS:
        answer = f"{abs(number) * 2 + 7:g}"
    return model.with_text(ResponseLayout.asked(example).write(answer))


def _written(boxes: Sequence[Box]) -> str:
    return json.dumps([[round(side, 6) for side in box] for box in boxes])
