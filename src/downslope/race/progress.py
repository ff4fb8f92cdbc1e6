"""What a race shows while it runs, on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from downslope.race.budget import cost
from downslope.race.decide import rank
from downslope.race.record import Event, Job, Record


class Progress(Protocol):
    """Whoever is told of each event of a race, and of the record that holds it."""

    def take(self, event: Event, record: Record) -> None:
        """One event, after it was journalled."""
        ...


class Lines:
    """One line for each thing that a reader of a log wants to know."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def take(self, event: Event, record: Record) -> None:
        """Print the event, if it is worth a line."""
        if text := line(event, record):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Live:
    """A bar in full trainings, and the lines above it."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.lines = bar, Lines(bar.console)
        self.task = bar.add_task("rehearsing", total=None)

    def take(self, event: Event, record: Record) -> None:
        """Move the bar."""
        self.lines.take(event, record)
        if record.plan is not None:
            done, total = spent(record)
            self.bar.update(self.task, completed=float(done), total=float(total), description=now(record))


def spent(record: Record) -> tuple[Fraction, Fraction]:
    """Full trainings done, by jobs that are judged, and all that the plan holds.

    >>> spent(Record())
    (Fraction(0, 1), Fraction(0, 1))
    """
    if record.plan is None:
        return Fraction(0), Fraction(0)
    finals = (record.plan["finalists"] + 1) * record.plan["seeds"]
    each = [cost(record.rungs[: k + 1]) - cost(record.rungs[:k]) for k in range(len(record.rungs))]
    done = sum(
        (Fraction(1) if job.rung is None else each[job.rung] / record.rungs[job.rung].runners)
        for job in record.verdicts
    )
    return Fraction(done), cost(record.rungs) + finals


def now(record: Record) -> str:
    """Where the race is, in a few words."""
    assert record.plan is not None
    if "finalists" in record.announced:
        return "finals"
    rung = sum(isinstance(one, int) for one in record.announced)
    return f"rung {rung + 1} of {len(record.rungs)}"


def line(event: Event, record: Record) -> str | None:
    """What an event says to a person; None for those that say nothing."""
    kind = event["kind"]
    if kind == "race":
        rungs = ", ".join(f"{rung['runners']} at {rung['fraction']}" for rung in event["rungs"])
        finals = (event["finalists"] + 1) * event["seeds"]
        return (
            f"racing {event['task_name']}: {event['rungs'][0]['runners']} recipes; rungs: {rungs} of a full "
            f"training ({float(cost(record.rungs)):.1f}x), then up to {finals} full trainings in the finals"
        )
    if kind == "open" and event["resumed"]:
        return f"going on: {len(record.verdicts)} results are in the journal"
    if kind == "cut":
        return _cut(event, record)
    if kind == "finalists":
        return "finals: " + ", ".join(record.trials[trial].names[0] for trial in event["trials"])
    if kind in ("failed", "lost", "damaged"):
        name = record.trials[event["trial"]].names[0] if event["trial"] < len(record.trials) else "?"
        again = {"lost": " (tried again)", "damaged": " (trained again)"}.get(kind, "")
        return f"{name}: {event['reason']}{again}"
    return None


def _cut(event: Event, record: Record) -> str:
    assert record.plan is not None
    best = rank(record, event["rung"], event["order"])[0]
    verdict = record.verdicts[Job(event["rung"], None, best)]
    score = verdict.outcome
    if score == "ok":
        score = f"loss {verdict.loss:.4g}, {record.plan['metric']} {verdict.metric:.4g}"
    text = f"rung {event['rung'] + 1} of {len(record.rungs)}: best {record.trials[best].names[0]} ({score})"
    last = event["rung"] + 1 == len(record.rungs)
    return text if last else f"{text}; {len(event['kept'])} of {len(event['order'])} go on"


@contextmanager
def progress() -> Iterator[Progress]:
    """Live where stderr is a terminal, lines where it is not."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield Live(bar)
