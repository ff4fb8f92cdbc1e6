"""A run: one training of a task by a recipe, in a folder, resumable at any instant.

The folder holds `run.json` and `recipe.toml` (what it is), `journal.jsonl` (what happened), `ckpt/` (where it
can go on from) and, in the end, `result.json`.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from downslope.errors import BadInput
from downslope.folder import RunFolder, disk
from downslope.journal import Event, Journal, read
from downslope.parallel import PATIENCE, Ranks, joined, watched
from downslope.recipe import Recipe
from downslope.tasks import Task
from downslope.tasks import task as find
from downslope.train import checkpoint
from downslope.train.history import history, losses
from downslope.train.loop import Loop
from downslope.train.plan import Plan
from downslope.train.precision import Arithmetic, uncompiled
from downslope.train.progress import Show
from downslope.train.store import Elsewhere, Store
from downslope.train.training import Evaluation, Training

_OURS = {
    "run.lock",
    "run.json",
    "recipe.toml",
    "journal.jsonl",
    "journal.jsonl.lock",
    "ckpt",
    "ranks",
    "result.json",
}


@dataclass(frozen=True)
class Run:
    """A finished training: its trained `model`, the loss and metric on the validation and the test part.

    `target` is the task's, and `reached` whether the metric on the validation part is at least as good; None
    where there is none.
    """

    folder: Path
    task: str
    seed: int
    steps: int
    metric: str
    valid: Evaluation
    test: Evaluation | None
    model: nn.Module = field(repr=False, compare=False)
    target: float | None = None
    higher_is_better: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the validation part has the target's metric or a better one."""
        if self.target is None:
            return None
        metric = self.valid.metric
        return metric >= self.target if self.higher_is_better else metric <= self.target

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
            "target": self.target,
            "reached": self.reached,
            "valid": _finite(self.valid),
            "test": self.test and _finite(self.test),
        }

    def __str__(self) -> str:
        parts = [("validation", self.valid), ("test", self.test)]
        seen = ", ".join(f"{part} {self.metric} {e.metric:.4g} (loss {e.loss:.4g})" for part, e in parts if e)
        aim = (
            ""
            if self.target is None
            else f"; target {self.target:g} {'reached' if self.reached else 'missed'}"
        )
        return f"{self.task}, {self.steps} steps: {seen}{aim}\n{self.folder}"


def train(
    task: Task | str,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str],
    seed: int = 0,
    valid_every: int | None = None,
    save_every: int | None = None,
    quiet: bool = False,
    background: bool = False,
    shard: bool = False,
    patience: float = PATIENCE,
    precision: str | None = None,
    compile: bool = False,
) -> Run:
    """Train a task (or the address of one) by a recipe, the task's own unless given, in the folder `out`.

    Validated every `valid_every` updates (default: 20 times), saved every `save_every` (default: once a
    minute, in the `background` if so), tested once, at the end. After kill -9 at any instant the same call,
    or `resume`, goes on and ends in the same bits. SIGINT and SIGTERM save first. BadInput if the folder
    holds anything but this run. Under torchrun every rank calls it: see `resume`. `precision`: "bf16" or
    "fp16" for autocast; `compile`: the model, by torch.compile.
    """
    task = find(task) if isinstance(task, str) else task
    recipe, path = recipe or task.recipe, Path(out)
    plan = Plan.of(task, recipe, seed, valid_every, save_every, Arithmetic(precision, compile))
    with joined(shard, patience) as ranks:
        ranks.check_same("a training", plan.sha)
        begun = ranks.told(lambda: (path / "run.json").exists())
        if ranks.leads and not begun and path.is_dir() and (others := foreign(path)):
            raise BadInput(f"{out} is not a run, it holds {others[0]}: give another folder.")
        # Made before the folder is: what is wrong with task or recipe shows here, and leaves nothing behind.
        fresh = None if begun else _new(plan, task, recipe, ranks)
        if not ranks.leads:
            return _follow(path, task, background, ranks, fresh)
        with RunFolder(out) as folder:
            if (path / "run.json").exists():
                begun_as = plan_in(path)
                begun_as.same(plan, out)
                return _go_on(folder, begun_as, task, begun_as.find_recipe(out), quiet, background, ranks)
            folder.write("recipe.toml", plan.recipe.encode())
            folder.write("run.json", plan.text())
            return _go_on(folder, plan, task, recipe, quiet, background, ranks, fresh)


