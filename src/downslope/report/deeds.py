"""What happened in a training beside its updates: what strategies did, as marks and as a table."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from downslope.groups import MOST_NAMES, named
from downslope.report import events as ev
from downslope.report.plot import Moments
from downslope.report.text import listing, number, plural
from downslope.report.view import Deed, Deeds
from downslope.strategies import STRATEGIES

MOST_ROWS = 40
MOST_KINDS = 8  # of marks: beyond, nobody could tell them apart
GUARD = "guard"
GROWN = ("growth", "grow")


def happened(steps: Sequence[ev.Step], told: Sequence[ev.Deed | ev.Skip]) -> list[ev.Deed]:
    """All of it in order: what strategies told, what the guard left out, batches that grew."""
    grown = [
        ev.Deed(
            step=now.step,
            by=GROWN[0],
            did=GROWN[1],
            why="its schedule",
            facts={"batches per update": float(now.batches)},
        )
        for before, now in pairwise(steps)
        if before.batches != now.batches
    ]
    known = [_skipped(one) if isinstance(one, ev.Skip) else one for one in told]
    return sorted([*known, *grown], key=lambda deed: deed.step)


def _skipped(skip: ev.Skip) -> ev.Deed:
    facts: dict[str, float | str] = {"in": named(skip.names)} if skip.names else {}
    facts |= {"begun by": skip.culprit} if skip.culprit else {}
    return ev.Deed(step=skip.step, by=GUARD, did="skip", why="a gradient was not finite", facts=facts)


def moments(found: Sequence[ev.Deed], steps: Sequence[ev.Step]) -> list[Moments]:
    """When each kind of thing was done; of the second in which, what the last update before it knows."""
    kinds: dict[str, list[int]] = {}
    for deed in found:
        kinds.setdefault(_what(deed), []).append(deed.step)
    at = [step.step for step in steps]

    def clock(step: int) -> float:
        place = bisect_right(at, step)
        return steps[place - 1].seconds if place else math.nan

    return [
        Moments(f"{what}, {plural(len(when), 'time')}", tuple(map(float, when)), tuple(map(clock, when)))
        for what, when in list(kinds.items())[:MOST_KINDS]
    ]


def table(found: Sequence[ev.Deed], last: int) -> Deeds | None:
    """A row for each run of equal ones, one after the other or at neighbouring steps; where that gives too
    many rows, runs reach as far as must be. None if nothing happened.
    """
    if not found:
        return None
    spans = [1.0, *(last / 2**power for power in range(8, 0, -1)), math.inf]
    every = (_runs(found, span) for span in spans)
    runs = next((runs for runs in every if len(runs) <= MOST_ROWS), _runs(found, math.inf))
    lead = f"{plural(len(found), 'event')} beside the updates; a step is the number of updates before it."
    if len(runs) < len(found):
        lead += " Equal ones are one row, with the least and the greatest of their numbers."
    if len(runs) > MOST_ROWS:
        lead += f" The first {MOST_ROWS} kinds of {len(runs)} are shown."
    return Deeds(lead, [_row(run) for run in runs[:MOST_ROWS]])


def _runs(found: Sequence[ev.Deed], span: float) -> list[list[ev.Deed]]:
    """Equal ones that follow each other, or lie within `span` steps of each other."""
    runs: list[list[ev.Deed]] = []
    latest: dict[tuple[str, str, str], list[ev.Deed]] = {}
    for deed in found:
        key = (deed.by, deed.did, deed.why)
        run = latest.get(key)
        if run is None or not (run is runs[-1] or deed.step <= run[-1].step + span):
            run = latest[key] = []
            runs.append(run)
        run.append(deed)
    return runs


def _row(run: Sequence[ev.Deed]) -> Deed:
    first, last = run[0], run[-1]
    steps = f"{first.step}" if first.step == last.step else f"{first.step} to {last.step}"
    names = dict.fromkeys(name for deed in run for name in deed.facts)
    facts = [f"{name} {_all([d.facts[name] for d in run if name in d.facts])}" for name in names]
    why = first.why + (": " if first.why and facts else "") + ", ".join(facts)
    return Deed(steps, len(run), _what(first), why)


def _all(values: Sequence[float | str]) -> str:
    """One value, the least and the greatest of several numbers, or the first of several texts."""
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) < len(values):
        texts = list(dict.fromkeys(str(value) for value in values))
        left = len(texts) - MOST_NAMES
        return listing(texts[:MOST_NAMES] + ([f"{left} more"] if left > 0 else []))
    finite = sorted(value for value in numbers if math.isfinite(value))
    ends = [number(value) for value in (finite[:1] + finite[-1:] or numbers[:1])]
    return " to ".join(dict.fromkeys(ends))


def _what(deed: ev.Deed) -> str:
    known = STRATEGIES.get(deed.by)
    if deed.by == GUARD:
        return "The guard left the update out"
    return f"[{deed.by}] {known.deeds.get(deed.did, deed.did) if known else deed.did}"
