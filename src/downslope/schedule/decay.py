"""The kinds that know their whole course: stairs and curves behind a warmup."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from downslope.errors import BadInput, under
from downslope.schedule.curve import power, way
from downslope.schedule.duration import Duration
from downslope.schedule.schedule import Schedule, in_order, kind, make


@kind(lambda i, peak: peak)
def constant(peak: float, warmup: Duration = 0) -> Schedule:
    """`peak` throughout.

    torch: ConstantLR(factor=1). For: short runs, trunks of a cooldown, schedule-free rules. Not for: the end
    of a run by noisy gradients, whose weights keep moving about the minimum; cool down, or average them.

    >>> [constant(1.0, warmup=3)(i) for i in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return make("constant", peak=peak, warmup=warmup)


@kind(lambda i, peak, steps, end: way(peak, end, i, steps))
def linear(peak: float, steps: Duration, end: float = 0.0, warmup: Duration = 0) -> Schedule:
    """A straight line from `peak` to `end`.

    torch: LinearLR(start_factor=1, end_factor=end/peak, total_iters=steps). For: a known budget. Not for: a
    length that is open: cut short it stops at a high rate, and behind `steps` it stays at `end`; see wsd.

    >>> [linear(1.0, steps=4)(i) for i in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return make("linear", peak=peak, steps=steps, end=end, warmup=warmup)


@kind(lambda i, peak, every, factor: peak * power(factor, i // every))
def step(peak: float, every: Duration, factor: float = 0.1, warmup: Duration = 0) -> Schedule:
    """Stairs: times `factor` at each `every`-th update, counted from the end of the warmup.

    torch: StepLR(step_size=every, gamma=factor). For: reproducing older work. Not for: new work, where a
    smooth way needs no choice of stairs; it never arrives at 0.

    >>> [step(1.0, every=2, factor=0.5)(i) for i in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    return make("step", peak=peak, every=every, factor=factor, warmup=warmup)


@kind(lambda i, peak, at, factor: peak * power(factor, bisect_right(at, i)))
def multistep(peak: float, at: Sequence[Duration], factor: float = 0.1, warmup: Duration = 0) -> Schedule:
    """Stairs of unequal length: times `factor` at each update of `at`; at one that stands there twice, twice.

    torch: MultiStepLR(milestones=at, gamma=factor). `at` counts from the first update, warmup included. For:
    reproducing older work, sizes of a batch ([growth]). Not for: another length than that for which `at` was
    found, unless it is in %.

    >>> [multistep(1.0, at=(1, 4), factor=0.5)(i) for i in range(6)]
    [1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    """
    return in_order(make("multistep", peak=peak, at=at, factor=factor, warmup=warmup))


@kind(lambda i, peak, every, factor: peak * power(factor, i / every))
def exponential(peak: float, every: Duration, factor: float = 0.5, warmup: Duration = 0) -> Schedule:
    """Times `factor` in each `every` updates, smoothly: a half-life.

    torch: ExponentialLR(gamma=factor^(1/every)); it multiplies update by update, and drifts. For: numbers
    that change by a ratio. Not for: a known budget, at whose end it never arrives.

    >>> [exponential(1.0, every=2, factor=0.25)(i) for i in range(5)]
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    return make("exponential", peak=peak, every=every, factor=factor, warmup=warmup)


def _polynomial(i: int, peak: float, steps: int, end: float, power: float) -> float:
    if i >= steps:
        return end
    return end + (peak - end) * math.pow((steps - i) / steps, power) if i and peak != end else peak


@kind(_polynomial)
def polynomial(
    peak: float, steps: Duration, end: float = 0.0, power: float = 0.9, warmup: Duration = 0
) -> Schedule:
    """end + (peak - end)·(1 - i/steps)^power: a line where `power` is 1, below it above 1.

    torch: PolynomialLR(total_iters=steps, power), whose end is 0. Source: the "poly" policy of
    arXiv:1606.00915, with its power. For: a known budget. Not for: open lengths; a power that nobody chose,
    where linear says the same without one.

    >>> [polynomial(1.0, steps=4, power=2)(i) for i in range(6)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    return make("polynomial", peak=peak, steps=steps, end=end, power=power, warmup=warmup)


@kind(lambda i, peak, every: peak / (1 + i / every))
def inverse_time(peak: float, every: Duration, warmup: Duration = 0) -> Schedule:
    """peak/(1 + i/every): a half after `every` updates, a third after twice as many; it needs no length.

    What stochastic approximation asks of rates: their sum diverges, that of their squares does not. torch has
    none. Source: Robbins and Monro 1951; Bottou 2012, "Stochastic gradient descent tricks". Not for: a budget
    that is known, where a way to 0 at its end is better.

    >>> [inverse_time(1.0, every=2)(i) for i in (0, 2, 6)]
    [1.0, 0.5, 0.25]
    """
    return make("inverse_time", peak=peak, every=every, warmup=warmup)


@kind(lambda i, peak, every: peak / math.sqrt(1 + i / every))
def inverse_sqrt(peak: float, every: Duration, warmup: Duration = 0) -> Schedule:
    """peak/√(1 + i/every): a half after three times `every` updates; it needs no length.

    Source: arXiv:1706.03762, eq. 3: its `warmup_steps` w is every=w, warmup=w-1, and the peak then is
    (w·d_model)^-0.5. torch has none; others call `every` the time scale. Not for: a run of known length.

    >>> [inverse_sqrt(1.0, every=1)(i) for i in (0, 3, 15)]
    [1.0, 0.5, 0.25]
    """
    return make("inverse_sqrt", peak=peak, every=every, warmup=warmup)


@kind(lambda i, peak, steps, end: way(peak, end, i, steps, "cosine"))
def cosine(peak: float, steps: Duration, end: float = 0.0, warmup: Duration = 0) -> Schedule:
    """Half a cosine from `peak` to `end`.

    torch: CosineAnnealingLR(T_max=steps, eta_min=end), which climbs again behind T_max. Source: SGDR without
    restarts, arXiv:1608.03983, eq. 5. For: a known budget. Not for: a run that is cut short or goes on, nor
    comparing at half of it: half a cosine is not the cosine of half the length.

    >>> [round(cosine(1.0, steps=4)(i), 4) for i in range(6)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """
    return make("cosine", peak=peak, steps=steps, end=end, warmup=warmup)


@kind(
    lambda i, peak, steps, cooldown, end, shape="linear": way(
        peak, end, i - (steps - cooldown), cooldown, shape
    )
)
def wsd(
    peak: float,
    steps: Duration,
    warmup: Duration = 0,
    cooldown: Duration = "20 %",
    end: float = 0.0,
    shape: str = "linear",
) -> Schedule:
    """Warmup, stable, decay: `peak` until the last `cooldown` updates, then down to `end` over these.

    As good as a cosine of the same length, and its trunk can be cooled at any time. `shape` of the way down:
    linear, cosine, sqrt (1 - √x, the best in the source), or exponential (arXiv:2404.06395), which needs an
    end other than 0. Source: arXiv:2405.18392. torch has none. Not for: judging a run on its trunk, whose
    loss falls late, in the cooldown; runs whose cooldown is a handful of updates.

    >>> [wsd(1.0, steps=5, cooldown=2)(i) for i in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    numbers = {"peak": peak, "steps": steps, "warmup": warmup, "cooldown": cooldown, "end": end}
    return passable(make("wsd", **numbers, **unless_linear(shape)))


def unless_linear(shape: str) -> dict[str, str]:
    """Shape as it is written: not at all if linear, so that recipes older than shapes keep their hash."""
    return {} if shape == "linear" else {"shape": shape}


def passable(made: Schedule) -> Schedule:
    """The schedule, if it has no exponential way that leads to 0 or across it; else BadInput."""
    numbers, (low, high) = dict(made.numbers), made.bounds
    if numbers.get("shape") == "exponential" and low != high and (numbers["end"] == 0 or low * high < 0):
        with under("end"):
            raise BadInput(
                f"{made.kind}: an exponential way neither arrives at 0 nor crosses it: end must be on the "
                f"side of the level before, such as a hundredth of it, got {numbers['end']:g}."
            )
    return made
