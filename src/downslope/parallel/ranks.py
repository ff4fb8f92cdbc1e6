"""Ranks: the processes of one training, and what they agree on.

Whatever decides about the training is agreed on before it counts: every rank then holds the same state, bit
for bit, and does the same. Nothing that goes from rank to rank is unpickled: it is tensors, or JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from downslope.errors import BadInput, DownslopeError
from downslope.parallel.watchdog import PATIENCE

T = TypeVar("T")


class Lost(DownslopeError):  # noqa: N818  the sentence reads "lost: …"
    """Another rank ended, or did not answer in time: this one cannot go on, but the run can be resumed."""

    exit_code = 75  # EX_TEMPFAIL: start again


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` that train together; a single one talks to nobody.

    `shard`: the weights and what the optimizer keeps of them lie in parts on all ranks (FSDP2), else each has
    all of them (DDP). `patience`: seconds in which the others must answer. `control` is a process group for
    numbers on the CPU, `mesh` the ranks as FSDP2 takes them. All methods but `part` must be called by all
    ranks, in the same order; they raise Lost.

    >>> ALONE.leads, ALONE.part(5), ALONE.most(3, 0)
    (True, slice(0, 5, None), (3, 0))
    """

    rank: int = 0
    world: int = 1
    shard: bool = False
    patience: float = PATIENCE
    control: Any = field(default=None, repr=False, compare=False)
    mesh: Any = field(default=None, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @cached_property
    def together(self) -> bool:
        """Whether there is more than one."""
        return self.world > 1

    def part(self, count: int) -> slice:
        """Which of `count` items are this rank's; the parts of all ranks in order are all items.

        >>> [Ranks(rank, world=3).part(5) for rank in range(3)]
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
        """
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, the same bits on each."""
        if not self.together:
            return value
        total = value.detach().clone()
        with lost():
            dist.all_reduce(total)
        return total / self.world

    def most(self, *values: int) -> tuple[int, ...]:
        """The largest of each number over all ranks."""
        if not self.together:
            return values
        table = torch.tensor(values, dtype=torch.int64)
        with lost():
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self.control)
        return tuple(table.tolist())

    def rows(self, mine: Sequence[Sequence[float]]) -> list[list[float]]:
        """Rows of float64 numbers, equally many on every rank, taken in turn: the first of each rank, the
        second of each, and so on.
        """
        if not self.together:
            return [list(row) for row in mine]
        table = torch.tensor(mine, dtype=torch.float64)
        found = [torch.empty_like(table) for _ in range(self.world)]
        with lost():
            dist.all_gather(found, table, group=self.control)
        every: list[list[float]] = torch.stack(found, dim=1).flatten(0, 1).tolist()
        return every

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Put the values that rank 0 has into these tensors, which are whole on every rank."""
        held = list(tensors) if self.together else []
        for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in held):
            alike = [tensor for tensor in held if (tensor.dtype, tensor.device) == kind]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
            with lost():
                dist.broadcast(flat.view(torch.uint8), 0)  # gloo does not know every type
            parts = torch.split(flat, [tensor.numel() for tensor in alike])
            with torch.no_grad():
                for tensor, part in zip(alike, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def told(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, as plain JSON data; if that is BadInput, every rank raises it."""
        if not self.together:
            return decide()
        mine = _tried(decide) if self.leads else _Outcome()
        return cast("T", mine.of(self._spread(mine.text)))

    def each(self, act: Callable[[], T]) -> list[T]:
        """What every rank makes, as plain JSON data, in their order; `act` talks to no other rank. If it is
        BadInput on any, every rank raises it.
        """
        if not self.together:
            return [act()]
        mine = _tried(act)
        texts = self._gathered(mine.text)
        return [mine.of(text, f"rank {rank}: ") for rank, text in enumerate(texts)]

    def check_same(self, what: str, text: str) -> None:
        """BadInput, on every rank, unless all have the same text, which is an ASCII one such as a hash."""
        if not self.together:
            return
        theirs = self._spread(text.encode()).decode()
        (differs,) = self.most((theirs != text) * (self.rank + 1))
        if differs:
            raise BadInput(f"rank {differs - 1} has {what} other than rank 0: all must be given the same.")

    def meet(self) -> None:
        """Wait for all."""
        self.most(0)

    def _gathered(self, data: bytes) -> list[bytes]:
        """What every rank has, of any lengths."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with lost():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self.control)
            most = max(map(int, sizes))
            held = [torch.zeros(most, dtype=torch.uint8) for _ in sizes]
            mine = torch.frombuffer(bytearray(data.ljust(most)), dtype=torch.uint8)
            dist.all_gather(held, mine, group=self.control)
        return [table.numpy().tobytes()[: int(size)] for table, size in zip(held, sizes, strict=True)]

    def _spread(self, data: bytes) -> bytes:
        """What rank 0 has, of any length."""
        size = torch.tensor([len(data)])
        with lost():
            dist.broadcast(size, 0, group=self.control)
            held = torch.zeros(int(size), dtype=torch.uint8)
            if self.leads:
                held.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(held, 0, group=self.control)
        return held.numpy().tobytes()


@dataclass(frozen=True)
class _Outcome:
    """What came of something that a rank did, as JSON `text` for all, and what it raised."""

    text: bytes = b""
    raised: BaseException | None = None

    def of(self, text: bytes, who: str = "") -> Any:
        """The value that a text, this rank's or another's, stands for. Its own error comes first."""
        if self.raised is not None:
            raise self.raised
        found = json.loads(text)
        if "refused" in found:
            raise (BadInput if found["bad"] else Lost)(f"{who}{found['refused']}")
        return found["said"]


def _tried(act: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(json.dumps({"said": act()}).encode())
    except BaseException as error:  # whatever it is, the others must not wait for this rank
        refused = {"refused": str(error), "bad": isinstance(error, BadInput)}
        return _Outcome(json.dumps(refused).encode(), error)


ALONE = Ranks()
"""A training of one process."""


class lost:  # reads as what it is, a context: `with lost():`
    """What torch raises inside because another rank is gone becomes Lost, also where it is the cause of
    another error.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, Lost) or not isinstance(error, Exception):
            return
        if any(map(_about_ranks, (error, error.__cause__, error.__context__))):
            raise Lost(f"lost another rank: {str(error).strip().splitlines()[0][:200]}") from error


def _about_ranks(error: BaseException | None) -> bool:
    known = isinstance(error, dist.DistError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL")))
