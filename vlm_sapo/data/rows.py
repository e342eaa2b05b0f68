"""Opens a source of rows (hub id, folder, file, Python) and reads its rows as examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from inspect import iscoroutinefunction, signature
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import is_offline_mode
from PIL.Image import Image

from vlm_sapo.config.data import SourceConfig
from vlm_sapo.data.files import TEXT_FILES, kind, read_file
from vlm_sapo.data.formats import (
    ANSWERS,
    IMAGES,
    Content,
    Row,
    as_turns,
    check_column,
    check_marks,
    holds_image,
    is_missing,
    read_answer,
    recognize,
    with_images,
)
from vlm_sapo.data.images import decode
from vlm_sapo.fingerprint import fingerprint_rows
from vlm_sapo.hub import COMMIT, check_no_revision, is_hub_id
from vlm_sapo.plugins import PYTHON, locate, resolve, searched
from vlm_sapo.rewards.parts import resolve_reward
from vlm_sapo.rewards.trl import TrlReward
from vlm_sapo.rewards.verifiers.options import multiple_choice
from vlm_sapo.types import Example, RowError, one_line

SAMPLED_ROWS = 20
"""Rows whose values decide what the columns are."""


def open_rows(
    source: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    args: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Sequence[Row]:
    """The rows of a source, none of its images decoded yet.

    `source` is a JSON, JSON lines, CSV, TSV or parquet file, a folder written by `datasets` or laid out as on
    the hub, a hub id with a `revision`, or `file.py:function`, called with `args`. Raises ValueError naming
    `data.source`.
    """
    if source.startswith(PYTHON):
        return resolve(source, field="data.source")
    if not is_hub_id(source):
        check_no_revision(source, revision, field="data.source")
    if ":" in source and not locate(source).exists():
        return _call(source, args or {})
    if args:
        raise ValueError("data.args must be empty unless data.source is 'file.py:function'; remove it")
    path = locate(source)
    if kind(path) in TEXT_FILES:
        rows = read_file(path)
        return rows if isinstance(rows, list) else _pick_split(rows, split, source)
    if path.is_file() and path.suffix not in (".parquet", ".arrow"):
        raise ValueError(
            f"data.source ({source}) must be a JSON, JSON lines, CSV, TSV, parquet or Arrow file; "
            f"{path.suffix} files aren't read; convert it, or set data.source=file.py:function to read it"
        )
    import datasets

    try:
        if path.suffix == ".parquet":
            rows = datasets.Dataset.from_parquet(str(path))
        elif path.suffix == ".arrow":
            rows = datasets.Dataset.from_file(str(path))
        elif any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else source, subset, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.source ({source}) must be a file, a folder or a hub id{searched(source)}; {error}"
        ) from error
    rows = _pick_split(rows, split, source)
    if revision is not None and is_offline_mode():
        _check_cached(rows, source, revision)
    return undecoded(rows)


def _call(source: str, args: Mapping[str, Any]) -> Sequence[Row]:
    """The rows that a function returns, or an error that names its arguments."""
    function = resolve(source, field="data.source")
    try:
        signature(function).bind(**args)
    except TypeError as error:
        raise ValueError(
            f"data.args ({dict(args)}) must fit {source}{signature(function)}; {error}"
        ) from error
    try:
        return function(**args)
    except OSError as error:
        raise ValueError(f"data.args ({dict(args)}) must name a file that can be read; {error}") from error


def _check_cached(rows: Any, source: str, revision: str) -> None:
    """Raises ValueError if rows come from another commit: offline, `datasets` takes the newest that its cache
    has, whatever the revision."""
    files = [Path(file["filename"]) for file in rows.cache_files]
    if COMMIT.fullmatch(revision) and not all(revision in file.parts for file in files):
        raise ValueError(
            f"data.revision ({revision}) of {source} is not in the cache, which has another one, and "
            "HF_HUB_OFFLINE is set; load it once with a network, or unset HF_HUB_OFFLINE"
        )


def _pick_split(rows: Any, split: str | None, source: str) -> Any:
    if not isinstance(rows, Mapping):
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        raise ValueError(f"data.split ({split}) must be one of {', '.join(rows)}, the splits of {source}")
    return rows[split]


def undecoded(rows: Any) -> Any:
    """Leaves images as bytes, at any depth: a broken one is an error of its row and not of the whole set,
    and no column opens files or addresses by itself. Answers that are class labels become the names."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel) and any(name in names for names in ANSWERS):
            labels = [None if label is None else feature.int2str(label) for label in rows[name]]
            rows = rows.remove_columns(name).add_column(name, labels)
        elif (raw := _raw(feature)) != feature:
            rows = rows.cast_column(name, raw)
    return rows


