"""Opens a source of rows (hub id, folder, JSONL, parquet, Python) and reads its rows as examples."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL.Image import Image

from vlm_sapo.config.data import SourceConfig
from vlm_sapo.data.images import decode
from vlm_sapo.plugins import locate, resolve
from vlm_sapo.rewards.verifiers.options import multiple_choice
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, RowError

Row = Mapping[str, Any]


def open_rows(
    source: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> Sequence[Row]:
    """The rows of a source, none of its images decoded yet.

    `source` is a JSONL or parquet file, a folder written by `datasets` or laid out as on the hub, a hub id,
    or `file.py:function`, called with `args`. Raises ValueError naming `data.source`.
    """
    if ":" in source and not Path(source).exists():
        return _call(source, args or {})
    if args:
        raise ValueError("data.args must be empty unless data.source is 'file.py:function'; remove it")
    path = locate(source)
    if path.suffix in (".jsonl", ".json"):
        return _read_jsonl(path)
    import datasets

    try:
        if path.suffix == ".parquet":
            rows = datasets.Dataset.from_parquet(str(path))
        elif any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else source, subset)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.source ({source}) must be a file, a folder or a hub id; {error}") from error
    return _undecoded(_pick_split(rows, split, source))


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


def _read_jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"data.source ({path}) must exist; there is no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RowError(
                        f"{path}, line {number}: a JSON object is needed; this is {type(row).__name__}"
                    )
                rows.append(row)
            except json.JSONDecodeError as error:
                raise RowError(
                    f"{path}, line {number}: not valid JSON ({error}); mend or remove that line"
                ) from error
    return rows


def _pick_split(rows: Any, split: str | None, source: str) -> Any:
    if not isinstance(rows, Mapping):
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        raise ValueError(f"data.split ({split}) must be one of {', '.join(rows)}, the splits of {source}")
    return rows[split]


def _undecoded(rows: Any) -> Any:
    """Leaves images as bytes, at any depth: a broken one is an error of its row and not of the whole set,
    and no column opens files or addresses by itself."""
    for name, feature in rows.features.items():
        if (raw := _raw(feature)) != feature:
            rows = rows.cast_column(name, raw)
    return rows


def _raw(feature: Any) -> Any:
    """A feature of `datasets` with images, audio and video left as they are stored: bytes and a path."""
    if isinstance(feature, Mapping):
        return {name: _raw(inner) for name, inner in feature.items()}
    if hasattr(feature, "decode") and pa.types.is_struct(feature.pa_type):
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
        self.anywhere = section.pictures_anywhere or ".py:" in self.name
        self.transform = resolve(section.transform, field="data.transform") if section.transform else None
        verifier = section.verifier
        self.common = {
            "task": task or section.task,
            "template": section.template,
            "system": section.system,
            "verifier": (verifier.name, verifier.args) if verifier else None,
        }
        path = locate(self.name.partition(":")[0])
        self.folder = path if path.is_dir() else path.parent
        columns = self.column_names = dict(section.columns)
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
        first = self._row(0)
        if isinstance(rows, list):  # of JSON lines, which need not have all columns
            first = dict.fromkeys(name for row in rows for name in row) | dict(first)
        names = columns.get("images", ["images", "image"])
        self.image_columns = [names] if isinstance(names, str) else list(names)
        """Columns that may hold images: the first that a row has is used."""
        self.columns = _complete(columns, first, self.name)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        columns = self.columns
        key = self._name(row, index)
        label = f"row {key} of {self.name}"
        problem, answer = row.get(columns["problem"]), row.get(columns["answer"])
        for field, value in (("problem", problem), ("answer", answer)):
            if value is None or not str(value).strip():
                raise RowError(
                    f"{label}: field {columns[field]} is empty; give it a value or filter the row out"
                )
        _check_text(label, {columns["problem"]: problem, columns["answer"]: answer, "id": key})
        problem, answer = multiple_choice(str(problem), answer, row, label=label)
        images = self._images(row, label)
        marks = problem.count(IMAGE_PLACEHOLDER)
        if marks not in (0, len(images)):
            raise RowError(
                f"{label}: field {columns['problem']} has {marks} {IMAGE_PLACEHOLDER} marks "
                f"and the row {len(images)} images; "
                "give one mark per image, or none to put the images first"
            )
        others = {
            name: value
            for name, value in row.items()
            if name not in self.image_columns and not holds_image(value)
        }
        text = json.dumps(answer, ensure_ascii=False) if isinstance(answer, list | dict) else str(answer)
        return Example(
            id=key,
            problem=problem,
            answer=text,
            images=images,
            columns=others,
            row=index,
            source=self.name,
            **self.common,
        )

    def key(self, index: int) -> str:
        """A row's id, or its number, read without its images."""
        try:
            return self._name(self._row(index), index)
        except RowError:
            return self._name(self.raw(index), index)

    def _name(self, row: Row, index: int) -> str:
        column = _first(self.column_names.get("id", "id"), row)
        return str(row[column]) if column else str(self.indices[index])

    def raw(self, index: int) -> Row:
        """A row as the source holds it."""
        return self.rows[self.indices[index]]

    def _row(self, index: int) -> Row:
        row = self.raw(index)
        try:
            return self.transform(row) if self.transform else row
        except (LookupError, TypeError, ValueError, AttributeError, SyntaxError) as error:
            raise RowError(
                f"row {self._name(row, index)} of {self.name}: data.transform cannot read it ({error!r}); "
                f"its columns are {', '.join(map(str, row))}"
            ) from error

    def _images(self, row: Row, label: str) -> tuple:
        column = next((name for name in self.image_columns if row.get(name) not in (None, [])), None)
        value = row.get(column) if column else None
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        images = []
        for number, item in enumerate(values):
            try:
                images.append(decode(item, self.folder, anywhere=self.anywhere))
            except ValueError as error:
                raise RowError(f"{label}: field {column}, image {number + 1}: {error}") from error
        return tuple(images)


def _matching(rows: Sequence[Row], conditions: Mapping[str, Any], name: str) -> list[int]:
    """The indices of the rows whose columns have the required value, or one of several."""
    if not conditions:
        return list(range(len(rows)))
    for column in conditions:
        _check_column(column, rows[0], f"data.filter.{column}", name)
    allowed = {column: value if isinstance(value, list) else [value] for column, value in conditions.items()}
    return [
        index
        for index, row in enumerate(rows)
        if all(row.get(column) in values for column, values in allowed.items())
    ]


def holds_image(value: Any) -> bool:
    """Whether a column's value is an image or a list of them, as objects or as bytes."""
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(x, Image | bytes) or (isinstance(x, Mapping) and "bytes" in x) for x in items)


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


def _complete(names: Mapping[str, str | Sequence[str]], row: Row, source: str) -> dict[str, str]:
    """The user's column names checked against a row, the others by their usual names."""
    columns = {"problem": "problem", "answer": "answer", "id": "id"}
    for field, options in names.items():
        columns[field] = _first(options, row) or (options if isinstance(options, str) else options[0])
        _check_column(columns[field], row, f"data.columns.{field}", source)
    if "images" not in columns:
        columns |= next(({"images": usual} for usual in ("images", "image") if usual in row), {})
    for field in ("problem", "answer"):
        _check_column(columns[field], row, f"data.columns.{field}", source)
    return columns


def _check_column(column: str, columns: Iterable[str], field: str, source: str) -> None:
    if column not in columns:
        close = difflib.get_close_matches(column, list(columns), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"{field} ({column}) must be a column of {source}; {hint}it has {', '.join(map(str, columns))}"
        )
