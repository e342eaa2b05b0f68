"""Callbacks: a user's objects that are told of steps, responses, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from vlm_sapo.distributed import Interrupted, deferring_signals


class Callback:
    """Base class: override what you need. Only the main process calls them, in the training thread, after
    the files of the run have the same facts.

    An exception stops the run before its next step, with a checkpoint as after Ctrl-C, and `train` raises it;
    the same call resumes. To end a run early, raise an exception of yours.
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """After a step, with its metrics by name (docs/run-folder.md)."""

    def on_rollouts(self, step: int, rollouts: list[dict[str, Any]]) -> None:
        """After a step, before `on_step`, with its lines of `rollouts.jsonl`: responses with problem, reward,
        advantage. `log.rollouts` says of how many groups."""

    def on_evaluation(self, step: int, name: str, metrics: dict[str, Any]) -> None:
        """After an evaluation, with its line of `evaluations.jsonl`: `pass@1`, `ci95`, `n`, ..."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """When a checkpoint is complete, with its folder. Those that are written in the background are
        announced when the next one starts, or the run ends."""


def checked(callbacks: Any) -> list[Callback]:
    """The callbacks as a list. Raises ValueError for what is none."""
    listed = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for item in listed:
        if not isinstance(item, Callback) or not isinstance(callbacks, Iterable):
            raise ValueError(
                f"callbacks ({item!r:.80}) must be a list of objects of subclasses of vlm_sapo.Callback"
            )
    return listed


class Callbacks:
    """Calls callbacks for what is written into a run's folder, until one fails.

    `request_stop` stops the run before its next step, with a reason.
    """

    def __init__(self, callbacks: Sequence[Callback], request_stop: Callable[[str], None]):
        self.callbacks, self.request_stop = callbacks, request_stop
        self.failure: BaseException | None = None
        """What a callback raised; none is called any more."""
        self._rollouts: list[dict[str, Any]] = []

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.failure is not None and (error is None or isinstance(error, Interrupted)):
            raise self.failure from None

    def __call__(self, event: str, record: Mapping[str, Any]) -> None:
        """Passes on a line of a log, or a complete checkpoint."""
        if event == "rollouts.jsonl":
            self._rollouts.append(dict(record))
        elif event == "metrics.jsonl":
            metrics = {name: value for name, value in record.items() if name != "step"}
            rollouts, self._rollouts = self._rollouts, []
            if rollouts:
                self._call([item.on_rollouts for item in self.callbacks], record["step"], rollouts)
            self._call([item.on_step for item in self.callbacks], record["step"], metrics)
        elif event == "evaluations.jsonl":
            metrics = {name: value for name, value in record.items() if name not in ("step", "name")}
            methods = [item.on_evaluation for item in self.callbacks]
            self._call(methods, record["step"], record["name"], metrics)
        elif event == "checkpoint":
            self._call([item.on_checkpoint for item in self.callbacks], record["step"], record["path"])

    def close(self) -> None:
        """Nothing is open."""

    def _call(self, methods: Sequence[Callable[..., None]], step: int, *facts: Any) -> None:
        for method in methods:
            if self.failure is not None:
                return
            with deferring_signals():  # a signal is not the callback's failure
                try:
                    method(step, *deepcopy(facts))  # one that changes them changes its own
                except BaseException as error:  # whatever a user's code raises, `sys.exit()` included
                    name = method.__qualname__
                    error.add_note(
                        f"raised by {name} after step {step}; the same call resumes a run that isn't finished"
                    )
                    self.failure = error
                    self.request_stop(f"{name} raised {error!r}")
