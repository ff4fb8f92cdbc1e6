"""The loop of a run: advance, journal, validate, save, stop when asked. It decides nothing about numbers."""

import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from downslope.errors import UserCodeError
from downslope.journal import Event
from downslope.parallel import alive
from downslope.train.plan import Plan
from downslope.train.player import Diverged
from downslope.train.progress import Show
from downslope.train.shared import check_one_state
from downslope.train.signals import Signals
from downslope.train.store import Store
from downslope.train.training import Attempt, Evaluation, Training

MINUTE = 60.0
"""Seconds between checkpoints where the plan says nothing else."""

_WRITTEN_AT_ONCE = 100
_NAMES = 20  # of parameters, in one skip event


class Loop:
    """One training, from where `state` stands to its end. `past` are the events that count so far.

    All ranks of a training run it. What depends on a clock or a signal is agreed on: the clock is that of the
    first rank, and a signal to any is one to all.
    """

    def __init__(self, state: Training, plan: Plan, store: Store, past: Sequence[Event], show: Show) -> None:
        self.state, self.plan, self.store, self.show = state, plan, store, show
        self.journal = store.journal
        self.valid = next(
            (Evaluation(e["loss"], e["metric"]) for e in reversed(past) if e["kind"] == "valid"), None
        )
        self.seconds = next((e["seconds"] for e in reversed(past) if e["kind"] == "step"), 0.0)
        self._saved_at = state.step
        self._saved = self._mark = self._written = time.monotonic()
        self._attempts: list[tuple[Attempt, float]] = []
        self._signals = Signals()
        self._signal, self._overdue = 0, False

    def run(self) -> Evaluation:
        """Train to the end and return the last validation. Each piece of work is saved before it is left."""
        state, plan = self.state, self.plan
        with self._signals:
            while not state.done:
                self._advance(min(self._next(plan.valid_every), self._next(plan.save_every), plan.steps))
                if state.step == self._next(plan.valid_every, 0) or state.done:
                    self._validate()
                self._agree()
                if self._save_due():
                    self._save()
                if self._signal:
                    self._signals.caught = signal.Signals(self._signal)
                    self.show.say(f"{self._signals.caught.name}: saved at step {state.step}.")
                    self.store.settle(wait=True)
                    self._signals.leave()
            self.store.settle(wait=True)
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
        self.store.settle()
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now
        self._attempts.append((attempt, self.seconds))
        if len(self._attempts) >= _WRITTEN_AT_ONCE or now > self._written + 1:
            self._write()
        self._agree()
        return self._signal > 0 or self._overdue

    def _agree(self) -> None:
        """Whether all are to stop, and whether all are to save."""
        alive()
        late = self.plan.save_every is None and time.monotonic() > self._saved + MINUTE
        ranks = self.state.ranks
        self._signal, overdue = ranks.most(self._signals.caught or 0, late and ranks.leads)
        self._overdue = bool(overdue)

    def _write(self) -> None:
        """The attempts so far go into the journal; their losses are fetched together, in one wait."""
        attempts, self._attempts = self._attempts, []
        self._written = time.monotonic()
        if not attempts:
            return
        losses = torch.stack([attempt.loss for attempt, _ in attempts]).tolist()
        told = _players(attempts)
        events: list[tuple[str, dict[str, Any]]] = []
        for (attempt, seconds), loss, moves in zip(attempts, losses, told, strict=True):
            fields: dict[str, Any] = {"step": attempt.step, "loss": loss}
            if attempt.batches > 1:
                fields["batches"] = attempt.batches
            if attempt.skipped:
                fields |= {"culprit": attempt.culprit} if attempt.culprit else {}
                fields |= {"scale": attempt.scale} if attempt.scale else {}
                named = list(attempt.skipped[:_NAMES])
                events.append(("skip", {**fields, "names": named, "count": len(attempt.skipped)}))
            if attempt.applied or not (attempt.skipped or attempt.told):
                players = {"players": moves} if moves else {}
                events.append(("step", {**fields, "lr": attempt.lr, **players, "seconds": seconds}))
            events += [("strategy", dict(note)) for note in attempt.told]
        self.journal.extend(events, sync=False)
        latest = {name: move["loss"] for moves in told for name, move in moves.items()}
        self.show.update(self.state.step, losses[-1], latest)

    def _validate(self) -> None:
        self.valid = self.state.evaluate("valid")
        fields = {"step": self.state.step, **self.valid.data(), "seconds": self.seconds}
        self.journal.append("valid", sync=False, **fields)
        self.show.valid(self.state.step, self.valid)

    def _save_due(self) -> bool:
        step = self.state.step
        due = self.state.done or self._overdue or self._signal > 0
        return step > self._saved_at and (due or step == self._next(self.plan.save_every, 0))

    def _save(self) -> None:
        state = self.state
        check_one_state(state.model, (side.optimizer for side in state.sides), state.ranks)
        self.store.save(state)
        self._saved_at, self._saved, self._overdue = self.state.step, time.monotonic(), False


def _players(attempts: Sequence[tuple[Attempt, float]]) -> list[dict[str, dict[str, Any]]]:
    """For each attempt, loss and rate by name of the players that were updated, where there are several."""
    named = [
        {name: move for name, move in attempt.moves.items() if name and move.applied}
        for attempt, _ in attempts
    ]
    every = [move.loss for moves in named for move in moves.values()]
    losses = iter(torch.stack(every).tolist() if every else [])
    return [{name: {"loss": next(losses), "lr": move.lr} for name, move in moves.items()} for moves in named]
