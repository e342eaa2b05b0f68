"""A run that is asked to stop (SIGTERM, SIGINT) leaves a checkpoint and goes on another time."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vlm_sapo.distributed import Interrupted, World, shielded

TWICE = 2.0
"""Seconds within which signals are one."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """What a signal does between `handling_signals` begins and ends.

    Between two steps, which is most of the time, it ends the work at once; an update is finished first.
    Several processes agree on it after a step. A second signal, TWICE seconds later, ends the process where
    it is: launchers pass on what the processes get themselves.
    """

    def __init__(self, world: World):
        self.world, self.reason, self.alarm, self._between = world, "", False, False
        self._first = math.inf
        """When the first signal came."""

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In the block a signal raises Interrupted; so does one that came before. All processes call it."""
        reason, alarm = max(self.world.all_gather((self.reason, self.alarm)))
        if reason:
            raise Interrupted(reason, alarm=alarm)
        self._between = self.world.size == 1
        try:
            yield
        finally:
            self._between = False

    def ask(self, reason: str, *, alarm: bool = False) -> None:
        """Ends the run before its next step."""
        self.reason, self.alarm = reason, alarm

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first > TWICE:
            sys.exit(128 + number)
        self._first = min(self._first, now)
        if not self.reason:
            self.ask(signal.Signals(number).name)
        if self._between:
            self._between = False
            shielded.raises(Interrupted(self.reason, alarm=self.alarm))
