"""Running compiled code on several threads: torch's own where it uses OpenMP, else plain ones of ours.

torch's threads have just run the backward pass and are still awake; threads beside them would wait for a core
until those fall asleep. Either way the work lies on one cursor from which everybody takes, so a core that is
busy elsewhere holds nobody up, and nobody who came late is waited for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

Start = Callable[[int], None]
"""Compiled code that takes work from the cursor of the job at an address until none is left; it needs no
GIL.
"""

_prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Worker:
    """A thread that waits for one job at a time; two bare locks hand over faster than a future does."""

    def __init__(self) -> None:
        self.offered, self.done = threading.Lock(), threading.Lock()
        self.offered.acquire()
        self.done.acquire()
        self.work: tuple[Start, int] | None = None
        threading.Thread(target=self._serve, name="downslope-kernel", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.offered.acquire()
            assert self.work is not None
            start, job = self.work
            start(job)
            self.done.release()

    def offer(self, start: Start, job: int) -> None:
        """Let the thread do the job when it wakes up; `settle` must follow."""
        self.work = start, job
        self.offered.release()

    def settle(self) -> None:
        """Take the job back if the thread has not begun it, else wait for its end."""
        if not self.offered.acquire(blocking=False):
            self.done.acquire()


class _Ours:
    """Plain threads: compiled code runs without the GIL, so they do."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: list[_Worker] = []

    def run(self, start: Start, job: int, threads: int) -> None:
        with self.lock:
            while len(self.workers) < threads - 1:
                self.workers.append(_Worker())
            busy = self.workers[: threads - 1]
            for worker in busy:
                worker.offer(start, job)
            start(job)
            for worker in busy:
                worker.settle()


_ours = _Ours()
_forked = False


def _after_fork() -> None:
    """Threads do not survive a fork: a child runs everything on the thread that it has."""
    global _ours, _forked
    _ours, _forked = _Ours(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def openmp() -> Callable[[int, int, int, int], None] | None:
    """torch's own `GOMP_parallel(function, job, threads, flags)`, or None where torch brings no such
    library.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            parallel = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def spread(address: int, job: int, threads: int) -> None:
    """Run the compiled code at `address` on a job, on so many threads, this one included; back when it is
    done.
    """
    if threads == 1 or _forked:
        _callable(address)(job)
    elif (parallel := openmp()) is not None:
        parallel(address, job, threads, 0)
    else:
        _ours.run(_callable(address), job, threads)


@cache
def _callable(address: int) -> Start:
    return _prototype(address)