def resume(
    out: str | os.PathLike[str],
    task: Task | None = None,
    *,
    allow_code_change: bool = False,
    quiet: bool = False,
    background: bool = False,
    shard: bool = False,
    patience: float = PATIENCE,
) -> Run:
    """Go on with the run in a folder: it ends in the same bits as if it had never been interrupted.

    `task` is needed only where the run's own has no address. BadInput, saying what has changed, if recipe,
    data or task file are not those it began with; `allow_code_change` accepts the latter two. Under torchrun
    every rank calls it: they share each batch, and with `shard` the weights too (FSDP2). On other ranks than
    before, numbers are equal only to rounding. `patience`: seconds without progress until ranks are given up.
    """
    path = Path(out)
    plan = plan_in(path)
    recipe = plan.find_recipe(path)
    task = plan.find_task(task, allow_code_change)
    with joined(shard, patience) as ranks:
        if not ranks.leads:
            return _follow(path, task, background, ranks)
        with RunFolder(path) as folder:
            return _go_on(folder, plan, task, recipe, quiet, background, ranks)


def _go_on(
    folder: RunFolder,
    plan: Plan,
    task: Task,
    recipe: Recipe,
    quiet: bool,
    background: bool,
    ranks: Ranks,
    fresh: Training | None = None,
) -> Run:
    path = folder.path
    with disk(f"write the folder {path}"):
        (path / "ckpt").mkdir(mode=0o700, exist_ok=True)
    show = Show(plan.task, plan.steps, task.metric_name, quiet)
    how: dict[str, Any] = {"world": ranks.world, "shard": ranks.shard}
    with Journal.open(path / "journal.jsonl") as journal, show:
        everything = _begun(journal, plan, {**_start(plan, task, recipe), **how})
        past = history(everything)
        for sentence in filter(None, [plan.other_versions(), _other_ranks(everything, ranks)]):
            show.say(sentence)
        ranks.told(lambda: plan.text().decode())
        store = Store(path / "ckpt", journal, background, ranks=ranks)
        found, after, damaged = store.newest(
            past, lambda at, sha: Training.load(at, task, recipe, sha, ranks, plan.arithmetic)
        )
        state = found or fresh or _new(plan, task, recipe, ranks, damaged)
        for sentence in damaged:
            show.say(f"{sentence} Going on from step {state.step}.")
        ended = next((event for event in past if event["kind"] == "end"), None)
        ranks.told(lambda: {"past": _brief(past, after), "ended": ended})
        if ended is None or not state.done:
            if past:
                entry = task.entry.data() if task.entry else None
                journal.append("resume", step=state.step, after=after, damaged=damaged, entry=entry, **how)
            else:
                journal.append("start", **_start(plan, task, recipe), **how)
            past = history([*past, {"kind": "resume", "after": after}])
            ended = _finish(folder, Loop(state, plan, store, past, show))
    return _run(path, plan, task, state, ended)


def _begun(journal: Journal, plan: Plan, start: dict[str, Any]) -> list[Event]:
    """The events so far; a branch begins with the checkpoint that its plan vouches for."""
    if plan.first:
        first = [(event["kind"], {k: v for k, v in event.items() if k != "kind"}) for event in plan.first]
        if missing := [("start", start), *first][journal.last + 1 :]:  # all, or what a crash tore off
            journal.extend(missing)
    return read(journal.path)


def _new(plan: Plan, task: Task, recipe: Recipe, ranks: Ranks, damaged: Sequence[str] = ()) -> Training:
    """The state at step 0, which a branch has not."""
    if plan.parent is not None:
        raise BadInput(f"{' '.join(damaged)} The branch has no other checkpoint: make it again elsewhere.")
    return Training(task, recipe, plan.seed, plan.threads, ranks=ranks, **plan.arithmetic.data())


