"""A race's journal, sorted by what its events are about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from downslope.errors import BadInput
from downslope.report import events as ev
from downslope.report.view import Metric

Runs = dict[tuple[int, str, int | None], list[ev.Segment]]


@dataclass
class Log:
    """All that a page needs to know of a race; any prefix of a journal gives one."""

    plan: ev.Plan
    segments: Runs = field(default_factory=lambda: defaultdict(list))  # by (trial, run, repeat)
    judged: dict[int, list[ev.Judged]] = field(default_factory=lambda: defaultdict(list))
    finals: dict[int, list[ev.Final]] = field(default_factory=lambda: defaultdict(list))
    kept: dict[int, frozenset[int]] = field(default_factory=dict)  # by rung
    finalists: tuple[int, ...] = ()
    failed: dict[int, str] = field(default_factory=dict)
    sealed: str | None = None  # SHA-256 of standings.json once the race is over
    wall: float | None = None  # seconds that it took
    standings: ev.Standings = field(default_factory=ev.Standings)

    @cached_property
    def candidates(self) -> dict[int, ev.Candidate]:
        """The trials by number."""
        return {candidate.trial: candidate for candidate in self.plan.trials}

    @cached_property
    def hues(self) -> dict[str, int]:
        """A colour for every rule, the same in the whole page."""
        return {rule: i for i, rule in enumerate(dict.fromkeys(c.rule for c in self.plan.trials))}

    @cached_property
    def metric(self) -> Metric:
        """The task's metric; one that is called accuracy and lies in 0 … 1 is written in percent."""
        values = [m.metric for group in (self.judged, self.finals) for ms in group.values() for m in ms]
        percent = "accuracy" in self.plan.metric.lower() and not any(v < 0 or v > 1 for v in values)
        return Metric(self.plan.metric, self.plan.higher_is_better, percent)

    @cached_property
    def rows(self) -> list[ev.StandingsRow]:
        """The standings' rows of the finalists, best first."""
        return [row for row in self.standings.rows if row.stage == "final"]

    @cached_property
    def order(self) -> list[int]:
        """All trials, best first: as the standings have them, else who went furthest, then who did best."""
        known = list(dict.fromkeys(row.trial for row in self.standings.rows if row.trial in self.candidates))

        def rank(trial: int) -> tuple[float, ...]:
            last = self.judged[trial][-1] if self.judged.get(trial) else None
            if last is None or last.loss != last.loss:
                return (trial in self.failed, -(last.rung if last else -1), float("inf"))
            return (trial in self.failed, -last.rung, last.loss)

        rest = sorted((t for t in self.candidates if t not in known), key=rank)
        return known + rest

    def name(self, trial: int) -> str:
        """What people call the trial."""
        return self.candidates[trial].names[0]

    def hue(self, trial: int) -> int:
        """The colour of the trial's rule."""
        return self.hues[self.candidates[trial].rule]

    def curve(
        self, trial: int, run: str, repeat: int | None = None
    ) -> tuple[list[float], list[float], list[float]]:
        """Steps, seconds and training loss of one run, its segments in order, a repeated piece once."""
        points: dict[float, tuple[float, float]] = {}
        for segment in sorted(self.segments.get((trial, run, repeat), []), key=lambda s: s.end):
            points.update(
                (step, (seconds, loss))
                for step, seconds, loss in zip(
                    segment.curve.step, segment.curve.seconds, segment.curve.loss, strict=False
                )
            )
        steps = sorted(points)
        return steps, [points[s][0] for s in steps], [points[s][1] for s in steps]


def read_log(events: Iterable[Mapping[str, Any]], name: str) -> Log:
    """Sort a journal's events; raises BadInput where one is wrong or names a trial that was never planned."""
    records = ev.typed(events, ev.RACE, name)
    plan = next((record for record in records if isinstance(record, ev.Plan)), None)
    if plan is None:
        raise BadInput(f"{name}: holds no event 'race': the race has not begun.")
    log = Log(plan)
    for record in records:
        trials = getattr(record, "trials", None) or (getattr(record, "trial", None),)
        strangers = [t for t in trials if isinstance(t, int) and t not in log.candidates]
        if strangers:
            raise BadInput(f"{name}: an event is about trial {strangers[0]}, which is not in the plan.")
        _sort_in(log, record)
    return log


def latest(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds from the journal's beginning to its last event."""
    time = events[-1].get("time") if events else None
    return float(time) if isinstance(time, float) else None


def _sort_in(log: Log, record: ev.Record) -> None:
    match record:
        case ev.Segment():
            log.segments[record.trial, record.run, record.repeat].append(record)
        case ev.Judged():
            log.judged[record.trial].append(record)
        case ev.Final():
            log.finals[record.trial].append(record)
        case ev.Cut():
            log.kept[record.rung] = frozenset(record.kept)
        case ev.Finalists():
            log.finalists = record.trials
        case ev.Failed():
            log.failed[record.trial] = record.reason
        case ev.End():
            log.sealed = record.standings
