"""A process that does not outlive the one that started it.

Run as a script, it becomes `downslope` itself, bound to its parent before the seconds that importing takes.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PARENT = "DOWNSLOPE_PARENT"
"""The variable with the process id of the agent that started a rank."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel end this process by SIGKILL when its parent ends, however that happens. Linux only;
    elsewhere it does nothing.

    `parent` is the id that the parent had: if it is gone already, this process ends here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != (parent or os.getppid()):  # it ended before the kernel was told
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(os.environ[PARENT]))
    runpy.run_module("downslope", run_name="__main__", alter_sys=True)