def _follow(path: Path, task: Task, background: bool, ranks: Ranks, fresh: Training | None = None) -> Run:
    """The part of a rank that leaves deciding to the first: it goes on from where that one does, which it
    finds in the same folder, and writes there what of the state it alone has.
    """
    plan = Plan(**json.loads(ranks.told(str)))
    recipe = Recipe.parse(plan.recipe)
    store = Store(path / "ckpt", Elsewhere(path / "journal.jsonl"), background, ranks=ranks)
    found, _, _ = store.newest(
        [], lambda at, sha: Training.load(at, task, recipe, sha, ranks, plan.arithmetic)
    )
    state = found or fresh or _new(plan, task, recipe, ranks)
    said = ranks.told(dict[str, Any])
    past, ended = said["past"], said["ended"]
    if ended is None or not state.done:
        with Show(plan.task, plan.steps, task.metric_name, quiet=True) as show:
            ended = _finish(None, Loop(state, plan, store, past, show))
    return _run(path, plan, task, state, ended)


def _brief(past: Sequence[Event], after: int) -> list[Event]:
    """What of the past other ranks need: the last of what a Loop reads."""
    counting = history([*past, {"kind": "resume", "after": after}])
    return [*{event["kind"]: event for event in counting if event["kind"] in ("valid", "step")}.values()]


def _other_ranks(events: Sequence[Event], ranks: Ranks) -> str:
    """What it means that a run goes on on other ranks than before, as a sentence; empty if it does not."""
    begun = [event for event in events if event["kind"] in ("start", "resume")][-1:]
    was = [(event.get("world", 1), event.get("shard", False)) for event in begun]
    if was in ([], [(ranks.world, ranks.shard)]):
        return ""
    then, now = (
        f"{world} rank{'s' * (world > 1)}{' with --shard' * shard}"
        for world, shard in (*was, (ranks.world, ranks.shard))
    )
    return (
        f"The run was on {then} and goes on on {now}: numbers are now equal only to rounding, and what is "
        "drawn at random is drawn anew."
    )


def plan_in(path: Path) -> Plan:
    """The plan in a run's folder, which must be the one that its journal began with."""
    plan, journal = Plan.read(path), path / "journal.jsonl"
    events = read(journal) if journal.exists() else []
    if events and events[0].get("plan") != plan.sha:
        raise BadInput(f"{path}/run.json is not what the run's journal says it is: changed or damaged.")
    return plan


def _start(plan: Plan, task: Task, recipe: Recipe) -> dict[str, Any]:
    about = {"metric": task.metric_name, "higher_is_better": task.higher_is_better, "plan": plan.sha}
    about |= {} if plan.parent is None else {"parent": plan.parent}
    about |= plan.arithmetic.data()
    return {"task": plan.task, "recipe": recipe.hash, "seed": plan.seed, "steps": plan.steps, **about}


def _finish(folder: RunFolder | None, loop: Loop) -> Event:
    """Train to the end, test, and say so: the test part is looked at here and nowhere else."""
    state, ranks = loop.state, loop.state.ranks
    stacks = loop.journal.path.with_name("ranks") / f"rank-{ranks.rank}.stacks"
    with watched(stacks, ranks.patience) if ranks.together else nullcontext():
        valid = loop.run()
        if state.finish():
            valid = state.evaluate("valid")
        test = state.evaluate("test") if state.task.test is not None else None
    ended: dict[str, Any] = {"step": state.step, "valid": valid.data(), "test": test.data() if test else None}
    result = {"schema": 1, **ended, "valid": _finite(valid), "test": test and _finite(test)}
    if folder is not None:
        folder.write("result.json", checkpoint.dump(result))
    loop.journal.append("end", **ended)
    return ended


def _run(path: Path, plan: Plan, task: Task, state: Training, ended: Event) -> Run:
    valid, test = (Evaluation(**ended[part]) if ended[part] else None for part in ("valid", "test"))
    assert valid is not None
    if not state.finished:
        state.finish()
    return Run(
        path,
        plan.task,
        plan.seed,
        ended["step"],
        task.metric_name,
        valid,
        test,
        uncompiled(state.model),
        task.target,
        task.higher_is_better,
    )


def foreign(path: Path) -> list[str]:
    """What is no part of a run, nor what a killed writer of one leaves behind."""
    names = sorted(entry.name for entry in path.iterdir())
    return [name for name in names if name not in _OURS and not re.fullmatch(r"\..+\.tmp", name)]


def _finite(seen: Evaluation) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in seen.data().items()}
