"""Every kind of schedule once: what it must be worth, drawn at random, short, rising; the laws run over it.

The truths are written from the definitions, in fractions and 60 decimal digits, and share nothing with the
package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from downslope.schedule import (
    KINDS,
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    multistep,
    one_cycle,
    plateau,
    polynomial,
    product,
    sequence,
    step,
    sum,  # noqa: A004
    wsd,
)

EXACT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)
Number = Fraction | float


def raised(of: Number, exponent: Number) -> Fraction:
    """of^exponent to 60 digits, of ≥ 0."""
    return Fraction(1) if exponent == 0 else shortened(EXACT.power(digits(of), digits(exponent)))


def digits(value: Number) -> Decimal:
    share = Fraction(value)
    return EXACT.divide(Decimal(share.numerator), Decimal(share.denominator))


def shortened(value: Decimal) -> Fraction:
    """A fraction of it; what is far below every float is 0."""
    return Fraction(value) if abs(value) > Decimal("1e-400") else Fraction(0)


def root(of: Fraction) -> Fraction:
    return shortened(EXACT.sqrt(digits(of)))


def half_cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def down(shape: str, start: Number, end: float, i: int, steps: int) -> Number:
    """From start to end: linear, cosine, 1-sqrt and geometric."""
    if i >= steps:
        return Fraction(end)
    if i <= 0:
        return Fraction(start)
    x = Fraction(i, steps)
    if shape == "exponential":
        return start * raised(Fraction(end) / Fraction(start), x) if start else start
    left = {"linear": 1 - x, "cosine": Fraction(half_cosine(float(x))), "sqrt": 1 - root(x)}[shape]
    return Fraction(end) + (Fraction(start) - Fraction(end)) * left


def truth(of: Schedule, i: int) -> Fraction:
    """What a schedule is worth at a step, from its definition."""
    numbers = dict(of.numbers)
    warmup = numbers.pop("warmup", 0)
    if i < warmup:
        return Fraction(numbers["peak"]) * (i + 1) / (warmup + 1)
    if "steps" in numbers:
        numbers["steps"] -= warmup
    if "at" in numbers:
        numbers["at"] = [place - warmup for place in numbers["at"]]
    return Fraction(ROWS[of.kind].truth(i - warmup, **numbers))


def poly(i: int, peak: float, steps: int, end: float, power: float) -> Number:
    left = Fraction(max(steps - i, 0), steps)
    return Fraction(end) + (Fraction(peak) - Fraction(end)) * raised(left, power)


def restarts(i: int, peak: float, every: int, end: float, growth: int, shrink: float) -> Number:
    """Restart after restart, as SGDR tells it."""
    start, period, height = 0, every, Fraction(peak) - Fraction(end)
    if growth == 1:
        start = i // every * every
        height *= raised(shrink, i // every)
    while i >= start + period:
        start, period, height = start + period, period * growth, height * Fraction(shrink)
    return Fraction(end) + height * Fraction(half_cosine((i - start) / period))


def cycles(i: int, peak: float, base: float, up: int, down: int, form: str, factor: float) -> Number:
    """arXiv:1506.01186: the distance from the nearest foot, over the flank's length."""
    place = i % (up + down)
    share = min(Fraction(place, up), Fraction(up + down - place, down))
    height = {
        "triangular": Fraction(1),
        "triangular2": raised(0.5, i // (up + down)),
        "exp_range": raised(factor, i),
    }[form]
    return Fraction(base) + (Fraction(peak) - Fraction(base)) * share * height


def one_in_two(i: int, peak: float, steps: int, base: float, end: float, rise: int, shape: str) -> Number:
    return down(shape, base, peak, i, rise) if i < rise else down(shape, peak, end, i - rise, steps - rise)


def one_after_another(i: int, parts: tuple[Schedule, ...], at: list[int]) -> Number:
    begun = [(0, parts[0])] + [(start, part) for start, part in zip(at, parts[1:], strict=True) if start <= i]
    start, part = begun[-1]
    return truth(part, i - start)


def held(i: int, part: Schedule, low: float = -math.inf, high: float = math.inf) -> Number:
    value = truth(part, i)
    return low if value < low else high if value > high else value


levels = st.floats(-1e6, 1e6).map(lambda level: level if abs(level) > 1e-6 else 0.0)
positive = st.floats(1e-3, 1e3)
lengths = st.integers(1, 10_000)
factors = st.floats(0, 1)


@st.composite
def warmed(draw: st.DrawFn, kind: str, least: int = 1, **numbers: Any) -> Schedule:
    """A kind with a length and a warmup that fits into it."""
    steps = draw(st.integers(least, 10_000))
    drawn = {name: draw(one) for name, one in numbers.items()}
    return KINDS[kind](draw(levels), steps=steps, warmup=draw(st.integers(0, steps - 1)), **drawn)


def built(kind: str, **numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Schedule]:
    return st.builds(KINDS[kind], **numbers)


@st.composite
def cooled(draw: st.DrawFn) -> Schedule:
    steps = draw(lengths)
    warmup = draw(st.integers(0, steps - 1))
    cooldown = draw(st.integers(0, steps - warmup))
    shape = draw(st.sampled_from(["linear", "cosine", "sqrt", "exponential"]))
    level = positive if shape == "exponential" else levels
    return wsd(draw(level), steps, warmup, cooldown, draw(level), shape)


@st.composite
def staired(draw: st.DrawFn) -> Schedule:
    at = sorted(draw(st.lists(st.integers(0, 20_000), max_size=6)))
    warmup = draw(st.integers(0, at[0] if at else 100))
    return multistep(draw(levels), at, draw(factors), warmup)


@st.composite
def humped(draw: st.DrawFn) -> Schedule:
    steps = draw(lengths)
    shape = draw(st.sampled_from(["linear", "cosine"]))
    rise = draw(st.integers(0, steps))
    return one_cycle(draw(levels), steps, draw(levels), draw(levels), rise, shape)


@st.composite
def swinging(draw: st.DrawFn) -> Schedule:
    form = draw(st.sampled_from(["triangular", "triangular2", "exp_range"]))
    factor = draw(factors) if form == "exp_range" else 1.0
    return cyclic(draw(levels), draw(levels), draw(lengths), draw(lengths), form, factor)


@st.composite
def waiting(draw: st.DrawFn) -> Schedule:
    peak = draw(levels)
    end = peak * draw(factors)
    warmup, patience, cooldown = draw(st.integers(0, 50)), draw(st.integers(0, 5)), draw(st.integers(0, 5))
    mode = draw(st.sampled_from(["min", "max"]))
    factor = draw(st.floats(0, 0.99))
    return plateau(peak, factor, patience, 0.01, "abs", mode, cooldown, end, warmup)


@st.composite
def followed(draw: st.DrawFn) -> Schedule:
    parts = draw(st.lists(simple, min_size=1, max_size=4))
    at = sorted(draw(st.lists(st.integers(0, 20_000), min_size=len(parts) - 1, max_size=len(parts) - 1)))
    return sequence(parts, at)


@st.composite
def clamped(draw: st.DrawFn) -> Schedule:
    low, high = sorted([draw(levels), draw(levels)])
    ends = draw(st.sampled_from([{"low": low}, {"high": high}, {"low": low, "high": high}]))
    return draw(simple).clamp(**ends)


@dataclass(frozen=True)
class Row:
    """A kind: its truth; any of it at random; it on a run of one step, as percentages, with the values of
    steps 0 and 1; rising, with the values of steps 0 and 10 (or what is said against it); falling, if it does
    not come back to its peak.
    """

    truth: Callable[..., Number]
    any: st.SearchStrategy[Schedule]
    short: tuple[Schedule, float, float]
    rising: tuple[Callable[[], Schedule], float, float] | tuple[Callable[[], Schedule], str]
    falling: Schedule | None = None


simple = st.one_of(
    warmed("cosine", end=levels),
    built("constant", peak=levels, warmup=st.integers(0, 50)),
    built("step", peak=levels, every=lengths, factor=factors),
    swinging(),
)

ROWS: dict[str, Row] = {
    "constant": Row(
        lambda i, peak: peak,
        built("constant", peak=levels, warmup=st.integers(0, 500)),
        (constant(0.5, warmup="5 %"), 0.5, 0.5),
        (lambda: constant(0.9), 0.9, 0.9),
        constant(0.9, warmup=3),
    ),
    "linear": Row(
        lambda i, peak, steps, end: down("linear", peak, end, i, steps),
        warmed("linear", end=levels),
        (linear(0.5, "100 %", 0.2, "5 %"), 0.5, 0.2),
        (lambda: linear(0.9, 10, end=0.99), 0.9, 0.99),
        linear(0.9, 50, 0.1, 3),
    ),
    "step": Row(
        lambda i, peak, every, factor: Fraction(peak) * raised(factor, i // every),
        built("step", peak=levels, every=lengths, factor=factors, warmup=st.integers(0, 500)),
        (step(0.5, "30 %", 0.1, "5 %"), 0.5, 0.05),
        (lambda: step(0.5, every=10, factor=1.5), 0.5, 0.75),
        step(0.9, 20, 0.3, 3),
    ),
    "multistep": Row(
        lambda i, peak, at, factor: Fraction(peak) * raised(factor, len([one for one in at if one <= i])),
        staired(),
        (multistep(0.5, ("50 %", "100 %")), 0.05, 0.005),  # half of one update is none
        (lambda: multistep(0.5, at=(10, 20), factor=1.5), 0.5, 0.75),
        multistep(0.9, (10, 30, 30), 0.3, 3),
    ),
    "exponential": Row(
        lambda i, peak, every, factor: Fraction(peak) * raised(factor, Fraction(i, every)),
        built("exponential", peak=levels, every=lengths, factor=factors, warmup=st.integers(0, 500)),
        (exponential(0.5, "30 %", 0.5, "5 %"), 0.5, 0.25),
        (lambda: exponential(0.5, every=10, factor=1.5), 0.5, 0.75),
        exponential(0.9, 20, 0.3, 3),
    ),
    "polynomial": Row(
        poly,
        warmed("polynomial", end=levels, power=st.floats(0.1, 5)),
        (polynomial(0.5, "100 %", 0.2, 2, "5 %"), 0.5, 0.2),
        (lambda: polynomial(0.9, 10, end=0.99), 0.9, 0.99),
        polynomial(0.9, 50, 0.1, 2, 3),
    ),
    "inverse_time": Row(
        lambda i, peak, every: Fraction(peak) * every / (every + i),
        built("inverse_time", peak=levels, every=lengths, warmup=st.integers(0, 500)),
        (inverse_time(0.5, "30 %", "5 %"), 0.5, 0.25),
        (lambda: inverse_time(-0.5, every=10), -0.5, -0.25),  # it has no end; below 0 it rises to it
        inverse_time(0.9, 20, 3),
    ),
    "inverse_sqrt": Row(
        lambda i, peak, every: Fraction(peak) * root(Fraction(every, every + i)),
        built("inverse_sqrt", peak=levels, every=lengths, warmup=st.integers(0, 500)),
        (inverse_sqrt(0.5, "30 %", "5 %"), 0.5, 0.5 / math.sqrt(2)),
        (lambda: inverse_sqrt(-0.5, every=10), -0.5, -0.5 / math.sqrt(2)),
        inverse_sqrt(0.9, 20, 3),
    ),
    "cosine": Row(
        lambda i, peak, steps, end: down("cosine", peak, end, i, steps),
        warmed("cosine", end=levels),
        (cosine(0.5, "100 %", 0.2, "5 %"), 0.5, 0.2),
        (lambda: cosine(0.9, 10, end=0.99), 0.9, 0.99),
        cosine(0.9, 50, 0.1, 3),
    ),
    "cosine_restarts": Row(
        restarts,
        built(
            "cosine_restarts",
            peak=levels,
            every=lengths,
            end=levels,
            growth=st.integers(1, 5),
            shrink=factors,
            warmup=st.integers(0, 500),
        ),
        (cosine_restarts(0.5, "30 %", 0.2, warmup="5 %"), 0.5, 0.5),
        (lambda: cosine_restarts(0.9, 10, end=0.99), 0.9, 0.9),  # the restart
    ),
    "cyclic": Row(
        cycles,
        swinging(),
        (cyclic(0.5, 0.2, "30 %"), 0.2, 0.5),
        (lambda: cyclic(0.85, 0.95, 10), 0.95, 0.85),  # momentum, turned over
    ),
    "one_cycle": Row(
        one_in_two,
        humped(),
        (one_cycle(0.5, "100 %", 0.1, 0.2), 0.5, 0.2),
        (lambda: one_cycle(0.85, 10, base=0.95, end=0.95), 0.95, 0.95),
    ),
    "wsd": Row(
        lambda i, peak, steps, cooldown, end, shape="linear": down(
            shape, peak, end, i - (steps - cooldown), cooldown
        ),
        cooled(),
        (wsd(0.5, "100 %", "5 %", "20 %", 0.2), 0.5, 0.2),
        (lambda: wsd(0.9, 10, end=0.99, shape="sqrt"), 0.9, 0.99),
        wsd(0.9, 50, 3, 20, 0.1, "sqrt"),
    ),
    "branch": Row(
        lambda i, trunk, start, cooldown, end, shape="linear": (
            truth(trunk, i) if i < start else down(shape, truth(trunk, start), end, i - start, cooldown)
        ),
        built(
            "branch",
            trunk=simple,
            start=lengths,
            cooldown=lengths,
            end=levels,
            shape=st.sampled_from(["linear", "cosine", "sqrt"]),
        ),
        (constant(0.5).cooldown("50 %", "50 %", 0.2), 0.2, 0.2),  # no update is left for either
        (lambda: constant(0.9).cooldown(5, 5, 0.99), 0.9, 0.99),
        cosine(0.9, 50, warmup=3).cooldown(20, 20, 0.1, "exponential"),
    ),
    "sequence": Row(
        one_after_another,
        followed(),
        (constant(0.5).then(linear(0.4, "50 %"), at="50 %"), 0.4, 0.0),
        (lambda: constant(0.5).then(linear(0.5, 5, end=0.7), at=5), 0.5, 0.7),
        constant(0.9, 3).then(linear(0.8, 20, 0.1), at=30),
    ),
    "sum": Row(
        lambda i, parts: math.fsum(truth(part, i) for part in parts),
        built("sum", parts=st.lists(simple, min_size=1, max_size=4)),
        (linear(0.5, "100 %") + 0.1, 0.6, 0.1),
        (lambda: linear(0.5, 10, end=0.7) + 0.1, 0.6, 0.8),
        sum([linear(0.9, 50, warmup=3), constant(0.5, 3)]),
    ),
    "product": Row(
        lambda i, parts: math.prod((truth(part, i) for part in parts), start=Fraction(1)),
        built("product", parts=st.lists(simple, min_size=1, max_size=3)),
        (linear(0.5, "100 %", 0.1) * step(1.0, "50 %", 0.5), 0.5, 0.05),
        (lambda: linear(0.5, 10, end=1.0) * constant(0.5), 0.25, 0.5),
        product([linear(0.9, 50, warmup=3), exponential(1.0, 20)]),
    ),
    "clamp": Row(
        held,
        clamped(),
        (linear(0.5, "100 %").clamp(0.2, 0.4), 0.4, 0.2),
        (lambda: linear(0.1, 10, end=0.9).clamp(0.2, 0.8), 0.2, 0.8),
        exponential(0.9, 20).clamp(0.3, 0.7),
    ),
    "plateau": Row(
        lambda i, peak, **_: peak,  # with nothing seen; what it sees is in test_plateau.py
        waiting(),
        (plateau(0.5, warmup="5 %"), 0.5, 0.5),
        (lambda: plateau(0.5, end=0.9), "plateau: end must lie between 0 and peak = 0.5, got 0.9."),
        plateau(0.9, warmup=3),
    ),
}  # fmt: skip
