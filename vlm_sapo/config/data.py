"""The sections that say where rows come from. Recipes and benchmark definitions are files of such fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from vlm_sapo.config.fields import AlsoCalled, Count, Note, Positive, Rate, Section
from vlm_sapo.config.files import find, read_mapping
from vlm_sapo.config.paths import Paths
from vlm_sapo.config.secrets import check_secrets
from vlm_sapo.plugins import locate


def _public(value: dict[str, Any]) -> dict[str, Any]:
    check_secrets(value, "args")
    return value


PublicArgs = Annotated[dict[str, Any], AfterValidator(_public)]
"""Arguments without secrets: the config is stored."""


HELD_OUT = "held-out"
"""Name of the evaluation on `data.holdout`, and of `eval.data` where that is one source."""
OF_RUN = "run"
"""The verifier of a benchmark that is graded by the reward of the run that evaluates it."""


class VerifierConfig(Section):
    example: ClassVar[str] = "{name: math}"

    name: Annotated[str, Note.FUNCTION]
    """A built-in verifier, `path/to/file.py:function` or `package.module:function`."""
    args: PublicArgs = {}
    """Keyword arguments of the verifier."""


def merge(recipe: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The recipe's fields with overrides, mappings merged at every depth. Another verifier doesn't get the
    arguments of the recipe's."""
    merged = recipe | overrides
    for name in recipe.keys() & overrides.keys():
        old, new = recipe[name], overrides[name]
        if isinstance(old, dict) and isinstance(new, dict):
            other = name == "verifier" and new.get("name", old["name"]) != old["name"]
            merged[name] = new if other else merge(old, new)
    return merged


class SourceConfig(Section):
    example: ClassVar[str] = "{source: rows.jsonl}"

    recipe: Annotated[str | None, Note.DEFINITION] = None
    """A shipped recipe (`data/README.md` lists them) or a YAML file with the fields below. Fields next to
    `recipe` override it; `null` unsets one. The stored config holds the result."""
    name: str | None = None
    """Name of these rows in the logs; by default the recipe's or the source's name."""
    source: Annotated[
        str | None,
        Note.IN_REPORT,
        Note.PATH,
        AlsoCalled(
            "path", "dataset", "train_files", "train_file", "dataset_name", "train_dataset", "data_path"
        ),
    ] = None
    """Hugging Face dataset id, folder, JSON, JSON lines, CSV, TSV or parquet file, or
    `path/to/file.py:function` that returns the rows."""
    fingerprint: str | None = None
    """Hash of rows that a Python program passed (`source: python:dataset`). Set by `train` and `sft`."""
    subset: Annotated[str | None, AlsoCalled("dataset_config", "dataset_config_name")] = None
    """Subset (configuration) of a dataset id that has several."""
    revision: Annotated[str | None, AlsoCalled("dataset_revision")] = None
    """Branch, tag or commit of a dataset id; null for its main branch. The stored config has the commit that
    was used, and a resumed run stays with it."""
    split: Annotated[str | None, AlsoCalled("dataset_train_split", "train_split")] = None
    """Split of a dataset id, folder or JSON file that has several, or a value of the split column."""
    args: Annotated[PublicArgs, Note.IN_REPORT, Note.PATH] = {}
    """Keyword arguments of a source that is a function."""
    columns: Annotated[
        dict[Literal["problem", "answer", "images", "id", "split", "response"], str | list[str]],
        AlsoCalled("prompt_key", "answer_key", "image_key", "input_key", "label_key", "response_key"),
    ] = {}
    """Which columns of the source to read, for example `{problem: question}`; without it they are recognised
    by their usual names (docs/data.md). `a.b` is the key `b` of the mapping in column `a`. Of a list of names
    the first that the rows have counts. `response` is the demonstration that `sft` learns from."""
    filter: dict[str, Any] = {}
    """Keep only rows whose column has this value, or one of these values."""
    transform: Annotated[str | None, Note.FUNCTION] = None
    """`path/to/file.py:function` that rewrites each row (a dict) before its columns are read."""
    limit: Annotated[Positive | None, AlsoCalled("max_samples", "num_samples", "train_max_samples")] = None
    """Use only the first N rows."""
    pictures_anywhere: bool = False
    """Allow rows of a file to name images outside its folder. Rows of a Python function always may."""
    system: Annotated[str | None, AlsoCalled("system_prompt")] = None
    """System prompt; null leaves it to the rows' system turns and the chat template."""
    template: Annotated[str, AlsoCalled("format_prompt", "prompt_template")] = "{problem}"
    """The user message; `{problem}` is replaced by the row's problem."""
    verifier: VerifierConfig | None = None
    """Verifier for the answers of these rows; the reward `auto` uses it."""

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, value: Any) -> Any:
        """The recipe's fields, overridden by those next to it."""
        if not isinstance(value, dict):
            return value
        fields = {name: item for name, item in value.items() if name != "recipe"}
        if value.get("recipe"):
            path = find(str(value["recipe"]), "data", field="recipe")
            recipe = Paths(path.parent).absolute(SourceConfig, read_mapping(path))
            fields = merge({"name": path.stem, **recipe}, fields)
        return {name: item for name, item in fields.items() if item is not None}

    @model_validator(mode="after")
    def _has_problem(self):
        if "{problem}" not in self.template:
            raise ValueError("template must contain {problem}, where the row's problem is inserted")
        return self

    @property
    def task(self) -> str:
        """Name of these rows in the logs."""
        return self.name or str(self.source)


