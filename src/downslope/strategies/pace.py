"""The pace of a training: how many of the data's batches each update takes.

With it the two clocks of a training, updates and data, part: schedules and counters go by updates, and the
length in epochs, which is the work, by data.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import TypeAlias, cast

Rates: TypeAlias = dict[str, int | None]
"""What durations need to become batches, or updates: how many an epoch has, the items and tokens of one."""


class Pace:
    """Every update takes `each` batches.

    >>> pace = Pace(2)
    >>> pace.count(7), pace.taken(7), pace.updates(15), pace.rates({"steps_per_epoch": 30, "batch_size": 16})
    (2, 14, 7, {'steps_per_epoch': Fraction(15, 1), 'batch_size': 32})
    """

    def __init__(self, each: int = 1) -> None:
        self.each = each

    def count(self, step: int) -> int:
        """The batches that update `step`, from 0, takes."""
        return self.taken(step + 1) - self.taken(step)

    def taken(self, step: int) -> int:
        """The batches that the first `step` updates take together."""
        return step * self.each

    def updates(self, batches: int) -> int:
        """The most updates that together take no more than so many batches."""
        return batches // self.each

    def most(self, steps: int) -> int:
        """The most batches that one of the first `steps` updates takes."""
        return self.each

    def rates(self, batch: Rates) -> Rates:
        """What durations need, in updates: how many an epoch has, of how many items and tokens each.

        Given: the same in batches (see `ds.Recipe.per_batch`). None where updates differ.
        """
        epoch = (one := batch["steps_per_epoch"]) and cast("int", Fraction(one, self.each))
        return {key: one and one * self.each for key, one in batch.items()} | {"steps_per_epoch": epoch}


class Growing(Pace):
    """Each update takes the nearest whole number of batches to `times`, halves up, and one at least.

    `times` is asked at the update, from 0, or, `by_data`, at the batches that were taken before it.

    >>> from downslope.schedule import multistep
    >>> pace = Growing(multistep(1.0, at=[4], factor=3.0), by_data=True)
    >>> [pace.count(step) for step in range(6)], pace.taken(6), pace.updates(12)
    ([1, 1, 1, 1, 3, 3], 10, 6)
    """

    def __init__(self, times: Callable[[int], float], by_data: bool) -> None:
        self.times, self.by_data = times, by_data
        self._taken = array("q", [0])

    def taken(self, step: int) -> int:
        """The batches that the first `step` updates take together."""
        while len(self._taken) <= step:
            self._walk()
        return self._taken[step]

    def updates(self, batches: int) -> int:
        """The most updates that together take no more than so many batches."""
        while self._taken[-1] <= batches:
            self._walk()
        return bisect_right(self._taken, batches) - 1

    def most(self, steps: int) -> int:
        """The most batches that one of the first `steps` updates takes."""
        self.taken(steps)
        return max(after - before for before, after in pairwise(self._taken[: steps + 1]))

    def rates(self, batch: Rates) -> Rates:
        """None, since updates differ."""
        return dict.fromkeys(batch)

    def _walk(self) -> None:
        taken = self._taken[-1]
        self._taken.append(taken + whole(self.times(taken if self.by_data else len(self._taken) - 1)))


def whole(times: float) -> int:
    """The nearest whole number, halves up, and 1 at least.

    >>> whole(2.4), whole(2.5), whole(0.2)
    (2, 3, 1)
    """
    return max(1, math.floor(times + 0.5))
