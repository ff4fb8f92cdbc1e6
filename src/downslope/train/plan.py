"""What a run is, in its `run.json`: written once at the start, compared on every resume."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downslope.errors import BadInput
from downslope.folder import read_file
from downslope.journal import Event
from downslope.recipe import Recipe
from downslope.tasks import Data, Entry, Task, reopen, size
from downslope.train.fingerprint import fingerprint
from downslope.train.order import measures
from downslope.train.precision import PLAIN, Arithmetic
from downslope.version import __version__

SCHEMA = 1
_LARGEST = 2**20
_IDENTITY = ("task", "entry", "seed", "steps", "data", "precision", "compile", "parent")
_PARENT = {"folder", "plan", "step", "sha", "asked", "first"}
_LATER = {"parent": None, "precision": None, "compile": False, "tokens": None}
"""What older files have not, and what that means; it is not written where it is so."""


@dataclass(frozen=True)
class Plan:
    """Task, data, recipe, seed and length of a run, and how often it is looked at and saved.

    `valid_every` and `save_every` count updates; without the latter a run is saved once a minute. `entry` is
    None for a task that no other process can find. Of data in memory, `data` has the SHA-256. `parent`, of a
    branch: folder, SHA-256 of the plan, step and SHA-256 of the checkpoint that it goes on from, what was
    `asked`, and name and SHA-256 of its own `first` checkpoint. `precision`, `compile`: see Arithmetic.
    `tokens`: of a sample, where the task says so.
    """

    task: str
    entry: Mapping[str, Any] | None
    seed: int
    steps: int
    recipe: str
    data: Mapping[str, Any]
    threads: int
    valid_every: int
    save_every: int | None
    versions: Mapping[str, str]
    schema: int = SCHEMA
    parent: Mapping[str, Any] | None = None
    precision: str | None = None
    compile: bool = False
    tokens: int | None = None

    @classmethod
    def of(
        cls,
        task: Task,
        recipe: Recipe,
        seed: int,
        valid_every: int | None = None,
        save_every: int | None = None,
        arithmetic: Arithmetic = PLAIN,
    ) -> "Plan":
        """The plan of a training that begins; validated 20 times on the way unless told otherwise."""
        for name, every in (("valid_every", valid_every), ("save_every", save_every)):
            if every is not None and (type(every) is not int or every < 1):
                raise BadInput(f"{name} must be a whole number of updates from 1, got {every!r}.")
        steps = recipe.run_steps(**measures(task, recipe.batch_size))
        return cls(
            task=task.name or "training",
            entry=task.entry.data() if task.entry else None,
            seed=seed,
            steps=steps,
            recipe=recipe.text(),
            data=about_data(task),
            threads=torch.get_num_threads(),
            valid_every=valid_every or max(steps // 20, 1),
            save_every=save_every,
            versions=_versions(),
            tokens=task.tokens,
            **arithmetic.data(),
        )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Plan":
        """The plan of the run in a folder; BadInput if there is none."""
        path = Path(folder, "run.json")
        if not path.exists():
            race = (
                " It holds a race: start that again to go on." if Path(folder, "race.json").exists() else ""
            )
            raise BadInput(f"there is no run in {folder}.{race}")
        try:
            data = {**_LATER, **json.loads(read_file(path, _LARGEST))}
            if data.get("schema", SCHEMA) > SCHEMA:
                raise BadInput(f"{path} was written by a newer version of downslope.")
            parent = data["parent"]
            if data.keys() != {item.name for item in fields(cls)} or (parent and parent.keys() != _PARENT):
                raise ValueError("its keys are not those of a run")
            plan = cls(**data)
            _ = plan.arithmetic  # refuses what is none
            return plan
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{path} is damaged: {error}.") from None

    def text(self) -> bytes:
        """The file."""
        told = {key: value for key, value in asdict(self).items() if _LATER.get(key, ...) != value}
        return json.dumps(told, indent=1, allow_nan=False).encode() + b"\n"

    @property
    def arithmetic(self) -> Arithmetic:
        """How it computes."""
        return Arithmetic(self.precision, self.compile)

    @property
    def sha(self) -> str:
        """The SHA-256 of the file, which the journal's first event has too."""
        return hashlib.sha256(self.text()).hexdigest()

    @property
    def first(self) -> list[Event]:
        """Of a branch, the checkpoint that it begins with, as its journal has it behind the start."""
        if self.parent is None:
            return []
        return [{"kind": "checkpoint", "step": self.parent["step"], **self.parent["first"], "after": 0}]

    def same(self, other: "Plan", folder: object) -> None:
        """BadInput, saying what differs, unless both are one run."""
        told = [
            f"{name}: {getattr(self, name)!r} → {getattr(other, name)!r}"
            for name in _IDENTITY
            if getattr(self, name) != getattr(other, name)
        ][:1]
        told += map(str, Recipe.parse(self.recipe).diff(Recipe.parse(other.recipe)))
        if told:
            raise BadInput(
                f"{folder} holds another run ({'; '.join(told)}): give another folder, or go on with that "
                f"run by `downslope resume {folder}`."
            )

    def other_versions(self) -> str:
        """What is not installed as it was when the run began, as a sentence; empty if all is."""
        now = _versions()
        changed = [
            f"{name} {self.versions.get(name)} → {now[name]}"
            for name in now
            if now[name] != self.versions.get(name)
        ]
        return (
            f"The run began with other versions ({', '.join(changed)}): its bits may differ."
            if changed
            else ""
        )

    def branched(self, task: Task, recipe: Recipe, steps: int, parent: Mapping[str, Any]) -> "Plan":
        """The plan of a run that goes on from a checkpoint of this one by another recipe."""
        return replace(
            self,
            entry=task.entry.data() if task.entry else None,
            data=about_data(task),
            recipe=recipe.text(),
            steps=steps,
            versions=_versions(),
            parent=parent,
        )

    def find_task(self, task: Task | None, allow_code_change: bool) -> Task:
        """The task of the run, found again unless given; BadInput if its code or its data have changed."""
        if task is None:
            if self.entry is None:
                raise BadInput(f"only the program that made the task {self.task!r} has it: give it as task=.")
            task = reopen(Entry.from_data(self.entry), allow_code_change)
        if self.tokens not in (None, task.tokens):  # lengths in tokens would be others
            raise BadInput(
                f"a sample of {self.task} had {self.tokens} tokens when the run began, and the task now says "
                f"{task.tokens}: go on with tokens={self.tokens}."
            )
        if not allow_code_change and (now := about_data(task)) != self.data:
            part = next(part for part in self.data if self.data[part] != now[part])
            raise BadInput(
                f"the {part} data of {self.task} have changed since the run began: {self.data[part]} then, "
                f"{now[part]} now."
            )
        return task

    def find_recipe(self, folder: str | os.PathLike[str]) -> Recipe:
        """The recipe of the run; BadInput if its `recipe.toml` now says something else."""
        mine, now = Recipe.parse(self.recipe, f"{folder}/run.json"), Recipe.load(Path(folder, "recipe.toml"))
        if changes := mine.diff(now):
            raise BadInput(
                f"{folder}/recipe.toml has changed since the run began ({'; '.join(map(str, changes))}): "
                "put it back, or train the new recipe into another folder."
            )
        return mine


def _versions() -> dict[str, str]:
    return {"downslope": __version__, "torch": str(torch.__version__), "numpy": np.__version__}


def about_data(task: Task) -> dict[str, Any]:
    """How many samples each part has, and the SHA-256 of those in memory."""
    parts: dict[str, Data | None] = {"train": task.train, "valid": task.valid, "test": task.test}
    return {name: None if data is None else _about(data) for name, data in parts.items()}


def _about(data: Data) -> dict[str, Any]:
    about: dict[str, Any] = {"samples": size(data)}
    if isinstance(data, tuple):
        about["sha256"] = hashlib.sha256("".join(map(fingerprint, data)).encode()).hexdigest()
    return about
