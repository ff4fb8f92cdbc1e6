"""A batch sampler whose order is a function of seed, epoch and index, and which knows its place."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sized
from hashlib import blake2b
from typing import Any

import torch
import torch.utils.data
from torch import Tensor, distributed

from downslope.errors import BadInput
from downslope.train.order import order
from downslope.train.random import LARGEST_SEED


class Index(int):
    """The index of a sample that knows the seed and the epoch it is drawn in, in every worker process.

    >>> index = Index(7, seed=0, epoch=3)
    >>> index + 1, index.epoch, index.key() == Index(7, 0, 3).key()
    (8, 3, True)
    """

    seed: int
    epoch: int

    def __new__(cls, index: int, seed: int, epoch: int) -> Index:
        made = super().__new__(cls, index)
        made.seed, made.epoch = seed, epoch
        return made

    def __reduce__(self) -> tuple[type[Index], tuple[int, int, int]]:
        return Index, (int(self), self.seed, self.epoch)

    def key(self) -> int:
        """A number below 2^192 that is another one for every (seed, epoch, index): BLAKE2b of the three. A
        generator of your own takes it: `numpy.random.default_rng(index.key())`.
        """
        text = f"{self.seed} {self.epoch} {int(self)}".encode()
        return int.from_bytes(blake2b(text, digest_size=24).digest(), "little")


class Sampler(torch.utils.data.Sampler[list[int]]):
    """Batches of indices for `DataLoader(..., batch_sampler=...)`, in the order of `downslope.train.order`.

    `samples` is their number, or a dataset. `batch_size` counts the samples of one update on all ranks: each
    of `world` ranks gets a piece of every batch, and the pieces together are the same batch whatever the
    world, which is torch.distributed's unless given. What is left over at the end of an epoch sits it out, or
    is a smaller batch (`drop_last=False`); data smaller than a batch is one batch. `data` names the data, for
    instance by a hash: on resume another name is refused, as another number of samples is. An iteration goes
    on where the last one stopped, and moves on to the next epoch at its end. Used without `Batches`, its
    place is that of the last batch handed to the loader, which workers fetch ahead of the training. Not for:
    data without a length, such as an IterableDataset.

    >>> sampler = Sampler(10, batch_size=4, seed=1)
    >>> [len(batch) for batch in sampler], sampler.epoch
    ([4, 4], 1)
    """

    def __init__(
        self,
        samples: int | Sized,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        data: str = "",
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if isinstance(samples, Sized):
            samples = len(samples)
        self.samples = _whole("the number of samples", samples, 1)
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.seed = _whole("seed", seed, 0, LARGEST_SEED)
        if not isinstance(data, str):
            raise BadInput(f"data names the data by a text, such as a hash, got {type(data).__name__}.")
        self.shuffle, self.drop_last, self.data = bool(shuffle), bool(drop_last), data
        self.epoch, self.used = 0, 0
        self.counts = True  # whether iterating moves the place; Batches moves it itself
        if (rank is None) != (world is None):
            raise BadInput("rank and world belong together: give both, or neither.")
        self._given = None
        if rank is not None and world is not None:
            most = _whole("world", world, 1) - 1
            self._given = _whole(f"the rank of one of {most + 1}", rank, 0, most), most + 1
        self._checked()

    @property
    def share(self) -> tuple[int, int]:
        """(rank, world): as given, or torch.distributed's at this moment."""
        if self._given:
            return self._given
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    @property
    def position(self) -> int:
        """Batches of this epoch that are used up; `used` counts their samples."""
        return -(-self.used // self._size)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole, rest = divmod(self.samples, self._size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        return self._counted() if self.counts else self.ahead()

    def ahead(self) -> Iterator[list[int]]:
        """What this rank has still to take in this epoch; the place is not moved."""
        rank, world = self._checked()
        seed, epoch, size, left = self.seed, self.epoch, self._size, self._left()

        def pieces() -> Iterator[list[int]]:
            for start in range(0, len(left), size):
                batch = left[start : start + size]
                mine = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]
                yield [Index(index, seed, epoch) for index in mine.tolist()]

        return pieces()

    def advance(self) -> None:
        """One more batch is used up."""
        self.used = min(self.used + self._size, self.samples)

    def turn(self) -> None:
        """The epoch is over: the next one begins."""
        self.seek(self.epoch + 1)

    def seek(self, epoch: int, position: int = 0) -> None:
        """Go to the batch at `position` of an epoch; both count from 0."""
        self.epoch = _whole("an epoch", epoch, 0)
        self.used = min(_whole("a position", position, 0, len(self)) * self._size, self.samples)

    def state_dict(self) -> dict[str, Any]:
        """The place and what it depends on, as plain data: the same on every rank."""
        return {"epoch": self.epoch, "used": self.used, "batch_size": self.batch_size, **self._fixed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the place that was saved, on any number of ranks.

        Another batch size is told by a warning: the epoch goes on with the next sample. BadInput where the
        number or the name of the data, the seed or the order is another: those have no such place.
        """
        try:
            theirs = {name: state[name] for name in self._fixed()}
            size, epoch, used = (_whole(name, state[name], 0) for name in ("batch_size", "epoch", "used"))
        except (KeyError, TypeError) as error:
            raise BadInput(f"this is not the state of a Sampler: {error!r}.") from None
        told = [
            f"{name} {theirs[name]!r} then and {mine!r} now"
            for name, mine in self._fixed().items()
            if theirs[name] != mine
        ]
        if told:
            raise BadInput(
                f"the order of samples is not the saved one: {', '.join(told)}. To begin an epoch with "
                f"what is there now, call seek({epoch + 1}) instead of loading."
            )
        _whole("used", used, 0, self.samples)
        if size != self.batch_size:
            warnings.warn(
                f"batch_size was {size} and is {self.batch_size}: epoch {epoch} goes on after {used} of "
                f"{self.samples} samples in batches of {self.batch_size}.",
                stacklevel=2,
            )
        self.epoch, self.used = epoch, used

    @property
    def _size(self) -> int:
        return min(self.batch_size, self.samples)

    def _fixed(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "data": self.data,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def _left(self) -> Tensor:
        """The samples of this epoch from the place on that come in a batch."""
        drawn = order(self.samples, self.seed, self.epoch) if self.shuffle else torch.arange(self.samples)
        over = (self.samples - self.used) % self._size if self.drop_last else 0
        return drawn[self.used : self.samples - over]

    def _counted(self) -> Iterator[list[int]]:
        for piece in self.ahead():
            self.advance()
            yield piece
        self.turn()

    def _checked(self) -> tuple[int, int]:
        """(rank, world). BadInput if a batch of this epoch is too small to be shared."""
        rank, world = self.share
        last = 0 if self.drop_last else (self.samples - self.used) % self._size
        smallest = last or self._size
        if smallest < world:
            cure = "drop_last=True, or another batch_size" if last else "a larger batch_size, or fewer ranks"
            raise BadInput(f"a batch of {smallest} cannot be shared by {world} ranks: take {cure}.")
        return rank, world


def _whole(what: str, value: Any, least: int, most: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise BadInput(f"{what} is a whole number {limit}, got {value!r}.")
    return number
