"""The base of all sections, types of fields, and what is written beside a field: notes and other names."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
TopP = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    example: ClassVar[str] = "{...: ...}"
    """How the section is written, for messages."""
    list_field: ClassVar[str] = ""
    """The field that a list in place of the section stands for."""

    @classmethod
    def field_label(cls, location: Sequence[str | int]) -> str:
        """What messages call a field: its dotted name."""
        return ".".join(map(str, location))


class Note(Enum):
    """A fact about a field, in its annotation. On a section it holds for all of its fields."""

    FREE_ON_RESUME = auto()
    """Changes how a run is carried out, not its results: a resumed run may have another value."""
    IN_REPORT = auto()
    """The report's summary shows it."""
    PATH = auto()
    """A file or folder, `FILE.py:NAME`, or a name that is neither; of a mapping, its entry `path`."""
    FUNCTION = auto()
    """`FILE.py:NAME`, or a name that is no path."""
    DEFINITION = auto()
    """A YAML file or the name of a shipped one; for a benchmark also `NAME:VARIANT` and `NAME=FILE`."""


@dataclass(frozen=True)
class AlsoCalled:
    """Names of a field in other trainers, from which a message leads to ours."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a value of this type may be or contain."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]


def types_of(section: type[Section]) -> tuple[str, ...]:
    """The values of a section's `type`, by which a union tells its sections apart; () without one."""
    field = section.model_fields.get("type")
    return typing.get_args(field.annotation) if field else ()


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All fields below a section with their dotted names; entries of lists have no number."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in sections_in(field.annotation):
            yield from walk(inner, f"{prefix}{name}.")


def noted(note: Note, *sections: type[Section]) -> frozenset[str]:
    """Dotted names of the fields and sections with a note."""
    return frozenset(name for section in sections for name, field in walk(section) if note in field.metadata)


def belongs(field: str, names: frozenset[str]) -> bool:
    """Whether a dotted name is one of `names` or lies in a section among them."""
    parts = field.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))


def other_names(field: FieldInfo) -> tuple[str, ...]:
    """What other trainers call a field."""
    return tuple(name for item in field.metadata if isinstance(item, AlsoCalled) for name in item.names)


BOUNDS = {
    Ge: ("ge", "of at least"),
    Gt: ("gt", "greater than"),
    Le: ("le", "at most"),
    Lt: ("lt", "less than"),
    MinLen: ("min_length", "with a length of at least"),
}
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def choices(annotation: Any) -> list[str]:
    """The words that a value of this type may be."""
    if typing.get_origin(annotation) is Literal:
        return [str(word) for word in typing.get_args(annotation)]
    return [word for argument in typing.get_args(annotation) for word in choices(argument)]


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value of this type must be, for a message: `a whole number of at least 1`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return expected(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return _any_of(_options(annotation))
    if origin in (typing.Union, UnionType):
        return _any_of([option for argument in arguments for option in _options(argument)])
    if sections := sections_in(annotation):
        example = sections[0].example
        return f"a list such as [{example}]" if origin is list else f"fields such as {example}"
    if origin is list and (words := choices(annotation)):
        return f"a list such as [{words[0]}]"
    bounds = [f"{BOUNDS[type(item)][1]} {getattr(item, BOUNDS[type(item)][0])}" for item in _bounds(metadata)]
    if origin in (list, tuple):
        name = "a list"
    else:
        name = "a mapping such as {name: value}" if origin is dict else NAMES.get(annotation, "a value")
    return " ".join([name, " and ".join(bounds)]).strip()


def scalar(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[type, dict[str, float]]:
    """Type and bounds (`ge`, `gt`, `le`, `lt`) of a field's value as one word on the command line, where
    words of a choice and lists are text."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return scalar(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, UnionType):
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return scalar(inner, metadata)
    bounds = {BOUNDS[type(item)][0]: getattr(item, BOUNDS[type(item)][0]) for item in _bounds(metadata)}
    return (annotation, bounds) if isinstance(annotation, type) and origin is None else (str, {})


def as_parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The field as a keyword argument of a function."""
    kind, _ = scalar(field.annotation)
    default = inspect.Parameter.empty if field.is_required() else field.default
    annotation = kind | None if default is None else kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options(annotation: Any) -> list[str]:
    if annotation is type(None):
        return ["null"]
    if typing.get_origin(annotation) is Literal:
        return [f"`{word}`" for word in typing.get_args(annotation)]
    return [expected(annotation)]


def _bounds(metadata: Sequence[Any]) -> list[Any]:
    items = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return [item for item in items if type(item) in BOUNDS]


def _any_of(options: list[str]) -> str:
    return " or ".join([part for part in (", ".join(options[:-1]), options[-1]) if part])
