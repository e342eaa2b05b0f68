"""The model card of a run: `README.md` in `final/`, with metadata as the hub reads it."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from vlm_sapo.config.data import HELD_OUT
from vlm_sapo.config.files import parse
from vlm_sapo.config.secrets import mask_values
from vlm_sapo.hub import is_hub_id, repo_of_snapshot
from vlm_sapo.reporting import environment
from vlm_sapo.reporting.console import duration
from vlm_sapo.reporting.run_folder import ENCODING_ERRORS, RunFolder, replace

CARD = "README.md"
CURVES = "curves.png"
SIGNATURE = "<!-- written by vlm-sapo, checksum {} -->"
"""The last line of a card, by which it is known whether somebody has edited it."""
TASK = "image-text-to-text"
MAX_ROWS = 20
"""Most evaluations of one set that the curve's table shows."""
HOST = re.compile(r"(https?://)[^\s/'\"]+")
USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")
```"""

Record = Mapping[str, Any]


def write_card(folder: RunFolder, summary: Record, repo: str | None = None) -> Path | None:
    """Writes the card of a run with this summary, and the plot of its curves, into `final/`. A `repo` on the
    hub is where the model will be, by default that of the config. A card that was edited by hand stays beside
    it; returns its new path."""
    final = folder.path / "final"
    if (folder.path / CURVES).is_file():
        shutil.copyfile(folder.path / CURVES, final / CURVES)
    edited = None
    if is_edited(final / CARD):
        edited = next(path for n in count(1) if not (path := final / f"README.edited-{n}.md").exists())
        (final / CARD).rename(edited)
    text = card(folder, summary, repo)
    replace(final / CARD, f"{text}\n{SIGNATURE.format(_checksum(text))}\n")
    return edited


def is_edited(path: Path) -> bool:
    """Whether a card was changed, or written as a whole, by hand."""
    if not path.is_file():
        return False
    text, _, rest = path.read_text(encoding="utf-8").rpartition("\n<!--")
    return f"<!--{rest.rstrip()}" != SIGNATURE.format(_checksum(text))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors=ENCODING_ERRORS)).hexdigest()[:16]


def card(folder: RunFolder, summary: Record, repo: str | None = None) -> str:
    """The card's text: metadata in YAML, then the page in Markdown."""
    config = parse((folder.path / "config.yaml").read_text(encoding="utf-8"))
    started, evaluations = environment.read(folder.path), folder.evaluations()
    name = repo or config.get("hub", {}).get("push") or folder.path.resolve().name
    results = list(_before_and_after(evaluations, summary["steps"]))
    conclusion = summary.get("learnt_nothing", "").partition(";")[0]
    metadata = _metadata(config, started, name, results).to_yaml()
    masked = yaml.safe_dump(mask_values(config), sort_keys=False, allow_unicode=True)
    body = [
        f"# {name.rpartition('/')[2]}",
        _introduction(config, started, summary),
        "## Results",
        *_results(config, results, evaluations),
        *([f"The run's own check says: {conclusion}."] if conclusion else []),
        *([f"![Curves of the training run]({CURVES})"] if (folder.path / CURVES).is_file() else []),
        "## Use",
        USE.format(name=name if "/" in name else "path/to/this/folder"),
        _prompt(config),
        "## Training",
        "\n".join(_training(config, started, summary)),
        _details("Config", public_text(masked)),
        "## Licence",
        _licence(started),
    ]
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(filter(None, body)) + "\n"


def _metadata(
    config: Record, started: Record, name: str, results: Sequence[tuple[Record, Record]]
) -> ModelCardData:
    base, base_model = started.get("base", {}), _base_model(config, started)
    sources = [task["source"] for task in _tasks(config) if is_hub_id(str(task["source"]))]
    kind = ["reinforcement-learning", _objective(config)] if "algo" in config else ["sft"]
    return ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=list(dict.fromkeys(sources)) or None,
        library_name="transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=TASK,
        tags=["vlm-sapo", *kind],
        model_name=name.rpartition("/")[2],
        eval_results=_eval_results(config, results) or None,
    )


def _base_model(config: Record, started: Record) -> str | None:
    """The hub id of the base model; of a local folder what its own card says, or None."""
    path = str(config["model"]["path"])
    return path if is_hub_id(path) else repo_of_snapshot(path) or started.get("base", {}).get("base_model")


def _steps(summary: Record) -> str:
    return f"{summary['steps']} step{'' if summary['steps'] == 1 else 's'}"


def _objective(config: Record) -> str:
    return str(config["algo"]["objective"]["type"])


def _tasks(config: Record) -> list[Record]:
    """The sections of the training data."""
    return config["data"].get("mixture") or [config["data"]]


def _before_and_after(evaluations: Sequence[Record], steps: int) -> Iterator[tuple[Record, Record]]:
    """The records of each evaluation before the first and after the last step."""
    records = {(record["name"], record["step"]): record for record in evaluations}
    for name in dict.fromkeys(record["name"] for record in evaluations):
        if (name, 0) in records and (name, steps) in records:
            yield records[name, 0], records[name, steps]


def _eval_results(config: Record, results: Sequence[tuple[Record, Record]]) -> list[EvalResult]:
    """The entries of the metadata's `model-index`. Two sets of rows of one data set are two there, by their
    own names: the hub takes entries of one data set for one result."""
    entries = [_eval_result(config, before, after) for before, after in results]
    shared = Counter(entry.unique_identifier for entry in entries)
    return [
        entry if shared[entry.unique_identifier] == 1 else _eval_result({}, before, after)
        for entry, (before, after) in zip(entries, results, strict=True)
    ]


def _eval_result(config: Record, before: Record, after: Record) -> EvalResult:
    """The result after training, with the one before in its args."""
    source = _held_out(config, after["name"])
    on_hub = is_hub_id(str(source.get("source")))
    return EvalResult(
        task_type=TASK,
        dataset_type=str(source["source"]) if on_hub else re.sub(r"[^\w.-]+", "-", after["name"]),
        dataset_name=after["name"],
        dataset_config=source.get("subset") if on_hub else None,
        dataset_split=source.get("split") if on_hub else None,
        dataset_revision=source.get("revision") if on_hub else None,
        dataset_args={"problems": after["n"]},
        metric_type="pass@1",
        metric_name="pass@1",
        metric_value=round(after["pass@1"], 4),
        metric_args={
            "ci95": [round(bound, 4) for bound in after["ci95"]],
            "before_training": round(before["pass@1"], 4),
            "before_training_ci95": [round(bound, 4) for bound in before["ci95"]],
        },
    )


def _held_out_sections(config: Record) -> list[Record]:
    data = config.get("eval", {}).get("data") or []
    return data if isinstance(data, list) else [data]


def _held_out(config: Record, name: str) -> Record:
    """The section of the held-out rows that are evaluated under this name; empty for a benchmark."""
    sections = _held_out_sections(config)
    if config.get("data", {}).get("holdout"):
        of_training = {f"{HELD_OUT}/{task.get('name') or task['source']}": task for task in _tasks(config)}
        of_training |= {} if config["data"].get("mixture") else {HELD_OUT: config["data"]}
        if name in of_training:
            return of_training[name]
    named = [section for section in sections if name in (section.get("name"), section.get("source"))]
    return (named or (sections if len(sections) == 1 and name == HELD_OUT else [{}]))[0]


def _introduction(config: Record, started: Record, summary: Record) -> str:
    path, revision = str(config["model"]["path"]), config["model"].get("revision")
    if is_hub_id(path):
        named = f"[{path}](https://huggingface.co/{path})"
    else:
        named = f"`{Path(path).name}`, a local model"
        if origin := _base_model(config, started):
            named += f" made from [{origin}](https://huggingface.co/{origin})"
    at = f" at commit `{revision}`" if revision else ""
    if "algo" in config:
        how = f"reinforcement learning ({_objective(config).upper()})"
    else:
        how = "supervised fine-tuning"
    lora = config["model"].get("lora")
    adapters = (
        f" LoRA adapters of rank {lora['rank']} were trained; the weights here are merged with them, and "
        "`adapter/` has the adapters alone."
        if lora
        else ""
    )
    return (
        f"{named}{at}, trained with {how} for {_steps(summary)} by vlm-sapo.{adapters} This card was "
        "written from the files of the run."
    )


def _results(
    config: Record, results: Sequence[tuple[Record, Record]], evaluations: Sequence[Record]
) -> Iterator[str]:
    if not results:
        yield "This run was not evaluated before and after training, so nothing here says how good it is."
        return
    rows = [
        f"| {_cell(after['name'])} | {after['n']} | {_score(before)} | {_score(after)} |"
        for before, after in results
    ]
    header = ["| evaluated on | problems | before | after |", "| --- | --- | --- | --- |"]
    yield "\n".join([*header, *rows])
    samples = config["eval"].get("samples", 1)
    yield (
        f"pass@1 with its 95 % interval: the mean score of {samples} sampled "
        f"response{'s' if samples > 1 else ''} per problem, graded as in training or by the benchmark's "
        "verifier. The interval says how much the score would vary with other problems of the same kind; "
        "nothing else was evaluated."
    )
    unclear = [after["name"] for before, after in results if _overlap(before["ci95"], after["ci95"])]
    if unclear:
        yield (
            f"On {', '.join(unclear)} the intervals before and after overlap: the table alone does not "
            "show a difference there."
        )
    if len({record["step"] for record in evaluations}) > 2:
        yield _details("Scores during training", "\n".join(_curve(evaluations)), language="")


def _curve(evaluations: Sequence[Record]) -> Iterator[str]:
    """A table of all evaluations, thinned out evenly where there are many."""
    steps = sorted({record["step"] for record in evaluations})
    stride = -(-len(steps) // MAX_ROWS)
    shown = {*steps[::stride], steps[-1]}
    yield "| evaluated on | step | pass@1 |"
    yield "| --- | --- | --- |"
    for record in evaluations:
        if record["step"] in shown:
            yield f"| {_cell(record['name'])} | {record['step']} | {_score(record)} |"


def _cell(text: str) -> str:
    """A text that stays within its cell of a table."""
    return text.replace("|", "\\|")


def _score(record: Record) -> str:
    low, high = record["ci95"]
    return f"{record['pass@1']:.3f} ({low:.3f} to {high:.3f})"


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] <= second[1] and second[0] <= first[1]


def _prompt(config: Record) -> str:
    """How a prompt of training looked, where it was more than the problem."""
    lines = []
    for task in _tasks(config):
        parts = {"system prompt": task.get("system"), "user message": task.get("template")}
        shown = {part: text for part, text in parts.items() if text and text != "{problem}"}
        if shown:
            of = f" of {task.get('name') or task['source']}" if len(_tasks(config)) > 1 else ""
            lines += [f"The {part}{of} in training:\n\n{_block(text)}" for part, text in shown.items()]
    return "\n\n".join(lines)


def _training(config: Record, started: Record, summary: Record) -> Iterator[str]:
    """The lines of a list: data, reward, algorithm, settings, time, devices, command, versions."""
    tasks = _tasks(config)
    total = sum(task.get("share", 1.0) for task in tasks)
    for task in tasks:
        share = f", {task.get('share', 1.0) / total:.0%} of every step" if len(tasks) > 1 else ""
        yield f"- data: {_rows(task)}{share}"
    if holdout := config["data"].get("holdout"):
        yield f"- held-out data: {holdout} of these rows (`data.holdout`), not trained on"
    for section in _held_out_sections(config):
        yield f"- held-out data: {_rows(section)}"
    for part in config.get("reward", {}).get("parts", []) if "algo" in config else []:
        gate = f", gate {part['gate']}" if part.get("gate") is not None else ""
        yield f"- reward: `{public_text(part['name'])}`, weight {part['weight']:g}{gate}"
    train = config["train"]
    if "algo" in config:
        algo = config["algo"]
        fields = {name: value for name, value in algo["objective"].items() if name != "type"}
        objective = ", ".join([_objective(config), *(f"{name} {value}" for name, value in fields.items())])
        advantage = algo["advantage"] if isinstance(algo["advantage"], str) else "own function"
        levels = f"{algo['ratio']} ratios, {advantage} advantages, KL weight {algo['kl']:g}"
        yield f"- algorithm: {objective}; {levels}"
        yield (
            f"- a step: {train['prompts_per_step']} prompts with {config['rollout']['group']} responses of "
            f"at most {config['rollout']['max_tokens']} tokens, in {train['minibatches']} updates"
        )
    else:
        yield f"- a step: {train['rows_per_step']} demonstrations"
    yield (
        f"- optimizer: {train['optimizer']}, peak learning rate {train['lr']:g}, {train['schedule']} "
        f"schedule, {config['model']['dtype']} weights, precision {train['precision']}, seed "
        f"{config['run']['seed']}"
    )
    devices = started.get("devices", [])
    on = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    seconds = summary["seconds"]
    took = duration(seconds) if seconds >= 60 else f"{seconds:.0f} s"
    yield f"- steps: {summary['steps']}, in {took}{f' on {on}' if on else ''}"
    if started:
        yield f"- command: `{public_text(started['command'])}`"
        changed = ", with uncommitted changes" if started["uncommitted_changes"] else ""
        yield f"- code: vlm-sapo at commit {started['commit'] or 'unknown'}{changed}"
        yield f"- versions: {', '.join(f'{name} {number}' for name, number in started['versions'].items())}"
    if changed := started.get("inputs_changed"):
        yield f"- changed between two starts: {public_text(', '.join(dict.fromkeys(changed)))}"
    if resumed := len(started.get("resumed", [])):
        times = "once" if resumed == 1 else f"{resumed} times"
        yield f"- resumed {times}; versions and devices are those of the first start"


def _rows(section: Record) -> str:
    """Where a section's rows come from, and which."""
    name = f"{section['name']}, " if section.get("name") else ""
    fields = [
        f", {field} {section[field]}" for field in ("subset", "split", "revision") if section.get(field)
    ]
    return f"{name}`{public_text(str(section['source']))}`{''.join(fields)}"


def _licence(started: Record) -> str:
    base = started.get("base", {})
    if "license" not in base:
        return (
            "The base model's card names no licence, or there was none to read, so none is given here. Look "
            "up the base model's terms and those of the data before you use or share this model."
        )
    name = base.get("license_name", base["license"])
    link = f" ({base['license_link']})" if "license_link" in base else ""
    return f"That of the base model, as its card says: {name}{link}. The data may have terms of its own."


def public_text(text: str) -> str:
    """A text without what concerns this machine alone: the user's home folder, and hosts of addresses."""
    with suppress(RuntimeError):  # a user without a home
        if (home := str(Path.home())) != "/":
            text = text.replace(f"{home}/", "~/")
    return HOST.sub(r"\1...", text)


def _details(title: str, text: str, language: str = "yaml") -> str:
    """A block that is folded in until a reader opens it."""
    content = _block(text, language) if language else text
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def _block(text: str, language: str = "") -> str:
    """A block of code, with a fence that its text doesn't contain."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
