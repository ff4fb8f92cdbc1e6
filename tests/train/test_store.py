"""Checkpoints of anyone's loop, and of runs: in the background too, bad ones named and passed over."""

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train import problems

import downslope as ds
from downslope.errors import BadInput
from downslope.journal import Journal, read
from downslope.train.history import history
from downslope.train.store import Store


class Loop:
    """A plain loop: its state, and a step that draws from the global generator."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = ds.TrainState(self.model, self.optimizer)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.state.step += 1
        return float(loss.detach())


@pytest.fixture(autouse=True)
def _undisturbed() -> Any:
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("background", [False, True])
def test_the_newest_stay_and_a_new_program_goes_on(tmp_path: Path, background: bool) -> None:
    first = Loop()
    with ds.Checkpoints(tmp_path / "c", keep=2, background=background) as kept:
        assert kept.load(first.state) is None
        for _ in range(4):
            first.step()
            kept.save(first.state)
    straight = [first.step() for _ in range(3)]
    assert sorted(path.name[-1] for path in (tmp_path / "c" / "ckpt").iterdir()) == ["3", "4"]
    second = Loop(1)
    with ds.Checkpoints(tmp_path / "c", background=background) as kept:
        found = kept.load(second.state)
        assert found is not None
        assert found.step == second.state.step == 4
        assert kept.damaged == []
    assert [second.step() for _ in range(3)] == straight


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    shas = []
    for background in (False, True):
        loop = Loop()
        loop.step()
        with ds.Checkpoints(tmp_path / str(background), background=background) as kept:
            kept.save(loop.state)
            for _ in range(2):  # into the memory of the first copy
                loop.step()
                kept.save(loop.state)
        events = read(tmp_path / str(background) / "journal.jsonl")
        shas.append([event["sha"] for event in events if event["kind"] == "checkpoint"])
    assert shas[0] == shas[1]
    assert len(set(shas[0])) == 3


def test_what_is_saved_in_the_background_is_the_state_of_that_moment(tmp_path: Path) -> None:
    loop = Loop()
    with ds.Checkpoints(tmp_path / "c", background=True) as kept:
        for _ in range(30):
            loop.step()
        before = loop.state.fields()
        kept.save(loop.state)
        for _ in range(30):
            loop.step()
    other = Loop(1)
    other.state.load(tmp_path / "c" / "ckpt" / "step-000000030")
    assert other.state.fields() == before


@pytest.mark.parametrize("which", ["newest", "all"])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, which: str) -> None:
    loop = Loop()
    with ds.Checkpoints(tmp_path / "c") as kept:
        for _ in range(2):
            loop.step()
            kept.save(loop.state)
    for step in (2,) if which == "newest" else (1, 2):
        path = tmp_path / "c" / "ckpt" / f"step-{step:09d}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    with ds.Checkpoints(tmp_path / "c") as kept:
        found = kept.load(loop.state)
        assert (found and found.step) == (1 if which == "newest" else None)
        assert "model.safetensors" in kept.damaged[0]
        assert "step-000000002" in kept.damaged[0]
        while loop.state.step < 3:
            loop.step()
        kept.save(loop.state)  # nothing stands in its way
        found = kept.load(loop.state)
        assert found is not None
        assert found.step == 3
    assert (tmp_path / "c" / "ckpt" / "step-000000002.damaged").exists()


def test_one_process_writes(tmp_path: Path) -> None:
    with ds.Checkpoints(tmp_path / "c"), pytest.raises(BadInput, match="is being written by process"):
        ds.Checkpoints(tmp_path / "c")
    with pytest.raises(BadInput, match=r"keep is how many .* got 0"):
        ds.Checkpoints(tmp_path / "d", keep=0)


def _go_on(loop: Loop, kept: ds.Checkpoints) -> None:
    for _ in range(1000):
        loop.step()
        kept.settle()
        time.sleep(0.01)


STAGES = [("mkdir", 0), ("rename", 0)]
STAGES += [(call, after) for call in ("open", "write", "fsync") for after in range(4)]


@pytest.mark.parametrize(("call", "after"), STAGES)
def test_a_failure_in_the_background_is_raised_by_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    """Row F28: at whatever stage the disk refuses, it is told at once, and what was saved stays."""
    loop = Loop()
    kept = ds.Checkpoints(tmp_path / "c", background=True)
    loop.step()
    kept.save(loop.state)
    kept._store.settle(wait=True)
    before, real, calls = loop.state.fields(), getattr(os, call), [0]

    def failing(*given: Any, **named: Any) -> Any:
        if threading.current_thread().name.startswith("checkpoint"):
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **named)

    loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        kept.save(loop.state)
        with pytest.raises(BadInput, match="No space left on device"):
            _go_on(loop, kept)
    loop.step()
    kept.save(loop.state)  # there is room again
    kept.close()
    other = Loop(1)
    with ds.Checkpoints(tmp_path / "c") as again:
        found = again.load(other.state)
    assert found is not None
    assert found.step == loop.state.step
    assert not list((tmp_path / "c" / "ckpt").glob(".*"))
    other.state.load(tmp_path / "c" / "ckpt" / "step-000000001")
    assert other.state.fields() == before


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_any_instant_it_ends_in_the_same_bits(tmp_path: Path, background: bool) -> None:
    """Each child goes on from what it finds and is killed after a moment, until one gets to the end."""
    steps, rng = 600, random.Random(7)
    random.seed(0)
    straight = Loop()
    for _ in range(steps):
        straight.step()
    expected = straight.state.fields()
    kills = 0
    for turn in range(400):
        child = os.fork()
        if child == 0:
            try:
                random.seed(0)  # Python seeds it anew in every child
                loop = Loop()
                with ds.Checkpoints(tmp_path / "c", background=background) as kept:
                    kept.load(loop.state)
                    while loop.state.step < steps:
                        loop.step()
                        kept.settle()
                        if loop.state.step % 5 == 0:
                            kept.save(loop.state)
                os._exit(0 if loop.state.fields() == expected else 3)
            except BaseException:
                os._exit(4)
        time.sleep(rng.uniform(0.02, 0.1) * 1.02**turn)  # a busy machine gets there too
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -9), code
        kills += code == -9
        if code == 0:
            break
    assert code == 0
    assert kills >= 3


def test_a_run_saved_in_the_background_is_the_same_run(tmp_path: Path) -> None:
    runs = [
        ds.train(
            problems.rich(),
            out=tmp_path / str(background),
            seed=1,
            save_every=3,
            quiet=True,
            background=background,
        )
        for background in (False, True)
    ]
    assert runs[0].losses == runs[1].losses
    last = [
        next(event for event in reversed(run.events) if event["kind"] == "checkpoint")["sha"] for run in runs
    ]
    assert last[0] == last[1]


def test_an_acknowledgement_that_came_later_stands_where_the_state_stood(tmp_path: Path) -> None:
    """Updates are journalled while a checkpoint is being written: a resume from it repeats those."""
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append("start")
        journal.append("step", step=0)
        at = journal.last
        journal.append("step", step=1)
        journal.append("checkpoint", step=1, name="step-000000001", sha="0", after=at)
        journal.append("step", step=2)
        counting = history([*read(journal.path), {"kind": "resume", "after": at}])
    assert [event.get("step") for event in counting] == [None, 0, 1]
    assert counting[-1]["kind"] == "checkpoint"


def test_a_store_writes_nothing_after_it_was_fenced_off(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        store, loop = Store(tmp_path / "ckpt", journal), Loop()
        with (tmp_path / "journal.jsonl").open("ab") as other:
            other.write(b"x")
        with pytest.raises(BadInput, match="another process has written"):
            store.save(loop.state)
    assert not list((tmp_path / "ckpt").iterdir())
