"""`downslope train --nproc 2` itself: ranks, agent and supervisor killed, stopped, told to stop, failing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from train import problems

import downslope as ds
from downslope.journal import read
from downslope.train import history, losses

pytestmark = [
    pytest.mark.xdist_group("supervised"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
STEPS = 900  # long enough to be caught at work


@contextmanager
def started(out: Path, *options: str, task: str = "rich") -> Iterator[subprocess.Popen[str]]:
    """The command on two ranks; whatever is left of it in the end is killed."""
    recipe = out.parent / "recipe.toml"
    recipe.write_text(problems.recipe(steps=STEPS).text())
    arguments = ["train", f"{problems.__file__}:{task}", "--out", str(out), "--recipe", str(recipe)]
    command = [sys.executable, "-m", "downslope", *arguments, "--nproc", "2", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            for child in [*family(process.pid), process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def family(parent: int) -> list[int]:
    """The process ids of its children, and below these of theirs: the agent, then the ranks in order."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                children.append(int(path.parent.name))
    return [*sorted(children), *(one for child in sorted(children) for one in family(child))]


def alive(process: int) -> bool:
    """Whether it still runs; one that nobody has waited for yet does not."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(what: Callable[[], Any], seconds: float = 100) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)
    return found


def steps(out: Path) -> int:
    with suppress(ds.BadInput):
        return sum(event["kind"] == "step" for event in read(out / "journal.jsonl"))
    return 0


def at_work(process: subprocess.Popen[str], out: Path) -> list[int]:
    """The agent and the ranks, once they train."""
    before = steps(out)
    wait_for(lambda: steps(out) > before + 20)
    found = family(process.pid)
    assert len(found) == 3
    return found


def bits(out: Path) -> tuple[Any, ...]:
    """Hash of the final state, losses, validations, result."""
    events = history(read(out / "journal.jsonl"))
    state = [event["sha"] for event in events if event["kind"] == "checkpoint"][-1]
    valid = [(event["step"], event["loss"]) for event in events if event["kind"] == "valid"]
    return state, losses(events), valid, (out / "result.json").read_bytes()


def said(process: subprocess.Popen[str], code: int) -> str:
    found = process.communicate(timeout=200)[1]
    assert process.returncode == code, found
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What nobody disturbed ends in."""
    out = tmp_path_factory.mktemp("straight") / "run"
    with started(out) as process:
        assert "lost" not in said(process, 0)
    assert not (out / "ranks").exists()
    return bits(out)


def test_a_killed_rank_is_started_anew(tmp_path: Path, straight: tuple[Any, ...]) -> None:
    out = tmp_path / "run"
    with started(out) as process:
        _, first, second = at_work(process, out)
        os.kill(second, signal.SIGKILL)
        assert "A rank was lost: starting all 2 again (1 of 3)." in said(process, 0)
        assert not alive(first)
    assert bits(out) == straight


@pytest.mark.slow
def test_no_rank_outlives_the_supervisor(tmp_path: Path, straight: tuple[Any, ...]) -> None:
    out = tmp_path / "run"
    with started(out) as process:
        children = at_work(process, out)
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, children)), seconds=5)
    with started(out) as process:
        said(process, 0)
    assert bits(out) == straight


@pytest.mark.slow
def test_a_killed_agent_takes_the_ranks_along_and_is_started_anew(
    tmp_path: Path, straight: tuple[Any, ...]
) -> None:
    out = tmp_path / "run"
    with started(out) as process:
        agent, *ranks = at_work(process, out)
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, ranks)), seconds=5)
        said(process, 0)
    assert bits(out) == straight


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_where_the_others_wait(
    tmp_path: Path, straight: tuple[Any, ...]
) -> None:
    out = tmp_path / "run"
    with started(out, "--patience", "20") as process:
        *_, second = at_work(process, out)
        os.kill(second, signal.SIGSTOP)
        assert "A rank was lost" in said(process, 0)
    stacks = (out / "ranks" / "rank-0.stacks").read_text()
    assert "Timeout" in stacks
    assert "downslope/train/" in stacks  # in whichever of the loop's agreements the other was stopped
    assert "distributed_c10d.py" in stacks or "_engine_run_backward" in stacks
    assert bits(out) == straight


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_on_all_ranks(
    tmp_path: Path, straight: tuple[Any, ...], number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    with started(out) as process:
        at_work(process, out)
        process.send_signal(number)
        assert "saved at step" in said(process, code)
    assert [event["kind"] for event in read(out / "journal.jsonl")][-1] == "checkpoint"
    with started(out) as process:
        said(process, 0)
    assert bits(out) == straight


@pytest.mark.slow
def test_what_a_new_start_would_not_change_is_said_once(tmp_path: Path) -> None:
    with started(tmp_path / "run", task="failing") as process:
        found = said(process, 1)
    assert found.count("raised ZeroDivisionError") == 1
    assert "A rank was lost" not in found


@pytest.mark.slow
def test_a_run_goes_on_on_other_ranks_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], straight: tuple[Any, ...]
) -> None:
    out = tmp_path / "run"
    with started(out) as process:
        at_work(process, out)
        process.send_signal(signal.SIGTERM)
        said(process, 143)
    capfd.readouterr()
    run = ds.resume(out)
    assert (
        "The run was on 2 ranks and goes on on 1 rank: numbers are now equal only" in capfd.readouterr().err
    )
    assert run.steps == STEPS
    worlds = [event["world"] for event in read(out / "journal.jsonl") if event["kind"] in ("start", "resume")]
    assert worlds == [2, 1]
