"""kill -9 and crashes at every file operation: the continuation equals the run that was never stopped."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train import problems

from downslope.journal import read
from downslope.train import history

HARNESS = Path(__file__).with_name("harness.py")


def harness(*arguments: object, timeout: float = 280) -> dict[str, Any]:
    command = [sys.executable, str(HARNESS), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], (found, done.stderr)
    return found


def test_ten_kills_at_random_instants(tmp_path: Path) -> None:
    found = harness("kills", 10, 20261123, tmp_path)
    assert found["killed"] == 10
    assert found["at work"] >= 3


@pytest.mark.slow
def test_a_hundred_kills_at_random_instants(tmp_path: Path) -> None:
    found = harness("kills", 100, 7, tmp_path)
    assert found["killed"] == 100
    assert found["at work"] >= 50


@pytest.mark.faults
def test_two_thousand_kills_at_random_instants(tmp_path: Path) -> None:
    assert harness("kills", 2000, 11, tmp_path, timeout=3600)["at work"] >= 1000


def test_a_crash_at_some_of_the_file_operations(tmp_path: Path) -> None:
    assert harness("points", 25, 3, tmp_path)["killed"] >= 10


@pytest.mark.slow
def test_a_crash_at_every_file_operation_torn_writes_too(tmp_path: Path) -> None:
    found = harness("points", 1, 0, tmp_path, timeout=900)
    assert found["killed"] == found["of"] >= 200


def command(out: Path) -> "subprocess.Popen[bytes]":
    arguments = ["train", f"{problems.__file__}:rich", "--out", str(out)]
    return subprocess.Popen([sys.executable, "-m", "downslope", *arguments], stderr=subprocess.DEVNULL)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def bits(out: Path) -> tuple[Any, ...]:
    """Hash of the final state, losses, result."""
    events = history(read(out / "journal.jsonl"))
    state = [event["sha"] for event in events if event["kind"] == "checkpoint"][-1]
    losses = [(event["step"], event["loss"]) for event in events if event["kind"] == "step"]
    return state, losses, (out / "result.json").read_bytes()


@pytest.mark.slow
def test_the_command_itself_killed_at_work(tmp_path: Path) -> None:
    out, straight, draw = tmp_path / "run", tmp_path / "straight", random.Random(3)
    assert command(straight).wait(120) == 0
    for _ in range(4):
        process, before = command(out), size(out / "journal.jsonl")
        while process.poll() is None and size(out / "journal.jsonl") == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.wait(60)
    assert command(out).wait(120) == 0
    assert bits(out) == bits(straight)
