"""The geometry of a weight: the matrix and the lines that rules see in it, and the shapes of its slots."""

from __future__ import annotations

import math
from collections.abc import Sequence

from downslope.rules.slot import Slot
from downslope.rules.value import LINES


def view(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which lines and matrices see a weight: of one dimension or none, it is a column."""
    return tuple(shape) if len(shape) > 1 else (math.prod(shape), 1)


def lines(over: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of the view that a line runs along."""
    seen = len(view(shape))
    if over == "unit":
        return tuple(range(1 if len(shape) > 1 else 0, seen))
    return (seen - 1 if over == "row" else seen - 2,)


def spanned(part: Sequence[int], whole: Sequence[int]) -> tuple[int, int] | None:
    """(span, run) of an array that has length 1 along some axes of a view: the element at `flat` of the view
    reads its entry at `flat // span * run + flat % run`. None where no such numbers are.
    """
    if tuple(part) == tuple(whole):
        return max(math.prod(whole), 1), max(math.prod(whole), 1)
    lost = [axis for axis, size in enumerate(whole) if part[axis] != size]
    if lost == list(range(lost[0], len(whole))):
        return math.prod(whole[lost[0] :]), 1
    return (whole[-2] * whole[-1], whole[-1]) if lost == [len(whole) - 2] else None


def counted(over: str, shape: Sequence[int]) -> float:
    """How many elements a scope holds, or how many rows, columns and dimensions the weight has. A line of no
    elements counts as one of one, so that the mean of nothing is 0.
    """
    seen = view(shape)
    if over in LINES:
        return float(max(math.prod([seen[axis] for axis in lines(over, shape)]), 1))
    of = {"dimensions": len(shape), "rows": seen[0], "columns": math.prod(seen[1:])}
    return float(of.get(over, math.prod(seen)))


def shape_of_slot(slot: Slot, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that a slot of a weight of this shape has."""
    if slot.per == "element":
        return tuple(shape)
    if slot.per == "tensor":
        return ()
    if slot.per in LINES:
        along = lines(slot.per, shape)
        return tuple(1 if axis in along else size for axis, size in enumerate(view(shape)))
    side = int(counted("rows" if slot.per == "left" else "columns", shape))
    return (side, side)
