"""The sections that say where rows come from; recipes and benchmark definitions are files of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vlm_sapo.config.files import find, read_mapping
from vlm_sapo.config.secrets import check_secrets

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def _public(value: dict[str, Any]) -> dict[str, Any]:
    check_secrets(value, "args")
    return value


PublicArgs = Annotated[dict[str, Any], AfterValidator(_public)]
"""Arguments that hold no secret: the config is stored."""


class VerifierConfig(Section):
    name: str
    """A verifier, `path/to/file.py:function` or `package.module:function`."""
    args: PublicArgs = {}
    """Its keyword arguments."""


def joined(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given over the recipe's fields, mappings joined at every depth; another verifier brings its own
    arguments."""
    made = recipe | given
    for name in recipe.keys() & given.keys():
        old, new = recipe[name], given[name]
        if isinstance(old, dict) and isinstance(new, dict):
            other = name == "verifier" and new.get("name", old["name"]) != old["name"]
            made[name] = new if other else joined(old, new)
    return made


class SourceConfig(Section):
    recipe: str | None = None
    """Name of a shipped recipe (`data/README.md` lists them) or a YAML file with the fields below; what is
    given beside it comes before, and null takes a field back. The stored config holds the result."""
    name: str | None = None
    """What the logs call these rows; by default the recipe's or the source's name."""
    source: str | None = None
    """Hub id, folder, JSONL or parquet file, or `path/to/file.py:function` that returns the rows."""
    subset: str | None = None
    """Configuration of a hub id that has several."""
    split: str | None = None
    """Split of a hub id or folder that has several, or value of the split column of a JSONL file."""
    args: PublicArgs = {}
    """Keyword arguments of a source that is a function."""
    columns: dict[Literal["problem", "answer", "images", "id", "split", "response"], str | list[str]] = {}
    """The source's own column names, by ours; of a list the first that the rows have. `response` is the
    demonstration that `sft` learns from."""
    filter: dict[str, Any] = {}
    """Keep the rows whose column has this value, or one of these values."""
    transform: str | None = None
    """`path/to/file.py:function` that rewrites each row (a dict) before its columns are read."""
    limit: Positive | None = None
    """Use the first so many rows only."""
    pictures_anywhere: bool = False
    """Let rows of a file name pictures outside its folder. Rows of a Python function may in any case."""
    system: str | None = None
    """System prompt; null leaves it to the chat template."""
    template: str = "{problem}"
    """The user's turn; `{problem}` stands for the row's problem."""
    verifier: VerifierConfig | None = None
    """The verifier of these rows' answers, which the reward `auto` then uses."""

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, value: Any) -> Any:
        """The recipe's fields under the given ones; mappings are joined."""
        if not isinstance(value, dict):
            return value
        given = {name: item for name, item in value.items() if name != "recipe"}
        if value.get("recipe"):
            path = find(str(value["recipe"]), "data", field="recipe")
            given = joined({"name": path.stem, **read_mapping(path)}, given)
        return {name: item for name, item in given.items() if item is not None}

    @model_validator(mode="after")
    def _has_problem(self):
        if "{problem}" not in self.template:
            raise ValueError("template must contain {problem}; put it where the row's problem goes")
        return self

    @property
    def task(self) -> str:
        """What the logs call these rows."""
        return self.name or str(self.source)


class RowsConfig(SourceConfig):
    @model_validator(mode="after")
    def _has_source(self):
        if self.source is None:
            raise ValueError("source is missing; give the hub id, folder or file that holds the rows")
        return self

    def at(self, path: str) -> RowsConfig:
        """The same rows from a local file: as the source, or as a source function's argument `path`."""
        by_function = ":" in str(self.source)
        update = {"args": self.args | {"path": path}} if by_function else {"source": path, "subset": None}
        return self.model_copy(update=update)


class TaskConfig(RowsConfig):
    share: Rate
    """Share of this task in every mini-batch; shares are divided by their sum."""


class BenchmarkConfig(RowsConfig):
    """A file of `eval/benchmarks/`."""

    about: str
    """What it is, in one line."""
    verifier: VerifierConfig = VerifierConfig(name="auto", args={"finding": "stated"})
    """Our verdict of a response."""
    official: VerifierConfig | None = None
    """The authors' own rule, where ours differs from it on purpose."""
    metric: str | None = None
    """The authors' own score over all problems, where that is not the mean: a name of
    vlm_sapo/evaluation/metrics.py, or `path/to/file.py:function`."""
    by: list[str] = []
    """Columns whose values get a score of their own."""
    max_tokens: Positive = 2048
    """Longest response."""
    variant: Literal["split", "subset"] = "split"
    """What `NAME:VARIANT` chooses."""


class DataConfig(SourceConfig):
    mixture: list[TaskConfig] = []
    """Several tasks, each with a fixed share of every mini-batch, instead of one source. `data: [...]` is
    short for it."""
    max_prompt_tokens: Positive = 4096
    """Longest prompt, image tokens included. A longer one is an error: prompts are never cut."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a row that cannot be used does: stop the run, or be skipped and counted."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"mixture": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_or_several(self):
        if not self.mixture and self.source is None:
            raise ValueError("source is missing; give the hub id, folder or file that holds the rows")
        unset = SourceConfig().model_dump()
        given = [name for name, value in self._source().items() if value != unset[name]]
        if self.mixture and given:
            raise ValueError(f"{given[0]} beside mixture has no effect; move it into the mixture's entries")
        names = [task.task for task in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"mixture has two tasks of one name ({', '.join(names)}); give each a `name`")
        return self

    @property
    def tasks(self) -> list[TaskConfig]:
        """The tasks with their shares; a single source is one task."""
        if self.mixture:
            return self.mixture
        return [TaskConfig(share=1.0, **self._source())]

    def _source(self) -> dict[str, Any]:
        return self.model_dump(include=set(SourceConfig.model_fields))
