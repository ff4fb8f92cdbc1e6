"""F3 to F6: a crash at every operation on a file, and files that are cut, changed or doubled afterwards."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.host import Found, differences, ended, forked, go, hosted, outcome
from faults.matrix import Figure, row

from downslope import journal
from downslope.errors import BadInput
from downslope.train import checkpoint
from downslope.train.checkpoint import Damaged

CHANGING = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
STEPS, SAVE_EVERY = 6, 2


class Mine:
    """Counts the operations that change files, and ends the process at one of them.

    A write can be torn: `part` is how much of it is still done, 0 (before it) to 1 (just after it).
    """

    def __init__(self, at: int | None, part: float) -> None:
        self.at, self.part, self.seen = at, part, list[str]()
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


def counted(out: Path, log: Path) -> None:
    mine = Mine(None, 0)
    go(out, STEPS, SAVE_EVERY)
    seen = list(mine.seen)
    log.write_text(json.dumps(seen))


def points(every: int, seed: int, folder: Path) -> Found:
    """Before, within and after every write, fsync, rename and unlink of a training with three saves."""
    assert ended(forked(lambda: counted(folder / "reference", folder / "log"))) == 0
    expected, log = outcome(folder / "reference"), json.loads((folder / "log").read_text())
    halves = {"write": (0.0, 0.1, 0.5, 0.9, 1.0)}
    chosen = [(at, part) for at, name in enumerate(log) for part in halves.get(name, (0.0, 1.0))][::every]
    wrong = []
    for at, part in chosen:
        out = folder / f"point-{at}-{part}"

        def crash(out: Path = out, at: int = at, part: float = part) -> None:
            Mine(at, part)
            go(out, STEPS, SAVE_EVERY)

        code = ended(forked(crash))
        found = [f"was not stopped: {code}"] if code != 77 else []
        code = ended(forked(lambda out=out: go(out, STEPS, SAVE_EVERY)))
        found += [f"did not go on: {code}"] if code else differences(out, expected)
        if found:
            wrong.append({"point": at, "operation": log[at], "part": part, "found": found})
        shutil.rmtree(out, ignore_errors=True)
    return {"done": len(chosen), "wrong": wrong}


@row("F3", None, every_day=True, slow=True)
def test_f03_a_crash_at_every_file_operation(figure: Figure, tmp_path: Path) -> None:
    assert hosted(points, figure, tmp_path)["done"] >= 200


# --- F4, F5: checkpoints that are not what was saved ---------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with two checkpoints."""
    out = tmp_path_factory.mktemp("files") / "run"
    go(out, STEPS, SAVE_EVERY)
    return out


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint of 50 MB and the hash of its manifest."""
    folder = tmp_path_factory.mktemp("big") / "step-1"
    tensors = {f"{i}.weight": torch.randn(1000, 1250) for i in range(10)}
    return folder, checkpoint.write(folder, {"model.safetensors": checkpoint.pack(tensors)}, step=1)


def newest(out: Path) -> tuple[Path, str]:
    """Folder and hash of the last checkpoint."""
    event = [event for event in journal.read(out / "journal.jsonl") if event["kind"] == "checkpoint"][-1]
    return out / "ckpt" / event["name"], event["sha"]


def flipped(good: bytes, place: int) -> bytes:
    return good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {"F4": lambda good, place: good[:place], "F5": flipped}


def every_byte(figure: Figure, saved: tuple[Path, str]) -> None:
    """Damage each byte of each file of a checkpoint; the file is named."""
    folder, sha = saved
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    places = [(path, place) for path, good in files.items() for place in range(len(good))]
    for path, place in figure.of(places):
        path.write_bytes(DAMAGE[figure.row](files[path], place))
        with pytest.raises(Damaged, match=re.escape(path.name)):
            checkpoint.verify(folder, sha)
        path.write_bytes(files[path])
    checkpoint.verify(folder, sha)


@row("F4", None)
def test_f04_a_checkpoint_cut_at_every_byte_is_named(figure: Figure, finished: Path) -> None:
    every_byte(figure, newest(finished))


@row("F5", None)
def test_f05_a_flipped_bit_in_every_byte_is_named(figure: Figure, finished: Path) -> None:
    every_byte(figure, newest(finished))


@row("F4", 1000, slow=True)
def test_f04_a_large_checkpoint_cut_anywhere_is_named(figure: Figure, big: tuple[Path, str]) -> None:
    folder, sha = big
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for _, draw in figure.draws():
        os.truncate(path, place := draw.randrange(len(data)))
        with pytest.raises(Damaged, match=r"model\.safetensors has"):
            checkpoint.verify(folder, sha)
        with path.open("ab") as file:
            file.write(data[place:])
    checkpoint.verify(folder, sha)


@row("F5", 1000, slow=True)
def test_f05_a_flipped_bit_anywhere_in_a_large_checkpoint_is_named(
    figure: Figure, big: tuple[Path, str]
) -> None:
    folder, sha = big
    with (folder / "model.safetensors").open("r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for _, draw in figure.draws():
            place = draw.randrange(size)
            good = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([good[0] ^ 1 << draw.randrange(8)]), place)
            with pytest.raises(Damaged, match=r"SHA-256 of model\.safetensors"):
                checkpoint.verify(folder, sha)
            os.pwrite(file.fileno(), good, place)
    checkpoint.verify(folder, sha)


def fall_backs(count: int, seed: int, folder: Path) -> Found:
    """A file of the newest checkpoint is cut or changed: the one before it is used, to the same end."""
    assert ended(forked(lambda: go(folder / "whole", STEPS, SAVE_EVERY))) == 0
    expected, wrong = outcome(folder / "whole"), []
    for number in range(count):
        draw, out = random.Random(f"{seed} {number}"), folder / f"run-{number}"
        shutil.copytree(folder / "whole", out)
        path = draw.choice(sorted(newest(out)[0].iterdir()))
        good, kind = path.read_bytes(), draw.choice(sorted(DAMAGE))
        path.write_bytes(DAMAGE[kind](good, place := draw.randrange(len(good))))
        code = ended(forked(lambda out=out: go(out, STEPS, SAVE_EVERY)))
        named = [told for event in journal.read(out / "journal.jsonl") for told in event.get("damaged", [])]
        found = [f"ended with {code}"] if code else []
        found += [] if [path.name in told for told in named] == [True] else [f"named {named}"]
        now = outcome(out)
        now["files"] = [name for name in now["files"] if not name.endswith(".damaged")]
        found += [key for key in now if now[key] != expected[key]]
        if found:
            wrong.append({"seed": seed, "number": number, "at": [path.name, kind, place], "found": found})
        shutil.rmtree(out)
    return {"done": count, "wrong": wrong}


@row("F4", 200, slow=True)
def test_f04_f05_the_checkpoint_before_a_damaged_one_is_used(figure: Figure, tmp_path: Path) -> None:
    hosted(fall_backs, figure, tmp_path)


# --- F6: the journal -----------------------------------------------------------------------------------


def seqs(path: Path) -> list[int]:
    return [event["seq"] for event in journal.read(path)]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, bytes, list[int]]:
    """A training's journal, its bytes, and where its lines begin."""
    path = Path(shutil.copy(finished / "journal.jsonl", tmp_path))
    data = path.read_bytes()
    return path, data, [0, *(i + 1 for i, byte in enumerate(data) if byte == ord("\n"))]


