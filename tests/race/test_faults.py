"""What goes wrong around a race, with real processes: kills, bad trials, damaged files, two at once."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from race.conftest import workers

import downslope as ds
from downslope.errors import BadInput
from downslope.race.race import ATTEMPTS

PATIENCE = 120.0


def until(condition, process=None):
    """Wait for a condition, for as long as the process that should bring it about lives."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        if process is not None and process.poll() is not None:
            return condition()
        time.sleep(0.02)
    return found


def gone(pids):
    """Whether none of these processes lives; one that ended but was not waited for does not."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
        except OSError:
            continue
    return True


def kill_coordinator(plain, out, dice):
    """Start the race and kill it at a random instant of its work; its workers must not outlive it."""
    opened = len(plain.events(out, "open"))
    with plain.start(out, workers=dice.choice([1, 2, 3])) as process:
        until(lambda: len(plain.events(out, "open")) > opened or plain.events(out, "end"), process)
        time.sleep(dice.choice([0.0, dice.uniform(0, 6)]))
        children = workers(process.pid)
        process.kill()
        process.wait()
    until(lambda: gone(children))


def acknowledged_work_is_not_repeated(events):
    """A piece behind which a checkpoint was acknowledged is trained once."""
    seen = set()
    for event in events:
        if event["kind"] == "segment" and event["checkpoint"]:
            run = (event["trial"], event["repeat"], event["run"], event["run"] == "branch" and event["rung"])
            steps = {(run, step) for step in range(event["start"], event["end"])}
            assert not steps & seen
            seen |= steps
    return True


def test_coordinator_killed_at_any_time_goes_on_to_the_same_bytes(plain):
    dice = random.Random(0)
    for _ in range(3):
        kill_coordinator(plain, "killed", dice)
    plain.race("killed", workers=2)
    assert plain.bytes("killed") == plain.bytes("reference")
    assert acknowledged_work_is_not_repeated(plain.events("killed"))


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_coordinator_killed_fifty_times(plain):
    dice = random.Random(1)
    for number in range(10):
        for _ in range(5):
            kill_coordinator(plain, f"killed-{number}", dice)
        plain.race(f"killed-{number}", workers=dice.choice([1, 2, 4]))
        assert plain.bytes(f"killed-{number}") == plain.bytes("reference")
        assert acknowledged_work_is_not_repeated(plain.events(f"killed-{number}"))


def has_grown(plain, out, goal):
    return len(plain.events(out)) >= goal


def kill_workers(plain, out, kills, dice):
    """Kill a worker whenever the race has got on a little; the number of kills that hit one."""
    hit = 0
    with plain.start(out, workers=2) as process:
        while hit < kills and process.poll() is None:
            goal = len(plain.events(out)) + dice.randrange(2, 5)
            until(partial(has_grown, plain, out, goal), process)
            time.sleep(dice.uniform(0, 0.1))
            for pid in dice.sample(found := workers(process.pid), min(1, len(found))):
                os.kill(pid, signal.SIGKILL)
                hit += 1
        assert process.wait() == 0
    return hit


def test_workers_killed_at_any_time_change_nothing(plain):
    hit = kill_workers(plain, "orphaned", 3, random.Random(2))
    assert hit
    assert plain.events("orphaned", "lost")
    assert not plain.events("orphaned", "failed")
    assert plain.bytes("orphaned") == plain.bytes("reference")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_workers_killed_fifty_times(plain):
    dice, hit, number = random.Random(3), 0, 0
    while hit < 50:
        number += 1
        hit += kill_workers(plain, f"orphaned-{number}", 10, dice)
        assert plain.bytes(f"orphaned-{number}") == plain.bytes("reference")


def test_a_stopped_race_leaves_no_process_and_goes_on(plain):
    with plain.start("stopped", workers=2) as process:
        until(lambda: plain.events("stopped", "segment"), process)
        children = workers(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait()
    assert children
    until(lambda: gone(children))
    plain.race("stopped")
    assert plain.bytes("stopped") == plain.bytes("reference")


def test_a_second_coordinator_is_refused_by_the_process_id_of_the_first(plain):
    with plain.start("twice", workers=1) as process:
        until(lambda: plain.events("twice", "open"), process)
        with pytest.raises(BadInput, match=str(process.pid)):
            plain.race("twice")
        process.kill()


def test_damaged_checkpoints_are_named_and_trained_again(plain):
    with plain.start("damaged", workers=1) as process:
        until(lambda: plain.events("damaged", "cut") and len(plain.events("damaged", "judged")) > 8, process)
        process.kill()
        process.wait()
    weights = sorted(plain.folder("damaged").glob("trials/*/*/model.safetensors"))
    assert weights
    for file in weights:
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    plain.race("damaged")
    assert all("model.safetensors" in event["reason"] for event in plain.events("damaged", "damaged"))
    assert plain.events("damaged", "damaged")
    assert plain.bytes("damaged") == plain.bytes("reference")


def test_a_disk_that_refuses_checkpoints_fails_no_trial_and_the_race_goes_on_later(plain):
    folder = plain.folder("refusing")
    folder.mkdir()
    (folder / "trials").write_text("in the way")
    with pytest.raises(BadInput, match="cannot write"):
        plain.race("refusing")
    assert not plain.events("refusing", "failed")
    (folder / "trials").unlink()
    plain.race("refusing")
    assert plain.bytes("refusing") == plain.bytes("reference")


TROUBLES = {
    "raises": (1e3, 'raise ValueError("enough")', "ValueError: enough"),
    "exits": (1e6, "sys.exit(3)", "SystemExit: 3"),
    "ends": (1e9, "os._exit(3)", "exit code 3"),
    "crashes": (1e12, "ctypes.string_at(0)", "SIGSEGV"),
    "is killed": (1e15, "os.kill(os.getpid(), 9)", "SIGKILL"),
    "shouts": (1e18, 'print("x" * 50_000_000); raise ValueError("hoarse")', "hoarse"),
    "leaves a child": (1e21, 'subprocess.Popen(["sleep", "1234.5"]); os._exit(4)', "exit code 4"),
}


def test_bad_trials_fail_with_a_reason_and_the_race_goes_on(field, monkeypatch):
    """The rate decides how far weights explode, and that decides what the task then does."""
    ordered = sorted(TROUBLES.values(), reverse=True)
    cases = " ".join(f"\n        if size > {rate / 30}: {what}" for rate, what, _ in ordered)
    bad = field(f"size = model.weight.detach().abs().max(){cases}")
    monkeypatch.setitem(ATTEMPTS, "another", 2)
    recipes = {
        name: ds.Recipe(ds.chain(ds.sgd(lr=rate)), steps=40, batch_size=16)
        for name, (rate, _, _) in TROUBLES.items()
    }
    table = bad.race("bad", recipes=recipes, rules=["adamw"], budget="9x", seeds=2)
    rows = {row.name: row for row in table.rows}
    for name, (_, _, reason) in TROUBLES.items():
        assert rows[name].status == "failed", name
        assert reason in rows[name].reason, name
    assert {row.name for row in table.rows[-len(TROUBLES) :]} == set(TROUBLES)
    assert table.rows[0].rule == "adamw"
    traces = {event["trial"]: event["trace"] for event in bad.events("bad", "failed")}
    assert "Segmentation fault" in traces[rows["crashes"].trial]
    assert "little.py" in traces[rows["raises"].trial]
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if b"1234.5" in _read(one)]


def _read(file):
    try:
        return file.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_trial_that_hangs_is_given_up(field):
    bad = field("time.sleep(1e6)")
    recipes = {"sleeps": ds.Recipe(ds.chain(ds.sgd(lr=1e4)), steps=40, batch_size=16)}
    table = bad.race("bad", recipes=recipes, rules=["adamw"], budget="4x", stall=30.0)
    row = next(row for row in table.rows if row.name == "sleeps")
    assert row.status == "failed"
    assert "no sign of life" in row.reason
