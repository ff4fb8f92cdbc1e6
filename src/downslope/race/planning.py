"""The plan of a race: who runs, on which ladder. Made once, journalled, and the same when asked again."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from downslope.errors import BadInput
from downslope.race.budget import Budget, plan
from downslope.race.candidates import BASELINE, RULES, baseline, brought, grid, trials
from downslope.race.record import Event, Trial
from downslope.recipe import Recipe
from downslope.tasks import Task, size
from downslope.version import __version__

FINALISTS = 3
PIECES = 10
"""Checkpoints in a full training: what a crash can cost of it is a tenth."""

Recipes = Mapping[str, Recipe | str | os.PathLike[str]]


@dataclass(frozen=True)
class Request:
    """A race as it is asked for."""

    task: Task
    budget: str
    seeds: int
    seed: int
    recipes: Recipes
    rules: Sequence[str] | None

    @property
    def spend(self) -> Budget:
        """The budget, understood. Errors: BadInput."""
        return Budget.parse(self.budget)

    def field(self) -> tuple[list[Trial], list[Trial]]:
        """Those that race, in order of importance, and the baseline, unless one of them is its twin."""
        if "" not in self.task.players:
            raise BadInput(
                "a race follows one optimizer, and this task has several players: use downslope train."
            )
        entered = [
            *brought(self.recipes),
            *grid(self.task.recipe, RULES if self.rules is None else self.rules),
        ]
        if not entered:
            raise BadInput("There is nothing to race: name at least one rule, or bring a recipe.")
        everyone = trials([*entered, baseline(self.task.recipe)], self.task)
        racing = [trial for trial in everyone if trial.origin != "baseline"]
        return racing, everyone[len(racing) :]


def planned(request: Request, pace: Event | None) -> dict[str, Any]:
    """The fields of the `race` event. `pace` is what was measured, for a budget in time. Errors: BadInput."""
    task, seeds = request.task, request.seeds
    racing, beside = request.field()
    steps = _named([*racing, *beside], BASELINE).steps
    speed, workers = (pace["seconds_per_step"], pace["workers"]) if pace else (None, 1)
    bought = request.spend.trainings(steps, speed, workers, (FINALISTS + 1) * seeds)
    asked = sum(trial.origin == "given" for trial in racing)
    rungs = plan([trial.length for trial in racing], asked, bought, FINALISTS)
    staying = [*racing[: rungs[0].runners], *beside]
    numbered = [replace(trial, trial=number) for number, trial in enumerate(staying)]
    return {
        **_about(task),
        "seed": request.seed,
        "seeds": seeds,
        "budget": request.budget,
        "versions": versions(),
        "finalists": FINALISTS,
        "baseline": _named(numbered, BASELINE).trial,
        "interval": max(1, steps // PIECES),
        "rungs": [
            {"rung": number, "fraction": str(rung.fraction), "runners": rung.runners}
            for number, rung in enumerate(rungs)
        ],
        "trials": [{**asdict(trial), "names": list(trial.names)} for trial in numbered],
        "left_out": [trial.names[0] for trial in racing[rungs[0].runners :]],
    }


def _about(task: Task) -> dict[str, Any]:
    assert task.entry is not None
    parts = {"train": task.train, "valid": task.valid, "test": task.test}
    return {
        "task": task.entry.address,
        "task_name": task.name,
        "task_seed": task.entry.seed,
        "task_sha256": task.entry.sha256,
        "metric": task.metric_name,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "sizes": {part: 0 if data is None else size(data) for part, data in parts.items()},
    }


def versions() -> dict[str, str]:
    """What a bit-exact continuation depends on."""
    return {"downslope": __version__, "torch": torch.__version__, "python": platform.python_version()}


def agree(asked: Mapping[str, Any], held: Event) -> None:
    """Refuse to go on with a race that is not the one that was asked for, naming the first difference."""
    for key, value in asked.items():
        if held.get(key) != value:
            raise BadInput(
                f"The folder holds another race: its {key.replace('_', ' ')} {_short(held.get(key))}, now "
                f"{_short(value)}. Ask for the same race, or choose another folder."
            )


def _short(value: object) -> str:
    text = str(value)
    return f"is {text}" if len(text) <= 80 else "differs"


def _named(found: Iterable[Trial], name: str) -> Trial:
    return next(trial for trial in found if name in trial.names)
