"""Hashes of objects that a Python program passes, the same in every process: of rows, and of functions with
what they refer to."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

LENGTH = 16
"""Characters of a fingerprint."""
HASHED_ROWS = 256
"""Most rows that a fingerprint covers, evenly spaced."""
PLAIN = (type(None), bool, int, float, str)
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint_rows(rows: Sequence[Mapping[str, Any]], indices: Sequence[int] | None = None) -> str:
    """A hash of the number of rows, or of those with these `indices`, and of up to HASHED_ROWS of them, with
    the pixels of their images."""
    numbers = range(len(rows)) if indices is None else indices
    count = min(HASHED_ROWS, len(numbers))
    hashed = [numbers[number * len(numbers) // count] for number in range(count)]
    return _hash([len(numbers), *(_plain(rows[number], []) for number in hashed)])


def fingerprint_settings(*settings: Any) -> str:
    """A hash of values of a config."""
    return _hash(_plain(settings, []))


def fingerprint_function(function: Callable[..., Any]) -> str:
    """A hash of a function's source text, defaults, and the values of closures and globals that it uses;
    functions and classes of the program itself count with theirs, those of importable modules by name."""
    return _hash(_plain(function, []))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]


def _plain(value: Any, above: list[Any]) -> Any:
    """A value as JSON can hold it. `above` has the objects that contain it, which may contain each other."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Image):
        return [value.mode, *value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy()
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if any(value is item for item in above):
        return "again"
    within = [*above, value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item, within) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item, within) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(item, within), sort_keys=True) for item in value)
    return _described(value, within)


def _described(value: Any, within: list[Any]) -> Any:
    """What a function, class or other object is."""
    if isinstance(value, functools.partial):
        return ["partial", *(_plain(item, within) for item in (value.func, value.args, value.keywords))]
    if isinstance(value, MethodType):
        return ["method", _plain(value.__func__, within), _plain(value.__self__, within)]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, FunctionType | type):
        if not _is_of_program(value):
            return f"{value.__module__}.{value.__qualname__}"
        return _class(value, within) if isinstance(value, type) else _function(value, within)
    if callable(value) and (inner := inspect.unwrap(value)) is not value:  # as functools.lru_cache has it
        return ["wrapped", _plain(inner, within)]
    if isinstance(value, CodeType):
        return [
            value.co_code.hex(),
            list(value.co_names),
            *(_plain(item, within) for item in value.co_consts),
        ]
    if type(value).__module__ == "builtins":
        return ADDRESS.sub("", repr(value))
    is_inner = len(within) > 2  # a library's object there, such as a client, has state of its own
    if is_inner and not _is_of_program(type(value)):
        return _plain(type(value), within)
    try:
        state = value.__getstate__()  # of slots too
    except TypeError:  # it can't be pickled
        state = ADDRESS.sub("", repr(value))
    return [_plain(type(value), within), _plain(state, within)]


def _is_of_program(value: FunctionType | type) -> bool:
    """Whether it is defined in the script or notebook, or inside a function: no other process finds it."""
    return value.__module__ in ("__main__", "__mp_main__") or "<locals>" in value.__qualname__


def _function(value: FunctionType, within: list[Any]) -> Any:
    names = {
        name: value.__globals__[name] for name in sorted(_names(value.__code__)) if name in value.__globals__
    }
    closure = []
    for cell in value.__closure__ or ():
        try:
            closure.append(_plain(cell.cell_contents, within))
        except ValueError:  # not set yet
            closure.append("empty")
    return [
        _source(value) or _plain(value.__code__, within),
        closure,
        *(_plain(item, within) for item in (value.__defaults__, value.__kwdefaults__, names)),
    ]


def _names(code: CodeType) -> set[str]:
    """The names that a function's code uses, and that of the functions and comprehensions inside it."""
    inner = [item for item in code.co_consts if isinstance(item, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _class(value: type, within: list[Any]) -> Any:
    """Its source and what its methods use, and those of the program's classes that it inherits from."""
    methods = {
        name: _plain(item.fget if isinstance(item, property) else item, within)
        for name, item in vars(value).items()
        if isinstance(item, FunctionType | staticmethod | classmethod | property)
    }
    bases = [_plain(base, within) for base in value.__bases__ if _is_of_program(base)]
    return [_source(value) or value.__qualname__, methods, bases]


def _source(value: Any) -> str | None:
    """The source text; None where there is no file or cell of it."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return None
