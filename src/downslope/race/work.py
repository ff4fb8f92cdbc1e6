"""One job of a race, done: train to where the assignment says, leave checkpoints, judge.

It speaks in messages, plain data; whoever listens puts them into the journal, and only then does a
checkpoint count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downslope.errors import BadInput, DownslopeError
from downslope.folder import disk
from downslope.recipe import Recipe
from downslope.schedule import Schedule
from downslope.tasks import Entry, Task, reopen
from downslope.train import Attempt, Damaged, Diverged, Training
from downslope.train.checkpoint import remove

Message = dict[str, Any]

WARMING, TIMED = 5, 1.0
"""Of a rehearsal: updates that are not timed, because kernels are made in them, and seconds that are."""


class Refused(DownslopeError):  # noqa: N818  the disk did
    """The disk refused a checkpoint: that is no fault of the trial, and no other would fare better."""


@dataclass(frozen=True)
class Bench:
    """What a worker works with: the task, and the folder in which trials keep their checkpoints."""

    task: Task
    trials: Path

    @staticmethod
    def open(hello: Mapping[str, Any]) -> Bench:
        """The bench that the coordinator's first message describes."""
        return Bench(reopen(Entry.from_data(hello["task"])), Path(hello["trials"]))


@dataclass
class Curve:
    """Training loss against updates and computing seconds; a point is the mean since the last one."""

    every: int
    before: float
    alive: Callable[[], None]
    points: Message = field(default_factory=lambda: {"step": [], "loss": [], "lr": [], "seconds": []})
    began: float = field(default_factory=time.perf_counter)
    total: float = 0.0
    count: int = 0

    @property
    def seconds(self) -> float:
        """Computing seconds of the run until now."""
        return self.before + time.perf_counter() - self.began

    def note(self, attempt: Attempt) -> None:
        """Take in one attempt, and make a point where one is due."""
        self.total += float(attempt.loss)
        self.count += 1
        if attempt.step % self.every == 0:
            values = {"step": attempt.step, "loss": self.total / self.count, "lr": attempt.lr}
            for name, value in {**values, "seconds": self.seconds}.items():
                self.points[name].append(value)
            self.total, self.count = 0.0, 0
            self.alive()


class Work:
    """A job under way. `messages` does it; the last message holds "over"."""

    def __init__(self, bench: Bench, job: Mapping[str, Any], alive: Callable[[], None]) -> None:
        self.bench, self.job, self.alive = bench, job, alive
        self.folder = bench.trials / job["folder"]
        self.legs: list[Message] = list(job["legs"])
        self.seconds = 0.0

    def messages(self) -> Iterator[Message]:
        """Train and judge. Raises UserCodeError or BadInput where the trial fails, Refused where the disk
        does.
        """
        try:
            self.state = self._resumed() if self.job["start"] else self._fresh()
        except Damaged as error:
            yield {"kind": "damaged", "checkpoint": self.job["start"]["checkpoint"], "reason": str(error)}
            self.legs, self.seconds, self.state = list(self.job["legs"]), 0.0, self._fresh()
        outcome = "ok"
        try:
            for leg in self.legs:
                yield from self._train(leg)
        except Diverged:
            yield self._segment(leg, None)
            outcome = "diverged"
        yield self._verdict(outcome)

    def _fresh(self) -> Training:
        return Training(self.bench.task, Recipe.parse(self.job["recipe"]), self.job["seed"])

    def _resumed(self) -> Training:
        start = self.job["start"]
        if start["run"] == "branch":
            self.legs = self.legs[1:]
        self.seconds = start["seconds"]
        return Training.load(self.folder / start["checkpoint"], self.bench.task, sha=start["sha"])

    def _train(self, leg: Message) -> Iterator[Message]:
        """Train one leg in pieces; behind each but the last of the job lies a checkpoint."""
        state, interval = self.state, self.job["interval"]
        if leg["lr"] is not None:
            state.optimizer.follow("lr", Schedule.from_data(leg["lr"]))
        while state.step < leg["end"]:
            goal = min(leg["end"], (state.step // interval + 1) * interval)
            self.begun, self.curve = state.step, Curve(self.job["every"], self.seconds, self.alive)
            try:
                state.advance(goal, self.curve.note)
            finally:
                self.seconds = self.curve.seconds
            over = goal == leg["end"] and leg is self.legs[-1]
            yield self._segment(leg, None if over else f"{leg['run']}-{goal:09d}")

    def _segment(self, leg: Message, checkpoint: str | None) -> Message:
        sha = self._save(self.folder / checkpoint) if checkpoint else None
        valid = {"step": self.state.step, **self.state.evaluate("valid").data()} if checkpoint else None
        return {
            "kind": "segment",
            "run": leg["run"],
            "start": self.begun,
            "end": self.state.step,
            "curve": self.curve.points,
            "seconds": self.seconds,
            "valid": valid and {**valid, "seconds": self.seconds},
            "checkpoint": checkpoint,
            "sha": sha,
        }

    def _save(self, folder: Path) -> str:
        """Save a checkpoint. One of that name that is there was never acknowledged: it makes room."""
        try:
            with disk(f"write the folder {folder.parent}"):
                folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove(folder)
            return self.state.save(folder)
        except BadInput as error:
            raise Refused(str(error)) from error

    def _verdict(self, outcome: str) -> Message:
        final = self.job["rung"] is None
        numbers: Message = {"loss": float("nan"), "metric": float("nan")}
        if outcome == "ok":
            numbers = self.state.evaluate("valid").data()
            if final and self.bench.task.test is not None:
                numbers |= {
                    f"test_{name}": value for name, value in self.state.evaluate("test").data().items()
                }
        return {
            "kind": "final" if final else "judged",
            "step": self.state.step,
            "seconds": self.seconds,
            "outcome": outcome,
            **({"seed": self.job["seed"], "test_loss": None, "test_metric": None} if final else {}),
            **numbers,
            "over": True,
        }


def rehearse(bench: Bench, job: Mapping[str, Any], alive: Callable[[], None]) -> Message:
    """Try a few updates and the validation part, without a trace; if `timed`, measure an update's seconds."""
    state = Training(bench.task, Recipe.parse(job["recipe"]), job["seed"])
    state.advance(min(WARMING, state.steps))
    state.evaluate("valid")
    if not job["timed"]:
        return {"kind": "rehearsed", "over": True}
    began, first = time.perf_counter(), state.step

    def enough(_: Attempt) -> bool:
        alive()
        return time.perf_counter() - began > TIMED

    state.advance(first + 10_000, enough)
    return {"kind": "rehearsed", "pace": (time.perf_counter() - began) / (state.step - first), "over": True}
