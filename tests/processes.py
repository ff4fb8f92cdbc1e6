"""Real processes that use a room of the package, to be stopped and killed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "downslope"
ALONE = f"""
import sys, types
package = types.ModuleType("downslope")  # without its __init__, which imports torch: seconds for nothing
package.__path__ = [{str(SRC)!r}]
sys.modules["downslope"] = package
"""


@contextmanager
def started(program: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A running Python program with pipes for output and errors; killed at the end if it still runs."""
    command = [sys.executable, "-c", ALONE + program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: "subprocess.Popen[str]") -> str:
    """The next line that a process says, waiting for it."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
