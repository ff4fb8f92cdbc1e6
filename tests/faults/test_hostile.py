"""F14, F15, F26: texts that would be markup, files that would be code, and secrets that would stay behind."""

import io
import json
import marshal
import os
import pickle
import shlex
import shutil
import socket
import string
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from faults.host import go
from faults.matrix import Figure, row
from race.conftest import SMALL
from race.conftest import TASK as LITTLE
from report.made_up import Race, training
from report.test_page import HOSTILE, check, page
from safetensors.torch import save
from torch import Tensor, nn
from train import problems

import downslope as ds
from downslope.errors import BadInput, UserCodeError
from downslope.journal import Journal, read
from downslope.report import report
from downslope.report.text import visible
from downslope.train.checkpoint import MANIFEST

STEPS, SAVE_EVERY = 6, 2


PIECES = [*HOSTILE[:-1], *"<>&\"'`=/ \n\t\rxy\u0301"]


@row("F14", 2000, slow=True)
def test_f14_whatever_a_journal_says_is_text_on_the_page(figure: Figure, tmp_path: Path) -> None:
    """In every place at once where a race or a training holds words of the user's."""
    for number, draw in figure.draws():
        letters = [chr(draw.choice([draw.randrange(0x20, 0x300), draw.randrange(0xD7FF)])) for _ in range(3)]
        text, folder = "".join(draw.choices([*PIECES, *letters], k=draw.randint(1, 5))), tmp_path / "run"
        if number % 5:
            training(folder, text, steps=80)
        else:
            Race(folder, text)
        assert visible("digits-cnn" + text)[:280] in check(page(folder)).text, (number, text)
        shutil.rmtree(folder)


# --- F15: files that would be code --------------------------------------------------------------------


