"""The journal of a race, folded: what has been planned, judged, lost. Nothing is decided here, and order of
arrival is forgotten.

Only what the journal says has happened has happened; a restart folds the same events and knows the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from downslope.race.budget import Length, Rung

Event = Mapping[str, Any]


class Job(NamedTuple):
    """A piece of work with a verdict: a trial judged at a rung, or one repeat of a finalist."""

    rung: int | None
    repeat: int | None
    trial: int

    @staticmethod
    def of(event: Event) -> Job:
        """The job that an event is about."""
        return Job(event.get("rung"), event.get("repeat"), event["trial"])

    def data(self) -> dict[str, int | None]:
        """The job as the fields of an event."""
        return {"trial": self.trial, "rung": self.rung, "repeat": self.repeat}


@dataclass(frozen=True)
class Trial:
    """One distinct recipe of a race, under all the names it was entered with.

    `lr` is its peak; `trunk` the schedule (as data) of its rate while it is not cooling down, which takes
    `cooldown` of `steps` updates, to `end`.
    """

    trial: int
    names: tuple[str, ...]
    rule: str
    lr: float
    family: str
    origin: str
    steps: int
    warmup: int
    cooldown: int
    end: float
    trunk: Mapping[str, Any]
    recipe: str
    hash: str

    @property
    def length(self) -> Length:
        """Its lengths in applied updates."""
        return Length(self.steps, self.warmup, self.cooldown)

    @staticmethod
    def of(data: Event) -> Trial:
        """The trial that the `race` event describes."""
        return Trial(**{**data, "names": tuple(data["names"])})


@dataclass(frozen=True)
class Verdict:
    """What came of a job: "ok" with a finite metric and loss, "diverged", or "failed" with a reason."""

    outcome: str
    metric: float = math.nan
    loss: float = math.nan
    test_metric: float = math.nan
    test_loss: float = math.nan
    reason: str | None = None

    @staticmethod
    def of(event: Event) -> Verdict:
        """The verdict of a `judged`, `final` or `failed` event; numbers that are not finite are a
        divergence.
        """
        if event["kind"] == "failed":
            return Verdict("failed", reason=event["reason"])
        names = ("metric", "loss", "test_metric", "test_loss")
        numbers = {name: math.nan if event.get(name) is None else float(event[name]) for name in names}
        sound = (
            event["outcome"] == "ok" and math.isfinite(numbers["metric"]) and math.isfinite(numbers["loss"])
        )
        return Verdict(
            "ok" if sound else "diverged", **numbers, reason=None if sound else "the loss is not finite"
        )

    def judged(self, higher_is_better: bool) -> tuple[int, float, float]:
        """The order of a rung, smaller is better: sound before diverged before failed, then the loss, then
        the metric.

        In the search one seed must tell dozens of recipes apart. On a small validation part the metric
        cannot: it moves in steps of one sample, and its noise is that of a few samples near the border. The
        loss weighs every sample. `benchmarks/judge.py` measures which of the two foretells the metric of
        other seeds better.
        """
        if self.outcome != "ok":
            return (1 if self.outcome == "diverged" else 2, 0.0, 0.0)
        return (0, self.loss, -self.metric if higher_is_better else self.metric)

    def key(self, higher_is_better: bool) -> tuple[int, float, float]:
        """The order of the finals: sound before diverged before failed, then the metric, then the loss.

        The metric is what the task asks for, and with several seeds there is enough of it.
        """
        rank, loss, metric = self.judged(higher_is_better)
        return (rank, metric, loss)


@dataclass
class Record:
    """Everything a decider may know; `take` folds one event in.

    `newest`: the last durable piece of each run, by trial, repeat and run. `deaths`: workers lost on a job
    since its last durable piece. `announced`: cuts and finalists that the journal already tells its
    readers.
    """

    plan: Event | None = None
    pace: Event | None = None
    trials: tuple[Trial, ...] = ()
    rungs: tuple[Rung, ...] = ()
    verdicts: dict[Job, Verdict] = field(default_factory=dict)
    newest: dict[tuple[int, int | None, str], Event] = field(default_factory=dict)
    deaths: dict[Job, int] = field(default_factory=dict)
    announced: set[int | str] = field(default_factory=set)
    ended: bool = False

    @staticmethod
    def of(events: Iterable[Event]) -> Record:
        """The record of a whole journal, or of any beginning of one."""
        record = Record()
        for event in events:
            record.take(event)
        return record

    def take(self, event: Event) -> None:
        """Fold one event in. A second verdict on one job changes nothing: the first was acknowledged."""
        kind = event["kind"]
        if kind in ("judged", "final", "failed"):
            self.verdicts.setdefault(Job.of(event), Verdict.of(event))
        elif kind == "segment":
            self.deaths.pop(Job.of(event), None)
            if event["checkpoint"] is not None:
                self.newest[event["trial"], event["repeat"], event["run"]] = event
        elif kind == "damaged":
            for run in ("trunk", "branch", "final"):
                self.newest.pop((event["trial"], event["repeat"], run), None)
        elif kind == "lost":
            self.deaths[Job.of(event)] = self.deaths.get(Job.of(event), 0) + 1
        elif kind == "race":
            self.plan = event
            self.trials = tuple(Trial.of(trial) for trial in event["trials"])
            self.rungs = tuple(Rung(Fraction(rung["fraction"]), rung["runners"]) for rung in event["rungs"])
        elif kind == "pace":
            self.pace = event
        elif kind in ("cut", "finalists"):
            self.announced.add(event.get("rung", kind))
        elif kind == "end":
            self.ended = True
