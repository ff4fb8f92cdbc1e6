"""A run: one training of a task by a recipe, in a folder, resumable at any instant.

The folder holds `run.json` and `recipe.toml` (what it is), `journal.jsonl` (what happened), `ckpt/` (where it
can go on from) and, in the end, `result.json`.
"""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from downslope.errors import BadInput
from downslope.folder import RunFolder, disk
from downslope.journal import Event, Journal, read
from downslope.recipe import Recipe
from downslope.tasks import Task
from downslope.tasks import task as find
from downslope.train import checkpoint
from downslope.train.history import history, losses
from downslope.train.loop import Loop, restore
from downslope.train.plan import Plan
from downslope.train.progress import Show
from downslope.train.training import Evaluation, Training

_OURS = {"run.lock", "run.json", "recipe.toml", "journal.jsonl", "journal.jsonl.lock", "ckpt", "result.json"}


@dataclass(frozen=True)
class Run:
    """A finished training: its trained `model`, the loss and metric on the validation and the test part."""

    folder: Path
    task: str
    seed: int
    steps: int
    metric: str
    valid: Evaluation
    test: Evaluation | None
    model: nn.Module = field(repr=False, compare=False)

    @property
    def events(self) -> list[Event]:
        """The events of its journal that count: each update once, however often it was interrupted."""
        return history(read(self.folder / "journal.jsonl"))

    @property
    def losses(self) -> dict[int, float]:
        """The training loss by step."""
        return losses(self.events)

    def data(self) -> dict[str, Any]:
        """As plain data; what is not finite is None."""
        return {
            "folder": str(self.folder),
            "task": self.task,
            "seed": self.seed,
            "steps": self.steps,
            "metric": self.metric,
            "valid": _finite(self.valid),
            "test": self.test and _finite(self.test),
        }

    def __str__(self) -> str:
        parts = [("validation", self.valid), ("test", self.test)]
        seen = ", ".join(f"{part} {self.metric} {e.metric:.4g} (loss {e.loss:.4g})" for part, e in parts if e)
        return f"{self.task}, {self.steps} steps: {seen}\n{self.folder}"


def train(
    task: Task | str,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str],
    seed: int = 0,
    valid_every: int | None = None,
    save_every: int | None = None,
    quiet: bool = False,
) -> Run:
    """Train a task (or the address of one) by a recipe, the task's own unless given, in the folder `out`.

    Validated every `valid_every` updates (default: 20 times), saved every `save_every` (default: once a
    minute), tested once, at the end. After kill -9 at any instant the same call, or `resume`, goes on and
    ends in the same bits. SIGINT and SIGTERM save first. BadInput if the folder holds anything but this run.
    """
    task = find(task) if isinstance(task, str) else task
    recipe, path = recipe or task.recipe, Path(out)
    plan = Plan.of(task, recipe, seed, valid_every, save_every)
    begun = (path / "run.json").exists()
    if not begun and path.is_dir() and (others := _foreign(path)):
        raise BadInput(f"{out} is not a run, it holds {others[0]}: give another folder.")
    # Made before the folder is: what is wrong with task or recipe shows here, and leaves nothing behind.
    fresh = None if begun else Training(task, recipe, seed, plan.threads)
    with RunFolder(out) as folder:
        if (path / "run.json").exists():
            begun_as = _plan(path)
            begun_as.same(plan, out)
            return _go_on(folder, begun_as, task, begun_as.find_recipe(out), quiet)
        folder.write("recipe.toml", plan.recipe.encode())
        folder.write("run.json", plan.text())
        return _go_on(folder, plan, task, recipe, quiet, fresh)


def resume(
    out: str | os.PathLike[str],
    task: Task | None = None,
    *,
    allow_code_change: bool = False,
    quiet: bool = False,
) -> Run:
    """Go on with the run in a folder: it ends in the same bits as if it had never been interrupted.

    `task` is needed only where the run's own has no address. BadInput, saying what has changed, if recipe,
    data or task file are not those it began with; `allow_code_change` accepts the latter two.
    """
    path = Path(out)
    plan = _plan(path)
    recipe = plan.find_recipe(path)
    task = plan.find_task(task, allow_code_change)
    with RunFolder(path) as folder:
        return _go_on(folder, plan, task, recipe, quiet)


def _go_on(
    folder: RunFolder, plan: Plan, task: Task, recipe: Recipe, quiet: bool, fresh: Training | None = None
) -> Run:
    path = folder.path
    with disk(f"write the folder {path}"):
        (path / "ckpt").mkdir(mode=0o700, exist_ok=True)
    show = Show(plan.task, plan.steps, task.metric_name, quiet)
    with Journal.open(path / "journal.jsonl") as journal, show:
        past = history(read(journal.path))
        if versions := plan.other_versions():
            show.say(versions)
        state, after, damaged = restore(plan, task, recipe, path / "ckpt", past, fresh)
        for sentence in damaged:
            show.say(f"{sentence} Going on from step {state.step}.")
        ended = next((event for event in past if event["kind"] == "end"), None)
        if ended is None or not state.done:
            if past:
                entry = task.entry.data() if task.entry else None
                journal.append("resume", step=state.step, after=after, damaged=damaged, entry=entry)
            else:
                journal.append("start", **_start(plan, task, recipe))
            past = [event for event in past if event["seq"] <= after]
            ended = _finish(folder, Loop(state, plan, journal, past, show))
    return _run(path, plan, task, state, ended)


def _plan(path: Path) -> Plan:
    """The plan in a run's folder, which must be the one that its journal began with."""
    plan, journal = Plan.read(path), path / "journal.jsonl"
    events = read(journal) if journal.exists() else []
    if events and events[0].get("plan") != plan.sha:
        raise BadInput(f"{path}/run.json is not what the run's journal says it is: changed or damaged.")
    return plan


def _start(plan: Plan, task: Task, recipe: Recipe) -> dict[str, Any]:
    about = {"metric": task.metric_name, "higher_is_better": task.higher_is_better, "plan": plan.sha}
    return {"task": plan.task, "recipe": recipe.hash, "seed": plan.seed, "steps": plan.steps, **about}


def _finish(folder: RunFolder, loop: Loop) -> Event:
    """Train to the end, test, and say so: the test part is looked at here and nowhere else."""
    valid, state = loop.run(), loop.state
    if state.finish():
        valid = state.evaluate("valid")
    test = state.evaluate("test") if state.task.test is not None else None
    ended: dict[str, Any] = {"step": state.step, "valid": valid.data(), "test": test.data() if test else None}
    result = {"schema": 1, **ended, "valid": _finite(valid), "test": test and _finite(test)}
    folder.write("result.json", checkpoint.dump(result))
    loop.journal.append("end", **ended)
    return ended


def _run(path: Path, plan: Plan, task: Task, state: Training, ended: Event) -> Run:
    valid, test = (Evaluation(**ended[part]) if ended[part] else None for part in ("valid", "test"))
    assert valid is not None
    if not state.finished:
        state.finish()
    return Run(path, plan.task, plan.seed, ended["step"], task.metric_name, valid, test, state.model)


def _foreign(path: Path) -> list[str]:
    """What is no part of a run, nor what a killed writer of one leaves behind."""
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name not in _OURS and not re.fullmatch(r"\..+\.tmp", name)]


def _finite(seen: Evaluation) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in seen.data().items()}