SOURCE_MISSING = "source is missing; set it to a dataset id, a folder or a file with rows"


class RowsConfig(SourceConfig):
    @model_validator(mode="after")
    def _has_source(self):
        if self.source is None:
            raise ValueError(SOURCE_MISSING)
        return self

    def at(self, path: str) -> RowsConfig:
        """The same rows from a local file: as the source, or as a source function's argument `path`."""
        by_function = ":" in str(self.source) and not locate(str(self.source)).exists()
        update = (
            {"args": self.args | {"path": path}}
            if by_function
            else {"source": path, "subset": None, "revision": None}
        )
        return self.model_copy(update=update)


class TaskConfig(RowsConfig):
    example: ClassVar[str] = "{source: rows.jsonl, share: 0.5}"

    share: Annotated[Rate, AlsoCalled("weight", "ratio", "prob")]
    """Share of this task in every mini-batch; shares are normalised to sum to 1."""


class BenchmarkConfig(RowsConfig):
    """A file of `eval/benchmarks/`."""

    about: str = ""
    """Description in one line."""
    verifier: VerifierConfig = VerifierConfig(name="auto", args={"finding": "stated"})
    """Our verifier. `{name: run}` is the reward of the run that has the benchmark in `eval.benchmarks`."""
    official: VerifierConfig | None = None
    """The benchmark's official scorer, where our verifier differs from it on purpose."""
    metric: Annotated[str | None, Note.FUNCTION] = None
    """The official score over all problems, where that is not the mean: a name of METRICS in
    vlm_sapo/evaluation/results.py, or `path/to/file.py:function`."""
    by: list[str] = []
    """Columns to break the score down by."""
    max_tokens: Positive = 2048
    """Maximum length of a response, in tokens."""
    variant: Literal["split", "subset"] = "split"
    """What `NAME:VARIANT` selects."""

    @model_validator(mode="after")
    def _run_has_no_official_scorer(self):
        if self.verifier.name == OF_RUN and (self.official or self.verifier.args):
            raise ValueError(
                f"verifier {OF_RUN} is the run's whole reward and takes neither args nor official beside it; "
                "remove them, or name a verifier"
            )
        return self


class DataConfig(SourceConfig):
    list_field: ClassVar[str] = "mixture"

    mixture: list[TaskConfig] = []
    """Several tasks, each with a fixed share of every mini-batch, instead of one source. `data: [...]` is
    short for it; overrides name the entries `data.mixture.0`, `data.mixture.1`, ... either way."""
    holdout: Annotated[
        Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1)] | None,
        Note.IN_REPORT,
        AlsoCalled(
            "val_size",
            "test_size",
            "eval_split_ratio",
            "split_dataset_ratio",
        ),
    ] = None
    """Rows to hold out of training, of each task of a mixture: a number of rows (200) or a share (0.1). The
    run is evaluated on them as `held-out`, or `held-out/TASK` for each task. No image is on both sides, and
    the split is the same for every `run.seed` (docs/data.md)."""
    max_prompt_tokens: Annotated[Positive, AlsoCalled("max_prompt_length", "prompt_length")] = 4096
    """Longest allowed prompt in tokens, image tokens included. A longer one is an error: prompts are never
    truncated."""
    on_error: Annotated[
        Literal["stop", "skip"], AlsoCalled("filter_overlong_prompts", "truncation", "truncation_strategy")
    ] = "stop"
    """On a row that can't be used: `stop` the run, or `skip` the row and count it."""
    workers: Annotated[
        Count | None, Note.FREE_ON_RESUME, AlsoCalled("dataloader_num_workers", "preprocessing_num_workers")
    ] = None
    """Threads that read and encode rows, the next step's while this one trains; null for one per core, at
    most 4. With 0 the main thread reads a row when it is needed: for a function of yours that must run there,
    or whose random numbers must come in the same order in every run."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {cls.list_field: value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_or_several(self):
        if not self.mixture and self.source is None:
            raise ValueError(SOURCE_MISSING)
        unset = SourceConfig().model_dump()
        misplaced = [name for name, value in self._source().items() if value != unset[name]]
        if self.mixture and misplaced:
            raise ValueError(
                f"{misplaced[0]} next to mixture has no effect; set it in each entry of the mixture"
            )
        names = [task.task for task in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(
                f"mixture has two tasks of one name ({', '.join(names)}); give each its own `name`"
            )
        return self

    @property
    def tasks(self) -> list[TaskConfig]:
        """The tasks with their shares; a single source is one task."""
        if self.mixture:
            return self.mixture
        return [TaskConfig(share=1.0, **self._source())]

    def _source(self) -> dict[str, Any]:
        return self.model_dump(include=set(SourceConfig.model_fields))
