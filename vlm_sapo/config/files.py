"""Reads YAML: text, and files of the user's or shipped ones by name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from vlm_sapo.plugins import searched, shipped


class _Loader(yaml.SafeLoader):
    """Reads `1e-6` as a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises ValueError where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"this must be valid YAML ({error})") from error


def find(name: str, folder: str, *, field: str) -> Path:
    """The YAML file called `name`: a path, or the name of a shipped one in `folder`, with or without `.yaml`;
    case, dashes and underscores don't matter. `field` is what messages call it: config, recipe, ..."""
    if (path := Path(name).expanduser()).is_file():
        return path
    known = {path.stem: path for path in sorted(shipped(folder).glob("*.yaml"))}
    same = [path for stem, path in known.items() if _key(stem) == _key(name.removesuffix(".yaml"))]
    if same:
        return same[0]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "check the name, or give the path of a YAML file."
    names = ", ".join(known)
    raise ValueError(f"no {field} `{name}`; {hint} Shipped {field}s: {names}{searched(name)}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises ValueError naming the file."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} must be a YAML file; {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} must be valid YAML; {error.__cause__ or error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain `field: value` lines; it contains {type(values).__name__}")
    return values


def _key(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()
