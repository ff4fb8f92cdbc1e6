"""A branch: another plan for a run, from one of its checkpoints on, as a run of its own in a new folder.

The old folder stays as it is. The new one becomes a run when its `run.json` is written, which is last and
vouches for the checkpoint that it begins with: a kill before leaves no run, a kill after a whole one.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from downslope.errors import BadInput
from downslope.folder import RunFolder, disk
from downslope.journal import Event, read
from downslope.optimizer import Optimizer
from downslope.parallel import place
from downslope.recipe import Recipe
from downslope.schedule import Duration, Schedule, duration, in_steps
from downslope.schedule.picture import draw
from downslope.tasks import Task
from downslope.train import checkpoint
from downslope.train.history import history
from downslope.train.order import steps_per_epoch
from downslope.train.plan import Plan
from downslope.train.player import Side
from downslope.train.run import foreign, plan_in
from downslope.train.training import Training
from downslope.train.turn import Turn, course, dated, depends, peak, schedule_of, turned

_KEPT = "weights, the optimizer's state and steps, random generators, strategies, the place in the data"


@dataclass(frozen=True)
class Asked:
    """What is to change: the whole length, the peak of the rate, the items of an update, a recipe; from which
    checkpoint on; how the schedules go on, and over which warmup or by which shape.
    """

    steps: Duration | None = None
    rate: float | None = None
    batch_size: int | None = None
    recipe: Recipe | None = None
    at: int | None = None
    then: str | None = None
    warmup: Duration | None = None
    shape: str = "linear"

    def __post_init__(self) -> None:
        for key in ("steps", "warmup"):
            if (given := getattr(self, key)) is not None:
                object.__setattr__(self, key, duration(given, key))
        if self.rate is not None and not (type(self.rate) in (int, float) and 0 < self.rate < math.inf):
            raise BadInput(f"rate is the new peak of the learning rate, above 0, got {self.rate!r}.")
        if self.then is not None:
            course(self.then)
        if self.warmup is not None and self.then != "rewarm":
            raise BadInput("a warmup is the way up of rewarm: say that it is to rewarm, or give no warmup.")
        if self.shape not in SHAPES or (self.shape != "linear" and self.then != "decay"):
            raise BadInput(
                f"shape is the way down of decay, one of {', '.join(SHAPES)}, got {self.shape!r} for "
                f"{self.then or 'no course'}."
            )

    def data(self) -> dict[str, Any]:
        """As plain data, a recipe as its hash."""
        return {**asdict(replace(self, recipe=None)), "recipe": self.recipe and self.recipe.hash}


SHAPES = ("linear", "cosine", "sqrt")
"""The ways down to 0."""


class Course(NamedTuple):
    """The learning rate of one optimizer as it was to be and as it now is to be, by its own updates: of how
    many before and after the change, `at` which of them, and the validations `seen` by then.
    """

    old: Schedule
    new: Schedule
    before: int
    after: int
    at: int
    seen: Sequence[tuple[int, float]] = ()

    def was(self, step: int) -> float:
        """The rate as it was to be."""
        return self.old(step, self.seen)

    def will(self, step: int) -> float:
        """The rate as it now is to be."""
        return self.new(step, self.seen)

    @property
    def silent(self) -> int | None:
        """The update from which on the rate is 0 to the end; None if the last one has another."""
        low, high = self.at, self.after - 1
        if self.will(high) != 0:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.will(middle) == 0 else (middle + 1, high)
        return high


@dataclass(frozen=True)
class Branch:
    """A change of plan, before any update of it is made: print it, draw it.

    `folder` and `step`: where it goes on from. `out`: the new run; None where nothing was written. `steps`:
    the whole length before and after. `courses`: the rate, by player where there are several. `said`: what
    else is to be known.
    """

    folder: Path
    out: Path | None
    step: int
    steps: tuple[int, int]
    then: str
    old: Recipe
    recipe: Recipe
    courses: Mapping[str, Course]
    said: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """As plain data; curves are pairs of update and rate."""
        curves = {
            name: {
                "old": one.old.preview(one.before, seen=one.seen),
                "new": one.new.preview(one.after, seen=one.seen),
                "at": one.at,
            }
            for name, one in self.courses.items()
        }
        return {
            "folder": str(self.folder),
            "out": self.out and str(self.out),
            "step": self.step,
            "steps": list(self.steps),
            "then": self.then,
            "diff": [list(one) for one in self.old.diff(self.recipe)],
            "kept": _KEPT,
            "said": list(self.said),
            "rates": curves,
            "recipe": self.recipe.text(),
        }

    def picture(self, width: int = 72, height: int = 9, *, plain: bool = False) -> str:
        """The rate over the updates, as it is to be and, in faint points, as it was to be; the axis marks
        the branch.
        """
        drawn = []
        for name, one in self.courses.items():
            title = f"learning rate{f' of {name}' if name else ''} (points: as it was)"
            shape = draw(one.will, one.after, width, height, plain, behind=(one.was, one.before), at=one.at)
            drawn.append(f"{title}\n{shape}")
        return "\n".join(drawn)

    def __str__(self) -> str:
        before, after = self.steps
        where = f"{self.folder} at step {self.step} of {before}"
        into = f", in {self.out}" if self.out else ""
        lines = [f"A branch of {where}, to step {after}{into}: {self.then}."]
        diff = self.old.diff(self.recipe)
        lines += [f"Kept: {_KEPT}.", *(f"  {one}" for one in diff), *self.said]
        lines += ["", self.picture()] if self.courses else []
        return "\n".join(lines)


def branch(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    *,
    steps: Duration | None = None,
    rate: float | None = None,
    batch_size: int | None = None,
    recipe: Recipe | None = None,
    at: int | None = None,
    then: str | None = None,
    warmup: Duration | None = None,
    shape: str = "linear",
    allow_code_change: bool = False,
    quiet: bool = False,
) -> Branch:
    """Change the plan of a run from its newest checkpoint on, or from the one `at` a step: a new run in
    `out`, which `resume` trains; without `out` nothing is written. Printed on stderr unless `quiet`.

    `steps`: the whole length. `rate`: the new peak; other parts keep their ratio. `then`: schedules go on as
    begun ("keep"), rise within `warmup` and begin anew over what is left ("rewarm"), or go down to 0 by a
    `shape` ("decay"). It must be said where a schedule was made for a length that changes, and where the rate
    is to rise. A new `recipe` has the same rules. BadInput for what cannot be, and where `out` holds anything
    else. The same call again goes on with the branch that it began.
    """
    asked = Asked(steps, rate, batch_size, recipe, at, then, warmup, shape)
    if place().world > 1:
        raise BadInput("a branch is made by one process: make it first, then resume it on several.")
    path, new = Path(folder), None if out is None else Path(out)
    plan = plan_in(path)
    if new is not None and (new / "run.json").exists():
        found = _begun(path, plan, new, asked)
    else:
        found = _made(path, plan, new, plan.find_task(task, allow_code_change), asked)
    if not quiet:
        sys.stderr.write(f"{found}\n")
    return found


def _begun(path: Path, plan: Plan, out: Path, asked: Asked) -> Branch:
    """The branch that is there already, if it is the one that is asked for."""
    begun = plan_in(out)
    parent = begun.parent or {}
    if (parent.get("plan"), parent.get("asked")) != (plan.sha, asked.data()):
        raise BadInput(
            f"{out} holds another run: give another folder, or go on with that by `downslope resume {out}`."
        )
    recipes = Recipe.parse(plan.recipe), Recipe.parse(begun.recipe)
    steps, then = (plan.steps, begun.steps), asked.then or "keep"
    said = ("It has begun already, and goes on as it was planned then.",)
    return Branch(path, out, parent["step"], steps, then, *recipes, {}, said)


def _made(path: Path, plan: Plan, out: Path | None, task: Task, asked: Asked) -> Branch:
    old = plan.find_recipe(path)
    state, sha, damaged = _loaded(path, plan, task, old, asked.at)
    if state.company.stopped:
        raise BadInput(f"[stop] has ended the run at step {state.step}: begin at an earlier one (at=…).")
    change = _Change(state, plan, old, asked)
    found = change.branch(path, out, damaged)
    fresh = Training(  # refuses what does not fit
        task, found.recipe, plan.seed, plan.threads, fresh=False, **plan.arithmetic.data()
    )
    change.turn(fresh)
    if out is not None:
        parent: dict[str, Any] = {"folder": str(path), "plan": plan.sha, "step": state.step, "sha": sha}
        parent["asked"] = asked.data()
        made = partial(plan.branched, task, found.recipe, change.steps)
        _write(out, state, lambda first: made({**parent, "first": first}))
    return found


def _loaded(
    path: Path, plan: Plan, task: Task, recipe: Recipe, at: int | None
) -> tuple[Training, str, list[str]]:
    """The state to go on from, its checkpoint's SHA-256, and a sentence for each that was passed over."""
    journal = path / "journal.jsonl"
    events = (history(read(journal)) if journal.exists() else []) or plan.first
    saved = [e for e in events if e["kind"] == "checkpoint" and (path / "ckpt" / e["name"]).exists()]
    there = ", ".join(str(event["step"]) for event in saved)
    chosen: list[Event] = [event for event in saved if at in (None, event["step"])]
    if not chosen:
        which = f"no checkpoint at step {at}" if at is not None else "no checkpoint"
        raise BadInput(f"{path} has {which} to go on from. There are: {there or 'none'}.")
    damaged: list[str] = []
    for event in reversed(chosen):
        try:
            state = Training.load(path / "ckpt" / event["name"], task, recipe, event["sha"])
            return state, event["sha"], damaged
        except checkpoint.Damaged as error:
            damaged.append(str(error))
    raise BadInput(" ".join(damaged))


