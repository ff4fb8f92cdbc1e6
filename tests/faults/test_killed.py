"""F1, F9, F21: kill -9 and signals at any instant, and two processes on one run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count as counting
from pathlib import Path
from shutil import rmtree
from typing import Any

from faults.host import Found, differences, ended, forked, go, hosted, outcome
from faults.matrix import Figure, row
from train import problems

from downslope.errors import BadInput
from downslope.folder import RunFolder
from downslope.journal import read
from downslope.train import history

STEPS, BRIEF, SAVE_EVERY = 40, 16, 4


def reference(folder: Path, steps: int = STEPS) -> tuple[Found, float]:
    """The run that nothing happens to: what must be equal, and how many seconds it takes."""
    began = time.monotonic()
    assert ended(forked(lambda: go(folder / "reference", steps))) == 0
    return outcome(folder / "reference"), time.monotonic() - began


# --- F1: kill -9 --------------------------------------------------------------------------------------


def lost_work(out: Path) -> list[str]:
    """More than one interval between checkpoints must never be trained again."""
    events = read(out / "journal.jsonl")
    lost = []
    for place, event in enumerate(events):
        if event["kind"] == "resume":
            behind = [e for e in history(events[:place]) if e["kind"] == "step" and e["seq"] > event["after"]]
            lost += [f"{len(behind)} updates lost at event {place}"] * (len(behind) > SAVE_EVERY)
    return lost


def kills(count: int, seed: int, folder: Path) -> Found:
    """Runs that are killed up to eight times each and then continued to their end."""
    expected, length = reference(folder, BRIEF)
    draw, done, at_work, wrong = random.Random(seed), 0, 0, []
    while done < count:
        out = folder / f"run-{done}"
        started, delays = done, []
        while True:
            child = forked(lambda out=out: go(out, BRIEF))
            if done < count and len(delays) < 8:
                delays.append(draw.uniform(0, length))
                time.sleep(delays[-1])
                os.kill(child, signal.SIGKILL)
            if (code := ended(child)) >= 0:
                break
            done += 1
            at_work += (out / "journal.jsonl").exists()
        found = [f"did not go on: {code}"] if code else differences(out, expected) + lost_work(out)
        if found:
            wrong.append({"seed": seed, "from": started, "delays": delays, "found": found})
        rmtree(out)
    return {"done": done, "at work": at_work, "wrong": wrong}


@row("F1", 2000, slow=True)
def test_f01_killed_at_random_instants(figure: Figure, tmp_path: Path) -> None:
    assert hosted(kills, figure, tmp_path)["at work"] >= figure.cases // 4


def command(out: Path) -> "subprocess.Popen[bytes]":
    arguments = ["train", f"{problems.__file__}:rich", "--out", str(out)]
    return subprocess.Popen([sys.executable, "-m", "downslope", *arguments], stderr=subprocess.DEVNULL)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def working(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Wait until a command has written to the journal of its run."""
    before = size(out / "journal.jsonl")
    while process.poll() is None and size(out / "journal.jsonl") == before:
        time.sleep(0.002)


@row("F1", 200, slow=True)
def test_f01_the_command_itself_killed(figure: Figure, tmp_path: Path) -> None:
    began = time.monotonic()
    assert command(tmp_path / "straight").wait(120) == 0
    length, expected = time.monotonic() - began, outcome(tmp_path / "straight")
    for number, draw in figure.draws():
        out = tmp_path / f"run-{number // 8}"
        process = command(out)
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, length))
        else:
            working(process, out)
            time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.wait(60)
        if number % 8 == 7 or number == figure.cases - 1:
            assert command(out).wait(120) == 0
            assert differences(out, expected) == [], number


# --- F21: signals -------------------------------------------------------------------------------------

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 30.0


def proper(number: signal.Signals, code: int, out: Path) -> bool:
    """Whether a training may end like this after a signal: done, not yet begun, or saved as it was asked."""
    if code in (0, -number):  # python ends by SIGINT itself, as a shell expects it
        return True
    newest = history(read(out / "journal.jsonl"))[-1]
    return code == 128 + number and newest["kind"] in ("checkpoint", "start")


