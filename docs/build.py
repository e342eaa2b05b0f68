"""Writes docs/config.md from the config classes, and the plots of docs/algorithm.md from the objectives.

python docs/build.py
"""

from __future__ import annotations

import types
import typing
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vlm_sapo.algo.diagnostics import effective_update
from vlm_sapo.algo.objectives import OBJECTIVES, TokenTensors
from vlm_sapo.config.schema import SftConfig, TrainConfig
from vlm_sapo.training.loss import Objective

DOCS = Path(__file__).parent
HEAD = """# Every field of a config

Written by `python docs/build.py` from the classes in `vlm_sapo/config/`; change texts there. A field is set
in the file, or on the command line as `section.field=value`. `required` fields have no default.
"""


def config_page() -> str:
    """The page, section by section, of `train` and of what `sft` has beside it."""
    lines, done = [HEAD, "# vlm-sapo train\n"], set()
    _section(TrainConfig, "", lines, done)
    lines.append("# vlm-sapo sft\n\nHas the same sections but `algo` and `alarms`, and its own `train`:\n")
    _section(SftConfig, "", lines, done)
    return "\n".join(lines).rstrip() + "\n"


def _section(model: type[BaseModel], path: str, lines: list[str], done: set) -> None:
    """A table of the fields that hold values, then the sections among them, each class once."""
    done.add(model)
    inner = [(name, part) for name, field in model.model_fields.items() for part in _models(field.annotation)]
    rows = [
        f"| `{path}{name}` | {_kind(field.annotation)} | {_default(field)} | {_line(field.description)} |"
        for name, field in model.model_fields.items()
        if field.description
    ]
    if rows:
        lines += ["| field | kind | default | |", "| --- | --- | --- | --- |", *rows, ""]
    for name, part in inner:
        if part not in done:
            given = part.model_fields.get("type")
            kind = f", type {_kind(given.annotation)}" if given else ""
            lines.append(f"## {path}{name}{kind}\n")
            _section(part, f"{path}{name}.", lines, done)


def _models(annotation: object) -> list[type[BaseModel]]:
    """The config classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _kind(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if a is type(None) else _kind(a) for a in arguments))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    if _models(annotation):
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, "value")


def _default(field) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "required" if field.is_required() else ""
    return "" if isinstance(field.default, BaseModel) else f"`{_yaml(field.default)}`"


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def plots() -> dict[str, Figure]:
    """What is left of the plain policy gradient, by ratio: SAPO beside the others, and by temperature."""
    ratio = torch.linspace(0.01, 3, 600, dtype=torch.float64)
    compared = {
        "SAPO, tau 1 / 1.05": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
        "GRPO, clip .2": ("grpo", {"low": 0.2, "high": 0.2}),
    }
    one, axes = _axes(2)
    for axis, sign in zip(axes, (1.0, -1.0), strict=True):
        for label, (name, parameters) in compared.items():
            axis.plot(ratio, _left(name, ratio, sign, parameters), label=label)
        axis.set_title(f"{'positive' if sign > 0 else 'negative'} advantage", fontsize=10)
        axis.legend(fontsize=8)
    two, (axis,) = _axes(1)
    for tau in (0.5, 1.0, 2.0, 4.0, 8.0):
        parameters = {"tau_pos": tau, "tau_neg": tau}
        axis.plot(ratio, _left("sapo", ratio, 1.0, parameters), label=f"tau {tau:g}")
    axis.legend(fontsize=8)
    return {"gate.png": one, "temperature.png": two}


def _axes(count: int):
    figure = Figure(figsize=(4.5 * count, 3), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.set_xlabel("ratio r of new to old probability", fontsize=9)
        axis.set_ylabel("left of the gradient, f'(r)", fontsize=9)
        axis.grid(alpha=0.3)
    return figure, axes


def _left(name: str, ratio: torch.Tensor, sign: float, parameters: dict[str, float]) -> torch.Tensor:
    log_ratio = ratio.log()[None]
    tensors = TokenTensors(
        logprobs=log_ratio,
        old=torch.zeros_like(log_ratio),
        advantages=torch.full_like(log_ratio, sign),
        mask=torch.ones_like(log_ratio, dtype=torch.bool),
    )
    return effective_update(Objective(OBJECTIVES[name], **parameters), tensors)[0]


if __name__ == "__main__":
    (DOCS / "config.md").write_text(config_page(), encoding="utf-8")
    for name, figure in plots().items():
        figure.savefig(DOCS / name, dpi=110)
    print("docs/config.md, " + ", ".join(f"docs/{name}" for name in plots()))
