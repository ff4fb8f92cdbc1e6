"""F10: clocks that jump. Durations are never negative, and nothing depends on the time of day."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

from faults.host import Found, differences, ended, forked, go, hosted, outcome
from faults.matrix import Figure, row
from faults.test_files import Mine

from downslope.journal import read

DAY = 86_400.0
JUMPS = (DAY, -DAY, 3600.0, -3600.0, -0.5, 1e9, -1e9)  # 3600: the clocks of summer and winter


def jumping(draw: random.Random) -> None:
    """The wall clock jumps again and again; the monotonic one has another beginning, as after a boot."""
    boot, shift = draw.choice([0.0, 1e7]) - time.monotonic(), [0.0]
    monotonic, wall = time.monotonic, time.time
    time.monotonic = lambda: monotonic() + boot

    def changed(scale: float) -> Callable[[], float]:
        def now() -> float:
            if draw.random() < 0.5:
                shift[0] += draw.choice(JUMPS)
            return type(scale)((wall() + shift[0]) * scale)

        return now

    time.time, time.time_ns = changed(1.0), changed(10**9)  # type: ignore[assignment]


def aged(out: Path, draw: random.Random) -> None:
    """Files that say they were written at any time, later ones before earlier ones."""
    for path in out.rglob("*"):
        when = 1.7e9 + draw.uniform(-1e9, 1e9)
        os.utime(path, (when, when))


def backwards(out: Path) -> list[str]:
    """Times and durations that are negative or run back."""
    events = read(out / "journal.jsonl")
    told = (
        ["the journal's time runs back"]
        if [e["time"] for e in events] != sorted(e["time"] for e in events)
        else []
    )
    spent = [event["seconds"] for event in events if "seconds" in event]
    return told + ["a negative duration"] * (min(spent) < 0 or events[0]["time"] < 0)


def clocks(count: int, seed: int, folder: Path) -> Found:
    """A training ends at a random file operation and goes on by another clock, among files of any age."""
    assert ended(forked(lambda: go(folder / "whole"))) == 0
    expected, wrong = outcome(folder / "whole"), []
    for number in range(count):
        draw, out = random.Random(f"{seed} {number}"), folder / f"run-{number}"
        at = draw.randrange(20, 200)

        def first(out: Path = out, draw: random.Random = draw, at: int = at) -> None:
            jumping(draw)
            Mine(at, 0.5)
            go(out)

        def then(out: Path = out, draw: random.Random = draw) -> None:
            jumping(random.Random(draw.random()))
            go(out)

        code = ended(forked(first))
        found = [f"was not stopped: {code}"] if code != 77 else []
        aged(out, draw)
        code = ended(forked(then))
        found += [f"did not go on: {code}"] if code else differences(out, expected) + backwards(out)
        if found:
            wrong.append({"seed": seed, "number": number, "at": at, "found": found})
        rmtree(out)
    return {"done": count, "wrong": wrong}


@row("F10", 50, every_day=True, slow=True)
def test_f10_the_clock_jumps(figure: Figure, tmp_path: Path) -> None:
    hosted(clocks, figure, tmp_path)
