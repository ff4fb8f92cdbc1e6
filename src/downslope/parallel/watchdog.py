"""A watchdog on progress: a rank that hangs writes down where, and ends, so that all can start anew."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 600.0
"""Seconds without progress after which a rank is given up, and in which ranks must answer each other."""

_OFTEN = 1.0  # seconds between two settings of the clock, which starts a thread

_watching: list[_Watchdog] = []


@contextmanager
def watched(path: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Within it, this process ends, with the stacks of all its threads in `path`, unless `alive` is called
    every `patience` seconds.

    The clock runs in a thread of C that needs no GIL: a process that is stuck in a collective, a lock or a
    loop is found too. One that was stopped (SIGSTOP) is not, but those that wait for it are. The file is
    touched as often as the clock is set, and goes in the end if nothing is in it.
    """
    _watching.append(_Watchdog(path, patience))
    try:
        alive()
        yield
    finally:
        _watching.pop().close()


def alive() -> None:
    """There was progress. Cheap enough for every update; without a watch it does nothing."""
    if _watching:
        _watching[-1].alive()


class _Watchdog:
    def __init__(self, path: Path, patience: float) -> None:
        self.path, self.patience = path, patience
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self.file = os.open(path, flags, 0o600)
        self.due = 0.0

    def alive(self) -> None:
        now = time.monotonic()
        if now >= self.due:
            self.due = now + min(_OFTEN, self.patience / 10)
            os.utime(self.file)
            faulthandler.dump_traceback_later(self.patience, exit=True, file=self.file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if not os.fstat(self.file).st_size:
            with suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()
        os.close(self.file)
