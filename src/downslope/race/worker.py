"""A worker process of a race: reads jobs as JSON lines, does them one by one, says what came of each.

The pool starts it with two last arguments: the file number of the channel, and the number of the parent.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from traceback import format_exc, print_exc
from typing import Any

from downslope.errors import BadInput, UserCodeError, redact

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent, where the kernel can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Channel:
    """The line to the coordinator. When that is gone, so is this process: nobody is left to write for."""

    def __init__(self, file: int) -> None:
        os.set_inheritable(file, False)
        self.socket = socket.socket(fileno=file)
        self.last = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.socket.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)

    def say(self, message: Mapping[str, Any]) -> None:
        """One message; non-finite floats go as JSON's NaN and Infinity, which only Python reads."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            os._exit(1)
        self.last = time.monotonic()

    def alive(self) -> None:
        """A sign of life, at most once a second."""
        if time.monotonic() - self.last > 1:
            self.say({"kind": "alive"})


def attend(channel: Channel) -> None:
    """Do the jobs that come over the channel until it closes."""
    import torch

    from downslope.race.work import Bench, Refused, Work, rehearse

    torch.set_num_threads(1)
    bench: Bench | None = None
    hello: dict[str, Any] = {}
    for message in channel:
        if not hello:
            hello = message
            continue
        try:
            bench = bench or Bench.open(hello)
            if "legs" in message:
                for said in Work(bench, message, channel.alive).messages():
                    channel.say(said)
            else:
                channel.say(rehearse(bench, message, channel.alive))
        except Refused as error:
            channel.say({"kind": "refused", "reason": str(error), "over": True})
        except (Exception, SystemExit) as error:
            channel.say({"kind": "failed", **_blame(error), "over": True})
        gc.collect()  # a trial's model and data must not outlive it


def _blame(error: BaseException) -> dict[str, str]:
    """Why it failed, and the traceback, empty for bad input; no secret may stand in a reason, which the
    standings quote.
    """
    from downslope.tasks import frames

    if isinstance(error, UserCodeError):
        return {"reason": redact(str(error)), "trace": frames(error)}
    if isinstance(error, BadInput):
        return {"reason": redact(str(error)), "trace": ""}
    said = str(error).strip().split("\n")[0]
    reason = redact(f"{type(error).__name__}{': ' if said else ''}{said}")
    return {"reason": reason, "trace": format_exc()}


def main() -> None:
    """The process, from its first line to its last."""
    file, parent = (int(word) for word in sys.argv[-2:])
    die_with(parent)
    code = 0
    try:
        attend(Channel(file))
    except BaseException:
        print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # whatever threads the user's code has left behind
