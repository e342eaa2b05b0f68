"""Writes the config that a plan recommends: what differs from the defaults, and why."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from vlm_sapo.config.load import read_values, without_defaults
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.tools.plan.nearest import Change

WIDTH = 100
"""Columns of a written line."""


def config_text(
    name: str, overrides: Sequence[str], changes: Sequence[Change], *, run_name: str, head: Sequence[str]
) -> str:
    """A config file: `head` as comments, then the fields of config `name` with overrides and changes, without
    those that have their default, and above each change its reason."""
    reasons = {override: change.reason for change in changes for override in change.overrides}
    named = (*overrides, *reasons, f"run.name={run_name}")
    fields = {override.partition("=")[0]: reason for override, reason in reasons.items()}
    values = without_defaults(TrainConfig, read_values(TrainConfig, name, named), list(fields))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=WIDTH)
    lines = text.splitlines()
    for field, reason in fields.items():
        index = _line_of(lines, field)
        indent = lines[index][: len(lines[index]) - len(lines[index].lstrip())]
        lines.insert(index, f"{indent}# {reason}")
    return "\n".join([*(f"# {line}" for line in head), *lines]) + "\n"


def _line_of(lines: Sequence[str], field: str) -> int:
    """The line of a field in block style, by its dotted name."""
    index = -1
    for depth, key in enumerate(field.split(".")):
        start = f"{'  ' * depth}{key}:"
        index = next(number for number in range(index + 1, len(lines)) if lines[number].startswith(start))
    return index
