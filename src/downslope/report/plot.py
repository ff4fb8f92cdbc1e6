"""Geometry of the curves: which panels there are, and what every panel draws.

A panel is drawn here, once, as SVG paths in a box of 1000 × 1000 that the browser stretches; the same
numbers go to the page's script, which only reads them (hover). So the page prints, and shows its curves
without JavaScript.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from downslope.report.axis import Axis, Tick, spanning

RARE = 12  # moments of one kind that are drawn through the whole panel; more of them stand at its foot
POINTS = 160  # per line: a panel is rarely wider than 800 pixels, and every second pixel is enough
BOX = 1000


@dataclass(frozen=True)
class Track:
    """One measured quantity of one training: value at step and second; equal lengths, ascending steps."""

    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]

    def thinned(self, points: int = POINTS) -> Track:
        """At most about `points` of them: lowest and highest of every stretch, so that no spike is lost."""
        n = len(self.values)
        if n <= points:
            return self
        edges = [i * n // (points // 2) for i in range(points // 2 + 1)]
        kept = {0, n - 1}
        for start, stop in pairwise(edges):
            stretch = range(start, stop)
            kept.add(min(stretch, key=lambda i: _order(self.values[i])))
            kept.add(max(stretch, key=lambda i: _order(self.values[i])))
        order = sorted(kept)
        return Track(*(tuple(column[i] for i in order) for column in (self.steps, self.seconds, self.values)))

    def smooth(self, span: float) -> Track:
        """Each value replaced by the mean of those in `span` steps around it."""
        values = []
        for step in self.steps:
            near = self.values[
                bisect_left(self.steps, step - span / 2) : bisect_right(self.steps, step + span / 2)
            ]
            values.append(sum(near) / len(near))
        return Track(self.steps, self.seconds, tuple(values))


@dataclass(frozen=True)
class Series:
    """One training in the plots, a line or (`dots`) single points; `faint` ones stay in the background."""

    name: str
    hue: int
    tracks: dict[str, Track]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Moments:
    """When things of one kind happened: steps, and the seconds of these, NaN where nobody knows."""

    name: str
    steps: tuple[float, ...]
    seconds: tuple[float, ...]

    def path(self, against: str, x: Axis, lane: int) -> str:
        """A stroke at each, as the `d` of an SVG path: through the panel, or in a lane at its foot.

        >>> Moments("left out", (1.0, 3.0), (0.5, math.nan)).path("seconds", Axis(0, 1), 0)
        'M500 0v1000'
        """
        shown = [value for value in getattr(self, against) if math.isfinite(value)]
        places = sorted({round(BOX * x.place(value)) for value in shown})
        stroke = f"{BOX - 40 * (lane + 1)}v40" if len(self.steps) > RARE else f"0v{BOX}"
        return "".join(f"M{place} {stroke}" for place in places)


@dataclass(frozen=True)
class Quantity:
    """What a panel may show; with `flip` its logarithmic form is that of the error, 1 − value."""

    key: str
    name: str  # on its switch
    title: str = ""  # over its drawing; the name if empty
    percent: bool = False
    flip: bool = False
    log: bool = True  # a logarithmic form exists


@dataclass(frozen=True)
class Path:
    """One line of a panel: an SVG path in the box, of the series with this index."""

    series: int
    d: str


@dataclass(frozen=True)
class Panel:
    """One drawing: axes, ticks and lines."""

    key: str
    name: str
    title: str
    quantity: str
    against: str
    x: Axis
    y: Axis
    paths: list[Path]
    marks: list[str] = field(default_factory=list)  # a path for each kind of moments

    @property
    def x_ticks(self) -> list[Tick]:
        """The ticks of the horizontal axis."""
        return self.x.ticks(6)

    @property
    def y_ticks(self) -> list[Tick]:
        """The ticks of the vertical axis."""
        return self.y.ticks(5)

    def data(self) -> dict[str, Any]:
        """What the script needs to find the point below the pointer."""
        return {
            "quantity": self.quantity,
            "against": self.against,
            "x": _axis_data(self.x),
            "y": _axis_data(self.y),
        }


def panels(
    series: Sequence[Series], quantities: Iterable[Quantity], marks: Sequence[Moments] = ()
) -> list[Panel]:
    """Every quantity that was measured, against steps and seconds, linear and (if it has one) logarithmic."""
    return [
        panel(series, quantity, against, log, marks)
        for quantity in quantities
        if any(s.tracks.get(quantity.key) for s in series)
        for against in ("steps", "seconds")
        for log in ((True, False) if quantity.log else (False,))
    ]


def panel(
    series: Sequence[Series], quantity: Quantity, against: str, log: bool, marks: Sequence[Moments] = ()
) -> Panel:
    """Draw one quantity of all series; linear after all, and saying so, where strong lines are negative."""
    drawn = [
        (i, getattr(t, against), t.values) for i, s in enumerate(series) if (t := s.tracks.get(quantity.key))
    ]
    shown = _shown(series, drawn)
    flip = log and quantity.flip
    negative = log and not flip and any(v < 0 for v in shown)
    x = spanning((v for _, xs, _ in drawn for v in xs), zero=True)
    y = spanning(shown, log=log and not negative, percent=quantity.percent, flip=flip)
    told = ", by the logarithm of its error" if flip else ", linear: a negative one has no logarithm"
    return Panel(
        key="-".join((quantity.key, against, "log" if log else "linear")),
        name=quantity.name,
        title=(quantity.title or quantity.name) + (told if flip or negative else ""),
        quantity=quantity.key,
        against=against,
        x=x,
        y=y,
        paths=[Path(i, path(xs, values, x, y, joined=not series[i].dots)) for i, xs, values in drawn],
        marks=[kind.path(against, x, lane) for lane, kind in enumerate(marks)],
    )


def path(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, *, joined: bool = True) -> str:
    """The `d` of an SVG path; a value that is no number, or too small for a logarithm, breaks the line.

    >>> path([0, 1], [0.0, 1.0], Axis(0, 1), Axis(0, 1))
    'M0 1000h0L1000 0'
    """
    strokes = _strokes(xs, ys, x, y)
    if not joined:
        return "".join(f"M{point}h0" for stroke in strokes for point in stroke)
    return "".join(f"M{stroke[0]}h0" + "".join(f"L{point}" for point in stroke[1:]) for stroke in strokes)


def _strokes(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> list[list[str]]:
    """The unbroken pieces of a line, as pairs of coordinates in the box."""
    strokes: list[list[str]] = [[]]
    for at, value in zip(xs, ys, strict=True):
        if math.isfinite(at) and math.isfinite(value) and (value > 0 or y.flip or not y.log):
            strokes[-1].append(f"{round(BOX * x.place(at))} {round(BOX * (1 - y.place(value)))}")
        elif strokes[-1]:
            strokes.append([])
    return [stroke for stroke in strokes if stroke]


def _shown(
    series: Sequence[Series], drawn: Sequence[tuple[int, Sequence[float], Sequence[float]]]
) -> list[float]:
    """What the vertical axis must hold: the strong lines, so that one bad trial does not flatten the rest."""
    strong = [v for i, _, values in drawn if not series[i].faint for v in values if math.isfinite(v)]
    return strong or [v for _, _, values in drawn for v in values]


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _axis_data(axis: Axis) -> dict[str, Any]:
    return asdict(axis)
