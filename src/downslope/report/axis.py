"""Axes: from a value to a place between 0 and 1, and the ticks a reader expects there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from downslope.report.text import number

FARTHEST = 1e100  # a value beyond is as good as infinite: no axis is stretched for it
PERFECT = 1e-6  # an error below is none: no part of the data has so many items


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis; `minor` ones disappear on a narrow screen."""

    value: float
    place: float
    label: str
    minor: bool = False


@dataclass(frozen=True)
class Axis:
    """An interval of values, linear or logarithmic, mapped onto 0 … 1.

    `flip` is for an accuracy: logarithmic in the error, 1 − value, so that 90 %, 99 % and 99.9 % lie equally
    far apart; a perfect value lies at the upper end.

    >>> Axis(0.01, 1.0, log=True).place(0.1), round(Axis(0.0, 0.99, log=True, flip=True).place(0.9), 9)
    (0.5, 0.5)
    """

    low: float
    high: float
    log: bool = False
    percent: bool = False
    flip: bool = False

    def place(self, value: float) -> float:
        """Where the value lies: 0 at `low`, 1 at `high`; what lies outside stays outside, never beyond ±9."""
        if self.flip:
            inside = min(value, self.high)  # a perfect value has no logarithm of its error
            place = math.log((1 - self.low) / (1 - inside)) / math.log((1 - self.low) / (1 - self.high))
        elif self.log:
            low, high = math.log(self.low), math.log(self.high)
            place = (math.log(value) - low) / (high - low) if value > 0 else -1.0
        else:
            place = (value - self.low) / (self.high - self.low)
        return max(-9.0, min(9.0, place))

    def ticks(self, count: int = 6) -> list[Tick]:
        """About `count` round values inside the interval."""
        if self.flip:
            values = [1 - error for error in reversed(_log_values(1 - self.high, 1 - self.low, count))]
        else:
            values = (_log_values if self.log else _linear_values)(self.low, self.high, count)
        every = 2 if len(values) > 4 else 1
        return [Tick(v, self.place(v), self.label(v), minor=i % every != 0) for i, v in enumerate(values)]

    def label(self, value: float) -> str:
        """The value as this axis writes it."""
        if self.percent:
            return f"{round(100 * value, 6):.10g} %".replace("-", "−")
        if not self.log and abs(value) < 1e-9 * (self.high - self.low):
            return "0"
        return short(value)


def short(value: float) -> str:
    """A tick's label: thousands as k, so that five digits do not crowd an axis.

    >>> short(1500.0), short(20000.0), short(2e6), short(0.25)
    ('1500', '20k', '2M', '0.25')
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size * (10 if letter == "k" else 1) <= abs(value) < 1000 * size:
            return f"{value / size:.4g}{letter}".replace("-", "−")
    return number(value, 4)


def spanning(
    values: Iterable[float],
    *,
    log: bool = False,
    percent: bool = False,
    zero: bool = False,
    flip: bool = False,
    margin: float = 0.04,
) -> Axis:
    """The axis that holds all finite values with a little air; `zero` makes it begin at 0.

    A logarithmic axis looks at positive values only, a flipped one at values up to 1. With nothing to show it
    is 0 … 1 (log: 0.1 … 1, flipped: 0 … 0.9).
    """
    if flip:
        errors = [1 - v for v in values if -FARTHEST < v <= 1]
        error = spanning([e for e in errors if e > PERFECT], log=True, margin=margin)
        least = error.low / 2 if min(errors, default=1) <= PERFECT else error.low
        return Axis(1 - error.high, 1 - least, True, percent, True)
    known = [float(v) for v in values if abs(v) < FARTHEST and (v > 1 / FARTHEST or not log)]
    if not known:
        return Axis(0.1 if log else 0.0, 1.0, log, percent)
    low, high = min(known), max(known)
    if log:
        air = max((high / low) ** margin, 1.02)
        return Axis(low / air, high * air, True, percent)
    if zero:
        return Axis(0.0, high * (1 + margin / 4) if high > 0 else 1.0, False, percent)
    air = (high - low) * margin or abs(high) * margin or 1.0
    return Axis(low - air, high + air, False, percent)


def _linear_values(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / max(count, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _log_values(low: float, high: float, count: int) -> list[float]:
    decades = math.log10(high / low)
    if decades < 0.7:
        return [v for v in _linear_values(low, high, count) if v > 0]
    mantissas = (1.0, 2.0, 5.0) if decades <= 2 else (1.0, 3.0) if decades <= 3 else (1.0,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil(decades / count)) if mantissas == (1.0,) else 1
    values = [m * 10.0**e for e in range(first, last + 1, stride) for m in mantissas]
    return [v for v in values if low * 0.999999 <= v <= high * 1.000001]
