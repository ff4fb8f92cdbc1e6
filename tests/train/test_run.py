"""Runs: they go on, refuse what is not theirs, and never look at the test part on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train import problems

import downslope as ds
from downslope.errors import BadInput, UserCodeError
from downslope.folder import write_file
from downslope.journal import Journal, read
from downslope.train import Diverged, checkpoint, history

RICH = f"{problems.__file__}:rich"


def go(out: Path, **changes: Any) -> ds.Run:
    given: dict[str, Any] = {"task": RICH, "recipe": problems.recipe(), "seed": 1, "save_every": 8}
    return ds.train(**{**given, "out": out, "valid_every": 10, "quiet": True, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    go(out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


class Pulled(BaseException):
    """The plug."""


@contextmanager
def pulled_at(step: int) -> Iterator[None]:
    """The training ends without a word when the update after `step` has been applied."""
    real = ds.Training.advance

    def advance(self: ds.Training, until: int, told: Any) -> None:
        def counted(attempt: Any) -> object:
            if attempt.step == step:
                raise Pulled
            return told(attempt)

        real(self, until, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ds.Training, "advance", advance)
        with pytest.raises(Pulled):
            yield


def same(one: Path, other: Path) -> None:
    """Both folders hold one run, bit for bit: weights, optimizer, generators; losses; result."""
    mine, theirs = (history(read(out / "journal.jsonl")) for out in (one, other))
    for kind, *fields in (
        ("step", "step", "loss", "lr"),
        ("valid", "step", "loss", "metric"),
        ("skip", "step"),
    ):
        assert [[e[f] for f in fields] for e in mine if e["kind"] == kind] == [
            [e[f] for f in fields] for e in theirs if e["kind"] == kind
        ]
    last = [[e["sha"] for e in events if e["kind"] == "checkpoint"][-1] for events in (mine, theirs)]
    assert last[0] == last[1]
    assert (one / "result.json").read_bytes() == (other / "result.json").read_bytes()


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    events = read(finished / "journal.jsonl")
    kinds = [event["kind"] for event in events]
    assert (kinds[0], kinds[-1], kinds.count("step"), kinds.count("end")) == ("start", "end", 40, 1)
    assert [event["step"] for event in events if event["kind"] == "valid"] == [10, 20, 30, 40]
    assert [event["step"] for event in events if event["kind"] == "checkpoint"] == [8, 16, 24, 32, 40]
    assert sorted(path.name for path in (finished / "ckpt").iterdir()) == ["step-000000032", "step-000000040"]
    assert ds.Recipe.load(finished / "recipe.toml") == problems.recipe()
    result = json.loads((finished / "result.json").read_text())
    run = go(finished)
    assert (result["valid"]["loss"], result["test"]["metric"]) == (
        run.valid.loss,
        run.test and run.test.metric,
    )
    assert run.data()["steps"] == result["step"] == 40
    assert list(run.losses) == list(range(40))
    assert "accuracy" in str(run)
    folders = [finished, finished / "ckpt"]
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)


def test_the_model_of_a_run_is_the_trained_one(finished: Path) -> None:
    run = ds.resume(finished, quiet=True)
    state = ds.Training(problems.rich(), problems.recipe(), seed=1)
    state.advance()
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name]), name
    assert state.evaluate("valid") == run.valid
    assert state.evaluate("test") == run.test


def test_the_journal_says_the_rate_of_every_update(finished: Path) -> None:
    schedule = problems.recipe().chain.defaults["lr"].resolve(run_steps=40)
    rates = [event["lr"] for event in read(finished / "journal.jsonl") if event["kind"] == "step"]
    assert rates == [schedule(step) for step in range(40)]


def test_a_finished_run_is_not_touched_again(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.json*")}
    assert ds.resume(copy, quiet=True) == go(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*.json*")} == before


@pytest.mark.parametrize("step", [0, 3, 7, 8, 9, 20, 39])
@pytest.mark.parametrize("again", ["resume", "train"])
def test_stopped_anywhere_it_goes_on_to_the_same_end(
    step: int, again: str, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pulled_at(step):
        go(out)
    run = ds.resume(out, quiet=True) if again == "resume" else go(out)
    same(out, finished)
    assert run.losses == go(finished).losses
    (resumed,) = [event for event in read(out / "journal.jsonl") if event["kind"] == "resume"]
    assert resumed["step"] == step // 8 * 8


def test_stopped_again_and_again_it_still_does(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for step in (5, 12, 13, 30, 31, 39):
        with pulled_at(step):
            go(out)
    go(out)
    same(out, finished)
    assert len(read(out / "journal.jsonl")) > len(history(read(out / "journal.jsonl"))) > 40


def test_the_test_part_is_looked_at_once_and_chooses_nothing(tmp_path: Path) -> None:
    seen = []
    inputs, targets = problems.parts(0)["test"]

    class Test(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(inputs)

        def __getitem__(self, index: int) -> Any:
            if index == 0:
                seen.append(read(tmp_path / "a" / "journal.jsonl")[-1]["kind"])
            return inputs[index], targets[index]

    run = go(tmp_path / "a", task=problems.task(test=Test()))
    assert seen == ["checkpoint"]
    without = go(tmp_path / "b", task=problems.task(test=None))
    assert without.valid == run.valid
    assert without.test is None
    assert without.losses == run.losses


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2}, "holds another run (seed: 1 → 2)"),
        ({"recipe": problems.recipe(max_norm=2.0)}, "holds another run (clip_norm.max_norm: 1.0 → 2.0)"),
        ({"recipe": problems.recipe(steps=50)}, "holds another run (steps: 40 → 50; steps: 40 → 50)"),
        ({"task": "cancer-logistic"}, "holds another run (task: 'rich' → 'cancer-logistic')"),
    ],
)
def test_a_folder_with_another_run_is_refused(changes: dict[str, Any], said: str, copy: Path) -> None:
    before = (copy / "journal.jsonl").read_bytes()
    with pytest.raises(BadInput) as caught:
        go(copy, **changes)
    assert said in str(caught.value)
    assert (copy / "journal.jsonl").read_bytes() == before


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match=r"holds thesis\.tex: give another folder"):
        go(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no run in"):
        ds.resume(tmp_path / "nowhere")
    (tmp_path / "race.json").write_text("{}")
    with pytest.raises(BadInput, match="holds a race"):
        ds.resume(tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write the folder"):
        go(tmp_path / "file" / "run")


@pytest.mark.parametrize("every", ["valid_every", "save_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_wrong_interval_is_refused(every: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{every} must be a whole number of updates from 1"):
        go(tmp_path / "run", **{every: value})
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_a_task_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="The model raised"):
        go(tmp_path / "run", task=problems.task(model=lambda: 1 / 0))
    with pytest.raises(BadInput, match="There is no task"):
        go(tmp_path / "run", task="digits-cn")
    assert not (tmp_path / "run").exists()


def test_a_changed_recipe_is_refused_with_the_change(copy: Path) -> None:
    write_file(copy / "recipe.toml", problems.recipe(weight_decay=0.5).text().encode())
    for again in (lambda: ds.resume(copy), lambda: go(copy)):
        with pytest.raises(BadInput, match=r"recipe\.toml has changed .*adamw\.weight_decay: 0\.01 → 0\.5"):
            again()
    write_file(copy / "recipe.toml", ("# only a comment\n" + problems.recipe().text()).encode())
    ds.resume(copy, quiet=True)


def test_a_changed_plan_is_refused(copy: Path) -> None:
    plan = (copy / "run.json").read_text()
    (copy / "run.json").write_text(plan.replace('"seed": 1', '"seed": 2', 1))
    with pytest.raises(BadInput, match=r"run\.json is not what the run's journal says"):
        ds.resume(copy)
    for damage in (plan[:-20], plan.replace("seed", "sead"), "[]", ""):
        (copy / "run.json").write_text(damage)
        with pytest.raises(BadInput, match=r"run\.json is"):
            ds.resume(copy)


TASK = """
import sys
sys.path.insert(0, {tests!r})
from train import problems

