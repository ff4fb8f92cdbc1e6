"""A race's page: nothing is decided here, the statistics are those of standings.json."""

from __future__ import annotations

import math
from collections.abc import Sequence

from downslope.report import words
from downslope.report.axis import Axis, spanning
from downslope.report.events import Candidate, Judged, Measured
from downslope.report.log import Log
from downslope.report.plot import Panel, Quantity, Series, Track, panels, path
from downslope.report.text import number, plural, redact
from downslope.report.view import (
    Curves,
    Facet,
    Gate,
    Lanes,
    Legend,
    Page,
    Point,
    Rates,
    Recipe,
    Row,
    Standings,
    Trial,
)

MOST_LINES = 240  # beyond, nobody could tell them apart, and the page grows too large
MOST_LANES = 300


def race_page(log: Log, command: str) -> Page:
    """Everything a race's page says."""
    series = _series(log)
    return Page(
        kind="race",
        task=log.plan.task_name,
        headline=words.headline(log),
        metric=log.metric,
        facts=words.facts(log),
        command=command,
        summary=words.summary(log),
        highlights=words.highlights(log),
        notes=words.notes(log),
        series=series,
        standings=_standings(log),
        curves=_curves(log, panels(series, quantities(log))),
        rates=_rates(log),
        lanes=_lanes(log),
        recipe=_recipe(log),
    )


def quantities(log: Log) -> list[Quantity]:
    """What the curves may show."""
    name, percent = log.plan.metric, log.metric.percent
    return [
        Quantity("train", "Training loss", "Training loss", "Training loss"),
        Quantity("valid", "Validation loss", "Validation loss", "Validation loss"),
        Quantity(
            "metric",
            name.capitalize(),
            f"Validation {name}",
            f"Validation error (100 % − {name})" if percent else f"Validation {name}",
            percent=percent,
            flip=percent,
        ),
    ]


def _standings(log: Log) -> Standings | None:
    if not log.rows:
        return None
    rows = [
        Row(
            rank=row.rank,
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


def _series(log: Log) -> list[Series]:
    """Background lines first: strong lines are drawn over them. In a large race the worst stay out."""
    seen: set[str] = set()
    series: list[Series] = []
    for trial in log.order:
        strong = log.candidates[trial].rule not in seen
        seen.add(log.candidates[trial].rule)
        if strong or len(series) < MOST_LINES:
            series += _of_trial(log, trial, strong=strong)
    return sorted(series, key=lambda s: not s.faint)


def _of_trial(log: Log, trial: int, *, strong: bool) -> list[Series]:
    """The trial's trunk with its judgements, and its finals; a final, if there is one, is the strong line."""
    hue, name = log.hue(trial), log.name(trial)
    repeats = sorted(
        {repeat for t, run, repeat in log.segments if t == trial and run == "final" and repeat is not None}
    )
    judged = log.judged.get(trial, [])
    found = [Series(name, hue, _tracks(log, trial, judged, "trunk"), faint=not strong or bool(repeats))]
    for repeat in repeats:
        valid: list[Measured] = [s.valid for s in log.segments[trial, "final", repeat] if s.valid]
        valid += [f for f in log.finals.get(trial, []) if f.repeat == repeat]
        tracks = _tracks(log, trial, valid, "final", repeat)
        found.append(
            Series(f"{name}, final on seed {repeat + 1}", hue, tracks, faint=not strong or repeat > 0)
        )
    return [s for s in found if s.tracks]


def _tracks(
    log: Log, trial: int, valid: Sequence[Measured], run: str, repeat: int | None = None
) -> dict[str, Track]:
    tracks = {}
    steps, seconds, losses = log.curve(trial, run, repeat)
    if steps:
        tracks["train"] = Track(tuple(steps), tuple(seconds), tuple(losses)).thinned()
    ordered = sorted({v.step: v for v in valid}.items())
    if ordered:
        at = tuple(float(step) for step, _ in ordered)
        clock = tuple(v.seconds for _, v in ordered)
        tracks["valid"] = Track(at, clock, tuple(v.loss for _, v in ordered)).thinned()
        tracks["metric"] = Track(at, clock, tuple(v.metric for _, v in ordered)).thinned()
    return tracks


def _curves(log: Log, drawn: list[Panel]) -> Curves | None:
    if not drawn:
        return None
    lead = (
        "The best candidate of every rule is drawn strongly: its full training where it reached the final, "
        "else as far as it went. Validation is read at the end of a cooldown, where the rate has come down."
    )
    legend = [Legend(rule, hue) for rule, hue in log.hues.items()]
    return Curves(lead, drawn, legend, "every other training")


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
    values = sorted(
        (j.metric for _, j in points.values() if math.isfinite(j.metric)), reverse=log.metric.higher_is_better
    )
    y = spanning(values[: max(2, math.ceil(0.8 * len(values)))], percent=log.metric.percent, margin=0.08)
    facets = [
        facet
        for rule in log.hues
        if (facet := _facet(log, rule, [p for p in points.values() if p[0].rule == rule], x, y))
    ]
    rung = log.plan.rungs[0] if log.plan.rungs else None
    place = f" after {number(100 * rung.fraction)} % of a full training" if rung else ""
    lead = (
        f"Validation {log.plan.metric} of every candidate{place}, the gate that all of them reached. A flat "
        "top forgives a careless learning rate; a narrow peak does not. Points on the edge lie beyond it."
    )
    return Rates(lead, x, y, facets)


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
        shown = min(max(value, y.low), y.high) if math.isfinite(value) else floor
        words_ = f"{best[lr][0].names[0]}\nlearning rate {number(lr)}: "
        tip = words_ + (log.metric.write(value) if best[lr][1].outcome == "ok" else best[lr][1].outcome)
        points.append(Point(x.place(lr), 1 - y.place(shown), tip, best=lr == top))
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
        if rung.fraction <= 1
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
    if judged and judged[-1].rung in log.kept and trial not in log.kept[judged[-1].rung]:
        return "cut", "stopped"
    return "running", "running" if log.sealed is None else "stopped"


def _recipe(log: Log) -> Recipe | None:
    winner = log.standings.winner
    if winner is None:
        return None
    candidate = log.candidates.get(winner.trial)
    steps = candidate.steps if candidate else 1000
    return Recipe("The winning recipe", "winner.toml", winner.recipe, steps)
