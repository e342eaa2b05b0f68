"""Reads files of rows: JSON lines, JSON, CSV, TSV. Errors name the line. Parquet is read by `datasets`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_sapo.plugins import searched
from vlm_sapo.types import RowError, one_line

Row = dict[str, Any]

TEXT_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
WRAPPERS = ("data", "rows", "examples", "samples", "items", "instances", "annotations", "questions")
SPLITS = ("train", "validation", "val", "dev", "test", "testmini")
"""Names under which a JSON file may hold its list of rows, or several lists."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
NULLS = ("", "null", "NULL")
"""Cells of a table that are empty. `None` and `N/A` are text there, as a person may have written them."""
WHOLE_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})")
LONGEST_INDEX = 64
"""Characters of a cell of images that is the index of another row instead (VLMEvalKit)."""


def read_file(path: Path) -> list[Row] | dict[str, list[Row]]:
    """The rows of a file, or its splits by name. Raises ValueError, and RowError naming the line."""
    if not path.is_file():
        raise ValueError(f"data.source ({path}) must exist; there is no such file{searched(path)}")
    text = _read_text(path)
    if kind(path) in (".csv", ".tsv"):
        return _read_table(path, text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = text.lstrip()[:1]
    if start == "[" or (start == "{" and kind(path) == ".json" and _is_whole(text)):
        return _read_json(path, text)
    return _read_lines(path, text)


def kind(path: Path) -> str:
    """The ending of a file's name, without `.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"data.source ({path}) must be a gzip file; {error}") from error
    try:
        return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"data.source ({path}) must be UTF-8 text; line {line} isn't ({error.reason}); save it as UTF-8"
        ) from error


def _is_whole(text: str) -> bool:
    """Whether a text is one JSON object over several lines, or one that holds rows in a list or by id."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return not _is_json(text.lstrip().split("\n", 1)[0])  # the error shall name the line that is wrong
    return "\n" in text.strip() or bool(_splits(value)) or _is_by_id(value) or _is_by_column(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _read_json(path: Path, text: str) -> list[Row] | dict[str, list[Row]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if kind(path) != ".json" and _is_json(text.lstrip().split("\n", 1)[0]):
            return _read_lines(path, text)
        raise _invalid(path, error.lineno, error) from error
    if isinstance(value, list):
        return _checked(path, value)
    if splits := _splits(value):
        rows = {name: _checked(path, items) for name, items in splits.items()}
        return next(iter(rows.values())) if len(rows) == 1 else rows
    if _is_by_column(value):
        raise ValueError(
            f"data.source ({path}) must be a list of rows; it is an object of columns; write it as a "
            "list, or as JSON lines"
        )
    if _is_by_id(value):
        return [{"id": name} | row for name, row in value.items()]
    return [value]


def _splits(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of rows that an object wraps, by name."""
    return {
        name: items
        for name, items in value.items()
        if name in (*WRAPPERS, *SPLITS)
        and isinstance(items, list)
        and items
        and isinstance(items[0], Mapping)
    }


def _is_by_id(value: Mapping[str, Any]) -> bool:
    """Whether an object holds rows by their id."""
    return len(value) > 1 and all(isinstance(item, Mapping) for item in value.values())


def _is_by_column(value: Mapping[str, Any]) -> bool:
    """Whether an object holds columns instead of rows, as lists or by the rows' numbers (pandas)."""
    return len(value) > 1 and all(
        (isinstance(item, list) and not any(isinstance(entry, Mapping) for entry in item))
        or (isinstance(item, Mapping) and "0" in item)
        for item in value.values()
    )


def _checked(path: Path, items: Sequence[Any]) -> list[Row]:
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise RowError(
                f"{path}, item {number}: a JSON object is needed; this is {type(item).__name__} "
                f"({one_line(item)})"
            )
    return list(items)


def _read_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _invalid(path, number, error) from error
            if not isinstance(row, dict):
                raise RowError(
                    f"{path}, line {number}: a JSON object is needed; this is {type(row).__name__}"
                )
            rows.append(row)
    return rows


def _invalid(path: Path, line: int, error: json.JSONDecodeError) -> RowError:
    reason = f"{error.msg}, column {error.colno}"
    return RowError(f"{path}, line {line}: not valid JSON ({reason}); mend or remove that line")


def _read_table(path: Path, text: str) -> list[Row]:
    """The rows of a CSV or TSV file. Cells are text as they were written; whole numbers become numbers where
    a column has nothing else, so that an index differs from a text."""
    header = text.split("\n", 1)[0]
    separator = "\t" if kind(path) == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default is less than an image in base64
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[Row] = []
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise RowError(f"{path}, line 1: two columns have one name ({one_line(', '.join(names))})")
        for cells in reader:
            if len(cells) != len(names) and cells:
                raise RowError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells for {len(names)} columns; quote "
                    "cells that hold a separator or a line break"
                )
            if cells:
                rows.append({n: None if c in NULLS else c for n, c in zip(names, cells, strict=True)})
    except csv.Error as error:
        raise RowError(f"{path}, line {reader.line_num}: {error}; mend the quotes there") from error
    for name in names:
        cells = [row[name] for row in rows if row[name] is not None]
        if all(WHOLE_NUMBER.fullmatch(cell) for cell in cells):
            for row in rows:
                row[name] = None if row[name] is None else int(row[name])
    return _with_own_images(rows)


def _with_own_images(rows: list[Row]) -> list[Row]:
    """VLMEvalKit's tables write an image once: other rows name the row that has it by its index."""
    if not rows or not {"index", "image"} <= rows[0].keys():
        return rows
    images = {str(row["index"]): row["image"] for row in rows}
    for row in rows:
        name = str(row["image"])
        if len(name) <= LONGEST_INDEX and len(str(images.get(name) or "")) > LONGEST_INDEX:
            row["image"] = images[name]
    return rows