def mine(seed=0):
    return problems.task({seed})
"""


def own_task(folder: Path, seed: str, comment: str = "") -> str:
    text = TASK.format(tests=str(Path(problems.__file__).parents[1]), seed=seed)
    (folder / "mine_and_only_mine.py").write_text(text + comment)
    return f"{folder / 'mine_and_only_mine.py'}:mine"


def test_changed_code_of_the_user_is_refused_unless_allowed(tmp_path: Path) -> None:
    address, out = own_task(tmp_path, "seed"), tmp_path / "run"
    with pulled_at(20):
        go(out, task=address)
    own_task(tmp_path, "seed", "# better\n")
    with pytest.raises(BadInput, match=r"mine_and_only_mine\.py has changed since this run"):
        ds.resume(out)
    assert ds.resume(out, allow_code_change=True, quiet=True).steps == 40
    (resumed,) = [event for event in read(out / "journal.jsonl") if event["kind"] == "resume"]
    assert resumed["entry"]["sha256"] != json.loads((out / "run.json").read_text())["entry"]["sha256"]


def test_changed_data_are_refused_with_the_difference(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pulled_at(20):
        go(out, task=problems.task(seed=0))
    with pytest.raises(BadInput, match="only the program that made the task 'training' has it"):
        ds.resume(out)
    with pytest.raises(BadInput, match="the train data of training have changed since the run began"):
        ds.resume(out, problems.task(seed=1))
    valid = tuple(column[:-1] for column in problems.parts(0)["valid"])
    with pytest.raises(BadInput, match="the valid data .*'samples': 30.*'samples': 29"):
        ds.resume(out, problems.task(valid=valid))
    assert ds.resume(out, problems.task(seed=0), quiet=True).steps == 40


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with ds.folder.RunFolder(tmp_path / "run"), pytest.raises(BadInput, match=f"process {os.getpid()} on"):
        go(tmp_path / "run")


# --- what goes wrong on the way ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    file: str, damage: str, copy: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "ckpt" / "step-000000040" / file
    data = path.read_bytes()
    place = random.Random(file + damage).randrange(len(data))
    if damage == "gone":
        path.unlink()
    else:
        bit = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        path.write_bytes({"cut": data[:place], "bit": bit, "empty": b""}[damage])
    run = ds.resume(copy)
    said = capsys.readouterr().err
    assert file in said
    assert "step-000000040 is damaged" in said
    assert "Going on from step 32" in said
    same(copy, finished)
    assert run.steps == 40
    names = sorted(path.name for path in (copy / "ckpt").iterdir())
    assert names == ["step-000000032", "step-000000040", "step-000000040.damaged"]


def test_with_no_sound_checkpoint_it_begins_again(copy: Path, finished: Path) -> None:
    for path in (copy / "ckpt").iterdir():
        (path / "manifest.json").write_text("{}")
    ds.resume(copy, quiet=True)
    same(copy, finished)
    (resumed,) = [event for event in read(copy / "journal.jsonl") if event["kind"] == "resume"]
    assert resumed["step"] == resumed["after"] == 0
    assert len(resumed["damaged"]) == 2


def test_a_swapped_checkpoint_is_not_believed(copy: Path, finished: Path) -> None:
    """Whole and sound in itself, but not the one that the journal knows."""
    shutil.rmtree(copy / "ckpt" / "step-000000040")
    shutil.copytree(copy / "ckpt" / "step-000000032", copy / "ckpt" / "step-000000040")
    ds.resume(copy, quiet=True)
    same(copy, finished)


def test_a_journal_damaged_in_the_middle_is_refused_by_offset(copy: Path) -> None:
    path = copy / "journal.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged at byte"):
        ds.resume(copy)


@pytest.mark.parametrize("step", [3, 11])
def test_divergence_ends_the_run_with_a_reason(step: int, tmp_path: Path) -> None:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += model.training
        return problems.noisy(model, batch) * (float("inf") if calls[0] > step else 1.0)

    with pytest.raises(Diverged, match=f"20 updates in a row were skipped at step {step}"):
        go(tmp_path / "run", task=problems.task(loss=loss, metric=ds.accuracy))
    events = read(tmp_path / "run" / "journal.jsonl")
    assert events[-1]["kind"] == "failed"
    assert [event["step"] for event in events if event["kind"] == "skip"] == [step] * 20
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(step))


def test_skips_are_journalled_with_names_and_count_as_no_step(tmp_path: Path) -> None:
    calls, last = [0], [Tensor()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training and not torch.equal(batch[0], last[0]):  # of a bad batch it is called again
            calls[0], last[0] = calls[0] + 1, batch[0]
        return problems.noisy(model, batch) * (
            float("nan") if calls[0] in (4, 5, 30) and model.training else 1.0
        )

    go(tmp_path / "run", task=problems.task(loss=loss, metric=ds.accuracy))
    events = read(tmp_path / "run" / "journal.jsonl")
    skips = [event for event in events if event["kind"] == "skip"]
    assert [event["step"] for event in skips] == [3, 3, 27]
    assert all(event["count"] > 0 and "head.bias" in event["names"] for event in skips)
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(40))


def test_an_error_in_the_users_loss_is_journalled_and_can_be_gone_on_from(
    tmp_path: Path, finished: Path
) -> None:
    broken = [True]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if broken[0] and model.training:
            calls.append(1)
            if len(calls) == 21:
                raise RuntimeError("out of tea")
        return problems.noisy(model, batch)

    calls: list[int] = []
    task = problems.task(loss=loss, metric=ds.accuracy)
    with pytest.raises(UserCodeError, match="out of tea"):
        go(tmp_path / "run", task=task)
    assert read(tmp_path / "run" / "journal.jsonl")[-1]["kind"] == "failed"
    broken[0] = False
    run = ds.resume(tmp_path / "run", task, quiet=True)
    assert run.losses == go(finished).losses


def full_after(size: int) -> Any:
    """An `os.write` for a disk with room for that many more bytes."""
    real, left = os.write, [size]

    def write(file: int, data: bytes) -> int:
        if left[0] <= 0 and len(data):
            raise OSError(28, "No space left on device")
        done = real(file, bytes(data)[: left[0]])
        left[0] -= done
        return done

    return write


def fill(out: Path, finished: Path, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full_after(size))
        with pytest.raises(BadInput, match="No space left on device"):
            go(out)
    names = [path.name for path in out.rglob("*")] if out.exists() else []
    assert not [name for name in names if name.endswith(".tmp")], names
    if (out / "journal.jsonl").exists():
        for event in [e for e in history(read(out / "journal.jsonl")) if e["kind"] == "checkpoint"][-2:]:
            checkpoint.verify(out / "ckpt" / event["name"], event["sha"])
    go(out)
    same(out, finished)


def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(tmp_path: Path, finished: Path) -> None:
    # Five checkpoints are written, of which two are left; there is room for less than that.
    whole = sum(path.stat().st_size for path in (finished / "ckpt").rglob("*") if path.is_file()) * 5 // 2
    for number, size in enumerate([0, 10, 700, 2500, 4000, *range(10_000, whole, whole // 6)]):
        fill(tmp_path / f"run-{number}", finished, size)


# --- signals, with real processes ---------------------------------------------------------------------

SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
import downslope as ds
from train import problems

def slow(model, batch):
    time.sleep(0.01)
    return problems.noisy(model, batch)

if __name__ == "__main__":
    task = problems.task(loss=slow, metric=ds.accuracy)
    ds.train(task, problems.recipe(steps=400), out=sys.argv[1], seed=1, save_every=200)
"""


