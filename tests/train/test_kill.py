"""kill -9 and crashes at every file operation: the continuation equals the run that was never stopped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
