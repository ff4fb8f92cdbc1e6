"""F7, F8: disks that are full, broken, or take a few bytes at a time. What was saved stays saved."""

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from itertools import count as counting
from pathlib import Path
from typing import Any

import pytest
from faults.host import TASK, Found, differences, ended, forked, go, hosted, outcome
from faults.matrix import Figure, row
from torch import nn
from train import problems

import downslope as ds
from downslope.journal import read
from downslope.train import checkpoint, history

STEPS, SAVE_EVERY = 6, 2


def unsound(out: Path) -> list[str]:
    """Acknowledged checkpoints that are not whole, and what a failed writer left behind."""
    if not out.exists():
        return []
    told = [path.name for path in out.rglob("*.tmp")]
    events = history(read(out / "journal.jsonl")) if (out / "journal.jsonl").exists() else []
    for event in [event for event in events if event["kind"] == "checkpoint"][-2:]:
        try:
            checkpoint.verify(out / "ckpt" / event["name"], event["sha"])
        except checkpoint.Damaged as error:
            told.append(str(error))
    return told


# --- F7: a full disk ----------------------------------------------------------------------------------


class Wide(nn.Sequential):
    """A model whose checkpoint takes 3 MB, so that none of the disks has room for the whole run."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 3))


def wide(out: Path) -> None:
    task = problems.task(model=Wide, metric=ds.accuracy)
    ds.train(task, problems.recipe(steps=STEPS), out=out, seed=1, save_every=SAVE_EVERY, quiet=True)


def mounted(folder: Path, size: int, *options: str) -> None:
    """A file system of so many KB in memory; mounted anew, it keeps what it holds."""
    folder.mkdir(exist_ok=True)
    options = (f"size={size}k", *options)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=True)


def full_disks(count: int, seed: int, folder: Path) -> Found:
    """Disks of 256 KB to 8 MB fill up; then they are enlarged, and the run goes on."""
    assert ended(forked(lambda: wide(folder / "whole"))) == 0
    expected, wrong = outcome(folder / "whole"), []
    for number in range(count):
        size = round(random.Random(f"{seed} {number}").uniform(256, 8192))
        disk, said = folder / "disk", folder / "said"
        out = disk / "run"
        mounted(disk, size)
        try:
            code = ended(forked(lambda out=out: wide(out), said))
            told = said.read_text()
            found = [] if code == 2 and "No space left on device" in told else [f"ended with {code}: {told}"]
            found += unsound(out)
            mounted(disk, 65_536, "remount")
            code = ended(forked(lambda out=out: wide(out)))
            found += [f"did not go on: {code}"] if code else differences(out, expected)
        finally:
            subprocess.run(["umount", disk], check=True)
        if found:
            wrong.append({"seed": seed, "number": number, "size": size, "found": found})
    return {"done": count, "wrong": wrong}


@row("F7", 100, slow=True)
def test_f07_a_disk_fills_up_and_is_enlarged(figure: Figure, tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    try:
        mounted(tmp_path / "probe", 256)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs rights that this user does not have")
    subprocess.run(["umount", tmp_path / "probe"], check=True)
    hosted(full_disks, figure, tmp_path)


class Room:
    """An `os.write` for a disk with room for so many more bytes; counts what was written."""

    def __init__(self, size: float) -> None:
        self.size, self.written, self._real = size, 0, os.write

    def __call__(self, file: int, data: bytes) -> int:
        left = self.size - self.written
        if left <= 0 and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self._real(file, bytes(data) if left >= len(data) else bytes(data)[: int(left)])
        self.written += done
        return done


def filled(out: Path, size: float) -> int:
    """Train with room for `size` bytes; the bytes that were written."""
    os.write = room = Room(size)  # type: ignore[assignment]
    go(out, STEPS, SAVE_EVERY)
    return room.written


def full_at_bytes(count: int, seed: int, folder: Path) -> Found:
    """Room for a number of bytes, from none to one too few for the whole run."""
    log = folder / "written"
    whole = folder / "whole"
    assert ended(forked(lambda: log.write_text(str(filled(whole, float("inf")))))) == 0
    expected, written, wrong = outcome(whole), int(log.read_text()), []
    for number in range(count):
        out, said = folder / f"run-{number}", folder / "said"
        size = (
            (written - 300) * number // max(1, count - 1)
        )  # seconds take more digits in one run than another
        code = ended(forked(lambda out=out, size=size: filled(out, size), said))
        told = said.read_text()
        found = [] if code == 2 and "No space left on device" in told else [f"ended with {code}: {told}"]
        found += unsound(out)
        code = ended(forked(lambda out=out: go(out, STEPS, SAVE_EVERY)))
        found += [f"did not go on: {code}"] if code else differences(out, expected)
        if found:
            wrong.append({"number": number, "size": size, "of": written, "found": found})
        shutil.rmtree(out)
    return {"done": count, "wrong": wrong}


@row("F7", 100, slow=True)
def test_f07_the_disk_is_full_after_any_byte(figure: Figure, tmp_path: Path) -> None:
    hosted(full_at_bytes, figure, tmp_path)


# --- F8: a disk that refuses or dawdles ---------------------------------------------------------------

ERRORS = (errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT, errno.ENOSPC, errno.EMFILE)
OPERATIONS = ("open", "write", "fsync", "rename", "mkdir", "ftruncate")


def counted(log: Path) -> None:
    """How many operations a whole training takes."""
    seen = counting()
    refusing(seen, -1, 0, False)
    go(log.with_name("whole"), STEPS, SAVE_EVERY)
    log.write_text(str(next(seen)))


def refusing(seen: "counting[int]", at: int, error: int, for_good: bool) -> None:
    """The system refuses the operation number `at`, once or from then on."""

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            if name == "open" and not given[1] & os.O_CREAT:  # looking is still allowed
                return real(*given, **named)
            number = next(seen)
            if number == at or (for_good and 0 <= at < number):
                raise OSError(error, os.strerror(error))
            return real(*given, **named)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name), name))


def dawdling(draw: random.Random) -> None:
    """Writes take a few bytes at a time, while a timer interrupts whatever the system is doing."""
    real = os.write
    os.write = lambda file, data: real(file, bytes(data[: draw.randint(1, 4096)]))  # type: ignore[assignment]
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)


def refusals(count: int, seed: int, folder: Path) -> Found:
    """One operation of a training fails with one error; or all succeed, slowly. Then it is continued."""
    assert ended(forked(lambda: counted(folder / "log"))) == 0
    expected, operations = outcome(folder / "whole"), int((folder / "log").read_text())
    wrong, refused = [], 0
    for number in range(count):
        draw, out, said = random.Random(f"{seed} {number}"), folder / f"run-{number}", folder / "said"
        at, error, for_good = draw.randrange(operations), draw.choice(ERRORS), draw.random() < 0.5
        slow = draw.random() < 0.2

        disk = partial(dawdling, draw) if slow else partial(refusing, counting(), at, error, for_good)
        code = ended(forked(lambda out=out, disk=disk: (disk(), go(out, STEPS, SAVE_EVERY)), said))
        refused += code == 2
        sound = code == 0 or (code == 2 and os.strerror(error) in said.read_text() and not slow)
        found = [] if sound else [f"ended with {code}: {said.read_text()}"]
        # A disk that refuses for good refuses to have the litter cleared away, too.
        found += [] if for_good else unsound(out)
        code = ended(forked(lambda out=out: go(out, STEPS, SAVE_EVERY)))
        found += [f"did not go on: {code}"] if code else differences(out, expected)
        if found:
            what = {"operation": at, "error": errno.errorcode[error], "for good": for_good, "slow": slow}
            wrong.append({"seed": seed, "number": number, **what, "found": found})
        shutil.rmtree(out, ignore_errors=True)
    return {"done": count, "refused": refused, "wrong": wrong}


@row("F8", 200, every_day=True, slow=True)
def test_f08_one_operation_fails_or_all_dawdle(figure: Figure, tmp_path: Path) -> None:
    assert hosted(refusals, figure, tmp_path)["refused"] >= figure.cases // 2


def test_f08_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    """Also for a superuser, whom no mode of a folder stops."""
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/run", "file/deep/run"):
        with pytest.raises(
            ds.errors.BadInput, match=r"cannot write the folder .*: (Not a directory|File exists)"
        ):
            ds.train(TASK, out=tmp_path / place, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
