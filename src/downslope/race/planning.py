"""The plan of a race: who runs, on which ladder. Made once and journalled; asked for again, it must come
out the same.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from downslope.errors import BadInput
from downslope.race.budget import Budget, plan
from downslope.race.candidates import BASELINE, RULES, baseline, brought, grid, trials
from downslope.race.record import Event, Trial
from downslope.recipe import Recipe
from downslope.tasks import Task, size

FINALISTS = 3
PIECES = 10
"""Checkpoints in a full training: what a crash can cost of it is a tenth."""

Recipes = Mapping[str, Recipe | str | os.PathLike[str]]


def planned(
    task: Task,
    budget: Budget,
    text: str,
    seeds: int,
    seed: int,
    recipes: Recipes,
    rules: Iterable[str] | None,
    pace: Event | None,
) -> dict[str, Any]:
    """The fields of the `race` event. `pace` is what was measured, for a budget in time. Errors: BadInput."""
    given = brought(recipes)
    entered = [*given, *grid(task.recipe, RULES if rules is None else rules)]
    if not entered:
        raise BadInput("There is nothing to race: name at least one rule, or bring a recipe.")
    everyone = trials([*entered, baseline(task.recipe)], size(task.train))
    racing = [trial for trial in everyone if trial.origin != "baseline"]
    steps = everyone[-1].steps if everyone[-1].origin == "baseline" else _named(everyone, BASELINE).steps
    speed, workers = (pace["seconds_per_step"], pace["workers"]) if pace else (None, 1)
    bought = budget.trainings(steps, speed, workers, (FINALISTS + 1) * seeds)
    asked = sum(trial.origin == "given" for trial in racing)
    rungs = plan([trial.length for trial in racing], asked, bought, FINALISTS)
    staying = [*racing[: rungs[0].runners], *everyone[len(racing) :]]
    field = [replace(trial, trial=number) for number, trial in enumerate(staying)]
    assert task.entry is not None
    return {
        "task": task.entry.data(),
        "task_name": task.name,
        "metric": task.metric_name,
        "higher_is_better": task.higher_is_better,
        "target": task.target,
        "sizes": {part: 0 if data is None else size(data) for part, data in _parts(task).items()},
        "seed": seed,
        "seeds": seeds,
        "budget": text,
        "versions": versions(),
        "finalists": FINALISTS,
        "baseline": _named(field, BASELINE).trial,
        "interval": max(1, steps // PIECES),
        "rungs": [
            {"rung": number, "fraction": str(rung.fraction), "runners": rung.runners}
            for number, rung in enumerate(rungs)
        ],
        "trials": [{**asdict(trial), "names": list(trial.names)} for trial in field],
        "left_out": [trial.names[0] for trial in racing[rungs[0].runners :]],
    }


def versions() -> dict[str, str]:
    """What a bit-exact continuation depends on."""
    from downslope import __version__

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


def _parts(task: Task) -> dict[str, Any]:
    return {"train": task.train, "valid": task.valid, "test": task.test}
