"""F16, F17, F20: a rank of several is killed at any instant, or stopped, and all go on; to the same bits.

Ranks are forked here, and ended when one of them is, as torch's agent does; the command with its agent and
supervisor is in tests/parallel.
"""

import os
import shutil
import signal
import socket
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from faults.host import TASK, Found, differences, ended, forked, hosted, outcome
from faults.matrix import Figure, row
from train import problems

import downslope as ds

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks ranks")
GRACE = 5.0
"""Seconds in which ranks that lost one must end by themselves or be ended."""


def start(out: Path, world: int, shard: bool, patience: float = 60) -> list[int]:
    """So many ranks of the training in `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        recipe = problems.recipe(steps=40)
        given: dict[str, Any] = {"save_every": 4, "valid_every": 4, "quiet": True}
        ds.train(TASK, recipe, out=out, seed=1, shard=shard, patience=patience, **given)
        os._exit(0)  # gloo's threads may abort an ordinary exit

    return [forked(lambda rank=rank: run(rank)) for rank in range(world)]  # type: ignore[misc]


def all_ended(children: list[int], seconds: float) -> list[int]:
    """How they ended; whoever has not in time is killed."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = ended(child)
        time.sleep(0.005)
    return [codes[child] for child in children]


def kills(count: int, seed: int, folder: Path, shard: bool) -> Found:
    """A rank is killed once or more in a training of two, which goes on and ends as if none had been."""
    began = time.monotonic()
    assert all_ended(start(folder / "straight", 2, shard), 60) == [0, 0]
    length, expected = time.monotonic() - began, outcome(folder / "straight")
    done, at_work, wrong = 0, 0, []
    while done < count:
        draw, out, first = Random(f"{seed} {done}"), folder / f"run-{done}", done
        codes = [-9]
        while any(codes):
            children = start(out, 2, shard)
            if killed := done < count and done < first + 5:
                victim = draw.randrange(2)
                time.sleep(draw.uniform(0, length))
                os.kill(children[victim], signal.SIGKILL)
                done += 1
                at_work += (out / "journal.jsonl").exists()
            codes = all_ended(children, GRACE if killed else 60)
            if not killed and any(codes):
                break
        if found := [f"did not go on: {codes}"] if any(codes) else differences(out, expected):
            wrong.append({"seed": seed, "from": first, "found": found})
        shutil.rmtree(out)
    return {"done": done, "at work": at_work, "wrong": wrong}


def whole(count: int, seed: int, folder: Path) -> Found:
    return kills(count, seed, folder, shard=False)


def sharded(count: int, seed: int, folder: Path) -> Found:
    return kills(count, seed, folder, shard=True)


def stopped(count: int, seed: int, folder: Path) -> Found:
    """A rank is stopped (SIGSTOP): those that wait for it write down where, and end."""
    assert all_ended(start(folder / "straight", 2, False), 60) == [0, 0]
    expected, wrong = outcome(folder / "straight"), []
    for number in range(count):
        draw, out = Random(f"{seed} {number}"), folder / f"run-{number}"
        victim, patience = draw.randrange(2), 3.0
        children = start(out, 2, False, patience)
        while not (out / "ckpt").exists() or not any((out / "ckpt").iterdir()):
            time.sleep(0.01)
        os.kill(children[victim], signal.SIGSTOP)
        began = time.monotonic()
        (code,) = all_ended([children[1 - victim]], 20)
        waited = time.monotonic() - began
        stacks = out / "ranks" / f"rank-{1 - victim}.stacks"
        found = [] if code and waited < patience + 5 else [f"ended with {code} after {waited:.1f} s"]
        if not (stacks.exists() and "File" in stacks.read_text()) and code not in (75,):
            found.append("left no stacks")
        os.kill(children[victim], signal.SIGKILL)
        ended(children[victim])
        shutil.rmtree(out / "ranks", ignore_errors=True)
        codes = all_ended(start(out, 2, False), 60)
        found += [f"did not go on: {codes}"] if any(codes) else differences(out, expected)
        if found:
            wrong.append({"seed": seed, "case": number, "found": found})
        shutil.rmtree(out)
    return {"done": count, "wrong": wrong}


@row("F16", 100)
def test_f16_a_rank_of_two_killed_at_random_instants(figure: Figure, tmp_path: Path) -> None:
    assert hosted(whole, figure, tmp_path)["at work"] >= figure.cases // 4


@row("F17", 50)
def test_f17_a_rank_of_two_with_sharded_weights_killed_at_random_instants(
    figure: Figure, tmp_path: Path
) -> None:
    assert hosted(sharded, figure, tmp_path)["at work"] >= figure.cases // 4


@row("F20", 20)
def test_f20_a_rank_that_is_stopped(figure: Figure, tmp_path: Path) -> None:
    hosted(stopped, figure, tmp_path)
