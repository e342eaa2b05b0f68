"""A config file and `key=value` overrides to a checked config. Mistakes become one sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vlm_sapo.config.fields import (
    Section,
    belongs,
    choices,
    expected,
    other_names,
    sections_in,
    types_of,
    walk,
)
from vlm_sapo.config.files import find, parse, read_mapping
from vlm_sapo.config.names import without_field
from vlm_sapo.config.paths import Paths
from vlm_sapo.config.rollout import VllmConfig
from vlm_sapo.config.schema import SftConfig, TrainConfig, TrainerConfig, free_on_resume
from vlm_sapo.types import one_line

T = TypeVar("T", bound=Section)
MAX_VALUE = 80
"""Characters of a value that a message shows."""
MAX_CHANGE = 200
"""Characters of a value that has changed, in a message; a list of sections may have thousands."""
ABSENT = "not there"
"""The value of a field that a config doesn't have, in a message."""
MAX_FOREIGN = 20
"""Fields of another trainer's section that a message lists."""


def load(kind: type[T], name: str, overrides: Sequence[str] = ()) -> T:
    """Reads a config file, applies `key=value` overrides and checks the result. The file's relative paths are
    looked up beside it, then in the working directory, those of overrides in the working directory.

    Raises ValueError with one line per problem, each with the field, the value and the remedy.
    """
    return check(kind, read_values(kind, name, overrides))


