"""A race's page: nothing is decided here, the statistics are those of standings.json."""

from __future__ import annotations

import math

from downslope.report import words
from downslope.report.axis import Axis, spanning
from downslope.report.curves import curves, trainings
from downslope.report.events import Candidate, Judged
from downslope.report.log import Log
from downslope.report.plot import path
from downslope.report.text import number, plural, redact
from downslope.report.view import (
    Facet,
    Gate,
    Lanes,
    Page,
    Point,
    Rates,
    Recipe,
    Row,
    Standings,
    Trial,
)

MOST_LANES = 300


def race_page(log: Log, command: str) -> Page:
    """Everything a race's page says."""
    series = trainings(log)
    return Page(
        kind="race",
        task=log.plan.task_name,
        headline=words.headline(log),
        names=[*(row.name for row in log.rows), log.plan.task_name],
        metric=log.metric,
        facts=words.facts(log),
        command=command,
        summary=words.summary(log),
        highlights=words.highlights(log),
        notes=words.notes(log),
        series=series,
        standings=_standings(log),
        curves=curves(log, series),
        rates=_rates(log),
        lanes=_lanes(log),
        recipe=_recipe(log),
    )


def _standings(log: Log) -> Standings | None:
    if not log.rows:
        return None
    ranks = [row.rank for row in log.rows]
    rows = [
        Row(
            rank=f"{row.rank}{'=' if ranks.count(row.rank) > 1 else ''}",
            name=row.name,
            hue=log.hue(row.trial) if row.trial in log.candidates else 0,
            mean=row.metric,
            test=row.test_metric,
            difference=row.difference,
            low=row.low,
            high=row.high,
            verdict=words.verdict(log, row),
            pairs=words.pairs(log, row, log.rows),
        )
        for row in log.rows
    ]
    ends = [v for row in rows for v in (row.difference, row.low, row.high, *row.pairs, 0.0) if v is not None]
    unit = " in points of percent" if log.metric.percent else ""
    lead = (
        f"Every finalist was trained on the same {plural(log.plan.seeds, 'fresh seed')}. Small dots are its "
        f"differences to the winner on each seed{unit}; the large dot is their mean, the bar its "
        f"{100 * log.standings.level:g} % interval. Left of the dashed line is worse; a bar that crosses it "
        "is a tie."
    )
    return Standings(lead, rows, spanning(ends, margin=0.06))


def _rates(log: Log) -> Rates | None:
    """One facet a rule: the first rung, which all candidates ran, against the peak learning rate."""
    points = {
        trial: (candidate, judged[0])
        for trial, candidate in log.candidates.items()
        if candidate.origin == "grid"
        and candidate.lr
        and candidate.lr > 0
        and (judged := log.judged.get(trial))
    }
    if not points:
        return None
    x = spanning((c.lr for c, _ in points.values() if c.lr), log=True, margin=0.06)
    y = _rated_axis(log, [j.metric for _, j in points.values() if math.isfinite(j.metric)])
    facets = [
        facet
        for rule in log.hues
        if (facet := _facet(log, rule, [p for p in points.values() if p[0].rule == rule], x, y))
    ]
    rung = log.plan.rungs[0] if log.plan.rungs else None
    place = f" after {number(100 * rung.fraction)} % of a full training" if rung else ""
    lead = (
        f"Validation {log.plan.metric} of every candidate{place}, the gate that all of them reached. A flat "
        "top forgives a careless learning rate; a narrow peak does not."
    )
    return Rates(lead, x, y, facets)


def _rated_axis(log: Log, values: list[float]) -> Axis:
    """An accuracy on the logarithm of its error shows all; else the worst fifth may lie beyond the edge."""
    if log.metric.percent:
        return spanning(values, percent=True, flip=True, margin=0.06)
    best = sorted(values, reverse=log.metric.higher_is_better)[: max(2, math.ceil(0.8 * len(values)))]
    return spanning(best, margin=0.08)


