"""The user's own file: run once, hashed, importable in a spawned worker; their faults are shown as theirs."""

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import downslope as ds
from downslope.errors import BadInput, UserCodeError
from downslope.tasks import Entry, frames, guest, load, reopen, take
from downslope.train import Training

MINE = """
import torch
import downslope as ds

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.ones(3) * index, torch.ones(1)

def linear(seed=0):
    model = lambda: torch.nn.Linear(3, 1)
    return ds.Task(model=model, train=Rows(), valid=Rows(), loss=ds.squared_error, target=seed)

def wrong():
    return {"model": None}

def broken():
    return 1 / 0

def leaves():
    raise SystemExit("no more")

def bare():
    return linear()

constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def mine(folder: Path) -> Path:
    path = folder / "mine.py"
    path.write_text(MINE)
    return path


def test_a_function_of_a_file_gives_its_task(mine: Path) -> None:
    found = load(f"{mine}:linear", seed=5)
    assert found.name == "linear"
    assert found.target == 5
    assert found.entry == Entry(f"{mine}:linear", 5, hashlib.sha256(mine.read_bytes()).hexdigest())


def test_a_function_without_a_seed_is_called_without_one(mine: Path) -> None:
    assert load(f"{mine}:bare", seed=5).target == 0


def test_a_relative_address_becomes_absolute(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    found = load("mine.py:linear")
    assert found.entry is not None
    assert found.entry.address == f"{mine}:linear"


def test_its_classes_reach_a_spawned_worker(mine: Path) -> None:
    found = load(f"{mine}:linear")
    loader = DataLoader(found.train, batch_size=4, num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    (batch,) = list(loader)
    assert torch.equal(batch[0], take(found.train, torch.arange(4))[0])


def test_the_same_file_is_run_once_and_a_changed_one_anew(mine: Path) -> None:
    first = type(load(f"{mine}:linear").train)
    assert type(load(f"{mine}:linear").train) is first
    stamp = mine.stat()
    mine.write_text(MINE.replace("return 4", "return 5"))
    os.utime(
        mine, ns=(stamp.st_atime_ns, stamp.st_mtime_ns)
    )  # as old and as long as before: only the bytes differ
    assert len(load(f"{mine}:linear").train) == 5


def test_a_changed_file_is_refused_unless_allowed(mine: Path) -> None:
    entry = load(f"{mine}:linear").entry
    assert entry is not None
    assert reopen(entry).entry == entry
    mine.write_text(MINE + "\n# one more line\n")
    with pytest.raises(BadInput, match="has changed since this run began"):
        reopen(entry)
    assert reopen(entry, allow_code_change=True).entry != entry


def test_a_sibling_of_the_file_can_be_imported(folder: Path) -> None:
    (folder / "net_of_mine.py").write_text("import torch\ndef net(): return torch.nn.Linear(3, 1)\n")
    own = folder / "uses_sibling.py"
    own.write_text(MINE.replace("import torch\n", "import torch\nfrom net_of_mine import net\n"))
    assert load(f"{own}:linear").model is not None


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (
            "{mine}:liner",
            "has no function 'liner'. Did you mean 'linear'. It has: linear, wrong, broken, leaves, bare",
        ),
        ("{mine}:constant", "'constant' of mine.py is not a function but a int"),
        ("{mine}:wrong", "mine.py:wrong must return a downslope.Task, got dict"),
        ("{folder}/other.py:linear", "cannot be read: No such file or directory"),
        ("{folder}:linear", "is written path/to/file.py:function"),
        ("{mine}", "is written path/to/file.py:function"),
        ("{mine}:", "is written path/to/file.py:function"),
        ("{mine}:a.b", "is written path/to/file.py:function"),
        ("{mine}:__import__('os')", "is written path/to/file.py:function"),
    ],
)
def test_a_wrong_address_is_one_sentence(mine: Path, address: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        load(address.format(mine=mine, folder=mine.parent))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["random", "torch", "json"])
def test_a_file_named_like_a_module_is_refused(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(MINE)
    with pytest.raises(BadInput, match=f"named like the module '{name}'"):
        load(f"{folder / name}.py:linear")


def test_a_file_that_was_imported_before_is_no_stranger(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(mine.parent)
    imported = importlib.import_module("mine")
    assert load(f"{mine}:linear").name == "linear"
    monkeypatch.delitem(sys.modules, "mine")
    assert imported.__file__ == str(mine)


def test_an_interrupt_leaves_no_half_module(folder: Path) -> None:
    path = folder / "sick.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(f"{path}:f")
    path.write_text(MINE)
    assert load(f"{path}:linear").name == "linear"


def test_a_file_that_is_no_module_name_is_refused(folder: Path) -> None:
    (folder / "my-task.py").write_text(MINE)
    with pytest.raises(BadInput, match="letters, digits and _, got 'my-task.py'"):
        load(f"{folder / 'my-task.py'}:linear")


def test_what_the_function_raises_is_the_users_with_the_users_frames_only(mine: Path) -> None:
    with pytest.raises(
        UserCodeError, match="function 'broken' of mine.py raised ZeroDivisionError"
    ) as caught:
        load(f"{mine}:broken")
    text = frames(caught.value)
    assert text.startswith("Traceback (most recent call last):\n")
    assert f'File "{mine}", line {MINE.splitlines().index("def broken():") + 2}, in broken' in text
    assert text.endswith("ZeroDivisionError: division by zero\n")
    assert text.count("  File ") == 1


def test_leaving_the_process_is_a_fault_of_the_user_too(mine: Path) -> None:
    with pytest.raises(UserCodeError, match="raised SystemExit: no more"):
        load(f"{mine}:leaves")


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import not_there\n", "ModuleNotFoundError"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_run_is_the_users_fault_and_leaves_no_module(
    folder: Path, source: str, last: str
) -> None:
    path = folder / "sick.py"
    path.write_text(source)
    with pytest.raises(UserCodeError, match=f"The task file sick.py raised {last}") as caught:
        load(f"{path}:f")
    assert "sick.py" in frames(caught.value)
    assert "downslope" not in frames(caught.value)
    assert "sick" not in sys.modules


def test_an_interrupt_is_nobodys_fault() -> None:
    with pytest.raises(KeyboardInterrupt), guest("the loss"):
        raise KeyboardInterrupt


def test_a_fault_inside_a_fault_keeps_its_first_name() -> None:
    with (
        pytest.raises(UserCodeError, match="^the inner raised ValueError: no"),
        guest("the outer"),
        guest("the inner"),
    ):
        raise ValueError("no")


REFUSED = """
import downslope as ds
from torch import nn


