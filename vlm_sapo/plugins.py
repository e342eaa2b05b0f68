"""Objects by name: from a built-in table, `package.module:attribute`, `path/to/file.py:attribute`, or
`python:NAME` for one that a Python program passed to `train` or `sft`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
MOVED = {
    f"vlm_sapo.rewards.{old}": f"vlm_sapo.rewards.verifiers.{new}"
    for old, new in {
        "answers": "answers",
        "boxes": "boxes",
        "choice": "choice",
        "judge": "judge",
        "mathematics": "math",
        "numeric": "number",
        "official": "official",
        "text": "text",
        "verifiers": "table",
    }.items()
}
"""Modules with reward functions by their earlier names, which stored configs and commands give."""
MOVED_FUNCTIONS = {
    f"vlm_sapo.rewards.{module}:format": "vlm_sapo.rewards.verifiers.layout:format"
    for module in ("text", "verifiers.text")
}

PYTHON = "python:"
"""Begins the name of an object that a Python program passed."""
_PASSED: dict[str, Any] = {}
"""These objects, by name."""


@contextmanager
def passing(objects: Mapping[str, Any]) -> Iterator[None]:
    """Makes objects known by their names `python:NAME`, inside the block."""
    before = dict(_PASSED)
    _PASSED.update(objects)
    try:
        yield
    finally:
        _PASSED.clear()
        _PASSED.update(before)


def shipped(relative: str | Path) -> Path:
    """Path of a file that ships with the project (`configs/...`, `data/...`), in a checkout or a wheel."""
    inside = PACKAGE / "shipped" / relative
    return inside if inside.exists() else PACKAGE.parent / relative


def locate(path: str | Path) -> Path:
    """A user's path: relative to the working folder if it exists there, else among the shipped files."""
    path = Path(path).expanduser()
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    inside = shipped(path)
    return inside if inside.exists() else path


def searched(path: str | Path) -> str:
    """Where a relative path was looked up, for a message; empty for an absolute one."""
    if Path(path).expanduser().is_absolute():
        return ""
    return f" (looked beside the file that names it, in {Path.cwd()}, and among the shipped files)"


def resolve(name: str, *, field: str, builtin: Mapping[str, Any] | None = None, group: str = "") -> Any:
    """The object called `name`.

    `field` is the config field to name in an error; `group` an entry point group to search.
    Raises ValueError when nothing fits.
    """
    builtin = builtin or {}
    if name in builtin:
        return builtin[name]
    if name.startswith(PYTHON):
        if name not in _PASSED:
            raise ValueError(
                f"{field} ({name}) is an object of the Python program that started this run; pass it again, "
                "as in train(config, dataset=..., reward=...)"
            )
        return _PASSED[name]
    target, _, attribute = MOVED_FUNCTIONS.get(name, name).rpartition(":")
    if target and attribute:
        module = (
            _from_file(target, field, name) if target.endswith(".py") else _from_package(target, field, name)
        )
        if attribute not in vars(module):
            close = difflib.get_close_matches(attribute, vars(module), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "check the name after the colon"
            raise ValueError(f"{field} ({name}) must name an object that {target} defines; {hint}")
        return vars(module)[attribute]
    for point in entry_points(group=group) if group else ():
        if point.name == name:
            return point.load()
    close = difflib.get_close_matches(name, builtin, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    known = f"one of {', '.join(sorted(builtin))}, " if builtin else ""
    raise ValueError(
        f"{field} ({name}) must be {known}'package.module:attribute' or 'path/to/file.py:attribute'; "
        f"{hint}nothing has this name"
    )


def resolve_call(name: str, *arguments: Any, field: str, args: Mapping[str, Any]) -> Any:
    """Calls the function or class called `name` with these arguments and the config's keyword arguments
    `args`. Raises ValueError where it doesn't accept them."""
    function = resolve(name, field=field)
    check_call(function, *arguments, name=name, field=field, args=args)
    return function(*arguments, **args)


def check_call(
    function: Callable, *arguments: Any, name: str, field: str, args: Mapping[str, Any]
) -> inspect.Signature:
    """The signature of a user's function. Raises ValueError where it doesn't accept these arguments."""
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments, **args)
    except TypeError as error:
        section = field.rpartition(".")[0]
        unknown = [key for key in args if key not in signature.parameters]
        close = [
            match for key in unknown for match in difflib.get_close_matches(key, signature.parameters, n=1)
        ]
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"{section}.args ({dict(args)}) must fit {name}{signature}; {error}{hint}"
        ) from error
    return signature


def absolute(name: str) -> str:
    """`path/to/file.py:attribute` with an absolute path; other names unchanged."""
    target, _, attribute = name.rpartition(":")
    return f"{locate(target).resolve()}:{attribute}" if target.endswith(".py") else name


def _from_file(target: str, field: str, name: str) -> Any:
    path = locate(target).resolve()
    if not path.is_file():
        raise ValueError(f"{field} ({name}) must name a Python file that exists{searched(target)}")
    key = f"vlm_sapo_plugin_{path.stem}_{abs(hash(str(path)))}"
    if str(path.parent) not in sys.path:  # its neighbours can be imported, after every library
        sys.path.append(str(path.parent))
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def _from_package(target: str, field: str, name: str) -> Any:
    try:
        return importlib.import_module(MOVED.get(target, target))
    except ModuleNotFoundError as error:
        if error.name and not target.startswith(error.name):
            raise
        raise ValueError(f"{field} ({name}) must name an importable module; {error}") from error