def _facet(log: Log, rule: str, measured: list[tuple[Candidate, Judged]], x: Axis, y: Axis) -> Facet | None:
    best: dict[float, tuple[Candidate, Judged]] = {}
    for candidate, judged in measured:
        lr = candidate.lr or 0.0
        if lr not in best or log.metric.better(judged.metric, best[lr][1].metric):
            best[lr] = (candidate, judged)
    if not best:
        return None
    lrs = sorted(best)
    values = [best[lr][1].metric for lr in lrs]
    floor = y.low if log.metric.higher_is_better else y.high
    top = lrs[0]
    for lr in lrs:
        top = lr if log.metric.better(best[lr][1].metric, best[top][1].metric) else top
    points = []
    for lr, value in zip(lrs, values, strict=True):
        place = min(1.0, max(0.0, y.place(value if math.isfinite(value) else floor)))
        words_ = f"{best[lr][0].names[0]}\nlearning rate {number(lr)}: "
        tip = words_ + (log.metric.write(value) if best[lr][1].outcome == "ok" else best[lr][1].outcome)
        points.append(Point(x.place(lr), 1 - place, tip, best=lr == top))
    return Facet(rule, log.hues[rule], number(top), path(lrs, values, x, y), points)


def _lanes(log: Log) -> Lanes | None:
    if not log.plan.rungs:
        return None
    gates = [
        Gate(
            rung.fraction,
            f"{number(100 * rung.fraction)} %",
            f"{rung.runners or _arrived(log, rung.rung)} ran",
            minor=rung.fraction < 0.25,
        )
        for rung in log.plan.rungs
    ]
    if log.finalists and gates[-1].place < 1:
        gates.append(Gate(1.0, "100 %", f"{len(log.finalists)} in the final"))
    lead = (
        "At every gate a short cooldown is branched off and judged; the better part goes on from where "
        "it stood, the rest stops. Gates are parts of a full training, with how many ran up to there."
    )
    if len(log.order) > MOST_LANES:
        lead += f" The best {MOST_LANES} of {len(log.order)} are drawn."
    return Lanes(lead, gates, [_lane(log, trial) for trial in log.order[:MOST_LANES]])


def _arrived(log: Log, rung: int) -> int:
    return sum(any(j.rung == rung for j in judged) for judged in log.judged.values())


def _lane(log: Log, trial: int) -> Trial:
    candidate = log.candidates[trial]
    judged = log.judged.get(trial, [])
    final = log.finals.get(trial, [])
    fraction = {rung.rung: rung.fraction for rung in log.plan.rungs}
    stops = [min(1.0, fraction.get(j.rung, j.step / candidate.steps)) for j in judged]
    if final:
        stops.append(1.0)
    last = [*judged, *final]
    fate, outcome = _fate(log, trial)
    row = next((r for r in log.rows if r.trial == trial), None)
    return Trial(
        name=log.name(trial),
        hue=log.hue(trial),
        steps=max((m.step for m in last), default=0),
        end=max(stops, default=0.0),
        stops=tuple(dict.fromkeys(stops)),
        value=row.metric if row else judged[-1].metric if judged else None,
        fate=fate,
        outcome=outcome,
    )


def _fate(log: Log, trial: int) -> tuple[str, str]:
    winner = log.standings.winner
    judged = log.judged.get(trial, [])
    if trial in log.failed:
        return "failed", redact(log.failed[trial]) or "failed"
    if winner and trial == winner.trial:
        return "winner", "winner"
    if trial in log.finalists:
        row = next((r for r in log.rows if r.trial == trial), None)
        baseline = "baseline, " if trial == log.plan.baseline else ""
        return "finalist", baseline + ("tied" if row and row.tied else "final")
    if judged and judged[-1].outcome != "ok":
        return "failed", judged[-1].outcome
    if judged and (log.finalists or trial not in log.kept.get(judged[-1].rung, {trial})):
        fraction = next((rung.fraction for rung in log.plan.rungs if rung.rung == judged[-1].rung), None)
        return "cut", f"out at {number(100 * fraction)} %" if fraction else "out"
    return "running", "running"


def _recipe(log: Log) -> Recipe | None:
    winner = log.standings.winner
    if winner is None:
        return None
    candidate = log.candidates.get(winner.trial)
    steps = candidate.steps if candidate else 1000
    return Recipe("The winning recipe", "winner.toml", winner.recipe, steps)
