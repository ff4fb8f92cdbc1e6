"""Kills whole trainings, many a second: a process that imports torch once and forks the victims.

    python tests/train/harness.py kills COUNT SEED FOLDER    at random instants
    python tests/train/harness.py points EVERY OFFSET FOLDER    at every EVERY-th file operation, or within

Every victim is continued until it ends, and must then equal the run that was never killed. Prints one line of
JSON: how many were killed, how many of them had work to lose, and what was found wrong, with what repeats it.
"""

import os

os.environ["NUMBA_NUM_THREADS"] = "1"  # a thread pool would not survive a fork

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from train import problems

import downslope as ds
from downslope.journal import read
from downslope.train import history

TASK = f"{problems.__file__}:rich"
CHANGING = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


def go(out: Path, steps: int, save_every: int) -> None:
    """Start the training, or go on with it."""
    recipe = problems.recipe(steps=steps)
    ds.train(TASK, recipe, out=out, seed=1, save_every=save_every, valid_every=save_every, quiet=True)


def outcome(out: Path) -> dict[str, Any]:
    """All that must be equal: every bit of the state, the losses, the validations, the result, the files."""
    events = read(out / "journal.jsonl")
    counting = history(events)
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
            acknowledged = [e["seq"] for e in history(events[:place]) if e["kind"] in ("start", "checkpoint")]
            if event["after"] != acknowledged[-1]:
                told.append(f"event {event['seq']} goes on after {event['after']}, not {acknowledged[-1]}")
            told += event["damaged"]
    return told


def differences(out: Path, expected: dict[str, Any]) -> list[str]:
    return broken_promises(out) + [name for name, value in outcome(out).items() if value != expected[name]]


def forked(act: Callable[[], object]) -> int:
    """The process id of a child that does this and ends with 0, or with 1 and a message."""
    child = os.fork()
    if child:
        return child
    try:
        act()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(count: int, seed: int, folder: Path) -> dict[str, Any]:
    steps, save_every = 40, 4
    began = time.monotonic()
    reference = folder / "reference"
    assert ended(forked(lambda: go(reference, steps, save_every))) == 0
    length, expected = time.monotonic() - began, outcome(reference)
    draw, done, at_work, wrong = random.Random(seed), 0, 0, []
    while done < count:
        out = folder / f"run-{done}"
        started, killed = done, []
        while True:
            child = forked(lambda out=out: go(out, steps, save_every))
            if done < count and len(killed) < 8:
                killed.append(draw.uniform(0, length))
                time.sleep(killed[-1])
                os.kill(child, signal.SIGKILL)
            if (code := ended(child)) >= 0:
                break
            done += 1
            at_work += (out / "journal.jsonl").exists()
        if found := [f"did not go on: {code}"] if code else differences(out, expected):
            wrong.append({"seed": seed, "from": started, "delays": killed, "found": found})
        shutil.rmtree(out)
    return {"killed": done, "at work": at_work, "seconds": time.monotonic() - began, "wrong": wrong}


class Mine:
    """Counts the operations that change files, and ends the process at one of them.

    A write can be torn: `part` is how much of it is still done, 0 (before it) to 1 (just after it).
    """

    def __init__(self, at: int | None, part: float) -> None:
        self.at, self.part, self.seen = at, part, []
        for name in CHANGING:
            setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            if name == "open" and not given[1] & os.O_CREAT:
                return real(*given, **named)
            self.seen.append(name)
            if len(self.seen) - 1 != self.at:
                return real(*given, **named)
            if name == "write":
                size = len(given[1])
                whole = {0.0: 0, 0.1: 1, 0.5: size // 2, 0.9: size - 1, 1.0: size}[self.part]
                real(given[0], bytes(given[1])[:whole])
            elif self.part == 1.0:
                real(*given, **named)
            os._exit(77)

        return operation


def counted(out: Path, steps: int, save_every: int, log: Path) -> None:
    mine = Mine(None, 0)
    go(out, steps, save_every)
    seen = list(mine.seen)
    log.write_text(json.dumps(seen))


def points(every: int, offset: int, folder: Path) -> dict[str, Any]:
    steps, save_every = 6, 2
    began = time.monotonic()
    assert ended(forked(lambda: counted(folder / "reference", steps, save_every, folder / "log"))) == 0
    expected, log = outcome(folder / "reference"), json.loads((folder / "log").read_text())
    halves = {"write": (0.0, 0.1, 0.5, 0.9, 1.0)}
    every_point = [(at, part) for at, name in enumerate(log) for part in halves.get(name, (0.0, 1.0))]
    wrong, chosen = [], every_point[offset::every]
    for at, part in chosen:
        out = folder / f"point-{at}-{part}"

        def crash(out: Path = out, at: int = at, part: float = part) -> None:
            Mine(at, part)
            go(out, steps, save_every)

        code = ended(forked(crash))
        found = [f"was not stopped: {code}"] if code != 77 else []
        code = ended(forked(lambda out=out: go(out, steps, save_every)))
        found += [f"did not go on: {code}"] if code else differences(out, expected)
        if found:
            wrong.append({"point": at, "operation": log[at], "part": part, "found": found})
        shutil.rmtree(out, ignore_errors=True)
    seconds = time.monotonic() - began
    return {"killed": len(chosen), "of": len(every_point), "seconds": seconds, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, first, second, place = sys.argv[1:]
    go(Path(place) / "warm", 4, 2)  # kernels are compiled once, here; the children inherit them
    found = {"kills": kills, "points": points}[verb](int(first), int(second), Path(place))
    sys.stdout.write(json.dumps(found) + "\n")
