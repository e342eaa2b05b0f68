"""Sends a run's numbers, histograms and sample pictures to trackers; a run outlives any of them."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlm_sapo.algo.diagnostics import DECADES
from vlm_sapo.distributed import Interrupted, shielded

Numbers = Mapping[str, float]
PICTURES = 10
"""Pictures are sent in the first of so many steps."""
CAPTION = 2000
"""Characters that go with one."""
_DECADES = DECADES.tolist()
EDGES = {
    "log_ratio": [-100.0, *(-edge for edge in reversed(_DECADES)), *_DECADES, 100.0],
    "attenuated_pos": [0.0, *_DECADES, 100.0],
    "attenuated_neg": [0.0, *_DECADES, 100.0],
}
"""Of the histograms; those of algo.diagnostics, with ends."""


class Tracker(Protocol):
    """One service. Any method may raise."""

    id: str
    """What a resumed run goes on under; empty where a folder or a name says it."""

    def numbers(self, step: int, values: Numbers) -> None: ...

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Counts of the bins between the edges, one more than bins."""

    def picture(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    id = ""

    def __init__(self, folder: Path, project: str, name: str, config: dict, id: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, values: Numbers) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self.writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=_dot(counts, middles),
            sum_squares=_dot(counts, [middle**2 for middle in middles]),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        import numpy as np

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.add_text(name, caption, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, folder: Path, project: str, name: str, config: dict, id: str, step: int):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=project, name=name, config=config, id=id or None, resume="allow", dir=str(folder)
        )
        self.id = self.run.id

    def numbers(self, step: int, values: Numbers) -> None:
        self.run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        self.run.log({name: self.wandb.Histogram(np_histogram=(list(counts), list(edges)))}, step=step)

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        self.run.log({name: self.wandb.Image(str(path), caption=caption)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio: `trackio show`; `TRACKIO_DIR` says where it keeps its data. It knows runs by name, so each
    gets one of its own."""

    def __init__(self, folder: Path, project: str, name: str, config: dict, id: str, step: int):
        import trackio

        self.trackio = trackio
        self.id = id or f"{name}-{secrets.token_hex(3)}"
        self.run = trackio.init(project, name=self.id, config=config, resume="allow", embed=False)

    def numbers(self, step: int, values: Numbers) -> None:
        self.run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        made = self.trackio.Histogram(np_histogram=(list(counts), list(edges)))
        self.run.log({name: made}, step=step)

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        self.run.log({name: self.trackio.Image(str(path), caption=caption)}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow at `MLFLOW_TRACKING_URI`, which has no histograms."""

    def __init__(self, folder: Path, project: str, name: str, config: dict, id: str, step: int):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric = MlflowClient(), Metric
        self.id = id or self._begin(project, name)
        if not id:
            texts = {key: json.dumps(value)[:500] for key, value in config.items()}
            self.client.log_batch(self.id, params=[Param(key, text) for key, text in texts.items()])

    def _begin(self, project: str, name: str) -> str:
        found = self.client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self.client.create_experiment(project)
        return self.client.create_run(experiment, run_name=name).info.run_id

    def numbers(self, step: int, values: Numbers) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(_allowed(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 500):  # it takes 1,000 at once
            self.client.log_batch(self.id, metrics=metrics[start : start + 500])

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        with Image.open(path) as image:
            self.client.log_image(self.id, image.convert("RGB"), key=name, step=step)
        self.client.log_text(self.id, caption, f"{name}_{step}.txt")

    def close(self) -> None:
        self.client.set_terminated(self.id)


def _allowed(name: str) -> str:
    """MLflow refuses the @ of pass@1, and names that aren't plain paths."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Trackers:
    """All of a run's: they get what its folder logs. One that fails is left out from then on, with a
    warning."""

    def __init__(self, made: Mapping[str, Tracker], folder: Path, warn: Callable[[str], None]):
        self.made, self.folder, self.warn = dict(made), folder, warn
        self.sent: tuple[int, int] | None = None
        """Step and place of the last picture."""

    def __call__(self, log: str, record: Mapping[str, Any]) -> None:
        """A record of one of the run's logs."""
        step = record["step"]
        if log == "metrics.jsonl":
            self._each(lambda tracker: tracker.numbers(step, _finite(record)))
        elif log == "evaluations.jsonl":
            values = {f"eval/{record['name']}/{key}": value for key, value in _finite(record).items()}
            self._each(lambda tracker: tracker.numbers(step, values))
        elif log == "histograms.jsonl":
            self._histograms(step, record["minibatches"])
        elif log == "rollouts.jsonl" and step % PICTURES == 1 and record["pictures"]:
            if (key := (step, record["place"])) == self.sent:
                return  # the group's first response goes with its picture
            self.sent = key
            name, caption = f"rollouts/{record['place']}", _caption(record)
            self._each(
                lambda tracker: tracker.picture(step, name, self.folder / record["pictures"][0], caption)
            )

    def close(self) -> None:
        """Ends all."""
        self._each(lambda tracker: tracker.close())

    def _histograms(self, step: int, minibatches: Sequence[Mapping[str, list]]) -> None:
        for name, edges in EDGES.items():
            columns = zip(*(one[name] for one in minibatches), strict=True)
            if counts := [sum(column) for column in columns]:
                self._each(partial(_add_histogram, step, f"policy/{name}", counts, edges))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.made.items()):
            try:
                with shielded():  # a signal is not the tracker's failure
                    call(tracker)
            except Interrupted:
                raise
            except Exception as error:  # of a service; the run's own files have everything
                self.warn(f"{name} failed ({error!r}) and gets nothing more of this run")
                del self.made[name]
                with suppress(Exception):
                    tracker.close()


def _add_histogram(step: int, name: str, counts: list[int], edges: list[float], tracker: Tracker) -> None:
    tracker.histogram(step, name, counts, edges)


def _finite(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a record's values."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _caption(record: Mapping[str, Any]) -> str:
    text = f"{record['problem']}\n{record['response']}\nreward {record['reward']:g}, gold {record['answer']}"
    return text[:CAPTION]


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
    """Trackers by name; a run that goes on from `step` finds its own again. Raises ValueError for one that
    isn't installed."""
    path = folder / "trackers.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    made: dict[str, Tracker] = {}
    for each in names:
        try:
            made[each] = TRACKERS[each](folder, project, name, config, known.get(each, ""), step)
        except ImportError as error:
            raise ValueError(f"log.to ({each}) needs a package: pip install {each} ({error})") from error
        except Exception as error:
            raise ValueError(f"log.to ({each}) cannot begin ({error})") from error
    if made:
        path.write_text(json.dumps({each: tracker.id for each, tracker in made.items()}))
    return Trackers(made, folder, warn)


def _dot(counts: Sequence[int], values: Sequence[float]) -> float:
    return sum(count * value for count, value in zip(counts, values, strict=True))
