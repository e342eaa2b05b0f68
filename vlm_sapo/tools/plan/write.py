"""Writes the config that a plan recommends: what differs from the defaults, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from vlm_sapo.config.load import read_values, without_defaults
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.plan.launch import quote
from vlm_sapo.tools.plan.nearest import Change

FIRST_LINE = "# vlm-sapo plan "
"""Beginning of a written file."""
WIDTH = 105
"""Columns of a written line."""


class _Inline(dict):
    """A mapping or, as its items, a list that is written in one line."""


class _Dumper(yaml.SafeDumper):
    """Writes lists of values and mappings in lists in one line, as configs are written by hand."""

    def represent_list(self, items: list) -> yaml.Node:
        short = not any(isinstance(item, dict | list) for item in items)
        node = super().represent_list([_Inline(item) if isinstance(item, dict) else item for item in items])
        node.flow_style = short
        return node

    def represent_inline(self, mapping: _Inline) -> yaml.Node:
        return self.represent_mapping("tag:yaml.org,2002:map", mapping, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(_Inline, _Dumper.represent_inline)


def check_target(path: Path) -> None:
    """Raises ValueError where `--write` would replace a file that no plan has written, or can't write."""
    if path.is_dir():
        raise ValueError(f"--write ({path}) must be a file; it is a folder")
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(FIRST_LINE):
        raise ValueError(f"--write ({path}) must be a new file or one that plan wrote; choose another name")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--write ({path}) must be in a folder that can be written; {parent} can't")


def config_text(
    name: str, overrides: Sequence[str], changes: Sequence[Change], *, run_name: str, about: Sequence[str]
) -> str:
    """A config file: the plan and what there is to say `about` it as comments, then the fields of config
    `name` with overrides and changes, without those that have their default, and above each change its
    reason."""
    named = (*overrides, *(change.override for change in changes), f"run.name={run_name}")
    reasons = {change.override.partition("=")[0]: change.reason for change in changes}
    values = without_defaults(TrainConfig, read_values(TrainConfig, name, named), list(reasons))
    lines = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH).splitlines()
    for field, reason in reasons.items():
        index = _line_of(lines, field)
        indent = lines[index][: len(lines[index]) - len(lines[index].lstrip())]
        lines.insert(index, f"{indent}# {reason}")
    head = [FIRST_LINE + quote((name, *overrides)), *(f"# {line}" for line in about)]
    return "\n".join([*head, *lines]) + "\n"


def _line_of(lines: Sequence[str], field: str) -> int:
    """The line of a field in block style, by its dotted name."""
    index = -1
    for depth, key in enumerate(field.split(".")):
        start = f"{'  ' * depth}{key}:"
        index = next(number for number in range(index + 1, len(lines)) if lines[number].startswith(start))
    return index
