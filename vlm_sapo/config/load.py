"""A config file and `key=value` overrides to a checked config, and mistakes to sentences."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from vlm_sapo.config.files import find, parse, read_mapping
from vlm_sapo.config.schema import Section, SftConfig, TrainConfig, TrainerConfig

T = TypeVar("T", bound=Section)
TYPED = ("engine", "objective", "correction")
"""Sections that their type alone may stand for."""
HARMLESS = (
    "run.name",
    "run.dir",
    "run.accept_changes",
    "checkpoint.",
    "alarms.",
    "log.",
    "reward.workers",
    "rollout.prompts_per_batch",
    "rollout.engine.servers",
    "rollout.engine.patience",
    "rollout.engine.timeout",
    "rollout.engine.gpu_memory",
    "model.gradient_checkpointing",
    "train.tokens_per_microbatch",
    "train.layout",
    "train.bad_updates",
    "train.shard",
    "train.offload",
)
"""Beginnings of fields that change how a run is carried out, and no result of it."""
VARIANTS = ("sapo", "grpo", "gspo", "cispo", "dppo", "vespo", "own", "hf", "vllm", "vllm_server")
"""Values of `type`, which pydantic puts between a section and its fields."""
NAME_OR_SECTION = ("OwnFunctionConfig", "literal[")
"""How pydantic calls the two forms of a field that is a name or a section."""


def load(kind: type[T], name: str, overrides: Sequence[str] = ()) -> T:
    """Reads a config file, applies `key=value` overrides and checks the result.

    Raises ValueError with one line per problem, each with the field, the value and the remedy.
    """
    values = read_mapping(find(name, "configs", field="CONFIG"))
    for override in overrides:
        _override(values, override)
    return check(kind, values)


def check(kind: type[T], values: dict) -> T:
    """A section from plain values. Raises ValueError with one line per problem."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        items = [item for item in error.errors() if not _is_other_form(item)]
        raise ValueError("\n".join(_explain(kind, item) for item in items)) from error


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

    def __str__(self) -> str:
        return f"{self.field}: {self.before} -> {self.after}"


def differences(before: str, after: str) -> list[Change]:
    """What changed between two configs that `dump` wrote."""
    old, new = (_flat(parse(text)) for text in (before, after))
    constant = new.get("train.schedule") == "constant"
    return [
        Change(
            field,
            old.get(field, "not there"),
            new.get(field, "not there"),
            field.startswith(HARMLESS) or (field == "train.steps" and constant),
        )
        for field in sorted(old.keys() | new.keys())
        if field not in old or field not in new or old[field] != new[field]
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    prefix = f"{name}." if name else ""
    return {key: item for part in value for key, item in _flat(value[part], f"{prefix}{part}").items()}


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override ({override}) must look like section.field=value")
    *path, last = key.split(".")
    node = values
    for name in path:
        if name in TYPED and isinstance(node, dict) and isinstance(node.get(name), str):
            node[name] = {"type": node[name]}
        node = _item(node, name, override) if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"override ({override}) must name a field; {name} is a value and has none")
    try:
        value = parse(text) if text else None
    except ValueError as error:
        raise ValueError(f"override ({override}): {error}") from error
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        if last == "type" and path and path[-1] in TYPED and node.get("type", value) != value:
            node.clear()  # another type has other fields
        node[last] = value


def _item(values: list, index: str, override: str) -> Any:
    if not index.isdecimal() or int(index) >= len(values):
        raise ValueError(f"override ({override}) must name an entry from 0 to {len(values) - 1}, not {index}")
    return values[int(index)]


def _is_other_form(item: dict) -> bool:
    """Whether an error is about the form that a value, a name or a section, does not have."""
    if not item["loc"] or not str(item["loc"][-1]).startswith(NAME_OR_SECTION):
        return False
    return (item["type"] == "literal_error") == isinstance(item["input"], dict)


def _explain(kind: type[Section], item: dict) -> str:
    """One sentence for one of pydantic's errors."""
    location = [
        part for part in item["loc"] if part not in VARIANTS and not str(part).startswith(NAME_OR_SECTION)
    ]
    field = ".".join(map(str, location)) or "config"
    if item["type"] == "extra_forbidden":
        valid = _fields_at(kind, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?" if close else "remove it."
        return f"{field} is not a field; {hint} Fields there: {', '.join(valid)}"
    if item["type"] == "missing":
        return f"{field} is missing; add it to the config file or to the command line as {field}=..."
    if item["type"] == "union_tag_invalid":
        tags = item["ctx"]["expected_tags"].replace("'", "").split(", ")
        close = difflib.get_close_matches(item["ctx"]["tag"], tags, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{field}.type ({item['ctx']['tag']}) must be one of {', '.join(tags)}{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{field}: {message}" if field != "config" else message
    return f"{field} ({item['input']!r}) is not valid: {message[0].lower()}{message[1:]}"


def _fields_at(kind: type[Section], location: tuple) -> list[str]:
    """The field names of the section that a path of an error leads to."""
    current: Any = [kind]
    for part in location:
        if isinstance(part, int) or str(part).startswith(NAME_OR_SECTION):
            continue
        named = [section.model_fields[part].annotation for section in current if part in section.model_fields]
        tagged = [section for section in current if part in _tags(section)]
        current = [section for annotation in named for section in _sections(annotation)] if named else tagged
    return [field for section in current for field in section.model_fields]


def _tags(section: type[Section]) -> tuple[str, ...]:
    field = section.model_fields.get("type")
    return field.annotation.__args__ if field else ()


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    arguments = annotation.__args__ if "__args__" in dir(annotation) else ()
    return [section for argument in arguments for section in _sections(argument)]


def check_processes(config: TrainConfig | SftConfig, size: int) -> int:
    """How many of `size` processes share one copy of the model. Raises ValueError where the config does not
    fit so many."""
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
            f"train.{name} ({minibatch}) must be divisible by the number of processes ({size}, one for each "
            f"GPU), since a group stays in one; use {options}, or another number of processes"
        )
    if size % shard:
        divisors = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise ValueError(
            f"train.shard ({shard}) must divide the number of processes ({size}, one for each GPU); use one "
            f"of {divisors}, or all"
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
            size > 1 and engine.type == "vllm" and engine.tensor_parallel > 1,
            f"rollout.engine.tensor_parallel must be 1 where {size} processes train, each with an engine of "
            "its own; use vllm_server for engines on several GPUs",
        ),
        (
            sharded and engine.type == "vllm_server" and engine.weights == "nccl",
            "rollout.engine.weights (nccl) sends whole weights from a GPU, and with train.shard or "
            "train.offload it has parts; use folder",
        ),
    ):
        if wrong:
            raise ValueError(message)