def read_values(kind: type[Section], name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a config file with overrides, and absolute paths. Raises ValueError where a path is that
    of two files."""
    path = find(name, "configs", field="config")
    paths = Paths(path.parent)
    values = paths.absolute(kind, read_mapping(path))
    for override in overrides:
        _override(kind, values, override)
    return replace(paths, folder=None, naming=True).absolute(kind, values)


def without_defaults(kind: type[T], values: Mapping[str, Any], keep: Sequence[str] = ()) -> dict[str, Any]:
    """The values without those that change nothing; the fields named by `keep` stay."""
    config, short = check(kind, values), deepcopy(dict(values))

    def prune(section: dict[str, Any], prefix: str) -> None:
        for key, value in list(section.items()):
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                prune(value, f"{name}.")
            if any(belongs(name, frozenset({field})) or belongs(field, frozenset({name})) for field in keep):
                continue
            before = list(section.items())
            del section[key]
            if not _gives(config, short):
                section.clear()
                section.update(before)  # in its old position

    prune(short, "")
    return short


def _gives(config: Section, values: Mapping[str, Any]) -> bool:
    """Whether the values give this config."""
    try:
        return type(config).model_validate(values) == config
    except ValidationError:
        return False


def check(kind: type[T], values: Mapping[str, Any]) -> T:
    """A section from plain values. Raises ValueError with one line per problem."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, values, error))) from error


def dump(config: Section) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Change:
    """A field whose value differs between two configs."""

    field: str
    before: Any
    after: Any
    harmless: bool
    """Whether a run with the new value is still the same run."""
    reason: str = ""
    """Why it isn't, where that is not plain."""

    def __str__(self) -> str:
        section, _, name = self.field.rpartition(".")
        if name == "fingerprint":
            return f"{section}: the rows or the function that the program passes here have changed"
        text = f"{self.field}: {one_line(self.before, MAX_CHANGE)} -> {one_line(self.after, MAX_CHANGE)}"
        return f"{text} ({self.reason})" if self.reason and not self.harmless else text


def differences(before: str, after: str) -> list[Change]:
    """What changed between two configs that `dump` wrote."""
    new = parse(after)
    free = free_on_resume()
    if new["train"].get("schedule") == "constant":  # the length of a run then changes no step of it
        free |= {"train.steps"}
    reasons = {"train.steps": f"which train.schedule={new['train'].get('schedule')} depends on"}
    return [
        Change(field, old, value, belongs(field, free), reasons.get(field, ""))
        for field, old, value in _differing(parse(before), new)
    ]


def _differing(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, earlier and new value of each field that differs; of lists of as many sections, their fields."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in sorted({*before, *after})}
    elif _sections(before) and _sections(after) and len(before) == len(after):
        pairs = dict(enumerate(zip(before, after, strict=True)))
    else:
        pairs = {}
        if before != after:
            yield name, before, after
    for key, pair in pairs.items():
        yield from _differing(*pair, f"{name}.{key}" if name else key)


def _sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _override(kind: type[Section], values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override ({override}) must look like section.field=value")
    *path, last = key.split(".")
    node: Any = values
    field = None
    for name, following, field in zip(path, [*path, last][1:], _fields_along(kind, path), strict=True):
        child = _entry(node, name, override) if isinstance(node, list) else node.setdefault(name, {})
        child = _written_out(child, field, following)
        if not isinstance(child, dict | list):
            raise ValueError(f"override ({override}) must name a field; {name} is a value and has none")
        node[int(name) if isinstance(node, list) else name] = child
        node = _as_list(child, field) if following.isdecimal() else child
    try:
        value = parse(text) if text else None
    except ValueError as error:
        raise ValueError(f"override ({override}): {error}") from error
    if isinstance(node, list):
        _entry(node, last, override)
        node[int(last)] = value
    else:
        if last == "type" and field and _is_typed(field) and node.get("type", value) != value:
            node.clear()  # another type has other fields
        node[last] = value


def _written_out(value: Any, field: FieldInfo | None, following: str) -> Any:
    """A section that is written in short, by its type or as a list, with its fields, where the field
    `following` of it is set."""
    if field is None:
        return value
    if isinstance(value, str) and _is_typed(field):
        return {"type": value}
    if isinstance(value, list) and not following.isdecimal():
        for section in sections_in(field.annotation):
            if section.list_field:
                return {section.list_field: value}
    return value


def _as_list(value: Any, field: FieldInfo | None) -> Any:
    """The list that a section stands for, where its list is written out."""
    names = [section.list_field for section in sections_in(field.annotation)] if field else []
    lists = [value[name] for name in names if name and isinstance(value, dict) and name in value]
    return lists[0] if lists else value


def _is_typed(field: FieldInfo) -> bool:
    """Whether the field is a section that its `type` alone may stand for."""
    sections = sections_in(field.annotation)
    return bool(sections) and all(map(types_of, sections)) and not choices(field.annotation)


def _fields_along(kind: type[Section], path: Sequence[str]) -> list[FieldInfo | None]:
    """The fields that the parts of a dotted name stand for; None for indices and what is no field."""
    fields, current = [], [kind]
    for name in path:
        matches = [section.model_fields[name] for section in current if name in section.model_fields]
        fields.append(matches[0] if matches else None)
        if not name.isdecimal():
            current = [section for field in matches for section in sections_in(field.annotation)]
    return fields


def _entry(values: list, index: str, override: str) -> Any:
    if not index.isdecimal() or int(index) >= len(values):
        raise ValueError(
            f"override ({override}) must name an entry by its number from 0 to {len(values) - 1}, not {index}"
        )
    return values[int(index)]


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors, and where in the config it is."""

    error: Mapping[str, Any]
    path: tuple[str | int, ...]
    """Fields and indices, without what pydantic puts between them for the members of a union."""
    parents: tuple[type[Section], ...]
    """The sections that the last of them is a field of, or is not."""
    annotation: Any
    metadata: tuple[Any, ...]
    """Type of the value, and its bounds."""


def _locate(kind: type[Section], values: Any, error: Mapping[str, Any]) -> _Problem:
    path: list[str | int] = []
    value = values
    parents = current = [kind]
    annotation: Any = kind
    key: Any = str
    metadata: tuple[Any, ...] = ()
    *_, last = error["loc"] or [None]
    for part in error["loc"]:
        fields = [section.model_fields[part] for section in current if part in section.model_fields]
        variants = [section for section in current if part in (*types_of(section), section.__name__)]
        if fields:
            path.append(part)
            value = value.get(part) if isinstance(value, Mapping) else None
            parents, annotation, metadata = current, fields[0].annotation, tuple(fields[0].metadata)
            current = [section for field in fields for section in sections_in(field.annotation)]
        elif part == "[key]":
            annotation = key
        elif get_origin(annotation) in (list, tuple, dict):
            key = get_args(annotation)[0]
            if not (isinstance(part, int) and isinstance(value, Mapping)):  # one entry in the place of a list
                path.append(part)
                value = value[part] if isinstance(value, list) and isinstance(part, int) else None
            annotation, metadata = _entry_type(annotation, part), ()
        elif variants:
            parents = current = variants
        elif part == last and error["type"] == "extra_forbidden":
            path.append(part)
            parents = current
    return _Problem(error, tuple(path), tuple(parents), annotation, metadata)


def _entry_type(annotation: Any, part: str | int) -> Any:
    """Type of a list's, tuple's or mapping's entry."""
    types = get_args(annotation)
    if get_origin(annotation) is tuple and isinstance(part, int) and part < len(types):
        return types[part]
    return types[-1]


def _explain(kind: type[Section], values: Any, error: ValidationError) -> list[str]:
    """One sentence for each field with errors. Of a union's errors the ones inside its section count, if the
    value is one."""
    problems = [_locate(kind, values, item) for item in error.errors()]
    above = {problem.path[:count] for problem in problems for count in range(len(problem.path))}
    sentences = [_sentence(kind, problem) for problem in problems if problem.path not in above]
    return list(dict.fromkeys(sentences))


def _sentence(kind: type[Section], problem: _Problem) -> str:
    error, name = problem.error, kind.field_label(problem.path) or "config"
    if error["type"] == "extra_forbidden":
        return _unknown(kind, problem)
    if error["type"] == "missing":
        example = "".join(section.example for section in sections_in(problem.annotation)[:1]) or "..."
        return f"{name} is missing; add it to the config file or to the command line as {name}={example}"
    if error["type"] == "union_tag_invalid":
        types = [word for section in sections_in(problem.annotation) for word in types_of(section)]
        word = error["ctx"]["tag"]
        return f"{name}.type ({word}) must be one of {', '.join(types)}{_did_you_mean(word, types)}"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{name}: {message}" if problem.path else message
    value = error["input"]
    shown = repr(value) if len(repr(value)) <= MAX_VALUE else f"{repr(value)[:MAX_VALUE]}..."
    if error["type"] == "finite_number":
        return f"{name} ({shown}) must be finite"
    hint = _did_you_mean(
        str(value), [] if get_origin(problem.annotation) is list else choices(problem.annotation)
    )
    if problem.annotation is str and isinstance(value, int | float):
        hint = "; put it in quotes"
    return f"{name} ({shown}) must be {expected(problem.annotation, problem.metadata)}{hint}"


def _did_you_mean(word: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(kind: type[Section], problem: _Problem) -> str:
    """A field that doesn't exist, and the one that was probably meant: a neighbour of nearly this name, or
    the field that other trainers call so. Of another trainer's section, one line for each of its fields."""
    *above, last = problem.path
    unknown = kind.field_label(problem.path)
    value = problem.error["input"]
    foreign = isinstance(value, Mapping) and value and not _is_misspelt(kind, unknown, value)
    if foreign and not without_field(unknown):
        fields = list(_fields_below(unknown, value))
        lines = [f"unknown field `{name}`; {_instead(kind, name)}" for name in fields[:MAX_FOREIGN]]
        rest = f"... and {len(fields) - MAX_FOREIGN} more below `{unknown}`; docs/coming-from.md lists names"
        return "\n".join([*lines, *([rest] if len(fields) > MAX_FOREIGN else [])])
    fields = {field: info for section in problem.parents for field, info in section.model_fields.items()}
    nearby = [field for field, info in fields.items() if _called(unknown, info)]
    nearby += difflib.get_close_matches(str(last), fields, n=1, cutoff=0.75)
    similar = difflib.get_close_matches(str(last), fields, n=1, cutoff=0.5)
    here, near = ([kind.field_label([*above, field]) for field in names] for names in (nearby, similar))
    if unknown in dict(walk(kind)):
        hint = "only another `type` has it."
    else:
        hint = _instead(kind, unknown, here, near)
    return f"unknown field `{unknown}`; {hint} Fields there: {', '.join(fields)}"


def _is_misspelt(kind: type[Section], name: str, value: Mapping[str, Any]) -> bool:
    """Whether an unknown section has nearly the name, and only fields, of one of ours."""
    sections = {path: sections_in(info.annotation) for path, info in walk(kind)}
    return any(
        section.model_fields.keys() >= value.keys()
        for path in difflib.get_close_matches(
            name, [path for path in sections if sections[path]], cutoff=0.75
        )
        for section in sections[path]
    )


def _instead(kind: type[Section], name: str, first: Sequence[str] = (), last: Sequence[str] = ()) -> str:
    """What to write instead of a field that doesn't exist, by its dotted name. `first` and `last` are guesses
    that count more and less than names of other trainers."""
    if not first and (sentence := without_field(name)):
        return f"{sentence}."
    elsewhere = [path for path, _ in walk(kind) if "." in path and name.endswith(f".{path}")]
    elsewhere += [
        path for dotted in (True, False) for path, info in walk(kind) if _called(name, info, dotted)
    ]
    elsewhere += [path for path, _ in walk(kind) if path.rpartition(".")[2] == name.rpartition(".")[2]]
    meant = [*first, *elsewhere, *last]
    return f"did you mean `{meant[0]}`?" if meant else "remove it, or check its name."


def _called(name: str, field: FieldInfo, dotted: bool | None = None) -> bool:
    """Whether other trainers call the field so, by the end of its dotted name; with `dotted` only by names
    that have a dot, or only by those without."""
    others = [other for other in other_names(field) if dotted in (None, "." in other)]
    return any(f".{name}".endswith(f".{other}") for other in others)


def _fields_below(name: str, value: Any) -> Iterator[str]:
    """Dotted names of a section's fields; those that only one sentence stands for are not taken apart."""
    if isinstance(value, Mapping) and value and not without_field(name):
        for key, item in value.items():
            yield from _fields_below(f"{name}.{key}", item)
    else:
        yield name


def check_processes(config: TrainConfig | SftConfig, size: int) -> int:
    """Number of processes, of `size`, that share one copy of the model. Raises ValueError where the config
    doesn't work with `size` processes."""
    train = config.train
    shard = size if train.shard == "all" else train.shard
    if isinstance(train, TrainerConfig):
        minibatch, name = train.prompts_per_step // train.minibatches, "prompts_per_step / minibatches"
    else:
        minibatch, name = train.rows_per_step, "rows_per_step"
    if minibatch % size:
        field, factor = name.partition(" / ")[0], train.minibatches if isinstance(train, TrainerConfig) else 1
        times = [minibatch // size * size, minibatch // size * size + size]
        options = " or ".join(f"train.{field}={number * factor}" for number in times if number)
        raise ValueError(
            f"train.{name} ({minibatch}) must be divisible by the number of processes ({size}, one per GPU), "
            f"since a group stays in one process; use {options}, or another number of processes"
        )
    if size % shard:
        divisors = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise ValueError(
            f"train.shard ({shard}) must divide the number of processes ({size}, one per GPU); use one of "
            f"{divisors}, or all"
            + ("" if size > 1 else f"; `torchrun --nproc-per-node {shard} -m vlm_sapo ...` starts {shard}")
        )
    _check_combinations(config, size, shard)
    return shard


def _check_combinations(config: TrainConfig | SftConfig, size: int, shard: int) -> None:
    train, engine = config.train, config.rollout.engine
    sharded = shard > 1 or train.offload
    four_bits = config.model.lora is not None and config.model.lora.bits
    for wrong, message in (
        (
            sharded and train.optimizer != "adamw",
            f"train.optimizer ({train.optimizer}) can't be sharded or offloaded; use adamw, or "
            "train.shard=1 without train.offload",
        ),
        (
            sharded and four_bits,
            "model.lora.bits (4) can't be sharded or offloaded; leave it out, or use train.shard=1 without "
            "train.offload",
        ),
        (
            train.reduce_dtype == "bfloat16" and not (sharded and train.precision == "bf16"),
            "train.reduce_dtype (bfloat16) must be float32 unless the model is sharded and train.precision "
            "is bf16; leave it out",
        ),
        (
            size > 1 and isinstance(engine, VllmConfig) and engine.tensor_parallel > 1,
            f"rollout.engine.tensor_parallel must be 1 where {size} processes train, each with an engine of "
            "its own; use vllm_server for engines on several GPUs",
        ),
    ):
        if wrong:
            raise ValueError(message)