class _Change:
    """One change of plan: what it makes of the recipe, and of the state at the branch."""

    def __init__(self, state: Training, plan: Plan, old: Recipe, asked: Asked) -> None:
        self.state, self.plan, self.old, self.asked = state, plan, old, asked
        goal = asked.recipe or old
        size = goal.batch_size if asked.batch_size is None else asked.batch_size
        if type(size) is not int or not 1 <= size <= state.samples:
            raise BadInput(f"a batch has 1 to all {state.samples} samples of the train part, got {size!r}.")
        self.per_epoch = steps_per_epoch(state.samples, size)
        self.batches, self.left_out = moved(state.batches, state.samples, old.batch_size, size)
        length = goal.steps if asked.steps is None else asked.steps
        self.goal = replace(goal, batch_size=size, steps=length)
        self.larger = size != old.batch_size
        self.steps = self._steps()
        self.longer = self.steps != plan.steps
        if self.steps <= state.step:
            raise BadInput(
                f"steps is the whole length, and the branch begins at step {state.step} of {plan.steps}: it "
                f"must be above that, got {self.steps}."
            )
        if self.goal.strategies != old.strategies:
            raise BadInput(
                "a branch goes on with the strategies that the run was begun with, and the recipe has others "
                f"({'; '.join(map(str, old.diff(replace(old, strategies=self.goal.strategies))))})."
            )
        self.then = asked.then or self._default()

    def _steps(self) -> int:
        """The whole length in updates: what is left of the data at the new batch size, if in data."""
        wanted = self.goal.steps
        if isinstance(wanted, int):
            return wanted
        if wanted == self.old.steps and not self.larger:
            return self.plan.steps
        if "growth" in self.goal.strategies:
            return self.goal.run_steps(self.per_epoch, self.state.task.tokens)
        batches = in_steps(wanted, "steps", **self.goal.per_batch(self.per_epoch, self.state.task.tokens))
        return self.state.step + max(0, batches - self.batches)

    @property
    def same(self) -> bool:
        """Whether the plan is the one that the run was begun with."""
        changed = self.longer or self.larger or self.asked.rate is not None or self.goal != self.old
        return self.then == "keep" and not changed

    def branch(self, path: Path, out: Path | None, damaged: list[str]) -> Branch:
        """What is told before anything runs."""
        recipe = self.old if self.same else self._recipe()
        courses = {side.name: self._course(side, recipe) for side in self.state.sides}
        said = (*damaged, *self._said(courses))
        steps = (self.plan.steps, self.steps)
        return Branch(path, out, self.state.step, steps, self.then, self.old, recipe, courses, said)

    def turn(self, fresh: Training) -> None:
        """Let the state be that of a training by the new recipe, of which `fresh` is one: its numbers and
        schedules, and its place in the data. A state kept to go back to would bring the old ones back.
        """
        if self.same:
            return
        for side, new in zip(self.state.sides, fresh.sides, strict=True):
            _follow(side.optimizer, new.optimizer)
        self.state.rescue.load({})
        self.state.recipe, self.state.batches = fresh.recipe, self.batches

    def _recipe(self) -> Recipe:
        old, goal = self.old, self.goal
        strategies = dated(old, self._begun(self.state.sides[0]), self.longer, self.larger)
        steps = self.steps if self.longer or self.larger else goal.steps
        made = {}
        for side in self.state.sides:
            turn, to = self._turn(side), _part(goal, side)
            if self.then == "rewarm":
                turn = replace(turn, warmup=turn.rise(to.chain.lr))
            made[side.name] = turned(_part(old, side), to, turn)
        goal = replace(goal, steps=steps, strategies=strategies)
        if "" not in made:
            return replace(goal, players=made)
        return replace(made[""], steps=steps, strategies=strategies)

    def _turn(self, side: Side) -> Turn:
        turn, rate = self._bare(side), self.asked.rate
        if rate is not None:
            return replace(turn, rate=float(rate), of=self._top())
        if self.then == "decay" and turn.present(_part(self.old, side).chain.lr) == 0:
            raise BadInput("the rate is 0 at the branch, and has nothing to decay from: take rewarm.")
        return turn

    def _bare(self, side: Side) -> Turn:
        """The turn of a side at the rate that it has."""
        now, asked = self._now(side), self.asked
        step, seen = side.optimizer.steps, side.optimizer.seen
        left, begun = max(1, now["run_steps"] - step), self._begun(side)
        return Turn(self.then, step, left, begun, now, warmup=asked.warmup, shape=asked.shape, seen=seen)

    def _top(self) -> float:
        """What the rate that is asked for takes the place of: the main peak, or where a decay begins."""
        first = self.state.sides[0]
        begins = self.then == "decay"
        found = self._bare(first).present(_part(self.old, first).chain.lr) if begins else self._peak()
        if found == 0:
            raise BadInput("the rate is 0, which no factor takes to another: give a recipe with the rate.")
        return found

    def _peak(self) -> float:
        """The main peak: of a recipe of one's own, which begins anew, as a whole; else that in force."""
        first = self.state.sides[0]
        rate = schedule_of(_part(self.goal, first).chain.lr)
        if self.asked.recipe is not None:
            return rate.peak
        return peak(rate.resolve(**self._begun(first)), first.optimizer.steps)

    def _begun(self, side: Side) -> dict[str, Any]:
        before = steps_per_epoch(self.state.samples, self.old.batch_size)
        return side.rates(self.old, self.plan.steps, before)

    def _now(self, side: Side) -> dict[str, Any]:
        return side.rates(self.goal, self.steps, self.per_epoch)

    def _default(self) -> str:
        """Keep, unless that is a guess: a schedule was made for what changes, or the rate would jump."""
        self.then = "keep"
        choice = (
            "keep (as it was begun, and its last value after that), rewarm (up to the peak, then its curve "
            "over what is left) or decay (straight down to 0)"
        )
        if self._depends():
            what = f"{self.plan.steps} updates, and there will be {self.steps}"
            if not self.longer:
                what = f"batches of {self.old.batch_size}, and they will be of {self.goal.batch_size}"
            raise BadInput(f"a schedule of the run was made for {what}: say what it does then, {choice}.")
        rate, old = self.asked.rate, self._peak()
        if rate is not None and rate > old:
            raise BadInput(f"the peak of the rate is to rise from {old:g} to {rate:g}: say how, {choice}.")
        return "keep"

    def _depends(self) -> bool:
        if not (self.longer or self.larger):
            return False
        sides = [(side, Turn("keep", 0, 1, self._begun(side), self._now(side))) for side in self.state.sides]
        return any(depends(_part(self.old, side), turn) for side, turn in sides)

    def _said(self, courses: Mapping[str, Course]) -> list[str]:
        said = []
        if self.asked.then is None and not self.same:
            said.append("The schedules go on as they were begun (keep): none was made for what changes.")
        for name, one in courses.items():
            whose = f"The rate{f' of {name}' if name else ''}"
            if (silent := one.silent) is not None:
                # From a rate of 0 there is nothing to decay.
                other = "rewarm or decay" if one.will(one.at) else "rewarm"
                said.append(
                    f"{whose} is 0 from update {silent} on: the last {one.after - silent} updates change "
                    f"nothing by it. {other} would make use of them."
                )
            elif self.then == "keep" and self._depends():
                last = one.will(one.after - 1)
                said.append(f"{whose} ends at {last:.3g}: decay would take it to 0.")
        if self.larger:
            out = f"{self.left_out} samples sit it out" if self.left_out else "none is left out by that"
            said.append(
                f"Batches of {self.old.batch_size} become batches of {self.goal.batch_size}: no sample comes "
                f"twice in this pass over the data, and {out}."
            )
            if self.asked.rate is None:
                said.append("The rate does not move with the batch: see Recipe.with_batch, and --rate.")
        return said

    def _course(self, side: Side, recipe: Recipe) -> Course:
        begun, now = self._begun(side), side.rates(recipe, self.steps, self.per_epoch)
        old, new = (
            schedule_of(_part(of, side).chain.lr).resolve(**rates)
            for of, rates in ((self.old, begun), (recipe, now))
        )
        own = side.optimizer
        return Course(old, new, begun["run_steps"], now["run_steps"], own.steps, list(own.seen))


