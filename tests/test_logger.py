"""What loggers get is what counts in the journal: read back by their own packages."""

from __future__ import annotations

import json
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import downslope as ds
from downslope import logger
from downslope.cli import run
from downslope.journal import Journal
from downslope.logger import LOGGERS, final, log, scalars

TAKEN = {"train/loss": {0: 2.0, 1: 1.5, 2: 1.0}, "valid/loss": {3: 0.9}, "test/metric": {3: 0.75}}
"""Of the events below, what counts."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    recipe = ds.tasks()["cancer-logistic"]().recipe.with_(steps=20)
    ds.train("cancer-logistic", recipe, out=folder, quiet=True)
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A run that was killed: what lies behind its checkpoint will be done again."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    shutil.copy(finished / "run.json", folder)
    with Journal.open(folder / "journal.jsonl") as journal:
        journal.append("start", task="cancer-logistic")
        journal.append("step", step=0, loss=2.0, lr=0.1)
        journal.append("step", step=1, loss=1.5, lr=0.1)
        journal.append("checkpoint", step=2, name="step-2", sha="")
        journal.append("step", step=2, loss=99.0, lr=0.1)
    return folder


def go_on(folder: Path) -> None:
    with Journal.open(folder / "journal.jsonl") as journal:
        journal.append("resume", step=2, after=3)
        journal.append("step", step=2, loss=1.0, lr=None)
        journal.append("valid", step=3, loss=0.9, metric=0.7, seconds=1.0)
        journal.append("checkpoint", step=3, name="step-3", sha="")
        journal.append("end", step=3, valid={"loss": 0.9, "metric": 0.7}, test={"loss": 0.8, "metric": 0.75})


def tensorboard_of(place: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    found = EventMultiplexer().AddRunsFromDirectory(str(place))
    found.Reload()
    (name,) = found.Runs()
    tags = found.Runs()[name]["scalars"]
    return {tag: {e.step: e.value for e in found.Scalars(name, tag)} for tag in tags}


def mlflow_of(place: Path) -> dict[str, dict[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((place / "mlruns").resolve().as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "cancer-logistic"]
    (made,) = client.search_runs([experiment.experiment_id])
    names = made.data.metrics
    return {n: {m.step: m.value for m in client.get_metric_history(made.info.run_id, n)} for n in names}


def records(path: Path) -> list[bytes]:
    """The records of a .wandb file: the log format of LevelDB, in blocks of 32 KiB behind seven bytes."""
    data, place, found, whole = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(whole)
            whole = b""
    return found


def wandb_of(place: Path) -> dict[str, dict[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    for path in sorted(place.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = Record.FromString(data)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    step = record.history.step.num
                    found.setdefault(name, {})[step] = float(json.loads(item.value_json))
    return found


READ = {"tensorboard": tensorboard_of, "mlflow": mlflow_of, "wandb": wandb_of}


@pytest.mark.parametrize("to", LOGGERS)
def test_a_logger_gets_what_counts_and_no_more_than_once(to: str, stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert log(stopped, to, out) == 4
    assert log(stopped, to, out) == 0
    seen = READ[to](out)
    assert seen["train/loss"] == pytest.approx({0: 2.0, 1: 1.5}), "the step that will be done again waits"
    go_on(stopped)
    assert log(stopped, to, out) == 4
    assert log(stopped, to, out) == 0
    seen = READ[to](out)
    for name, values in TAKEN.items():
        assert seen[name] == pytest.approx(values), name
    assert set(seen["train/lr"]) == {0, 1}


def test_following_ends_with_the_run(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "_POLL", 0.05)
    later = threading.Thread(target=lambda: (time.sleep(0.5), go_on(stopped)))
    later.start()
    assert log(stopped, "tensorboard", tmp_path / "out", follow=True) == 8
    later.join()
    assert tensorboard_of(tmp_path / "out")["train/loss"] == pytest.approx(TAKEN["train/loss"])


def test_a_whole_run_on_the_command_line(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["log", str(finished), "--out", str(out), "--json"]) == 0
    sent = json.loads(capfd.readouterr().out)["sent"]
    done = ds.resume(finished, quiet=True)
    assert sent == len(final(done.events))
    seen = tensorboard_of(out)
    assert seen["train/loss"] == pytest.approx(done.losses, rel=1e-6)
    assert seen["test/loss"] == pytest.approx({20: done.test.loss if done.test else None}, rel=1e-6)


def test_what_is_wrong_is_said_in_a_sentence(
    finished: Path, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["log", str(finished), "--to", "tensorbord"]) == 2
    assert "Did you mean 'tensorboard'?" in capfd.readouterr().err
    assert run(["log", str(tmp_path / "nothing")]) == 2
    assert "there is no run in" in capfd.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert run(["log", str(finished), "--out", str(tmp_path / "full")]) == 2
    assert "holds something else" in capfd.readouterr().err
    out = tmp_path / "out"
    log(finished, "tensorboard", out)
    changed = json.loads((stopped / "run.json").read_text()) | {"seed": 7}
    (stopped / "run.json").write_text(json.dumps(changed))
    with pytest.raises(ds.BadInput, match="another run's log"):
        log(stopped, "tensorboard", out)


def test_a_missing_package_names_the_extra(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(logger, "import_module", missing)
    with pytest.raises(ds.BadInput, match=r"needs mlflow: pip install 'downslope\[loggers\]'"):
        log(stopped, "mlflow", tmp_path / "out")


def test_of_several_players_each_sends_its_own() -> None:
    players = {"critic": {"loss": 0.5, "lr": 0.01}, "maker": {"loss": 2.0, "lr": None}}
    event = {"seq": 3, "kind": "step", "step": 7, "loss": 2.5, "lr": 0.01, "players": players}
    assert scalars(event) == {
        "train/loss": 2.5,
        "train/critic/loss": 0.5,
        "train/critic/lr": 0.01,
        "train/maker/loss": 2.0,
    }
    assert scalars({**event, "players": {}}) == {"train/loss": 2.5, "train/lr": 0.01}


def test_what_a_strategy_did_is_a_mark_at_its_step() -> None:
    event = {"seq": 9, "kind": "strategy", "by": "spikes", "step": 40, "did": "cut", "why": "", "facts": {}}
    assert scalars(event) == {"spikes/cut": 1.0}


def test_events_without_numbers_send_nothing() -> None:
    assert scalars({"seq": 0, "kind": "checkpoint", "step": 3}) == {}
    assert scalars({"seq": 0, "kind": "end", "step": 3, "test": None}) == {}
    assert final([{"seq": 0, "kind": "step"}]) == []