class Sentinel:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    """What is written to a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(source: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("__main__.py", source)
            archive.writestr("../../escaped", source)

    return saved(write)


def payloads(sentinel: Path) -> dict[str, bytes]:
    """Files by which some program would run code that makes the file `sentinel`."""
    trap, source = Sentinel(sentinel), f"open({str(sentinel)!r}, 'w')"
    array = np.array([trap], dtype=object)
    header = json.dumps(
        {"__metadata__": {"x": source}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}
    )
    return {
        **{f"pickle {protocol}": pickle.dumps(trap, protocol) for protocol in range(6)},
        "torch": saved(lambda file: torch.save(trap, file)),
        "torch, old": saved(lambda file: torch.save(trap, file, _use_new_zipfile_serialization=False)),
        "torch, a state dict": saved(lambda file: torch.save({"w": torch.ones(2), "x": trap}, file)),
        "npy": saved(lambda file: np.save(file, array, allow_pickle=True)),
        "npz": saved(lambda file: np.savez(file, allow_pickle=True, w=array)),
        "code": marshal.dumps(compile(source, "x", "exec")),
        "source": source.encode(),
        "zip": zipped(source),
        "yaml": f"!!python/object/apply:builtins.open [{str(sentinel)!r}, w]\n".encode(),
        "json": json.dumps({"py/reduce": [{"py/type": "builtins.open"}, [str(sentinel), "w"]]}).encode(),
        "toml": f"steps = 1\nbatch_size = 1\n[[chain]]\npart = {json.dumps(source)}\n".encode(),
        "safetensors of others": save({"other": torch.ones(3)}),
        "safetensors that lie": len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4,
        "safetensors without end": (2**62).to_bytes(8, "little") + b"{}",
        "nothing": b"",
    }


def nodes(treasure: Path) -> dict[str, Callable[[Path], object]]:
    """What can stand where a file should be."""

    def listening(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as door:
            here = os.open(path.parent, os.O_RDONLY)
            door.bind(f"/proc/self/fd/{here}/{path.name}")  # its own path may be too long for a socket
            os.close(here)

    return {
        "link": lambda path: path.symlink_to(treasure),
        "link to nowhere": lambda path: path.symlink_to(treasure.with_name("escaped")),
        "link to zeros": lambda path: path.symlink_to("/dev/zero"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "socket": listening,
    }


def newest(out: Path) -> Path:
    event = [event for event in read(out / "journal.jsonl") if event["kind"] == "checkpoint"][-1]
    return Path(out, "ckpt", event["name"])


def vouched(out: Path, folder: Path, data: bytes) -> None:
    """Give a checkpoint this manifest, and its hash to the journal, as whoever may write here could do."""
    (folder / MANIFEST).write_bytes(data)
    path = out / "journal.jsonl"
    events = read(path)
    path.unlink()
    with Journal.open(path) as journal:
        for event in events:
            sha = {"sha": sha256(data).hexdigest()} if event.get("name") == folder.name else {}
            own = {key: value for key, value in event.items() if key not in ("seq", "kind", "time")}
            journal.append(event["kind"], sync=False, **{**own, **sha})


def forged(out: Path, name: str, data: bytes) -> None:
    """Put a file into the newest checkpoint as if it had been saved so; another manifest as it is."""
    folder = newest(out)
    if name != MANIFEST:
        (folder / name).write_bytes(data)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
        data = json.dumps(manifest).encode()
    vouched(out, folder, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with two checkpoints."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    go(out, STEPS, SAVE_EVERY)
    return out


def every_use(out: Path) -> list[str]:
    """Do with a folder all that can be done with one; what refused it."""
    told = []
    for use in (
        lambda: ds.Recipe.load(out / "recipe.toml"),
        lambda: report(out),
        lambda: ds.resume(out, quiet=True),
        lambda: go(out, STEPS, SAVE_EVERY),
    ):
        try:
            use()
        except BadInput as error:
            told.append(str(error))
    return told


def plans(finished: Path) -> list[tuple[str, str, bool]]:
    """(what is planted, where, whether manifest and journal vouch for it)."""
    inside = [f"ckpt/*/{path.name}" for path in sorted(newest(finished).iterdir())]
    places = ["run.json", "recipe.toml", "journal.jsonl", "result.json", "run.lock", *inside]
    things = [*payloads(finished), *nodes(finished)]
    honest = [(thing, place, False) for thing in things for place in places]
    return honest + [(thing, place, True) for thing in payloads(finished) for place in inside]


@row("F15", 200, every_day=True, slow=True)
def test_f15_no_file_in_a_run_is_ever_run(figure: Figure, finished: Path, tmp_path: Path) -> None:
    every = plans(finished)
    Random(figure.seed).shuffle(every)
    assert len(every) >= figure.cases
    sentinel, treasure = tmp_path / "sentinel", tmp_path / "treasure"
    treasure.write_bytes(b"gold")
    refused = 0
    for number, _ in figure.draws():
        thing, place, vouch = every[number]
        out = Path(shutil.copytree(finished, tmp_path / "run"))
        path = out / place.replace("ckpt/*", f"ckpt/{newest(out).name}")
        path.unlink()
        if thing in (made := nodes(treasure)):
            made[thing](path)
        elif vouch:
            forged(out, path.name, payloads(sentinel)[thing])
        else:
            path.write_bytes(payloads(sentinel)[thing])
        began = time.process_time()
        told = every_use(out)
        assert time.process_time() - began < 8, every[number]  # at most two of the four uses train
        assert not sentinel.exists(), every[number]
        assert not list(tmp_path.rglob("escaped")), every[number]
        assert treasure.read_bytes() == b"gold", every[number]
        refused += bool(told)
        shutil.rmtree(out)
    assert refused >= figure.cases // 4


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "..", "a/../../escaped", "CON/../x", "model\0"])
def test_f15_a_manifest_cannot_name_what_lies_elsewhere(name: str, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (tmp_path / "escaped").write_bytes(b"gold")
    manifest = json.loads((newest(out) / MANIFEST).read_bytes())
    manifest["files"][name] = {"size": 4, "sha256": sha256(b"gold").hexdigest()}
    vouched(out, newest(out), json.dumps(manifest).encode())
    go(out, STEPS, SAVE_EVERY)
    told = [line for event in read(out / "journal.jsonl") for line in event.get("damaged", [])]
    assert len(told) == 1
    assert "manifest.json is no manifest" in told[0]
    assert (tmp_path / "escaped").read_bytes() == b"gold"


def test_f15_a_task_in_a_run_is_not_loaded_once_its_file_has_changed(tmp_path: Path) -> None:
    file, sentinel, out = tmp_path / "changed_task.py", tmp_path / "sentinel", tmp_path / "run"
    tests = str(Path(problems.__file__).parents[1])
    source = f"import sys; sys.path.insert(0, {tests!r})\nfrom train.problems import rich\n"
    file.write_text(source)
    ds.train(f"{file}:rich", problems.recipe(steps=2), out=out, quiet=True)
    file.write_text(f"{source}open({str(sentinel)!r}, 'w').close()\n")
    with pytest.raises(BadInput, match=r"changed_task\.py has changed"):
        ds.resume(out, quiet=True)
    assert not sentinel.exists()


# --- F26: secrets -------------------------------------------------------------------------------------

NAMES = ("API_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "WANDB_API_KEY", "client_secret")
SHAPES = ("", "", "ghp_", "hf_", "sk-", "xoxb-", "AKIA", "AIza", "glpat-", "pypi-")
WAYS = ("environment", "argv", "address", "exception")


def secret(draw: Random) -> tuple[str, str]:
    """A name and a value, of a known form or of none."""
    letters = "".join(draw.choices(string.ascii_letters + string.digits, k=20))
    return draw.choice(NAMES), draw.choice(SHAPES) + letters


def quoted(way: str, name: str, value: str) -> str:
    """What the user's code says when it fails."""
    return {
        "environment": f"cannot log in with {value}.",
        "argv": f"usage: {shlex.join(sys.argv)}",
        "address": f"GET https://ann:{value}@data.example/train.csv failed",
        "exception": f"403: {name}={value}, Authorization: Bearer {value}",
    }[way]