def signals(count: int, seed: int, folder: Path) -> Found:
    """One signal at a random instant, or two SIGINT, and then on to the end."""
    expected, length = reference(folder)
    granted, slowest, wrong = 0, 0.0, []
    for number in range(count):
        draw, out = random.Random(f"{seed} {number}"), folder / f"run-{number}"
        child = forked(lambda out=out: go(out))
        time.sleep(draw.uniform(0, length))
        asked, twice = draw.choice(ASKED), draw.random() < 0.25
        began = time.monotonic()
        os.kill(child, signal.SIGINT if twice else asked)
        if twice:
            time.sleep(draw.uniform(0, 0.003))
            os.kill(child, signal.SIGINT)
        code = ended(child)
        slowest = max(slowest, time.monotonic() - began)
        granted += code > 0 or (code == -signal.SIGINT and (out / "journal.jsonl").exists())
        found = [] if proper(signal.SIGINT if twice else asked, code, out) else [f"ended with {code}"]
        code = ended(forked(lambda out=out: go(out)))
        found += [f"did not go on: {code}"] if code else differences(out, expected, "files")
        if found:
            wrong.append({"seed": seed, "number": number, "signal": asked.name, "found": found})
        rmtree(out)
    return {"done": count, "granted": granted, "slowest": slowest, "wrong": wrong}


@row("F21", 200, slow=True)
def test_f21_a_signal_at_a_random_instant(figure: Figure, tmp_path: Path) -> None:
    found = hosted(signals, figure, tmp_path)
    assert found["slowest"] < GRACE
    assert found["granted"] >= figure.cases // 4


@row("F21", 20, slow=True)
def test_f21_the_command_itself_asked_to_stop(figure: Figure, tmp_path: Path) -> None:
    assert command(tmp_path / "straight").wait(120) == 0
    expected = outcome(tmp_path / "straight")
    for number, draw in figure.draws():
        out, asked = tmp_path / f"run-{number}", draw.choice(ASKED)
        process = command(out)
        working(process, out)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(asked)
        code = process.wait(GRACE)
        assert code in (0, 128 + asked), (number, asked)
        assert command(out).wait(120) == 0
        assert differences(out, expected, "files") == [], number  # it saved where it was asked to stop


# --- F9: two processes on one run ---------------------------------------------------------------------


def gated(out: Path, gate: int, said: Path) -> int:
    """A child that starts the run when the gate's other end is closed, and says how long it took."""

    def start() -> None:
        os.read(gate, 1)
        began = time.monotonic()
        try:
            go(out)
        finally:
            said.with_suffix(".seconds").write_text(str(time.monotonic() - began))

    return forked(start, said)


def at_once(count: int, seed: int, folder: Path) -> Found:
    """Two start together: one trains, the other is told by whom, or finds the run done and leaves it."""
    expected, _ = reference(folder)
    refused, slowest, wrong = 0, 0.0, []
    for number in range(count):
        out, told = folder / f"run-{number}", [folder / f"said-{number}-{i}" for i in range(2)]
        gate, opener = os.pipe()
        children = [gated(out, gate, said) for said in told]
        os.close(gate)
        os.set_inheritable(opener, False)
        for _ in children:
            os.write(opener, b".")
        os.close(opener)
        codes = [ended(child) for child in children]
        found = differences(out, expected)
        found += ["resumed"] * any(event["kind"] == "resume" for event in read(out / "journal.jsonl"))
        if sorted(codes) == [0, 2]:
            refused += 1
            loser = codes.index(2)
            slowest = max(slowest, float(told[loser].with_suffix(".seconds").read_text()))
            if f"is being written by process {children[1 - loser]} on " not in told[loser].read_text():
                found.append(told[loser].read_text())
        elif codes != [0, 0]:
            found.append(f"ended with {codes}: {[said.read_text() for said in told]}")
        if found:
            wrong.append({"number": number, "found": found})
        rmtree(out)
    return {"done": count, "refused": refused, "slowest": slowest, "wrong": wrong}


@row("F9", 100, slow=True)
def test_f09_two_start_at_once(figure: Figure, tmp_path: Path) -> None:
    found = hosted(at_once, figure, tmp_path)
    assert found["refused"] >= figure.cases // 2
    assert found["slowest"] < 2