def _raw(feature: Any) -> Any:
    """A feature of `datasets` with images, audio and video left as they are stored: bytes and a path."""
    if isinstance(feature, Mapping):
        return {name: _raw(inner) for name, inner in feature.items()}
    if hasattr(feature, "decode") and str(feature.pa_type).startswith("struct<"):
        return replace(feature, decode=False)
    if hasattr(feature, "feature"):
        return replace(feature, feature=_raw(feature.feature))
    return feature


class ExampleSet(Sequence):
    """The rows of a source as examples, selected, renamed and rewritten as a config section says.

    `task` is the rows' name in logs, by default the section's own. A row is transformed before its columns
    are read. Rows of a file may name images in the file's folder only, unless `pictures_anywhere` is set;
    rows of a Python function may name any.
    """

    def __init__(self, rows: Sequence[Row], section: SourceConfig, *, task: str | None = None):
        self.rows, self.name = rows, str(section.source)
        self._reading = Lock()
        self.anywhere = section.pictures_anywhere or ".py:" in self.name or self.name.startswith(PYTHON)
        self.transform = resolve(section.transform, field="data.transform") if section.transform else None
        verifier = section.verifier
        if verifier:
            function = resolve_reward(verifier.name, verifier.args, field="data.verifier")
            if iscoroutinefunction(function) or isinstance(function, TrlReward):
                raise ValueError(
                    f"data.verifier ({verifier.name}) must be a function that is called once per response; "
                    "name an async one such as judge, or one of TRL's signature, in reward.parts"
                )
        self.common = {
            "task": task or section.task,
            "template": section.template,
            "system": section.system,
            "verifier": (verifier.name, verifier.args) if verifier else None,
        }
        self.reading: list[Any] = [section.columns, section.transform, section.template, section.system]
        self.reading += [verifier.name, verifier.args] if verifier else []
        file = self.name if locate(self.name).exists() else self.name.rpartition(":")[0] or self.name
        path = Path() if self.name.startswith(PYTHON) else locate(file)
        self.folder = path if path.is_dir() else path.parent
        columns = dict(section.columns)
        self.response_column = columns.get("response")
        self.id_column = columns.get("id", "id")
        conditions = dict(section.filter)
        column = _first(columns.pop("split", "split"), rows[0] if len(rows) else {})
        self.has_split = column is not None
        if section.split is not None and column is not None:
            conditions.setdefault(column, section.split)
        self.indices = _matching(rows, conditions, self.name)[: section.limit]
        if not self.indices:
            raise ValueError(
                f"data.source ({self.name}) has no rows left; check data.split, data.filter and data.limit"
            )
        self.layout = recognize(columns, self._sample(), self.name)
        self.image_columns = list(self.layout.images)
        """Columns that may hold images: the first that a row has is used."""

    @property
    def format(self) -> str:
        """What the columns were recognised as, in one sentence."""
        return self.layout.describe(self._row(0))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        key = self._name(row, index)
        label = f"row {one_line(key)} of {self.name}"
        problem_field, answer_field = self.layout.problem, self.layout.answer or "answer"
        try:
            content = self.layout.read(row)
            problem, answer = multiple_choice(content.problem, content.answer, row)
            answer = read_answer(answer, answer_field)
            check_marks(problem, content, problem_field)
        except ValueError as error:
            raise RowError(f"{label}: {error}") from error
        texts = {problem_field: problem, answer_field: answer, "system": content.system or "", "id": key}
        _check_text(label, texts)
        others = {
            name: value
            for name, value in row.items()
            if name not in (*IMAGES, content.image_field) and not holds_image(value)
        }
        if (turns := as_turns(row.get("prompt"))) is not None:  # for rewards that read messages
            others["prompt"] = with_images(turns, lambda _: None)
        if content.reply is not None and self.response_column == problem_field:
            others[problem_field] = content.reply
        return Example(
            id=key,
            problem=problem,
            answer=answer,
            images=self._decode(content, label),
            columns=others,
            row=index,
            source=self.name,
            **self.common | {"system": self.common["system"] or content.system},
        )

    def select(self, indices: Sequence[int], *, task: str | None = None) -> ExampleSet:
        """Only these of the rows, in this order; `task` is their name in logs."""
        part = copy(self)
        part.indices = [self.indices[index] for index in indices]
        part.common = self.common | ({"task": task} if task else {})
        return part

    def fingerprint(self) -> str:
        """A hash of the rows as the source holds them, as `fingerprint_rows` makes it."""
        return fingerprint_rows(self.rows, self.indices)

    def key(self, index: int) -> str:
        """A row's id, or its number, read without its images."""
        try:
            return self._name(self._row(index), index)
        except RowError:
            return self._name(self.raw(index), index)

    def _name(self, row: Row, index: int) -> str:
        column = _first(self.id_column, row)
        return str(self.indices[index]) if column is None or is_missing(row[column]) else str(row[column])

    def raw(self, index: int) -> Row:
        """A row as the source holds it."""
        return self.rows[self.indices[index]]

    def _row(self, index: int) -> Row:
        with self._reading:  # rows and transform may be a user's, and nobody told them of threads
            return self._transformed(index)

    def _transformed(self, index: int) -> Row:
        row = self.raw(index)
        try:
            return self.transform(dict(row)) if self.transform else row  # it may change what it gets
        except (LookupError, TypeError, ValueError, AttributeError, SyntaxError) as error:
            raise RowError(
                f"row {self._name(row, index)} of {self.name}: data.transform cannot read it ({error!r}); "
                f"its columns are {one_line(', '.join(map(str, row)), 400)}"
            ) from error

    def _decode(self, content: Content, label: str) -> tuple[Image, ...]:
        images = []
        for number, value in enumerate(content.images, 1):
            try:
                images.append(decode(value, self.folder, anywhere=self.anywhere))
            except ValueError as error:
                raise RowError(f"{label}: field {content.image_field}, image {number}: {error}") from error
        return tuple(images)

    def _sample(self) -> Row:
        """The columns of the rows, with the first values of each among the first rows."""
        sample = dict(self._row(0))
        uneven = isinstance(self.rows, list)  # rows of JSON need not have all columns
        if uneven and self.transform is None:
            sample = dict.fromkeys(name for row in self.rows for name in row) | sample
        for index in range(1, min(SAMPLED_ROWS, len(self))):
            if not (uneven and self.transform) and not any(is_missing(value) for value in sample.values()):
                break
            with suppress(RowError):  # it is an error when the row is read
                sample |= {n: v for n, v in self._row(index).items() if is_missing(sample.get(n))}
        return sample


def _matching(rows: Sequence[Row], conditions: Mapping[str, Any], name: str) -> list[int]:
    """The indices of the rows whose columns have the required value, or one of several."""
    if not conditions:
        return list(range(len(rows)))
    for column in conditions:
        check_column(column, rows[0], f"data.filter.{column}", name)
    allowed = {column: value if isinstance(value, list) else [value] for column, value in conditions.items()}
    return [
        index
        for index in range(len(rows))  # not every kind of rows ends an iteration
        if all(rows[index].get(column) in values for column, values in allowed.items())
    ]


def _check_text(label: str, values: Mapping[str, Any]) -> None:
    """Raises RowError for text that no file or tokenizer can hold."""
    for name, value in values.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{label}: field {name} holds half a character ({error.reason}); mend or remove it"
            ) from error


def _first(names: str | Sequence[str], row: Row) -> str | None:
    """The first of the names that the row has."""
    return next((name for name in ([names] if isinstance(names, str) else names) if name in row), None)
