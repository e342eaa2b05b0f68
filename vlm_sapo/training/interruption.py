"""A run that is asked to stop (SIGTERM, SIGINT) leaves a checkpoint and goes on another time."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vlm_sapo.world import Interrupted, World

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """What a signal does between `listening` begins and ends.

    Between two steps, which is most of the time, it ends the work at once; an update is finished first.
    Several processes agree on it after a step. A second signal ends the process where it is.
    """

    def __init__(self, world: World):
        self.world, self.reason, self._between = world, "", False

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a signal raises Interrupted; so does one that came before. All processes call it."""
        if reason := max(self.world.gather(self.reason)):
            raise Interrupted(f"stopped: {reason}")
        self._between = self.world.size == 1
        try:
            yield
        finally:
            self._between = False

    def ask(self, reason: str) -> None:
        """Ends the run before its next step."""
        self.reason = reason

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            sys.exit(128 + number)
        self.ask(signal.Signals(number).name)
        if self._between:
            raise Interrupted(f"stopped: {self.reason}")
