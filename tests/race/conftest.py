"""A task of a second, and races on it: the smallest that has everything a race has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from downslope.journal import read
from downslope.race import Standings, race

TASK = """
import ctypes, os, subprocess, sys, time
import torch
from torch import nn
import downslope as ds
from downslope.tasks import Task, accuracy, cross_entropy

def loss(model, batch):
    if model.weight.detach().abs().max() > 100:
        {trouble}
    return cross_entropy(model, batch)

def task():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(240, 5, generator=draw)
    y = (x @ torch.randn(5, 3, generator=draw) + torch.randn(240, 3, generator=draw)).argmax(1)
    train, valid, test = ((x[a:b], y[a:b]) for a, b in ((0, 96), (96, 168), (168, 240)))
    recipe = ds.Recipe(ds.chain(ds.adamw(lr=1e-3)), steps=40, batch_size=16)
    parts = dict(train=train, valid=valid, test=test)
    return Task(model=lambda: nn.Linear(5, 3), **parts, loss=loss, metric=accuracy, recipe=recipe)
"""
SMALL: dict[str, Any] = {"budget": "4x", "seeds": 2, "rules": ["adamw", "sgd"]}


@dataclass(frozen=True)
class Field:
    """A task file, and races on it in folders beside it."""

    file: Path

    @property
    def address(self) -> str:
        return f"{self.file}:task"

    def folder(self, out: str) -> Path:
        return self.file.parent / out

    def race(self, out: str, **more: Any) -> Standings:
        """A small race, coordinated by this process."""
        return race(self.address, out=self.folder(out), **{**SMALL, **more})

    def start(self, out: str, **more: Any) -> subprocess.Popen[bytes]:
        """The same, coordinated by a process of its own, which can be killed."""
        asked = {"task": self.address, "out": str(self.folder(out)), **SMALL, **more}
        code = f"from downslope.race import race; race(**{asked!r})"
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def bytes(self, out: str) -> bytes:
        return (self.folder(out) / "standings.json").read_bytes()

    def events(self, out: str, kind: str = "") -> list[dict[str, Any]]:
        """What the journal says, also while it is being written."""
        path = self.folder(out) / "journal.jsonl"
        return [event for event in (read(path) if path.exists() else []) if kind in ("", event["kind"])]


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Field]:
    """Makes a field; `trouble` is the statement that its loss runs when weights have exploded."""

    def make(trouble: str = "pass") -> Field:
        file = tmp_path_factory.mktemp("field") / "little.py"
        file.write_text(TASK.format(trouble=trouble))
        return Field(file)

    return make


@pytest.fixture(scope="session")
def plain(field: Callable[..., Field]) -> Field:
    """A field without trouble, where "reference" was raced by one worker without a break."""
    made = field()
    made.race("reference", workers=1)
    return made


def workers(coordinator: int) -> list[int]:
    """The process ids of a coordinator's workers that live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            line = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == coordinator and fields[0] != "Z" and b"downslope.race.worker" in line:
            found.append(int(status.parent.name))
    return found
