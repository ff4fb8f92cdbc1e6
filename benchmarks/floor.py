"""The floor of a step: the time in which this machine streams the bytes that the trace says a step must move.

A pass over memory is imitated by in-place operations of torch on flat arrays, as many as the pass has, each
read and written as the pass reads and writes it: `a.add_(b)` reads two arrays and writes one, `a.mul_(c)`
reads and writes one, `a.copy_(b)` reads one and writes another, `a.sum()` reads one. An array that lasts
(weight, moment) is written where it was read. So the streamed bytes are exactly the trace's, and the
bandwidth is that of this mix of reads and writes, taken between the steps that it is compared to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from downslope.rules import Program

Share = tuple[Program, int]
"""A program, and how many numbers it steps."""

MOST = 6
"""How many flat arrays are held at most: a pass over more goes around them, which no cache notices."""

_held: dict[tuple[int, str], list[Tensor]] = {}


def bytes_of(shares: Sequence[Share]) -> int:
    """The bytes that a step moves by its trace."""
    return sum(program.bytes_moved * count for program, count in shares)


def release() -> None:
    """Let go of the flat arrays."""
    _held.clear()


def _arrays(count: int, device: str, wanted: int) -> Iterator[Tensor]:
    held = _held.setdefault((count, device), [])
    while len(held) < min(wanted, MOST):
        held.append(torch.full((count,), 1.0, device=device))
    place = 0
    while True:
        yield held[place % len(held)]
        place += 1


def _add(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: a.add_(b, alpha=1e-9)


def _scale(a: Tensor) -> Callable[[], object]:
    return lambda: a.mul_(0.999999)


def _copy(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: a.copy_(b)


def _fill(a: Tensor) -> Callable[[], object]:
    return lambda: a.fill_(1.0)


def _read(a: Tensor) -> Callable[[], object]:
    return lambda: a.sum()


def _operations(program: Program, count: int, device: str) -> Iterator[Callable[[], object]]:
    for stage in program.stages:
        loads, stores = set(stage.arrays), set(stage.stores)
        arrays = _arrays(count, device, len(loads | stores))
        lasting = [next(arrays) for _ in loads & stores]
        read = [next(arrays) for _ in loads - stores]
        written = [next(arrays) for _ in stores - loads]
        for target in lasting:
            yield _add(target, read.pop()) if read else _scale(target)
        for target in written:
            yield _copy(target, read.pop()) if read else _fill(target)
        for source in read:
            yield _read(source)
    arrays = _arrays(count, device, MOST)
    read_between, returned = program.lending
    yield from (_read(next(arrays)) for _ in range(read_between))
    yield from (_fill(next(arrays)) for _ in range(returned))


def stream(shares: Sequence[Share], device: str) -> Callable[[], None]:
    """A function that streams what a step of these programs must move."""
    operations = [run for program, count in shares for run in _operations(program, count, device)]

    def run() -> None:
        for operation in operations:
            operation()

    return run
