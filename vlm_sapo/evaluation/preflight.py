"""Looks at every row as training or an evaluation will: its pictures, its prompt, its gold answer."""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.models.encode import Encoder
from vlm_sapo.rewards.pool import ImageSize, RewardPool
from vlm_sapo.rewards.verifiers.answers import Ungraded
from vlm_sapo.rewards.verifiers.boxes import gold_boxes, in_coordinates
from vlm_sapo.rewards.verifiers.choice import named_options, option_column, read_options
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.rewards.verifiers.table import own_verifier
from vlm_sapo.rewards.verifiers.text import gold_texts
from vlm_sapo.types import Example, ResponseText, Reward, RowError

SIDE = 32
"""Of the grey thumbnail that near-duplicates are confirmed by."""
AHEAD = 64
"""Rows that are read ahead of the one that is looked at."""
TOGETHER = 256
"""Rows whose gold answers are graded at once, with their pictures where a function of a user's grades."""


@dataclass(frozen=True)
class Print:
    """What identifies a picture."""

    exact: str
    """Digest of size and pixels."""
    perceptual: int
    """64-bit perceptual hash."""
    thumbnail: np.ndarray
    """[SIDE * SIDE] float32 greys, centred and of length 1; zeros for a picture of one colour."""
    blank: bool
    """Whether the picture has one colour only."""


@dataclass(frozen=True)
class Inspected:
    """A row, without its pixels."""

    index: int
    id: str
    example: Example | None
    """With picture sizes in place of pictures; None where the row could not be read."""
    error: str = ""
    tokens: int = 0
    image_tokens: int = 0
    resized: tuple[tuple[int, int], ...] = ()
    """Width and height of the pictures as the model sees them."""
    prints: tuple[Print, ...] = ()
    gold: str = ""
    """What is wrong with the gold answer; empty where it scores 1."""
    wrong: str = ""
    """A wrong answer that scores above 0, and its score."""


def inspect(
    examples: ExampleSet,
    encode: Encoder,
    *,
    pictures: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Inspected]:
    """Every row, on all cores; with `pictures` also what identifies its pictures. `encode.max_tokens` is the
    limit that a prompt is held against. No row stops it: what is wrong is in `error`."""
    unlimited = Encoder(
        encode.vlm, min_pixels=encode.min_pixels, max_pixels=encode.max_pixels, max_tokens=float("inf")
    )
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in _ahead(
            pool, lambda index: _inspect(index, examples, encode, unlimited, pictures), len(examples)
        ):
            rows.append(row)
            progress(len(rows))
    return rows


def _ahead(pool: ThreadPoolExecutor, call: Callable, count: int) -> Iterator[Inspected]:
    """Results in order, with a bounded number of rows in memory."""
    waiting = []
    for index in range(count):
        waiting.append(pool.submit(call, index))
        if len(waiting) > AHEAD:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _inspect(index: int, examples, encode: Encoder, unlimited: Encoder, pictures: bool) -> Inspected:
    key = examples.key(index)
    try:
        example = examples[index]
    except RowError as error:
        return Inspected(index, key, None, str(error))
    light = replace(example, images=tuple(ImageSize(image.size) for image in example.images))
    prints = tuple(map(fingerprint, example.images)) if pictures else ()
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
    sizes = tuple(image.size for image in prompt.images)
    return Inspected(index, key, light, error, tokens, image_tokens, sizes, prints)


def fingerprint(picture: Image.Image) -> Print:
    """What identifies a picture, whatever its file format."""
    rgb = picture.convert("RGB")
    grey = rgb.convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()
    centred = thumbnail - thumbnail.mean()
    length = np.linalg.norm(centred)
    return Print(
        exact=hashlib.sha1(str(rgb.size).encode() + rgb.tobytes()).hexdigest(),
        perceptual=int(str(imagehash.phash(grey)), 16),
        thumbnail=centred / max(length, 1e-9),
        blank=all(low == high for low, high in rgb.getextrema()),
    )