def trying(out: Path) -> Iterator[None]:
    """Until the folder is free."""
    while True:
        with suppress(BadInput), RunFolder(out):
            return
        yield time.sleep(0.01)


def heirs(count: int, seed: int, folder: Path) -> Found:
    """The owner is killed at a random instant, and a process that waits for it takes over."""
    expected, length = reference(folder)
    slowest, wrong = 0.0, []
    for number in range(count):
        draw, out, said = random.Random(f"{seed} {number}"), folder / f"run-{number}", folder / "heir"
        owner = forked(lambda out=out: go(out))
        time.sleep(draw.uniform(0.3, 0.9) * length)

        def take_over(out: Path = out, said: Path = said) -> None:
            for _ in trying(out):
                pass
            said.with_suffix(".free").write_text(str(time.monotonic()))
            go(out)

        heir = forked(take_over, said)
        time.sleep(0.03)
        os.kill(owner, signal.SIGKILL)
        killed = time.monotonic()
        ended(owner)
        found = [f"did not go on: {code}"] if (code := ended(heir)) else differences(out, expected)
        slowest = max(slowest, float(said.with_suffix(".free").read_text()) - killed)
        if found:
            wrong.append({"number": number, "found": found})
        rmtree(out)
    return {"done": count, "slowest": slowest, "wrong": wrong}


@row("F9", 50, slow=True)
def test_f09_the_owner_is_killed_and_another_takes_over(figure: Figure, tmp_path: Path) -> None:
    assert hosted(heirs, figure, tmp_path)["slowest"] <= 1


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def stopping(at: int) -> None:
    """This process stops before it makes, names or removes its file number `at`."""
    seen = counting()

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            if (name != "open" or given[1] & os.O_CREAT) and next(seen) == at:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(*given, **named)

        return operation

    for name in ("open", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, wrapped(getattr(os, name), name))


def stopped_and_continued(count: int, seed: int, folder: Path) -> Found:
    """Owners are stopped. While its lock holds, others are refused; of every second one the lock is lost (its
    files are removed, as if the file system had none) and another finishes the run. Then all are continued.
    """
    expected, _ = reference(folder)
    cases: list[tuple[int, Path, dict[str, bytes]]] = []
    wrong: list[Any] = []
    began = time.monotonic()
    for number in range(2 * count):
        draw, out = random.Random(f"{seed} {number}"), folder / f"run-{number}"
        stop = partial(stopping, draw.randrange(10, 60))
        owner = forked(lambda out=out, stop=stop: (stop(), go(out)), folder / f"said-{number}")
        assert os.WIFSTOPPED(os.waitpid(owner, os.WUNTRACED)[1]), number
        if ended(forked(lambda out=out: go(out), folder / "refused")) != 2:
            wrong.append({"number": number, "found": "was not refused"})
        elif f"is being written by process {owner} on " not in (folder / "refused").read_text():
            wrong.append({"number": number, "found": (folder / "refused").read_text()})
        left: dict[str, bytes] = {}
        if number % 2:
            (out / "run.lock").unlink()
            (out / "journal.jsonl.lock").unlink()
            assert ended(forked(lambda out=out: go(out))) == 0
            left = contents(out)
        cases.append((owner, out, left))
    time.sleep(max(0, 6 * count - (time.monotonic() - began)))
    for number, (owner, out, left) in enumerate(cases):
        os.kill(owner, signal.SIGCONT)
        code, said = ended(owner), (folder / f"said-{number}").read_text()
        found = differences(out, expected)
        if left and code != 2:
            found.append(f"the stale owner ended with {code}: {said}")
        if left and contents(out) != left:
            found.append("the stale owner wrote")
        if not left and code:
            found.append(f"the owner did not go on: {code}: {said}")
        if found:
            wrong.append({"number": number, "found": found})
    return {"done": count, "wrong": wrong}


@row("F9", 10, slow=True)
def test_f09_the_owner_is_stopped_and_continued(figure: Figure, tmp_path: Path) -> None:
    hosted(stopped_and_continued, figure, tmp_path)
