"""The figures of the fault matrix: in how many cases a row's fault is planted, here and in `make faults`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import pytest

SEED = 20261124
PATIENCE = 1200
"""Seconds for the share of a row, on a busy machine."""
Item = TypeVar("Item")


@dataclass
class Figure:
    """So many cases of a row, or every `share`-th of all there are; `done` are those that came to an end."""

    row: str
    count: int | None
    share: int = 1
    seed: int = SEED
    done: int = 0

    @property
    def cases(self) -> int:
        """The count, where it does not depend on what is found there."""
        assert self.count is not None
        return self.count

    def draws(self) -> Iterator[tuple[int, Random]]:
        """The number of each case and a generator that is its own, so that one case can be repeated alone."""
        for number in range(self.cases):
            yield number, Random(f"{self.seed} {number}")
            self.done += 1

    def of(self, every: Sequence[Item]) -> Iterator[Item]:
        """Of all cases there are, the share that is taken."""
        for item in every[:: self.share]:
            yield item
            self.done += 1

    @property
    def whole(self) -> bool:
        """Whether no case was left out."""
        return self.done == self.count if self.count is not None else self.done > 0

    def __str__(self) -> str:
        return f"{self.row}: {self.done} cases, seed {self.seed}"


def row(name: str, full: int | None, *, every_day: bool = False, slow: bool = False) -> pytest.MarkDecorator:
    """The test takes a `figure`: `full` cases (None: all there are) in `make faults`, elsewhere a tenth of
    them, or all `every_day`. `slow`: even that takes more than some seconds.
    """
    share = 1 if every_day else 10
    part = None if full is None else -(-full // share)
    marks = [pytest.mark.slow, pytest.mark.timeout(PATIENCE)] if slow else []
    return pytest.mark.parametrize(
        "figure",
        [
            pytest.param(Figure(name, part, share), id="daily", marks=marks),
            pytest.param(Figure(name, full), id="full", marks=pytest.mark.faults),
        ],
    )