def moved(batches: int, samples: int, old: int, new: int) -> tuple[int, int]:
    """The batches of a new size that stand for so many of the old one, in the same pass over the data; and
    the samples that sit out the rest of that pass, because a batch begins at a multiple of its size.

    >>> moved(batches=13, samples=100, old=10, new=32)  # 30 samples into pass 1
    (4, 2)
    """
    epoch, position = divmod(batches, steps_per_epoch(samples, old))
    seen, whole = position * old, steps_per_epoch(samples, new)
    place = min(-(-seen // new), whole)
    return epoch * whole + place, max(0, min(place * new, samples) - seen)


def _part(recipe: Recipe, side: Side) -> Recipe:
    """What a side goes by, without what belongs to all."""
    return replace(recipe.players.get(side.name, recipe), strategies={}, players={})


def _follow(optimizer: Optimizer, made: Optimizer) -> None:
    """Go on, from the state and the step that an optimizer has, by the numbers and schedules of another."""
    packed, other = optimizer.state_dict(), made.state_dict()
    groups = []
    for group, new, plans in zip(
        packed["param_groups"], other["param_groups"], other["schedules"], strict=True
    ):
        numbers = {**new, **{key: group[key] for key in ("params", "param_names", "step") if key in group}}
        for key, index, data in plans:
            value = Schedule.from_data(data)(group["step"], optimizer.seen)
            if index is None:
                numbers[key] = value
            else:
                numbers[key] = tuple(value if i == index else one for i, one in enumerate(numbers[key]))
        groups.append(numbers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*the checkpoint's numbers are used")
        optimizer.load_state_dict({**packed, "param_groups": groups, "schedules": other["schedules"]})


def _write(out: Path, state: Training, plan_of: Callable[[Mapping[str, str]], Plan]) -> None:
    """Make the folder of a branch; `plan_of` its first checkpoint is written last, and makes it a run."""
    if out.is_dir() and (others := [*foreign(out), *(p.name for p in out.glob("journal.jsonl"))]):
        raise BadInput(f"{out} is not a run, it holds {others[0]}: give another folder.")
    with RunFolder(out) as folder:
        if (out / "run.json").exists():
            raise BadInput(f"{out} was begun meanwhile by another process: give another folder.")
        kept = out / "ckpt"
        with disk(f"write the folder {kept}"):
            kept.mkdir(mode=0o700, exist_ok=True)
            for path in list(kept.iterdir()):
                checkpoint.remove(path)
        name = f"step-{state.step:09d}"
        sha = state.save(kept / name)
        Training.load(kept / name, state.task, state.recipe, sha)  # nothing is vouched for that does not load
        plan = plan_of({"name": name, "sha": sha})
        folder.write("recipe.toml", plan.recipe.encode())
        folder.write("run.json", plan.text())
