"""Sends a run's numbers, histograms and sample images to experiment trackers. A tracker that fails never ends
the run."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from vlm_sapo.algo.diagnostics import DECADES
from vlm_sapo.distributed import Interrupted, deferring_signals

IMAGE_STEPS = 10
"""Images are sent at the first of every so many steps."""
CAPTION_LENGTH = 2000
"""Characters of an image's caption."""
_DECADES = DECADES.tolist()
EDGES = {
    "log_ratio": [-100.0, *(-edge for edge in reversed(_DECADES)), *_DECADES, 100.0],
    "attenuated_pos": [0.0, *_DECADES, 100.0],
    "attenuated_neg": [0.0, *_DECADES, 100.0],
}
"""Bin edges of each histogram: those of algo.diagnostics, closed at both ends."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker starts or continues."""

    project: str
    name: str
    folder: Path
    config: dict[str, Any]
    step: int
    """The last step before this start: 0 for a new run."""


class Tracker(Protocol):
    """One tracking service; names follow `accelerate.tracking`. Any method may raise."""

    id: str
    """Stored, so that a resumed run continues the same tracker run; empty where the folder identifies it."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def log_histogram(self, name: str, counts: Sequence[int], edges: Sequence[float], step: int) -> None:
        """`counts` of the bins between `edges`, which has one entry more."""

    def log_image(self, name: str, path: Path, caption: str, step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard(TensorBoardTracker):
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    id = ""

    def __init__(self, run: TrackedRun, id: str):
        super().__init__("tensorboard", run.folder, purge_step=run.step + 1)
        self.start()

    def log_histogram(self, name: str, counts: Sequence[int], edges: Sequence[float], step: int) -> None:
        middles = np.array([(low + high) / 2 for low, high in pairwise(edges)])
        self.tracker.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=float(np.dot(counts, middles)),
            sum_squares=float(np.dot(counts, middles**2)),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def log_image(self, name: str, path: Path, caption: str, step: int) -> None:
        with Image.open(path) as image:
            self.tracker.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.tracker.add_text(name, caption, step)


class _MediaLogging:
    """W&B and trackio take histograms and images as objects of their package, logged like numbers."""

    package: Any

    def log_histogram(self, name: str, counts: Sequence[int], edges: Sequence[float], step: int) -> None:
        self.log({name: self.package.Histogram(np_histogram=(list(counts), list(edges)))}, step=step)

    def log_image(self, name: str, path: Path, caption: str, step: int) -> None:
        self.log({name: self.package.Image(str(path), caption=caption)}, step=step)


class WandB(_MediaLogging, WandBTracker):
    """Weights & Biases; `WANDB_MODE=offline` keeps the data on this machine."""

    def __init__(self, run: TrackedRun, id: str):
        import wandb

        self.package = wandb
        options = {"id": id or None, "resume": "allow", "dir": str(run.folder)}
        super().__init__(run.project, name=run.name, config=run.config, **options)
        self.start()
        self.id = self.tracker.id


class Trackio(_MediaLogging, TrackioTracker):
    """trackio: `trackio show`; `TRACKIO_DIR` is where its data lies. It identifies runs by name, so each run
    gets a unique one."""

    def __init__(self, run: TrackedRun, id: str):
        import trackio

        self.package = trackio
        self.id = id or f"{run.name}-{secrets.token_hex(3)}"
        super().__init__(run.project, name=self.id, config=run.config, resume="allow", embed=False)
        self.start()


class MLflow:
    """MLflow at `MLFLOW_TRACKING_URI`. Uses a client of its own: accelerate's tracker logs into the thread's
    active run, which may be the caller's."""

    def __init__(self, run: TrackedRun, id: str):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        self.id = id or self._create_run(run)
        if not id:
            params = [Param(key, json.dumps(value)[:500]) for key, value in run.config.items()]
            self.client.log_batch(self.id, params=params)

    def _create_run(self, run: TrackedRun) -> str:
        experiment = self.client.get_experiment_by_name(run.project)
        id = experiment.experiment_id if experiment else self.client.create_experiment(run.project)
        return self.client.create_run(id, run_name=run.name).info.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 500):  # a request takes at most 1,000
            self.client.log_batch(self.id, metrics=metrics[start : start + 500])

    def log_histogram(self, name: str, counts: Sequence[int], edges: Sequence[float], step: int) -> None:
        """MLflow has no histograms; they are left out."""

    def log_image(self, name: str, path: Path, caption: str, step: int) -> None:
        with Image.open(path) as image:
            self.client.log_image(self.id, image.convert("RGB"), key=name, step=step)
        self.client.log_text(self.id, caption, f"{name}_{step}.txt")

    def finish(self) -> None:
        self.client.set_terminated(self.id)


