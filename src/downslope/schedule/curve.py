"""Curves: the ways from one level to another that the kinds share."""

import math
import sys
from collections.abc import Callable, Mapping

LARGEST = sys.float_info.max

CURVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    # (1 - cos πx)/2 as sin²(πx/2), which loses no digits near the start.
    "cosine": lambda x: math.sin(math.pi / 2 * x) ** 2,
    "sqrt": math.sqrt,
}
"""The share of the way that is behind, by the share of the time that is."""


def way(start: float, end: float, i: int, steps: int, shape: str = "linear") -> float:
    """The level after `i` of `steps` updates; exact at both ends, and where they are equal in between too.

    An exponential way falls by the same factor in each update: its ends have one sign, and none is 0.

    >>> way(1.0, 0.01, 1, 2, "exponential"), way(1.0, 0.0, 1, 4, "sqrt")
    (0.1, 0.5)
    """
    if i >= steps:
        return end
    if i <= 0 or start == end:
        return start
    if shape == "exponential":
        return start * math.pow(end / start, i / steps) if start else start
    share = CURVES[shape](i / steps)
    return start + (end - start) * share if share < 1 else end


def power(factor: float, exponent: float) -> float:
    """factor^exponent, or the largest float."""
    try:
        return math.pow(factor, exponent)
    except OverflowError:
        return LARGEST


def finite(value: float) -> float:
    """What grows stops at the largest float: it must not raise, nor become NaN, in the middle of a run."""
    return max(-LARGEST, min(LARGEST, value))