def check_golds(
    examples: ExampleSet, rows: Sequence[Inspected], reward: RewardPool, spec: Mapping[str, Any]
) -> list[Inspected]:
    """The rows with `gold` and `wrong` filled in: what the part `spec` of the reward says of the gold answer
    and of a wrong one. Functions of a user's see the pictures."""
    label, name, args = spec["label"], spec["name"], spec["args"]
    readable = [row for row in rows if row.example is not None]
    made = {row.index: _responses(row, name, args) for row in readable}
    own = not all(part.builtin for part in reward.parts)
    graded: list[Reward] = []
    for start in range(0, len(readable), TOGETHER):
        items = []
        for row in readable[start : start + TOGETHER]:
            example = examples[row.index] if own else row.example
            items += [(response, example) for response in made[row.index][:2]]
        graded += reward(items)
    scores, checked = iter(graded), {}
    for row in readable:
        good, bad, problem = made[row.index]
        one, other = next(scores), next(scores)
        outcome, value, leaked = one.outcomes[label], one.parts[label], other.parts[label]
        if not problem and value < 1:
            why = f"scores {value:g}" if outcome == "graded" else one.details[label] or outcome
            problem = f"the gold answer {row.example.answer[:60]!r}, given as {str(good)[:80]!r}: {why}"
        leak = f"{str(bad)[:60]!r} scores {leaked:g} for the gold {row.example.answer[:60]!r}"
        checked[row.index] = replace(row, gold=problem, wrong=leak if leaked > 0 and not problem else "")
    return [checked.get(row.index, row) for row in rows]


def _responses(row: Inspected, name: str, args: Mapping[str, Any]) -> tuple[ResponseText, ResponseText, str]:
    try:
        good = gold_response(row.example, name, args, row.resized)
        return good, wrong_response(row.example, name, args, row.resized), ""
    except Ungraded as error:
        return ResponseText(""), ResponseText(""), str(error) or error.outcome


PLACES = ("box", "point_in_box")

LISTED = ("anls", "chartqa", "edit_distance", "exact", "short")
"""Verifiers whose gold answer may be a list of accepted texts."""


def gold_response(example: Example, name: str, args: Mapping[str, Any], resized: tuple = ()) -> ResponseText:
    """The gold answer as a response that the verifier `name` must score 1; `resized` are the pictures' sizes
    as the model sees them."""
    name, args = own_verifier(example, name, args)
    answer = example.answer
    if name in PLACES:
        found = in_coordinates(gold_boxes(example), example, resized, args)
        answer = json.dumps([[round(side, 6) for side in box] for box in found])
    elif _by_text(example, name):
        answer = gold_texts(example)[0]
    elif name == "json_fields":
        return ResponseText(answer, resized=resized)
    return ResponseText(f"\\boxed{{{answer}}}", resized=resized)


def wrong_response(example: Example, name: str, args: Mapping[str, Any], resized: tuple = ()) -> ResponseText:
    """A response that the verifier `name` must score 0."""
    name, args = own_verifier(example, name, args)
    answer = "nothing of the kind"
    number = read_number(example.answer)
    given = read_options(example) if name in ("auto", "choice") else []
    lettered = (
        given or option_column(example.columns) or example.columns.get("question_type") == "multi_choice"
    )
    if name in PLACES:
        boxes = [
            (right + 1, bottom + 1, right + 2, bottom + 2) for _, _, right, bottom in gold_boxes(example)
        ]
        answer = json.dumps([list(box) for box in boxes])
    elif lettered and name in ("auto", "choice") and (chosen := named_options(example.answer, given)):
        count = len(given) or len(string.ascii_uppercase)
        answer = next(
            (string.ascii_uppercase[index] for index in range(count) if index not in chosen), answer
        )
    elif number is not None and not _by_text(example, name):
        answer = f"{abs(number) * 2 + 7:g}"
    return ResponseText(f"\\boxed{{{answer}}}", resized=resized)


def _by_text(example: Example, name: str) -> bool:
    """Whether the verifier compares texts, of which the gold answer may list several."""
    return name.rpartition(":")[2] in LISTED or example.columns.get("metric") == "anls"
