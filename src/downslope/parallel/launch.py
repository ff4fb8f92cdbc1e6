"""Starting all ranks of a training on one machine, and starting them anew when one was killed or hangs.

The ranks are children of torch's own elastic agent (torchrun), which is a child of this process. Each ends
with its parent, whatever ends that: there is never a rank that goes on unseen.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from downslope.errors import BadInput
from downslope.parallel import child
from downslope.parallel.child import PARENT, die_with_parent
from downslope.parallel.group import VERDICTS
from downslope.parallel.ranks import Lost

RESTARTS = 3
"""How often ranks are started anew after one of them was lost."""

GRACE = 30
"""Seconds that ranks have to save, once they were told to stop."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STEP = 0.1  # seconds between two looks at the agent
_SLACK = 1.5  # a rank's own watchdog comes first: it knows where the rank hangs
_START = 600.0  # seconds in which ranks, busy with imports and data, need not show anything yet


def supervise(
    arguments: Sequence[str],
    nproc: int,
    *,
    progress: Callable[[], object],
    say: Callable[[str], object],
    patience: float,
    restarts: int = RESTARTS,
) -> int:
    """Run `downslope` with these arguments as `nproc` ranks on this machine; the exit code.

    A rank that is lost, killed or hangs (`progress()`, once it moved, is equal for 1.5 times `patience`
    seconds) ends all, and all are started anew, `restarts` times; what ended by a `verdict`, or was told to
    stop, is not. SIGINT, SIGTERM and SIGHUP go to all ranks, the second SIGINT ends them at once. `say` is
    told of every new start. BadInput for fewer than one rank.
    """
    if type(nproc) is not int or nproc < 1:
        raise BadInput(f"a training has a whole number of ranks from 1, got {nproc!r}.")
    left = restarts
    while True:
        with _Agent(arguments, nproc) as agent:
            code = agent.wait(progress, patience * _SLACK)
        if agent.asked:
            return 128 + agent.asked[0] if code else 0
        if code != Lost.exit_code:
            return code
        if left == 0:
            say(f"A rank was lost again, after {restarts} new starts: giving up.")
            return code
        left -= 1
        say(f"A rank was lost: starting all {nproc} again ({restarts - left} of {restarts}).")


class _Agent:
    """torch's agent in a child process of its own, with the signals of this one sent on to it."""

    def __init__(self, arguments: Sequence[str], nproc: int) -> None:
        self.asked: list[int] = []
        self._before: dict[int, Any] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        me = os.getpid()
        self.process = os.fork()
        if self.process == 0:
            code = Lost.exit_code
            try:
                die_with_parent(me)
                code = _served(arguments, nproc)
            except Exception:
                traceback.print_exc()  # a fault of ours or torch's, of which nobody else would hear
            finally:
                os._exit(code)

    def __enter__(self) -> _Agent:
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.process:
            self.kill()
            os.waitpid(self.process, 0)

    def wait(self, progress: Callable[[], object], patience: float) -> int:
        """Its exit code; where nothing moved for so many seconds, or the grace is over, it is killed."""
        first = seen = progress()
        since = time.monotonic()
        while True:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self.process = 0
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else Lost.exit_code
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() > since + (patience if now != first else max(patience, _START)):
                self.kill()
            time.sleep(_STEP)

    def kill(self) -> None:
        """End it and, as the kernel sees to it, all ranks."""
        os.kill(self.process, signal.SIGKILL)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.asked)
        self.asked.append(number)
        if not self.process:
            return
        if again and number == signal.SIGINT:
            self.kill()
        elif not again:
            os.kill(self.process, number)


def _served(arguments: Sequence[str], nproc: int) -> int:
    """torchrun's own launcher, in this process; the exit code that stands for those of all ranks."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.setsid()  # Ctrl-C on a terminal reaches the supervisor alone, which sends it on
    logging.disable(logging.CRITICAL)  # the ranks speak for themselves
    os.environ[PARENT] = str(os.getpid())
    # One store for all attempts keeps addresses of ranks that are gone (torch 2.13, gloo).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what Objective asks for on purpose
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    options = ["--nnodes=1", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
    options += ["--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={os.getpid()}", "--max-restarts=0", "--no-python"]
    command = [sys.executable, "-P", child.__file__, *arguments]
    try:
        launcher: Any = torchrun.run
        launcher(torchrun.get_args_parser().parse_args([*options, *command]))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        meaning = {code: plain for plain, code in VERDICTS.items()}
        ends = [error.failures[rank] for rank in sorted(error.failures)]
        ends = [end for end in ends if end.exitcode in meaning]
        # torch unpacks what a rank left in its error file, or not: as it was written, it is a table.
        messages: list[Any] = [end.message for end in ends]
        told = [one["message"] if isinstance(one, dict) else one for one in messages]
        for said in dict.fromkeys(told):
            sys.stderr.write(f"{said}\n")
        return max((meaning[end.exitcode] for end in ends), default=Lost.exit_code)
    return 0
