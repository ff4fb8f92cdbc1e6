"""The kind that reacts: a cut where what is observed stops getting better."""

import math
from typing import Any

from downslope.errors import BadInput, under
from downslope.schedule.curve import power
from downslope.schedule.duration import Duration
from downslope.schedule.schedule import Schedule, Seen, kind, make


def _bar(best: float, threshold: float, mode: str) -> float:
    """What the next has to be below, to count as better than the best."""
    if math.isinf(best):
        return best
    return best - threshold if mode == "abs" else best * (1 - math.copysign(threshold, best))


def _cuts(
    i: int, seen: Seen, patience: int, threshold: float, threshold_mode: str, mode: str, cooldown: int
) -> int:
    """How often what was seen by the update `i` has stopped getting better."""
    sign = 1.0 if mode == "min" else -1.0
    best, waited, resting, cuts, last = math.inf, 0, 0, 0, 0
    for place, value in seen:
        if place < last:
            raise BadInput(
                f"plateau: observations must be in the order of their steps, got {place} behind {last}."
            )
        if place > i:
            break
        last, now = place, sign * float(value)
        if now < _bar(best, threshold, threshold_mode):
            best, waited = now, 0
        else:
            waited += 1
        if resting:
            resting, waited = resting - 1, 0
        if waited > patience:
            cuts, resting, waited = cuts + 1, cooldown, 0
    return cuts


def _plateau(i: int, seen: Seen, peak: float, factor: float, end: float, **patience: Any) -> float:
    reached = peak * power(factor, _cuts(i, seen, **patience))
    return max(reached, end) if peak >= 0 else min(reached, end)


@kind(_plateau)
def plateau(
    peak: float,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    mode: str = "min",
    cooldown: int = 0,
    end: float = 0.0,
    warmup: Duration = 0,
) -> Schedule:
    """`peak`, times `factor` whenever more than `patience` observations in a row are no better than the best,
    down to `end`.

    A pure function of the step and of what was `seen` by then. Patience and cooldown count observations,
    however many updates lie between; what is seen in the warmup does not count; NaN is never better. torch:
    ReduceLROnPlateau, same names, min_lr=end, eps=0; but where the best is below 0, its "rel" takes worse for
    better, and this asks for progress. Not for: noisy observations with a short patience, known budgets.

    >>> stuck = [(10, 2.0), (20, 1.0), (30, 1.0), (40, 1.0), (50, 0.5)]
    >>> [plateau(1.0, patience=1)(i, stuck) for i in (0, 30, 39, 40, 90)]
    [1.0, 1.0, 1.0, 0.1, 0.1]
    """
    watched = {"patience": patience, "threshold": threshold, "threshold_mode": threshold_mode, "mode": mode}
    made = make("plateau", peak=peak, factor=factor, **watched, cooldown=cooldown, end=end, warmup=warmup)
    numbers = dict(made.numbers)
    if abs(numbers["end"]) > abs(numbers["peak"]) or numbers["end"] * numbers["peak"] < 0:
        with under("end"):
            raise BadInput(
                f"plateau: end must lie between 0 and peak = {numbers['peak']:g}, got {numbers['end']:g}."
            )
    return made
