"""Many trainings as victims: a process that imports torch once and forks them.

    python tests/faults/host.py MODULE FUNCTION COUNT SEED FOLDER

calls that function of a test file with COUNT, SEED and FOLDER, where COUNT is the number of cases, or takes
every COUNT-th of all there are. It forks its victims and returns how many it had as "done" and what was
"wrong", with what repeats it; printed as one line of JSON, which `hosted` reads.
"""

import os

if __name__ == "__main__":
    os.environ["NUMBA_NUM_THREADS"] = "1"  # a thread pool would not survive a fork

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.matrix import Figure
from train import problems

import downslope as ds
from downslope.journal import read
from downslope.train import history

TASK = f"{problems.__file__}:rich"
Found = dict[str, Any]


def go(out: Path, steps: int = 40, save_every: int = 4) -> None:
    """Start the training, or go on with it."""
    recipe = problems.recipe(steps=steps)
    ds.train(TASK, recipe, out=out, seed=1, save_every=save_every, valid_every=save_every, quiet=True)


def outcome(out: Path) -> Found:
    """All that must be equal: every bit of the state, the losses, the validations, the result, the files."""
    counting = history(read(out / "journal.jsonl"))
    (state,) = [e["sha"] for e in counting if e["kind"] == "checkpoint"][-1:]
    return {
        "state": state,
        "losses": [[e["step"], e["loss"].hex()] for e in counting if e["kind"] == "step"],
        "valid": [[e["step"], e["loss"].hex(), e["metric"]] for e in counting if e["kind"] == "valid"],
        "ends": sum(e["kind"] == "end" for e in counting),
        "result": (out / "result.json").read_text(),
        "files": sorted(path.name for path in [*out.iterdir(), *(out / "ckpt").iterdir()]),
    }


def broken_promises(out: Path) -> list[str]:
    """Each continuation must begin at the newest checkpoint that was acknowledged, and find it sound."""
    told, events = [], read(out / "journal.jsonl")
    for place, event in enumerate(events):
        if event["kind"] == "resume":
            counting = [e for e in history(events[:place]) if e["kind"] in ("start", "checkpoint")]
            newest = counting[-1].get("after", counting[-1]["seq"])
            if event["after"] != newest:
                told.append(f"event {event['seq']} goes on after {event['after']}, not {newest}")
            told += event["damaged"]
    return told


def differences(out: Path, expected: Found, *but: str) -> list[str]:
    """What is not as in the run that nothing happened to, `but` what may differ."""
    found = outcome(out)
    return broken_promises(out) + [key for key in found if key not in but and found[key] != expected[key]]


def forked(act: Callable[[], object], said: Path | None = None) -> int:
    """The process id of a child that does this, and ends as a program that does it would.

    What it says on its way out goes to the file `said`, else to the host's own errors.
    """
    child = os.fork()
    if child:
        return child
    code, words = 0, ""
    try:
        act()
    except SystemExit as error:
        code = int(error.code or 0)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        code, words = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}\n"
    if said is not None:
        said.write_text(words)
    else:
        sys.stderr.write(words)
        sys.stderr.flush()
    os._exit(code)


def ended(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hosted(body: Callable[[int, int, Path], Found], figure: Figure, folder: Path) -> Found:
    """Run a test's body in a process of its own that may fork; nothing that it found may be wrong."""
    arguments = [Path(sys.modules[body.__module__].__file__ or "").stem, body.__name__]
    count = figure.share if figure.count is None else figure.count
    command = [sys.executable, __file__, *arguments, str(count), str(figure.seed), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, check=False)
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], (found, done.stderr[-4000:])
    figure.done = found["done"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, function, count, seed, place = sys.argv[1:]
    go(Path(place) / "warm", 4, 2)  # kernels are compiled once, here; the children inherit them
    body = getattr(importlib.import_module(f"faults.{name}"), function)
    sys.stdout.write(json.dumps(body(int(count), int(seed), Path(place))) + "\n")
