"""A race's page: nothing is decided here, the statistics are those of standings.json."""

from __future__ import annotations

from downslope.report import words
from downslope.report.axis import spanning
from downslope.report.curves import curves, trainings
from downslope.report.lanes import lanes
from downslope.report.log import Log
from downslope.report.rates import rates
from downslope.report.text import plural
from downslope.report.view import Page, Recipe, Row, Standings


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
        rates=rates(log),
        lanes=lanes(log),
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


def _recipe(log: Log) -> Recipe | None:
    winner = log.standings.winner
    if winner is None:
        return None
    candidate = log.candidates.get(winner.trial)
    steps = candidate.steps if candidate else 1000
    return Recipe("The winning recipe", "winner.toml", winner.recipe, steps)
