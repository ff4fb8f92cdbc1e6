"""The kinds that are made of other schedules."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from downslope.errors import BadInput, under
from downslope.schedule.curve import finite, way
from downslope.schedule.decay import passable, unless_linear
from downslope.schedule.duration import Duration
from downslope.schedule.schedule import (
    Bounds,
    Schedule,
    Seen,
    in_order,
    kind,
    levels_scaled,
    make,
    since,
)


def _branch(
    i: int, seen: Seen, trunk: Schedule, start: int, cooldown: int, end: float, shape: str = "linear"
) -> float:
    if i < start:
        return trunk(i, seen)
    return way(trunk(start, seen), end, i - start, cooldown, shape)


@kind(_branch)
def branch(
    trunk: Schedule, start: Duration, cooldown: Duration, end: float = 0.0, shape: str = "linear"
) -> Schedule:
    """`trunk` up to the update `start`, then to `end` over `cooldown` updates, by a `shape` as wsd has it.

    For: cooling a training down from any checkpoint of its trunk, to what budget is left. It starts from the
    level that the trunk has there, also where the trunk reacts. Source: arXiv:2405.18392. Not for: a trunk
    that has come down by itself, such as a cosine near its end: there is nothing left to cool.

    >>> from downslope.schedule import constant
    >>> [branch(constant(1.0), start=3, cooldown=2)(i) for i in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    numbers = {"trunk": trunk, "start": start, "cooldown": cooldown, "end": end}
    return passable(make("branch", **numbers, **unless_linear(shape)))


def _sequence(i: int, seen: Seen, parts: tuple[Schedule, ...], at: tuple[int, ...]) -> float:
    place = bisect_right(at, i)
    start = at[place - 1] if place else 0
    return parts[place](i - start, since(seen, start))


@kind(_sequence)
def sequence(parts: Sequence[Schedule], at: Sequence[Duration]) -> Schedule:
    """One schedule after another: from each update in `at` on the next, which counts its own steps from 0.

    A part that reacts sees what is observed from its start on. torch: SequentialLR(milestones=at). Not for:
    a warmup alone, which the kinds have of their own; parts whose values differ where they meet, unless the
    jump is meant.

    >>> from downslope.schedule import constant, linear
    >>> [sequence([constant(5.0), linear(1.0, steps=2)], at=[2])(i) for i in range(5)]
    [5.0, 5.0, 1.0, 0.5, 0.0]
    """
    made = in_order(make("sequence", parts=parts, at=at))
    if len(made.parts) != len(at) + 1:
        with under("at"):
            raise BadInput(
                f"sequence: at must hold one update fewer than parts, got {len(at)} for {len(parts)}."
            )
    return made


def _sum_bounds(of: Schedule) -> Bounds:
    lows, highs = zip(*(part.bounds for part in of.parts), strict=True)
    return reduce(add, lows), reduce(add, highs)


@kind(lambda i, seen, parts: reduce(add, (part(i, seen) for part in parts)), _sum_bounds)
def sum(parts: Sequence[Schedule]) -> Schedule:
    """The sum of schedules that run side by side from step 0; written `a + b`. A number counts as a constant.

    For: a floor under cycles, a rise on top of a decay. torch has none. Not for: a floor under a decay that
    ends at 0, for which it has `end`: a sum lifts the peak as well.

    >>> from downslope.schedule import constant, linear
    >>> (constant(1.0) + linear(0.5, steps=2) + 0.25)(1)
    1.5
    """
    return _some(make("sum", parts=parts))


def _product_bounds(of: Schedule) -> Bounds:
    def times(one: Bounds, two: Bounds) -> Bounds:
        corners = [a * b for a in one for b in two]
        return min(corners), max(corners)

    return reduce(times, (part.bounds for part in of.parts))


def _first_scaled(of: Schedule, factor: float) -> dict[str, Any]:
    first, *others = of.parts
    return {"parts": (first.scaled(factor), *others)}


@kind(
    lambda i, seen, parts: reduce(lambda a, b: finite(a * b), (part(i, seen) for part in parts)),
    _product_bounds,
    _first_scaled,
)
def product(parts: Sequence[Schedule]) -> Schedule:
    """The product of schedules that run side by side from step 0; written `a * b`. Give all but one of them
    levels around 1. A plain number scales instead: `2 * a`.

    torch: ChainedScheduler, for schedulers that multiply. For: a warmup or stairs on top of another course.
    Not for: two decays, each made for the whole run: their product is steeper than either.

    >>> from downslope.schedule import linear, step
    >>> (linear(1.0, steps=2) * step(1.0, every=1, factor=0.5))(1)
    0.25
    """
    return _some(make("product", parts=parts))


def _clamp_bounds(of: Schedule) -> Bounds:
    numbers = dict(of.numbers)
    low, high = numbers.get("low", -math.inf), numbers.get("high", math.inf)
    least, greatest = numbers["part"].bounds
    return _clamp(least, low, high), _clamp(greatest, low, high)


def _clamp(value: float, low: float = -math.inf, high: float = math.inf) -> float:
    return max(low, min(high, value))


def _clamp_scaled(of: Schedule, factor: float) -> dict[str, Any]:
    numbers = levels_scaled(of, factor)
    if factor < 0:
        numbers["low"], numbers["high"] = numbers.get("high"), numbers.get("low")
    return numbers


@kind(
    lambda i, seen, part, **ends: _clamp(part(i, seen), **ends),
    _clamp_bounds,
    _clamp_scaled,
)
def clamp(part: Schedule, low: float | None = None, high: float | None = None) -> Schedule:
    """`part`, held at or above `low` and at or below `high`; written `part.clamp(low, high)`.

    For: a floor under a decay that has no end of its own. torch has none. Not for: a decay with an `end`: it
    would stand still at the floor for the rest of its length, where `end` spends that on the way.

    >>> from downslope.schedule import step
    >>> [clamp(step(1.0, every=1, factor=0.5), low=0.2)(i) for i in range(4)]
    [1.0, 0.5, 0.25, 0.2]
    """
    ends = {name: level for name, level in (("low", low), ("high", high)) if level is not None}
    made = make("clamp", part=part, **ends)
    numbers = dict(made.numbers)
    if len(numbers) < 2:
        raise BadInput("clamp needs low, high or both.")
    if "low" in numbers and "high" in numbers and numbers["low"] > numbers["high"]:
        with under("low"):
            raise BadInput(f"clamp: low must be at most high = {numbers['high']:g}, got {numbers['low']:g}.")
    return made


def _some(made: Schedule) -> Schedule:
    if not made.parts:
        with under("parts"):
            raise BadInput(f"{made.kind}: parts must be at least one schedule.")
    return made
