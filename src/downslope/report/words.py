"""What a race's page says in words: a headline that a newcomer understands, and the facts behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from downslope.report.events import StandingsRow
from downslope.report.log import Log
from downslope.report.text import duration, listing, number, plural, redact
from downslope.report.view import Fact


def headline(log: Log) -> str:
    """Who won, in one sentence; a tie is called a tie."""
    winner = log.standings.winner
    if winner is None:
        return f"The race on {log.plan.task_name} is not finished"
    tied = [row.name for row in log.rows if verdict(log, row) == "tied"]
    if not tied:
        return f"{winner.name} trains {log.plan.task_name} best"
    if len(tied) == 1:
        return f"{winner.name} leads on {log.plan.task_name}, but {tied[0]} may be as good"
    return f"{winner.name} leads on {log.plan.task_name}, tied with {plural(len(tied), 'other')}"


def summary(log: Log) -> list[str]:
    """By how much, and how surely."""
    winner = log.standings.winner
    first = next((row for row in log.rows if verdict(log, row) == "winner"), None)
    if winner is None or first is None:
        return _unfinished(log)
    reached = (
        f"Trained from the start on {plural(log.plan.seeds, 'fresh seed')}, it reached a validation "
        f"{log.plan.metric} of {log.metric.write(first.metric)} on average."
    )
    behind = [row for row in log.rows if verdict(log, row) == "behind" and row.difference is not None]
    tied = [row.name for row in log.rows if verdict(log, row) == "tied"]
    parts = [reached]
    if tied:
        parts.append(f"On this evidence it cannot be told apart from {listing(tied)}.")
    if behind:
        parts.append(_gap(log, behind[0]))
    baseline = next((row for row in behind[1:] if row.trial == log.plan.baseline), None)
    if baseline:
        parts.append(_gap(log, baseline, " (the baseline)"))
    return [" ".join(parts)]


def _gap(log: Log, row: StandingsRow, note: str = "") -> str:
    metric = log.metric
    by = metric.write_difference(abs(row.difference or 0.0), plus=False) + metric.unit
    text = f"It beats {row.name}{note} by {by}"
    if row.low is None or row.high is None:
        return text + "."
    low, high = sorted((-row.low, -row.high))
    between = " to ".join(metric.write_difference(end, plus=False) for end in (low, high))
    sure = f"{100 * log.standings.level:g} % interval"
    return f"{text} ({sure}: {between})."


def _unfinished(log: Log) -> list[str]:
    judged = sum(1 for trial in log.candidates if log.judged.get(trial))
    text = f"{judged} of {plural(len(log.candidates), 'candidate')} were judged so far."
    if log.order and log.judged.get(log.order[0]):
        best = log.order[0]
        last = log.judged[best][-1]
        text += f" {log.name(best)} is ahead with a validation loss of {number(last.loss)}."
    return [text + " The same command goes on where the race stopped."]


def highlights(log: Log) -> list[Fact]:
    """The handful of numbers under the headline."""
    facts = []
    winner = log.standings.winner
    first = next((row for row in log.rows if verdict(log, row) == "winner"), None)
    if winner and first:
        facts.append(Fact(f"Validation {log.plan.metric}", log.metric.write(first.metric)))
        if first.test_metric is not None:
            facts.append(Fact(f"Test {log.plan.metric}", log.metric.write(first.test_metric)))
        finals = [f.seconds for f in log.finals.get(winner.trial, []) if math.isfinite(f.seconds)]
        if finals:
            facts.append(Fact("One training", duration(sum(finals) / len(finals))))
    facts.append(Fact("Candidates raced", str(len(log.candidates))))
    if log.wall is not None:
        facts.append(Fact("The whole race", duration(log.wall)))
    return facts


def facts(log: Log) -> list[Fact]:
    """How it was measured."""
    plan = log.plan
    found = [Fact("Task", plan.task)]
    if plan.sizes:
        s = plan.sizes
        test = f", {s.test} to test" if s.test else ""
        found.append(Fact("Data", f"{s.train} items to train on, {s.valid} to choose by{test}"))
        if s.test:
            found.append(Fact("Test part", "Split off once, by seed; reported, never used to choose"))
    found.append(Fact("Choosing", _choosing(log)))
    found.append(
        Fact(
            "Finals",
            f"{plural(len(log.finalists) or len(log.rows), 'finalist')}, each trained in full on "
            f"{plural(plan.seeds, 'fresh seed')}, the same seeds for all, ranked by validation {plan.metric}",
        )
    )
    level = f"{100 * log.standings.level:g} %"
    found.append(
        Fact(
            "Certainty",
            f"Differences are paired by seed; {level} intervals hold for all finalists at once; "
            "an interval that holds 0 is a tie",
        )
    )
    found.append(Fact("Budget", f"{plan.budget}, seed {plan.seed}"))
    if plan.target is not None:
        found.append(Fact("Target", f"{plan.metric} {log.metric.write(plan.target)}"))
    if plan.versions:
        found.append(
            Fact("Versions", listing([f"{name} {version}" for name, version in plan.versions.items()]))
        )
    return found


def _choosing(log: Log) -> str:
    fractions = [f"{number(100 * rung.fraction)} %" for rung in log.plan.rungs]
    places = f" at {listing(fractions)} of a full training" if fractions else ""
    return f"Successive halving by validation loss{places}, always at the end of a short cooldown"


def notes(log: Log) -> list[str]:
    """What a reader must know before believing the page."""
    if not log.failed:
        return []
    told = [f"{log.name(trial)} ({redact(reason)})" for trial, reason in log.failed.items()]
    more = [f"{len(told) - 3} more"] if len(told) > 3 else []
    return [f"{plural(len(told), 'candidate')} failed and left the race: {listing(told[:3] + more)}."]


def verdict(log: Log, row: StandingsRow) -> str:
    """Winner, tied with it, or behind."""
    if log.standings.winner and row.name == log.standings.winner.name:
        return "winner"
    return "tied" if row.tied else "behind"


def pairs(log: Log, row: StandingsRow, rows: Sequence[StandingsRow]) -> tuple[float, ...]:
    """The row's difference to the winner on every seed, negative where it was worse."""
    winner = next((r for r in rows if verdict(log, r) == "winner"), None)
    if winner is None or winner is row:
        return ()
    sign = 1 if log.metric.higher_is_better else -1
    return tuple(
        sign * (mine - best)
        for mine, best in zip(row.metrics, winner.metrics, strict=False)
        if mine is not None and best is not None and math.isfinite(mine - best)
    )
