"""How much the learning rate matters to each rule: what the first gate judged, against the peak rate."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from downslope.report.axis import Axis, spanning
from downslope.report.events import Candidate, Judged
from downslope.report.log import Log
from downslope.report.plot import path
from downslope.report.text import number
from downslope.report.view import Facet, Point, Rates

FAR = 50  # times the median: a loss beyond would press the others flat


class Attempt(NamedTuple):
    """One candidate of the grid and its first judgement."""

    candidate: Candidate
    judged: Judged

    @property
    def loss(self) -> float:
        """What it was judged by; infinite where it diverged."""
        return self.judged.loss if math.isfinite(self.judged.loss) else math.inf


def rates(log: Log) -> Rates | None:
    """One facet a rule, all on the same axes; None before the first judgement."""
    attempts = [
        Attempt(candidate, log.judged[trial][0])
        for trial, candidate in log.candidates.items()
        if candidate.origin == "grid" and candidate.lr and candidate.lr > 0 and log.judged.get(trial)
    ]
    if not attempts:
        return None
    x = spanning((attempt.candidate.lr or 0.0 for attempt in attempts), log=True, margin=0.06)
    losses = [attempt.loss for attempt in attempts]
    shown = [loss for loss in losses if loss <= FAR * abs(median(losses))]
    y = spanning(shown, log=min(losses) > 0, margin=0.06)
    rung = log.plan.rungs[0] if log.plan.rungs else None
    place = f" after {number(100 * rung.fraction)} % of a full training" if rung else ""
    lead = (
        f"Validation loss of every candidate{place}, at the gate that all of them reached; lower is better. "
        "A wide valley forgives a careless learning rate, a narrow one does not."
    )
    if any(attempt.loss > y.high for attempt in attempts):
        lead += " Points on the upper edge lie beyond it, or diverged."
    facets = [_facet(log, rule, [a for a in attempts if a.candidate.rule == rule], x, y) for rule in log.hues]
    return Rates(lead, x, y, [facet for facet in facets if facet])


def _facet(log: Log, rule: str, attempts: list[Attempt], x: Axis, y: Axis) -> Facet | None:
    best: dict[float, Attempt] = {}  # of several variants at one rate, the best
    for attempt in attempts:
        lr = attempt.candidate.lr or 0.0
        if lr not in best or attempt.loss < best[lr].loss:
            best[lr] = attempt
    if not best:
        return None
    lrs = sorted(best)
    top = min(lrs, key=lambda lr: best[lr].loss)
    points = [
        Point(x.place(lr), 1 - min(1.0, y.place(best[lr].loss)), _tip(log, best[lr]), best=lr == top)
        for lr in lrs
    ]
    return Facet(rule, log.hues[rule], number(top), path(lrs, [best[lr].loss for lr in lrs], x, y), points)


def _tip(log: Log, attempt: Attempt) -> str:
    judged = attempt.judged
    value = f"loss {number(judged.loss)}, {log.plan.metric} {log.metric.write(judged.metric)}"
    told = value if judged.outcome == "ok" else judged.outcome
    return f"{attempt.candidate.names[0]}\nlearning rate {number(attempt.candidate.lr)}: {told}"
