"""Makes the relative paths of a config absolute: beside the file that names them, else in the working
directory. What ships with the project, hub ids and built-in names stay as they are written."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from vlm_sapo.config.fields import Note, Section, sections_in
from vlm_sapo.plugins import shipped

BENCHMARK = re.compile(r"(?P<name>.+?\.ya?ml|[^:=]*)(?::(?P<variant>[^=]*))?(?:=(?P<rows>.*))?", re.DOTALL)


def split_benchmark(text: str) -> tuple[str, str, str]:
    """NAME, VARIANT and FILE of `NAME[:VARIANT][=FILE]`, the last two empty where they are missing; NAME may
    be the path of a YAML file, with any characters, and FILE may begin with `~`."""
    match = BENCHMARK.fullmatch(text)
    name, variant, rows = match.group("name", "variant", "rows") if match else (text, None, None)
    return name, variant or "", os.path.expanduser(rows or "")


@dataclass(frozen=True)
class Paths:
    """Finds the paths in the values of a file in `folder`; None for values of the command line."""

    folder: Path | None
    texts: dict[str, str] = field(default_factory=dict)
    """What was written, by the absolute path that it became."""
    naming: bool = False
    """Whether sources without a name get what was written as their name, so that logs don't depend on the
    folder."""

    def absolute(self, section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a section with absolute paths. Raises ValueError where a text is the path of two
        files."""
        return self._in_section([section], values, "")

    def _in_section(self, sections: Sequence[type[Section]], value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            known = {key: item for section in sections for key, item in section.model_fields.items()}
            return {
                key: self._in_field(known[key], item, f"{name}.{key}".lstrip(".")) if key in known else item
                for key, item in value.items()
            }
        short = next((section for section in sections if section.list_field), None)
        if short is not None and isinstance(value, str | list):
            return self._in_field(short.model_fields[short.list_field], value, name)
        if isinstance(value, str) and "name" in sections[0].model_fields:  # a name stands for the section
            return self._in_field(sections[0].model_fields["name"], value, name)
        return value

    def _in_field(self, info: FieldInfo, value: Any, name: str) -> Any:
        inner = sections_in(info.annotation)
        several = typing.get_origin(info.annotation) is list
        if several and isinstance(value, list):
            each = [
                self._in_section(inner, item, f"{name}.{number}")
                if inner
                else self._in_field(info, item, f"{name}.{number}")
                for number, item in enumerate(value)
            ]
            return [self._named(item) for item in each]
        if inner:
            section = self._in_section(inner, value, name)
            return section if several else self._named(section)  # one in the place of a list has its own name
        if (
            isinstance(value, Mapping) and Note.PATH in info.metadata
        ):  # arguments of a function that reads rows
            return dict(value) | (
                {"path": self._path(value["path"], f"{name}.path")} if "path" in value else {}
            )
        return self._in_text(info, value, name) if isinstance(value, str) else value

    def _in_text(self, info: FieldInfo, text: str, name: str) -> str:
        if Note.DEFINITION in info.metadata:
            return self._definition(text, name)
        path, file, attribute = text, *text.rpartition(":")[::2]
        if file.endswith(".py") and (Note.PATH in info.metadata or Note.FUNCTION in info.metadata):
            path = f"{self._path(file, name)}:{attribute}"
        elif Note.PATH in info.metadata:
            path = self._path(text, name)
        self.texts[path] = self.texts.get(text, text)
        return path

    def _named(self, value: Any) -> Any:
        """A section of rows with a name."""
        source = value.get("source") if self.naming and isinstance(value, Mapping) else None
        if source is None or value.get("recipe") or value.get("name") is not None:
            return value
        text = self.texts.get(source, source)
        return value if text == source else {**value, "name": text}

    def _definition(self, text: str, name: str) -> str:
        """`NAME[:VARIANT][=FILE]`, where NAME may be the path of a YAML file."""
        stem, variant, rows = split_benchmark(text)
        stem, rows = self._path(stem, name, os.path.isfile), self._path(rows, name)
        return f"{stem}{f':{variant}' if variant else ''}{f'={rows}' if rows else ''}"

    def _path(self, text: Any, name: str, exists: Callable[[str], bool] = os.path.exists) -> Any:
        if (
            not isinstance(text, str)
            or not text
            or text.startswith("~")
            or "://" in text
            or os.path.isabs(text)
        ):
            return text
        working, ours = os.path.abspath(text), str(shipped(text))
        beside = os.path.abspath(self.folder / text) if self.folder else working
        if beside != working and exists(beside) and exists(working) and not os.path.samefile(beside, working):
            raise ValueError(
                f"{name} ({text}) must be one file, and there are two: {beside} beside the file that names "
                f"it, and {working} in the working directory; write the whole path"
            )
        path = beside if exists(beside) else working
        is_shipped = exists(path) and os.path.exists(ours) and os.path.samefile(path, ours)
        return path if exists(path) and not is_shipped else text
