"""The loop of a run: advance, journal, validate, save, stop when asked. It decides nothing about numbers."""

import re
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch

from downslope.errors import UserCodeError
from downslope.folder import check_name, disk
from downslope.journal import Event, Journal
from downslope.recipe import Recipe
from downslope.tasks import Task
from downslope.train import checkpoint
from downslope.train.plan import Plan
from downslope.train.player import Diverged
from downslope.train.progress import Show
from downslope.train.signals import Signals
from downslope.train.training import Attempt, Evaluation, Training

KEEP = 2
"""Checkpoints that are kept; an older one goes after a newer one has been read back and verified."""

MINUTE = 60.0
"""Seconds between checkpoints where the plan says nothing else."""

_WRITTEN_AT_ONCE = 100
_NAMES = 20  # of parameters, in one skip event
_CHECKPOINT = re.compile(r"step-\d{9,}")


class Loop:
    """One training, from where `state` stands to its end. `past` are the events that count so far."""

    def __init__(
        self, state: Training, plan: Plan, journal: Journal, past: Sequence[Event], show: Show
    ) -> None:
        self.state, self.plan, self.journal, self.show = state, plan, journal, show
        self.folder = journal.path.parent / "ckpt"
        self.valid = next(
            (Evaluation(e["loss"], e["metric"]) for e in reversed(past) if e["kind"] == "valid"), None
        )
        self.seconds = next((e["seconds"] for e in reversed(past) if e["kind"] == "step"), 0.0)
        self._saved_at = state.step
        self._saved = self._mark = self._written = time.monotonic()
        self._attempts: list[tuple[Attempt, float]] = []
        self._signals = Signals()

    def run(self) -> Evaluation:
        """Train to the end and return the last validation. Each piece of work is saved before it is left."""
        state, plan = self.state, self.plan
        with self._signals:
            while not state.done:
                self._advance(min(self._next(plan.valid_every), self._next(plan.save_every), plan.steps))
                if state.step == self._next(plan.valid_every, 0) or state.done:
                    self._validate()
                if self._save_due():
                    self._save()
                if self._signals.caught:
                    self.show.say(f"{self._signals.caught.name}: saved at step {state.step}.")
                    self._signals.leave()
        assert self.valid is not None, "the last update is followed by a validation, and that by a checkpoint"
        return self.valid

    def _next(self, every: int | None, ahead: int = 1) -> int:
        """The next multiple of `every`; with ahead=0, the last one."""
        return (self.state.step // every + ahead) * every if every else self.plan.steps

    def _advance(self, until: int) -> None:
        self._mark = time.monotonic()
        try:
            self.state.advance(until, self._told)
        except (Diverged, UserCodeError) as error:
            self._write()
            self.journal.append("failed", step=self.state.step, reason=str(error))
            raise
        self._write()

    def _told(self, attempt: Attempt) -> bool:
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now
        self._attempts.append((attempt, self.seconds))
        if len(self._attempts) >= _WRITTEN_AT_ONCE or now > self._written + 1:
            self._write()
        return self._signals.caught is not None or self._overdue()

    def _overdue(self) -> bool:
        return self.plan.save_every is None and time.monotonic() > self._saved + MINUTE

    def _write(self) -> None:
        """The attempts so far go into the journal; their losses are fetched together, in one wait."""
        attempts, self._attempts = self._attempts, []
        self._written = time.monotonic()
        if not attempts:
            return
        losses = torch.stack([attempt.loss for attempt, _ in attempts]).tolist()
        told = _players(attempts)
        for (attempt, seconds), loss, moves in zip(attempts, losses, told, strict=True):
            fields: dict[str, Any] = {"step": attempt.step, "loss": loss}
            if attempt.batches > 1:
                fields["batches"] = attempt.batches
            if attempt.skipped:
                named = list(attempt.skipped[:_NAMES])
                self.journal.append("skip", sync=False, **fields, names=named, count=len(attempt.skipped))
            if attempt.applied or not attempt.skipped:
                players = {"players": moves} if moves else {}
                self.journal.append("step", sync=False, **fields, lr=attempt.lr, **players, seconds=seconds)
        latest = {name: move["loss"] for moves in told for name, move in moves.items()}
        self.show.update(self.state.step, losses[-1], latest)

    def _validate(self) -> None:
        self.valid = self.state.evaluate("valid")
        fields = {"step": self.state.step, **self.valid.data(), "seconds": self.seconds}
        self.journal.append("valid", sync=False, **fields)
        self.show.valid(self.state.step, self.valid)

    def _save_due(self) -> bool:
        step = self.state.step
        due = self.state.done or self._overdue() or self._signals.caught is not None
        return step > self._saved_at and (due or step == self._next(self.plan.save_every, 0))

    def _save(self) -> None:
        """A checkpoint is acknowledged by its event; only then, and verified, may an older one go."""
        name = f"step-{self.state.step:09d}"
        self.journal.check()
        sha = self.state.save(self.folder / name)
        self.journal.append("checkpoint", step=self.state.step, name=name, sha=sha)
        self._saved_at, self._saved = self.state.step, time.monotonic()
        checkpoint.verify(self.folder / name, sha)
        kept = sorted(path for path in self.folder.iterdir() if _CHECKPOINT.fullmatch(path.name))
        for path in kept[:-KEEP]:
            checkpoint.remove(path)


def _players(attempts: Sequence[tuple[Attempt, float]]) -> list[dict[str, dict[str, Any]]]:
    """For each attempt, loss and rate by name of the players that were updated, where there are several."""
    named = [
        {name: move for name, move in attempt.moves.items() if name and move.applied}
        for attempt, _ in attempts
    ]
    every = [move.loss for moves in named for move in moves.values()]
    losses = iter(torch.stack(every).tolist() if every else [])
    return [{name: {"loss": next(losses), "lr": move.lr} for name, move in moves.items()} for moves in named]


def restore(
    plan: Plan,
    task: Task,
    recipe: Recipe,
    folder: Path,
    past: Sequence[Event],
    fresh: Training | None = None,
) -> tuple[Training, int, list[str]]:
    """The newest state on which files, manifest and journal agree; the "seq" it stands at; what was damaged.

    Without one, the run begins again from its seed, with the state `fresh` if there is one. Whatever else
    lies among the checkpoints goes, but for the damaged: they are set aside.
    """
    saved = [event for event in past if event["kind"] == "checkpoint"]
    damaged: dict[str, str] = {}
    state, after = None, past[0]["seq"] if past else 0
    for event in reversed(saved):
        path = folder / check_name(event["name"])
        if not path.exists() and event not in saved[-KEEP:]:
            continue  # it has long been replaced by newer ones
        try:
            state, after = Training.load(path, task, recipe, event["sha"]), event["seq"]
            break
        except checkpoint.Damaged as error:
            damaged[event["name"]] = str(error)
    kept = [event["name"] for event in saved if event["seq"] <= after][-KEEP:]
    _tidy(folder, set(kept), damaged.keys())
    state = state or fresh or Training(task, recipe, plan.seed, plan.threads)
    return state, after, list(damaged.values())


def _tidy(folder: Path, good: Set[str], damaged: Set[str]) -> None:
    """Nothing is left where a checkpoint will be written."""
    for path in folder.iterdir():
        if path.name in damaged:
            aside = path.with_name(f"{path.name}.damaged")
            checkpoint.remove(aside)
            with disk(f"rename {path}"):
                path.rename(aside)
        elif path.name not in good and not path.name.endswith(".damaged"):
            checkpoint.remove(path)