def failing(said: str) -> ds.Task:
    """A task whose loss raises this, in the middle of a training."""
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > 4:
            raise RuntimeError(said)
        return problems.noisy(model, batch)

    return problems.task(loss=loss, metric=ds.accuracy)


def holding(folder: Path, value: str) -> list[str]:
    """The files of a folder in which a text stands."""
    return [path.name for path in folder.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]


@row("F26", 80, every_day=True)
def test_f26_no_secret_stays_in_a_run_or_its_page(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, draw in figure.draws():
        way, (name, value), out = WAYS[number % 4], secret(draw), tmp_path / str(number)
        with monkeypatch.context() as patch:
            if way == "environment":
                patch.setenv(name, value)
            if way == "argv":
                patch.setattr(sys, "argv", ["train.py", f"--{name.lower()}={value}"])
            with pytest.raises(UserCodeError) as caught:
                ds.train(failing(quoted(way, name, value)), problems.recipe(steps=STEPS), out=out, quiet=True)
            report(out)
        assert value in str(caught.value), "the user's own terminal may show it"
        assert holding(out, value) == [], (number, way, name)
        assert "[hidden]" in (out / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_f26_no_secret_stays_in_a_race_or_its_page(tmp_path: Path) -> None:
    value = "".join(Random(26).choices(string.ascii_letters, k=20))
    file = tmp_path / "little.py"
    said = f"raise ValueError('DB_PASSWORD={value} at https://ann:{value}@data.example')"
    file.write_text(LITTLE.format(trouble=said))
    recipes: Mapping[str, Any] = {
        "wild": ds.Recipe(ds.chain(ds.sgd(lr=1e4)), steps=40, batch_size=16),
    }
    out = tmp_path / "race"
    ds.race(f"{file}:task", out=out, recipes=recipes, **{**SMALL, "rules": ["adamw"]})
    report(out)
    assert any(event["kind"] == "failed" for event in read(out / "journal.jsonl"))
    assert holding(out, value) == []