def loss(model, batch):
    return ds.mutual([model(batch[0])], batch[1])


def task():
    digits = ds.task("digits-mlp")
    return ds.Task(model=digits.model, train=digits.train, valid=digits.valid, loss=loss, metric=ds.accuracy)


def wrong():
    return ds.Task(model=nn.Identity, train=(), valid=())


def raises():
    raise ds.BadInput("not today")
"""


def test_what_our_code_refuses_in_the_users_keeps_its_sentence_and_tells_the_line(folder: Path) -> None:
    path = folder / "refused.py"
    path.write_text(REFUSED)
    with pytest.raises(BadInput) as alone:
        ds.mutual([torch.zeros(1, 2)], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(BadInput) as caught, guest("the outer"):
        Training(load(f"{path}:task")).advance(1)
    line = REFUSED.splitlines().index("    return ds.mutual([model(batch[0])], batch[1])") + 1
    assert str(caught.value) == f"refused.py:{line}: {alone.value}"
    with pytest.raises(BadInput, match=r"^refused\.py:16: 'train' must be"):
        load(f"{path}:wrong")


def test_what_the_user_refuses_in_our_words_is_still_the_users(folder: Path) -> None:
    path = folder / "refused.py"
    path.write_text(REFUSED)
    with pytest.raises(UserCodeError, match="raised BadInput: not today"):
        load(f"{path}:raises")


def test_a_traceback_from_another_process_is_shown_as_it_came(mine: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        load(f"{mine}:broken")
    there = frames(caught.value)
    error = UserCodeError("the loss raised")
    error.__cause__ = Exception(there)
    assert frames(error) == there
