"""A pool of local worker processes, spoken to in JSON lines over socket pairs: no pickles, no forks.

A worker is a fresh interpreter with one torch thread, in a process group of its own, that dies with its
parent. What it prints is read and dropped but for the last lines, which tell why it died. Where a worker is
lost, its job is handed back with the reason; what to make of that is for the race to say.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from downslope.race.record import Job

Message = dict[str, Any]
TAIL = 4000
"""Bytes of what a worker printed that are kept."""

SOURCE = str(Path(__file__).resolve().parents[2])
BEGIN = "import sys; sys.path.append(sys.argv[1]); from downslope.race.worker import main; main()"
"""The very package that started it, wherever that lies; behind all else, so that it shadows nothing."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Lost:
    """A worker that ended, or hung, before its job was done: why, the last that it printed, who did it."""

    reason: str
    printed: str
    by: Literal["itself", "another", "silence"]


@dataclass(eq=False)
class Worker:
    """One process, what it is doing, and what it said that has not been taken yet."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    heard: float
    job: Job | None = None
    said: bytearray = field(default_factory=bytearray)
    printed: bytearray = field(default_factory=bytearray)
    closed: bool = False
    mute: bool = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand over a message; that a worker is dead is noticed elsewhere."""
        with suppress(OSError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def listen(self) -> list[Message]:
        """What the worker has said since, as far as it is complete; keeps the end of what it printed."""
        assert self.process.stdout is not None
        for _ in range(64):  # a worker that prints without end must not keep us here
            if not (data := _take(self.process.stdout.fileno())):
                self.mute = data is not None
                break
            self.printed[:] = (self.printed + data)[-TAIL:]
        while data := _take(self.channel.fileno()):
            self.said += data
        self.closed = data is not None
        *lines, rest = bytes(self.said).split(b"\n")
        self.said[:] = rest
        if lines:
            self.heard = time.monotonic()
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # its own code wrote on our line: nothing it says can be trusted
            self.closed = True
            return []

    def end(self) -> int:
        """Kill its process group, with the children that it started; its exit status."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Pool:
    """At most `size` workers, started when there is work; `hello` is the first message that each is sent.

    `stall`: seconds without a sign of life after which a worker counts as hung. A context manager: leaving it
    ends the workers.
    """

    def __init__(self, size: int, hello: Mapping[str, Any], stall: float) -> None:
        self.size, self.hello, self.stall = size, hello, stall
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self.workers):
            self._remove(worker)
        self.selector.close()

    @property
    def busy(self) -> set[Job]:
        """The jobs that are under way."""
        return {worker.job for worker in self.workers if worker.job is not None}

    def begin(self, job: Job, message: Mapping[str, Any]) -> None:
        """Give a job to an idle worker, or to a new one. Only while fewer than `size` are busy."""
        worker = next((worker for worker in self.workers if worker.job is None), None) or self._start()
        worker.job, worker.heard = job, time.monotonic()
        worker.send(message)

    def messages(self, wait: float) -> Iterator[tuple[Job, Message | Lost]]:
        """What is heard within `wait` seconds, job by job. A job ends with a message that says so, or is
        lost.
        """
        self.selector.select(wait)
        for worker in list(self.workers):
            status = worker.process.poll()  # before listening, so that its last words are heard
            for message in worker.listen():
                job, over = worker.job, message.pop("over", False)
                if over:
                    worker.job = None
                if job is not None and message["kind"] != "alive":
                    yield job, message
            if worker.mute:
                self._ignore(worker.process.stdout)
            hung = worker.job is not None and time.monotonic() - worker.heard > self.stall
            if status is not None or worker.closed or hung:
                yield from self._lose(worker, hung)

    def _lose(self, worker: Worker, hung: bool) -> Iterator[tuple[Job, Lost]]:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(0 if hung else 1)
        status = self._remove(worker)
        if worker.job is not None:
            printed = worker.printed.decode(errors="replace")
            if hung:
                yield worker.job, Lost(f"no sign of life for {self.stall:g} s", printed, "silence")
            else:
                by: Literal["itself", "another"] = "another" if -status == signal.SIGKILL else "itself"
                yield worker.job, Lost(cause(status), printed, by)

    def _remove(self, worker: Worker) -> int:
        assert worker.process.stdout is not None
        self.workers.remove(worker)
        status = worker.end()
        for file in (worker.channel, worker.process.stdout):
            self._ignore(file)
            file.close()
        return status

    def _ignore(self, file: Any) -> None:
        with suppress(KeyError):  # twice is once: a worker may have closed it long before it ends
            self.selector.unregister(file)

    def _start(self) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", BEGIN, SOURCE, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,
            )
        assert process.stdout is not None
        worker = Worker(process, ours, time.monotonic())
        for file in (ours, process.stdout):
            os.set_blocking(file.fileno(), False)
            self.selector.register(file, selectors.EVENT_READ)
        self.workers.append(worker)
        worker.send(self.hello)
        return worker


def cause(status: int) -> str:
    """How a process ended, in words.

    >>> cause(-11), cause(3)
    ('killed by SIGSEGV', 'exit code 3')
    """
    if status >= 0:
        return f"exit code {status}"
    memory = " (by hand, or for want of memory)" if -status == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-status).name}{memory}"


def _environment() -> dict[str, str]:
    """One thread, a trace where it crashes, and nothing that could make two workers differ."""
    ours = {"PYTHONFAULTHANDLER": "1", "PYTHONHASHSEED": "0"}
    return {**os.environ, **dict.fromkeys(THREADS, "1"), **ours}


def _take(file: int) -> bytes | None:
    """What can be read without waiting: None if there is nothing now, empty if there will be nothing more."""
    try:
        return os.read(file, 1 << 16)
    except BlockingIOError:
        return None
    except OSError:
        return b""