def _mlflow_name(name: str) -> str:
    """MLflow refuses characters such as the @ of pass@1, and path parts such as `..`."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


TRACKERS: dict[str, Callable[[TrackedRun, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Trackers:
    """The trackers of a run; they receive what is appended to its logs. One that fails is dropped with a
    warning."""

    def __init__(self, active: Mapping[str, Tracker], folder: Path, warn: Callable[[str], None]):
        self.active, self.folder, self.warn = dict(active), folder, warn
        self.last_image: tuple[int, int] | None = None
        """Step and group of the last image that was sent."""

    def __call__(self, log: str, record: Mapping[str, Any]) -> None:
        """Sends a record of the log file `log`."""
        if log == "metrics.jsonl":
            numbers = _numbers(record)  # `policy/...` are the means over the mini-batches
            self._log(record["step"], {k: v for k, v in numbers.items() if not k.startswith("minibatch")})
        elif log == "evaluations.jsonl":
            values = {f"eval/{record['name']}/{key}": value for key, value in _numbers(record).items()}
            self._log(record["step"], values)
        elif log == "histograms.jsonl":
            self._log_histograms(record["step"], record["minibatches"])
        elif log == "rollouts.jsonl" and record["step"] % IMAGE_STEPS == 1 and record["pictures"]:
            self._log_image(record)

    def close(self) -> None:
        for name in list(self.active):
            with self._dropped_on_failure(name) as tracker:
                tracker.finish()

    def _log(self, step: int, values: dict[str, float]) -> None:
        for name in list(self.active):
            with self._dropped_on_failure(name) as tracker:
                tracker.log(values, step=step)

    def _log_histograms(self, step: int, minibatches: Sequence[Mapping[str, list]]) -> None:
        """The counts of a step's mini-batches, summed."""
        histograms = {
            name: np.sum([one[name] for one in minibatches], axis=0) for name in EDGES if minibatches
        }
        for name in list(self.active):
            with self._dropped_on_failure(name) as tracker:
                for key, counts in histograms.items():
                    tracker.log_histogram(f"policy/{key}", counts.tolist(), EDGES[key], step=step)

    def _log_image(self, record: Mapping[str, Any]) -> None:
        """A group's image, with the first of its responses."""
        group = (record["step"], record["place"])
        if group == self.last_image:
            return
        self.last_image = group
        path = self.folder / record["pictures"][0]
        for name in list(self.active):
            with self._dropped_on_failure(name) as tracker:
                tracker.log_image(f"rollouts/{record['place']}", path, _caption(record), step=record["step"])

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[Tracker]:
        tracker = self.active[name]
        try:
            with deferring_signals():  # a signal is not the tracker's failure
                yield tracker
        except Interrupted:
            raise
        except Exception as error:  # any failure of a service; the run's own files have everything
            self.warn(f"{name} failed ({error!r}); nothing more of this run is sent to it")
            del self.active[name]
            with suppress(Exception):
                tracker.finish()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among a record's values."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _caption(record: Mapping[str, Any]) -> str:
    text = f"{record['problem']}\n{record['response']}\nreward {record['reward']:g}, gold {record['answer']}"
    return text[:CAPTION_LENGTH]


def build_trackers(
    names: Sequence[str],
    *,
    project: str,
    name: str,
    folder: Path,
    config: dict[str, Any],
    step: int,
    warn: Callable[[str], None],
) -> Trackers:
    """Starts trackers by name. A run that resumes from `step` continues its tracker runs, whose ids are in
    `trackers.json`. Raises ValueError for a tracker that isn't installed or can't start."""
    path = folder / "trackers.json"
    ids = json.loads(path.read_text()) if path.is_file() else {}
    run = TrackedRun(project, name, folder, config, step)
    active: dict[str, Tracker] = {}
    for each in names:
        try:
            active[each] = TRACKERS[each](run, ids.get(each, ""))
        except ImportError as error:
            raise ValueError(f"log.to ({each}) needs a package: pip install {each} ({error})") from error
        except Exception as error:
            raise ValueError(f"log.to ({each}) cannot start ({error})") from error
    if active:
        path.write_text(json.dumps({each: tracker.id for each, tracker in active.items()}))
    return Trackers(active, folder, warn)
