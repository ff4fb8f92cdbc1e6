"""Paired differences with intervals: what five repeats can and cannot tell apart. Plain Python, no scipy.

Every recipe of a final is trained from the same seeds, so two recipes are compared seed by seed: what the
seeds share (initial weights, order of samples) drops out. The interval is about fresh seeds on this very
validation part; it says nothing of other data, which is what the test part is there for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's t, by the finite sums for whole degrees of freedom (Abramowitz & Stegun
    26.7.3-4).

    >>> round(within(2.7764451052, 4), 9)
    0.95
    """
    angle = math.atan2(t, math.sqrt(freedom))
    return _within(math.sin(angle), math.cos(angle), angle, freedom)


def _within(sine: float, cosine: float, angle: float, freedom: int) -> float:
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(level: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = level, for Student's t with whole degrees of freedom; infinite for none.

    >>> round(quantile(0.95, 4), 4)
    2.7764
    """
    if freedom < 1:
        return math.inf
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        angle = (low + high) / 2
        if angle in (low, high):
            break
        if _within(math.sin(angle), math.cos(angle), angle, freedom) < level:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its interval; `low`, `high` are None where pairs are too few to tell."""

    mean: float
    low: float | None
    high: float | None

    @property
    def tied(self) -> bool:
        """Whether the interval holds 0, or is not known."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def paired(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95, comparisons: int = 1
) -> Difference:
    """Mean of ours - theirs, pair by pair, with a t interval, Bonferroni-widened to hold for all
    comparisons at once.

    The best of k recipes is picked by the same data that it is then compared on; k (k - 1) / 2 comparisons,
    all pairs, keep the promise of the level whichever turns out best. Fewer than two pairs: no interval.

    >>> paired([0.95, 0.96, 0.97], [0.95, 0.96, 0.97])
    Difference(mean=0.0, low=0.0, high=0.0)
    >>> paired([0.9, 0.7, 0.8], [0.96, 0.95, 0.99], comparisons=3).tied
    True
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return Difference(mean, None, None)
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1))
    half = quantile(1 - (1 - level) / comparisons, count - 1) * spread / math.sqrt(count)
    return Difference(mean, mean - half, mean + half)