@row("F6", None, every_day=True)
def test_f06_a_journal_cut_at_every_byte_keeps_what_is_whole(
    figure: Figure, copied: tuple[Path, bytes, list[int]]
) -> None:
    path, data, starts = copied
    for cut in figure.of(range(len(data))):
        path.write_bytes(data[:cut])
        assert seqs(path) == list(range(sum(start <= cut for start in starts) - 1)), cut


@row("F6", None, every_day=True)
def test_f06_a_flipped_byte_is_refused_by_its_offset_and_repaired_with_a_copy(
    figure: Figure, copied: tuple[Path, bytes, list[int]]
) -> None:
    path, data, starts = copied
    last = len(starts) - 2
    for place in figure.of(range(len(data))):
        damaged = flipped(data, place)
        path.write_bytes(damaged)
        hit = sum(start <= place for start in starts) - 1
        if hit == last:
            assert seqs(path) == list(range(last))
            continue
        with pytest.raises(BadInput, match=f"is damaged at byte {starts[hit]}: event {hit} is not readable"):
            journal.read(path)
        assert path.read_bytes() == damaged
        if place % 50 == 0:
            copy = journal.repair(path)
            assert copy.read_bytes() == damaged
            assert seqs(path) == list(range(hit))


@row("F6", 100, every_day=True)
def test_f06_a_last_block_that_is_doubled_or_empty_is_left_out(
    figure: Figure, copied: tuple[Path, bytes, list[int]]
) -> None:
    path, data, starts = copied
    for _, draw in figure.draws():
        length = draw.choice([1, draw.randrange(1, 600), 512, 4096])
        path.write_bytes(data + draw.choice([data[-length:], b"\0" * length, draw.randbytes(length)]))
        assert seqs(path) == list(range(len(starts) - 1))


def cuts(count: int, seed: int, folder: Path) -> Found:
    """A journal loses its end: what it no longer vouches for is done again, to the same end."""
    assert ended(forked(lambda: go(folder / "whole", STEPS, SAVE_EVERY))) == 0
    expected, wrong = outcome(folder / "whole"), []
    for number in range(count):
        draw, out = random.Random(f"{seed} {number}"), folder / f"run-{number}"
        shutil.copytree(folder / "whole", out)
        os.truncate(out / "journal.jsonl", cut := draw.randrange((out / "journal.jsonl").stat().st_size))
        code = ended(forked(lambda out=out: go(out, STEPS, SAVE_EVERY)))
        found = [f"ended with {code}"] if code else []
        now = outcome(out)
        found += [key for key in now if now[key] != expected[key]]
        if found:
            wrong.append({"seed": seed, "number": number, "cut": cut, "found": found})
        shutil.rmtree(out)
    return {"done": count, "wrong": wrong}


@row("F6", 50, every_day=True, slow=True)
def test_f06_a_run_whose_journal_was_cut_ends_the_same(figure: Figure, tmp_path: Path) -> None:
    hosted(cuts, figure, tmp_path)