@contextmanager
def training(tmp_path: Path, out: Path) -> Iterator["subprocess.Popen[str]"]:
    """A training in a process of its own, some updates after its start."""
    script = tmp_path / "slowly.py"
    script.write_text(SLOW.format(tests=str(Path(problems.__file__).parents[1])))
    with subprocess.Popen([sys.executable, script, out], stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not ((out / "journal.jsonl").exists() and steps(out)):
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def steps(out: Path) -> int:
    return sum(event["kind"] == "step" for event in read(out / "journal.jsonl"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_a_signal_saves_first_and_exits_with_its_code(name: str, tmp_path: Path) -> None:
    out, number = tmp_path / "run", signal.Signals[name]
    with training(tmp_path, out) as process:
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    expected = -signal.SIGINT if name == "SIGINT" else 128 + number
    assert process.returncode == expected, said
    events = read(out / "journal.jsonl")
    saved = events[-1]
    assert saved["kind"] == "checkpoint"
    assert saved["step"] == steps(out) not in (0, 200, 400)
    assert f"{name}: saved at step {saved['step']}." in said
    task = problems.task(metric=ds.accuracy)
    go(out, task=task, recipe=problems.recipe(steps=400))
    straight = ds.Training(task, problems.recipe(steps=400), seed=1)
    straight.advance()
    last = [e for e in history(read(out / "journal.jsonl")) if e["kind"] == "checkpoint"][-1]
    assert ds.Training.load(out / "ckpt" / last["name"], task).fields() == straight.fields()


def test_the_second_signal_ends_at_once() -> None:
    from downslope.train.signals import Signals

    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.caught is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path, finished: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(go, tmp_path / "run").result()
    same(tmp_path / "run", finished)


# --- what is shown ------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path / "run", quiet=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"rich: step {n} of 40" for n in (10, 20, 30, 40)]
    assert "\x1b" not in captured.err


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path / "run", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_what_was_journalled_before_the_plug_is_taken_back(tmp_path: Path) -> None:
    """`history` is defined by "seq" alone: what stands behind the checkpoint does not count."""
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append("start")
        journal.append("step", step=0, loss=3.0)
        saved = journal.append("checkpoint", step=1)
        journal.append("step", step=1, loss=2.0)
        journal.append("skip", step=2)
        journal.append("resume", after=saved)
        journal.append("step", step=1, loss=2.5)
        journal.append("resume", after=saved)
        journal.append("step", step=1, loss=2.6)
    events = read(tmp_path / "journal.jsonl")
    assert [event["seq"] for event in history(events)] == [0, 1, 2, 8]
    assert ds.losses(events) == {0: 3.0, 1: 2.6}
