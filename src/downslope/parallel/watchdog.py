"""A watchdog on progress: a rank that hangs writes down where, and ends, so that all can start anew."""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path

PATIENCE = 600.0
"""Seconds without progress after which a rank is given up, and in which ranks must answer each other."""


class Watchdog:
    """Ends this process, with the stacks of all its threads in `path`, unless `alive` is called within
    `patience` seconds, again and again.

    It waits in a thread of C that needs no GIL, so that a process that is stuck in a collective, a lock or a
    loop is found as well; one that was stopped (SIGSTOP) is not, but those that wait for it are.
    """

    def __init__(self, path: Path, patience: float) -> None:
        self.patience = patience
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._last = -1.0
        self.alive()

    def alive(self) -> None:
        """There was progress. Cheap enough for every update: the clock is set anew once a second."""
        now = time.monotonic()
        if now > self._last + min(1.0, self.patience / 10) or self._last < 0:
            self._last = now
            faulthandler.dump_traceback_later(self.patience, exit=True, file=self._file)

    def close(self) -> None:
        """No longer watch."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
