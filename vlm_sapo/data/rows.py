"""Opens a source of rows (hub id, folder, JSONL, parquet, Python) and reads its rows as examples."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL.Image import Image

from vlm_sapo.data.images import decode
from vlm_sapo.plugins import locate, resolve
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, RowError

Row = Mapping[str, Any]


def open_rows(
    source: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> Sequence[Row]:
    """The rows of a source, none of its pictures decoded yet.

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
    """The rows that a function returns, or an error that names what it was given."""
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
    """Leaves pictures as bytes, at any depth: a broken one is an error of its row and not of the whole set,
    and no column opens files or addresses by itself."""
    for name, feature in rows.features.items():
        if (raw := _raw(feature)) != feature:
            rows = rows.cast_column(name, raw)
    return rows


def _raw(feature: Any) -> Any:
    """A feature of `datasets` whose pictures, sounds and films, which are bytes and a path, stay as they are
    stored."""
    if isinstance(feature, Mapping):
        return {name: _raw(inner) for name, inner in feature.items()}
    if hasattr(feature, "decode") and pa.types.is_struct(feature.pa_type):
        return replace(feature, decode=False)
    if hasattr(feature, "feature"):
        return replace(feature, feature=_raw(feature.feature))
    return feature


class ExampleSet(Sequence):
    """The rows of a source as examples, with columns renamed, filtered and mapped.

    `columns` maps the names `problem, answer, images, id, split` to the source's own, or to several of which
    the first counts that the rows have; `keep` holds a value, or a list of values, per column that a row must
    have; `split` chooses from rows that have a split column; `transform` rewrites a row before its columns
    are read. `task, template, system, verifier` are those of every example. Rows name pictures in the folder
    of their file, or `anywhere`; those of a Python function may in any case.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        name: str,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        split: str | None = None,
        keep: Mapping[str, Any] | None = None,
        limit: int | None = None,
        transform: Callable[[Row], Row] | None = None,
        task: str = "",
        template: str = "{problem}",
        system: str | None = None,
        verifier: tuple[str, Mapping[str, Any]] | None = None,
        anywhere: bool = False,
    ):
        self.anywhere = anywhere or ".py:" in name
        self.rows, self.name, self.transform = rows, name, transform
        self.common = {"task": task, "template": template, "system": system, "verifier": verifier}
        path = locate(name.partition(":")[0])
        self.folder = path if path.is_dir() else path.parent
        columns = self.named = dict(columns or {})
        keep = dict(keep or {})
        column = _first(columns.pop("split", "split"), rows[0] if len(rows) else {})
        self.has_split = column is not None
        if split is not None and column is not None:
            keep.setdefault(column, split)
        self.indices = list(range(len(rows))) if not keep else _matching(rows, keep, name)
        self.indices = self.indices[:limit]
        if not self.indices:
            raise ValueError(
                f"data.source ({name}) has no rows left; check data.split, data.filter and data.limit"
            )
        first = self._row(0)
        if isinstance(rows, list):  # of JSON lines, which need not have all columns
            first = dict.fromkeys(name for row in rows for name in row) | dict(first)
        given = columns.get("images", ["images", "image"])
        self.pictures = [given] if isinstance(given, str) else list(given)
        """Columns that may hold pictures: of each row the first that does."""
        self.columns = _complete(columns, first, name)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        where = self.columns
        key = self._name(row, index)
        label = f"row {key} of {self.name}"
        problem, answer = row.get(where["problem"]), row.get(where["answer"])
        for field, value in (("problem", problem), ("answer", answer)):
            if value is None or not str(value).strip():
                raise RowError(
                    f"{label}: field {where[field]} is empty; give it a value or filter the row out"
                )
        _check_text(label, {where["problem"]: problem, where["answer"]: answer, "id": key})
        images = self._images(row, label)
        marks = str(problem).count(IMAGE_PLACEHOLDER)
        if marks not in (0, len(images)):
            raise RowError(
                f"{label}: field {where['problem']} has {marks} {IMAGE_PLACEHOLDER} marks "
                f"and the row {len(images)} pictures; "
                "give one mark per picture, or none to put the pictures first"
            )
        others = {
            name: value
            for name, value in row.items()
            if name not in self.pictures and not holds_picture(value)
        }
        text = json.dumps(answer, ensure_ascii=False) if isinstance(answer, list | dict) else str(answer)
        return Example(
            id=key,
            problem=str(problem),
            answer=text,
            images=images,
            columns=others,
            row=index,
            source=self.name,
            **self.common,
        )

    def key(self, index: int) -> str:
        """A row's id, or its number, read without its pictures."""
        try:
            return self._name(self._row(index), index)
        except RowError:
            return self._name(self.raw(index), index)

    def _name(self, row: Row, index: int) -> str:
        column = _first(self.named.get("id", "id"), row)
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
        column = next((name for name in self.pictures if row.get(name) not in (None, [])), None)
        value = row.get(column) if column else None
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        images = []
        for number, item in enumerate(values):
            try:
                images.append(decode(item, self.folder, anywhere=self.anywhere))
            except ValueError as error:
                raise RowError(f"{label}: field {column}, picture {number + 1}: {error}") from error
        return tuple(images)


def _matching(rows: Sequence[Row], keep: Mapping[str, Any], name: str) -> list[int]:
    for column in keep:
        _check_column(column, rows[0], f"data.filter.{column}", name)
    wanted = {column: value if isinstance(value, list) else [value] for column, value in keep.items()}
    return [
        index
        for index, row in enumerate(rows)
        if all(row.get(column) in values for column, values in wanted.items())
    ]


def holds_picture(value: Any) -> bool:
    """Whether a column's value is a picture or a list of them, as objects or as bytes."""
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


def _complete(given: Mapping[str, str | Sequence[str]], row: Row, name: str) -> dict[str, str]:
    """The user's column names checked against a row, the others by their usual names."""
    chosen = {}
    for field, names in given.items():
        chosen[field] = _first(names, row) or (names if isinstance(names, str) else names[0])
        _check_column(chosen[field], row, f"data.columns.{field}", name)
    columns = {"problem": "problem", "answer": "answer", "id": "id"} | chosen
    if "images" not in columns:
        columns |= next(({"images": usual} for usual in ("images", "image") if usual in row), {})
    for field in ("problem", "answer"):
        _check_column(columns[field], row, f"data.columns.{field}", name)
    return columns


def _check_column(column: str, known: Any, field: str, source: str) -> None:
    if column not in known:
        close = difflib.get_close_matches(column, list(known), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"{field} ({column}) must be a column of {source}; {hint}it has {', '.join(map(str, known))}"
        )
