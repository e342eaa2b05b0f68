"""The sections on the run itself: its folder, checkpoints, alarms, logs and where the result is pushed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vlm_sapo.config.fields import AlsoCalled, Count, Note, Positive, Rate, Section

Factor = Annotated[float, Field(ge=1)]
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class RunConfig(Section):
    name: Annotated[str, Note.FREE_ON_RESUME, AlsoCalled("run_name", "experiment_name")] = "run"
    """Name of the run; its folder is `runs/<name>` unless `run.dir` is set."""
    dir: Annotated[
        str | None,
        Note.FREE_ON_RESUME,
        AlsoCalled(
            "output_dir",
            "resume",
            "resume_from_checkpoint",
            "default_local_dir",
            "load_checkpoint_path",
            "save_checkpoint_path",
            "resume_mode",
            "resume_from_path",
            "find_last_checkpoint",
        ),
    ] = None
    """Folder for all output. If it has a checkpoint of the same config, the run is resumed from it."""
    seed: Annotated[int, Note.IN_REPORT, AlsoCalled("data_seed", "manual_seed")] = 0
    """Seed of data order and sampling."""
    deterministic: Annotated[bool | None, Note.FREE_ON_RESUME, AlsoCalled("full_determinism")] = None
    """Use deterministic operations, so that the same run on the same machine with the same number of threads
    gives the same numbers bit for bit. null is true on CPUs and leaves GPUs as they are; true also asks GPUs
    for it, which is slower there, and an operation that has no such form ends the run with its name."""
    accept_changes: Annotated[bool, Note.FREE_ON_RESUME] = False
    """Resume although the config has changed in ways that affect results."""
    overwrite: Annotated[bool, AlsoCalled("overwrite_output_dir")] = False
    """Start again in a folder that has a run; that run's files are deleted."""

    @property
    def folder(self) -> Path:
        return Path(self.dir).expanduser() if self.dir else Path("runs") / self.name


class CheckpointConfig(Section):
    every: Annotated[Count, AlsoCalled("save_steps", "save_freq", "save_interval", "save_strategy")] = 50
    """Save a checkpoint every N steps and after the last step; 0 for never."""
    keep_last: Annotated[Positive, AlsoCalled("save_total_limit", "save_limit")] = 2
    """Keep the N newest checkpoints."""
    keep_best: Annotated[Count, AlsoCalled("load_best_model_at_end")] = 0
    """Also keep the N checkpoints with the best pass@1 in the first evaluation (`eval.data` says which)."""
    background: Annotated[bool, AlsoCalled("async_save")] = False
    """Write checkpoints while training continues, from a copy of weights and optimizer state in host
    memory."""
    on_error: Literal["warn", "stop"] = "warn"
    """When a checkpoint can't be written (a full disk): `warn` and try again at the next one, or `stop`.
    Earlier checkpoints are not touched."""

    def check_best(self, evaluated_every: int, held_out: Any) -> None:
        """Raises ValueError where no checkpoint would be evaluated. `evaluated_every` is eval.every;
        `held_out` is empty where there is nothing to evaluate on."""
        if self.keep_best and not held_out:
            raise ValueError(
                f"checkpoint.keep_best ({self.keep_best}) selects checkpoints by evaluation; set "
                "data.holdout or eval.data"
            )
        if self.keep_best and (not self.every or not evaluated_every or evaluated_every % self.every):
            raise ValueError(
                f"checkpoint.keep_best ({self.keep_best}) selects among checkpoints that were evaluated, so "
                f"eval.every ({evaluated_every}) must be a multiple of checkpoint.every ({self.every}); use "
                f"eval.every={self.every or 50} checkpoint.every={self.every or 50}"
            )


class AlarmsConfig(Section):
    window: Positive = 20
    """Alarms compare the mean over this many steps."""
    entropy: Rate = 0.1
    """Alarm when entropy falls below this fraction of its value in the first steps."""
    length: Factor = 4.0
    """Alarm when responses are this many times longer or shorter than in the first steps."""
    reward: Rate = 0.5
    """Alarm when the mean reward falls below this fraction of its best value."""
    grad_norm: Factor = 20.0
    """Alarm when the gradient norm is this many times that of the first steps."""
    identical: Rate = 0.9
    """Alarm when more than this fraction of responses is identical to another response to the same prompt."""
    signal: Positive = 5
    """Alarm when this many steps in a row teach nothing: no group whose rewards differ, or no gradient."""
    stop: bool = False
    """Stop the run at an alarm, with a checkpoint and exit code 3; `checkpoint.keep_best` keeps the best one.
    The same command resumes; the same alarm is raised again only after it has cleared."""


class LogConfig(Section):
    rollouts: Annotated[
        Count,
        AlsoCalled(
            "num_completions_to_print", "log_completions", "val_generations_to_log", "rollout_data_dir"
        ),
    ] = 2
    """Groups per step whose responses are written to `rollouts.jsonl` and shown in the report, the first and
    the last group of the step among them."""
    to: Annotated[
        list[Literal["tensorboard", "wandb", "trackio", "mlflow"]],
        AlsoCalled("report_to", "logger", "trackers"),
    ] = []
    """Trackers that get metrics, histograms and, every tenth step, images."""
    project: Annotated[str, AlsoCalled("project_name", "wandb_project")] = "vlm_sapo"
    """Project name in the trackers; a run has the name of its folder."""


class HubConfig(Section):
    push: Annotated[str | None, AlsoCalled("hub_model_id", "push_to_hub")] = None
    """`owner/name` of a repository on the Hugging Face hub to which `final/` and its model card are uploaded
    once the run is finished. Token and right to write are checked before the first step (docs/hub.md)."""
    private: Annotated[bool | None, AlsoCalled("hub_private_repo")] = None
    """Whether the repository is private, if the run creates it; null for the owner's default."""

    @field_validator("push")
    @classmethod
    def _has_owner(cls, value: str | None) -> str | None:
        if value is not None and not REPOSITORY.fullmatch(value):
            raise ValueError(f"this ({value}) must be owner/name, such as my-team/qwen-geometry")
        return value
