"""The sections of a run as such: its folder, its checkpoints, what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vlm_sapo.config.data import Count, Positive, Rate, Section

Factor = Annotated[float, Field(ge=1)]


class RunConfig(Section):
    name: str = "run"
    """Name of the run; its folder is `runs/<name>` unless `run.dir` says otherwise."""
    dir: str | None = None
    """Folder that everything is written to. A folder with a checkpoint of the same config is resumed."""
    seed: int = 0
    """Seeds the order of the data and the sampling."""
    accept_changes: bool = False
    """Go on in a folder whose run had another config, although that makes it another run."""
    overwrite: bool = False
    """Start anew in a folder that holds a run, removing what that run wrote."""

    @property
    def folder(self) -> Path:
        return Path(self.dir) if self.dir else Path("runs") / self.name


class CheckpointConfig(Section):
    every: Count = 50
    """Write a checkpoint every so many steps and after the last one; 0 for never."""
    keep_last: Positive = 2
    """How many of the newest checkpoints stay."""
    keep_best: Count = 0
    """How many more stay: those with the best held-out result, of the steps that were evaluated."""
    background: bool = False
    """Write them while training goes on, from a copy of weights and optimizer in host memory."""
    on_error: Literal["warn", "stop"] = "warn"
    """When one can't be written (a full disk): go on and try again when the next one is due, or stop. The
    ones before stay whole."""

    def check_best(self, evaluated: int, measures: Any) -> None:
        """Raises ValueError where no evaluation would fall on a checkpoint; `evaluated` is eval.every, and
        `measures` is empty where there is nothing to evaluate on."""
        if self.keep_best and not measures:
            raise ValueError(
                f"checkpoint.keep_best ({self.keep_best}) keeps checkpoints by their evaluation, so "
                "eval.data must be set"
            )
        if self.keep_best and (not self.every or not evaluated or evaluated % self.every):
            raise ValueError(
                f"checkpoint.keep_best ({self.keep_best}) keeps checkpoints of steps that were evaluated, so "
                f"eval.every ({evaluated}) must be a multiple of checkpoint.every ({self.every}); use "
                f"eval.every={self.every or 50} checkpoint.every={self.every or 50}"
            )


class AlarmsConfig(Section):
    window: Positive = 20
    """Steps whose mean is compared."""
    entropy: Rate = 0.1
    """Alarm where the entropy is under this share of the first steps'."""
    length: Factor = 4.0
    """Alarm where responses are so many times longer or shorter than in the first steps."""
    reward: Rate = 0.5
    """Alarm where the mean reward is under this share of its best."""
    grad_norm: Factor = 20.0
    """Alarm where the gradient's norm is so many times that of the first steps."""
    identical: Rate = 0.9
    """Alarm where more than this share of responses equals another response to the same prompt."""
    stop: bool = False
    """Stop the run at an alarm, with a checkpoint and exit code 3; `checkpoint.keep_best` keeps the best one.
    The same command goes on, and the same alarm is not given again before it was over."""


class LogConfig(Section):
    rollouts: Count = 2
    """Groups per step whose responses go to `rollouts.jsonl` and into the report, the first and the last
    among them."""
    to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Trackers that also get numbers, histograms and, every tenth step, pictures."""
    project: str = "vlm_sapo"
    """What the trackers call the project; a run is called like its folder."""
