"""The command line: results on stdout, faults as one line on stderr, exit codes that scripts can trust."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path

import pytest

import downslope as ds
from downslope.cli import run
from downslope.description import TOOLBOX
from downslope.race import Standings
from downslope.recipe import Recipe
from downslope.rules import links, rules
from downslope.schedule import KINDS, example
from downslope.strategies import STRATEGIES
from downslope.tasks import task, tasks

ROOT = Path(__file__).parents[1]
QUICK = """
import torch
import downslope as ds
from downslope.recipe import Recipe

def quick(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 3, generator=generator)
    y = x.sum(dim=1, keepdim=True)
    print("made by the user")
    recipe = Recipe(chain=ds.chain(ds.sgd(lr=0.1)), steps=STEPS, batch_size=16)
    model = lambda: torch.nn.Linear(3, 1)
    return ds.Task(model=model, train=(x, y), valid=(x, y), loss=LOSS, recipe=recipe, tokens=2)

def broken(seed=0):
    raise RuntimeError("the data is gone")

def sick(model, batch):
    raise ValueError("a loss that raises")
"""


def downslope(*arguments: str, cwd: Path, **given: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "downslope", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **given)  # type: ignore[call-overload,no-any-return]


def write(folder: Path, steps: int = 8, loss: str = "ds.squared_error") -> None:
    (folder / "cli_task.py").write_text(QUICK.replace("STEPS", str(steps)).replace("LOSS", loss))


def one_line(text: str) -> str:
    assert text.startswith("downslope: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["race", "digit-cnn"], "There is no task 'digit-cnn'. Did you mean 'digits-cnn'?"),
        (["train", "digits-cn"], "Did you mean 'digits-cnn'?"),
        (["train", "nowhere.py:task"], "The task file nowhere.py cannot be read: No such file or directory."),
        (["train", "digits-mlp", "--recipe", "nowhere.toml"], "nowhere.toml"),
        (["show", "adamm"], "There is nothing called 'adamm'. Did you mean 'adam'?"),
        (["show", "cosin"], "Did you mean 'cosine'?"),
        (["list", "task"], "There is no list 'task'. Did you mean 'tasks'?"),
        (["rase", "digits-cnn"], "rase"),
        (["race"], "TASK"),
        (["race", "digits-cnn", "--sedes", "3"], "--seeds"),
        (["train", "digits-mlp", "--precision", "fp8"], "precision is bf16 or fp16, or left out for float32"),
        (["train", "digits-mlp", "--precision", "bfloat16"], "Did you mean 'bf16'?"),
        (["verify", "digits-mlp", "--precision", "fp8"], "got 'fp8'"),
        (["race", "digits-cnn", "--seeds", "many"], "'--seeds'"),
        (["race", "digits-cnn", "--seed", "-1"], "seed must be a whole number from 0, below 2**32, got -1"),
        (["train", "digits-cnn", "--seed", "4294967296"], "got 4294967296"),
        (["race", "digits-cnn", "--seeds", "0"], "got 0"),
        (["race", "digits-cnn", "--workers", "0"], "got 0"),
        (["race", "digits-cnn", "--rule", "adamm"], "'adamm'"),
        (["race", "digits-cnn", "--recipe", "a/x.toml", "--recipe", "b/x.toml"], "one file name"),
        (["race", "digits-cnn", "--budget", "20y"], "20y"),
        (["resume", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    said = capfd.readouterr()
    assert sentence in one_line(said.err)
    assert said.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[chain]]\npart = 'sgd'\nlr = 0.1\nmomentun = 0.9\n", "recipe.toml:6: "),
        ("[[chain]]\npart = 'adamm'\n", "Did you mean 'adam'?"),
        ("[[chain]]\npart = 'sgd'\nlr = -0.1\n", "lr must be at least 0; -0.1 was given"),
        ("[[chain]]\npart = 'sgd'\nlr = nan\n", "lr must be"),
        ("[[chain]\npart = 'sgd'\n", "recipe.toml:3: not TOML"),
        (
            "stepps = 3\n[[chain]]\npart = 'sgd'\n",
            "recipe.toml:3: unknown key 'stepps'. Did you mean 'steps'?",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["train", "race"])
def test_a_wrong_recipe_is_one_sentence_with_its_line(
    verb: str, text: str, sentence: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text("steps = 10\nbatch_size = 8\n" + text)
    assert run([verb, "cancer-logistic", "--recipe", str(recipe), "--out", str(out)]) == 2
    said = capfd.readouterr()
    assert sentence in one_line(said.err)
    assert said.out == ""
    assert not out.exists()


def test_help_and_version_succeed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([]) == run(["--help"]) == run(["race", "--help"]) == 0
    assert "race" in capfd.readouterr().out
    assert run(["--version"]) == 0
    assert capfd.readouterr().out.strip()[0].isdigit()


def test_list_names_everything(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    every = {
        "tasks": tasks(),
        "rules": rules(),
        "links": links(),
        "schedules": KINDS,
        "strategies": STRATEGIES,
        "tools": TOOLBOX,
    }
    assert {kind: list(rows) for kind, rows in listed.items()} == {
        kind: list(names) for kind, names in every.items()
    }
    assert all(text for rows in listed.values() for text in rows.values())
    assert run(["list", "rules"]) == 0
    text = capfd.readouterr().out
    assert all(f"  {name} " in text for name in rules())
    assert "digits-cnn" not in text


@pytest.mark.parametrize("name", [*rules(), *links()])
def test_show_prints_formula_source_and_numbers(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    item = {**rules(), **links()}[name]
    assert run(["show", name]) == 0
    page = capfd.readouterr().out
    assert all(line.strip() in page for line in item.formula.splitlines())
    assert item.source in page
    assert all(f"{number} = {value}" in page for number, value in item.numbers.items())
    assert run(["show", name, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["numbers"].keys() == item.numbers.keys()


@pytest.mark.parametrize("name", KINDS)
def test_show_prints_a_schedule_with_its_values(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["show", name]) == 0
    page = capfd.readouterr().out
    assert name in page
    assert "Not for: " in " ".join(page.split())
    assert run(["show", name, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["example"]["data"]["schedule"] == name
    assert data["example"]["values"] == [[step, example(name)(step)] for step in range(0, 101, 5)]
    assert data["numbers"].keys() == signature(KINDS[name]).parameters.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_show_prints_a_strategy_with_its_table(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    keys = [item.name for item in fields(STRATEGIES[name])]
    assert run(["show", name]) == 0
    page = capfd.readouterr().out
    assert page.startswith(f"[{name}]\n")
    assert "Not for: " in " ".join(page.split())
    assert all(f"\n  {key} " in page for key in keys)
    assert run(["show", name, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert (data["kind"], list(data["numbers"])) == ("strategy", keys)
    for item in fields(STRATEGIES[name]):
        said = data["numbers"][item.name]
        assert said["meaning"], f"strategies/glossary.py does not say what {item.name} means"
        assert said["required"] == (item.default is item.default_factory is MISSING)
    for tool in data["tool"].split(", "):
        found: object = ds
        for part in tool.split(".")[1:] if tool.startswith("ds.") else ():
            found = getattr(found, part)


@pytest.mark.parametrize("name", TOOLBOX)
def test_show_prints_a_tool_with_its_call_and_its_page(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    tool, page = TOOLBOX[name]
    assert run(["show", name, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    data = next((one for one in data.get("entries", []) if one["kind"] == "tool"), data)
    assert data["call"].startswith(f"{tool.__name__}(")
    assert " at 0x" not in data["call"]
    _, room, _, imported = data["import"].split()
    assert getattr(importlib.import_module(room), imported) is tool
    assert f"`{name.split('.')[-1]}" in (ROOT / data["page"]).read_text("utf-8").replace("`ds.", "`"), page
    assert run(["show", name]) == 0
    assert data["call"] in capfd.readouterr().out


def test_a_name_of_two_things_shows_both(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "average", KINDS["constant"])
    assert run(["show", "average"]) == 0
    page = capfd.readouterr().out
    assert page.startswith("average is a schedule and a strategy.\n")
    assert "[average]" in page
    assert "`peak` throughout." in page
    assert run(["show", "average", "--json"]) == 0
    entries = json.loads(capfd.readouterr().out)["entries"]
    assert [entry["kind"] for entry in entries] == ["schedule", "strategy"]


def test_show_says_what_was_measured_of_a_task(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "digits-cnn"]) == 0
    page = capfd.readouterr().out
    assert "train 898, valid 449, test 450" in page
    assert f"reference  {task('digits-cnn').reference}" in page
    assert run(["show", "digits-cnn", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["recipe"] == task("digits-cnn").recipe.data()


def test_race_prints_standings_page_recipe_and_lines_that_use_it(tmp_path: Path) -> None:
    write(tmp_path, steps=40)
    command = [
        "race",
        "cli_task.py:quick",
        "--budget",
        "4x",
        "--seeds",
        "2",
        "--rule",
        "sgd",
        "--rule",
        "adam",
    ]
    done = downslope(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "quick"
    assert "made by the user" not in done.stdout
    assert (folder / "report.html").exists()
    assert done.stdout.rstrip().endswith("runs/quick/report.html")
    recipe = Recipe.load(folder / "winner.toml")
    assert all(f"    {line}".rstrip() in done.stdout for line in recipe.text().splitlines())

    lines = [
        line.strip()
        for line in done.stdout.splitlines()
        if line.strip().startswith(("import", "recipe =", "optimizer ="))
    ]
    assert "(model, steps_per_epoch=4, tokens_per_sample=2)" in lines[-1]
    own = "\n".join(
        ["import torch", "model = torch.nn.Linear(3, 1)", *lines, "print(optimizer.param_groups[0]['lr'])"]
    )
    used = subprocess.run(
        [sys.executable, "-c", own], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(used.stdout) > 0

    before = (folder / "journal.jsonl").stat().st_mtime_ns
    again = downslope(*command, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["winner"]["recipe"] == recipe.text()
    assert answer["report"] == "runs/quick/report.html"
    assert [row["name"] for row in answer["rows"]] == [row.name for row in Standings.load(folder).rows]
    assert (folder / "journal.jsonl").stat().st_mtime_ns == before, "a finished race was run again"


def test_the_users_exception_shows_their_frames_and_exits_with_1(tmp_path: Path) -> None:
    write(tmp_path)
    done = downslope("train", "cli_task.py:broken", cwd=tmp_path)
    assert done.returncode == 1
    *trace, last = done.stderr.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "RuntimeError: the data is gone"
    assert "downslope" not in "".join(trace)
    assert (
        last == "downslope: The task function 'broken' of cli_task.py raised RuntimeError: the data is gone"
    )
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_raises_is_the_users_fault_too(tmp_path: Path) -> None:
    write(tmp_path, loss="sick")
    done = downslope("train", "cli_task.py:quick", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: a loss that raises" in done.stderr
    assert 'in sick\n    raise ValueError("a loss that raises")' in done.stderr
    assert "/downslope/" not in done.stderr


def test_a_loss_that_raises_in_a_worker_shows_the_same_frames(tmp_path: Path) -> None:
    write(tmp_path, loss="sick")
    done = downslope("race", "cli_task.py:quick", "--budget", "4x", "--rule", "sgd", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    *trace, last = done.stderr[done.stderr.index("Traceback") :].splitlines()
    assert trace[-1] == "ValueError: a loss that raises"
    assert [line for line in trace if line.startswith("  File ")] == [trace[1]]
    assert trace[1].endswith(", in sick")
    assert last == "downslope: The loss of quick raised ValueError: a loss that raises"


def test_train_answers_machines_with_one_document_whatever_the_user_prints(tmp_path: Path) -> None:
    write(tmp_path)
    done = downslope("train", "cli_task.py:quick", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (tmp_path / answer["folder"] / "recipe.toml").exists()
    assert "made by the user" in done.stderr


@pytest.mark.parametrize(("steps", "reached"), [(1000, True), (3, False)])
def test_train_says_whether_the_target_is_reached(
    steps: int, reached: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(task("diabetes-lasso").recipe.with_(steps=steps).text())
    command = ["train", "diabetes-lasso", "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    assert run(command) == 0
    assert f"; target 1e-06 {'reached' if reached else 'missed'}\n" in capfd.readouterr().out
    assert run([*command, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert (answer["target"], answer["reached"]) == (1e-6, reached)


def test_train_of_a_task_without_a_target_says_nothing_of_one(tmp_path: Path) -> None:
    write(tmp_path)
    done = downslope("train", "cli_task.py:quick", cwd=tmp_path)
    assert "target" not in done.stdout
    again = json.loads(downslope("train", "cli_task.py:quick", "--json", cwd=tmp_path).stdout)
    assert (again["target"], again["reached"]) == (None, None)


def test_report_of_a_run_prints_where_the_page_lies(tmp_path: Path) -> None:
    write(tmp_path)
    assert downslope("train", "cli_task.py:quick", "--out", "mine", cwd=tmp_path).returncode == 0
    done = downslope("report", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip()).read_text("utf-8").startswith("<!doctype html>")


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    write(tmp_path, steps=10**7)
    command = [sys.executable, "-m", "downslope", "train", "cli_task.py:quick", "--out", "mine"]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "mine" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while (
        child.poll() is None
        and time.monotonic() < deadline
        and not (journal.exists() and journal.stat().st_size > 500)
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert out == ""
    assert "To go on: downslope resume mine" in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "downslope", "list"]
    done = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False, timeout=60
    )
    os.close(write_end)
    assert done.stderr == ""
    assert done.returncode == 1


def test_an_output_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "plain").write_text("a file")
    for out in ("plain", "plain/inside"):
        done = downslope("train", "cli_task.py:quick", "--out", out, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "plain" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert (tmp_path / "plain").read_text() == "a file"
