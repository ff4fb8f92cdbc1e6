"""The batches of a training by number: which samples, and the samples themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from downslope.tasks import Batch, Data, Task, guest, size, take
from downslope.train.order import order, steps_per_epoch
from downslope.train.weights import moved

_BLOCK = 2**20  # bytes that are taken together


class Reader:
    """The train part of a task in batches of `batch_size`, numbered from a training's first; tensors in
    memory lie on `device`.

    Of those, several batches are taken together, and a batch is a part of what was taken: on small data that
    takes a quarter of the time. Where such a block begins depends on the number alone and not on where a
    training was resumed, because how memory is aligned can show in the last bit.

    >>> from downslope.tasks import task
    >>> reader = Reader(task("digits-mlp"), seed=0, batch_size=32, device=torch.device("cpu"))
    >>> images, labels = reader.batch(0)
    >>> images.shape, bool((labels == reader.taken(reader.indices(0))[1]).all())
    (torch.Size([32, 64]), True)
    """

    def __init__(self, task: Task, seed: int, batch_size: int, device: torch.device) -> None:
        self.seed, self.batch_size, self.device = seed, batch_size, device
        self.in_memory = isinstance(task.train, tuple)
        self.data: Data = moved(task.train, device) if self.in_memory else task.train
        self.samples = size(task.train)
        self.per_epoch = steps_per_epoch(self.samples, batch_size)
        self._guarded = guest(f"The data of {task.name or 'the task'}")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._block: tuple[int, list[Batch]] = (-1, [])
        self._together = 1
        if isinstance(self.data, tuple):
            each = sum(column.nbytes for column in self.data) * batch_size // self.samples
            self._together = max(1, min(self.per_epoch, _BLOCK // max(each, 1)))

    def indices(self, number: int, batches: int = 1) -> Tensor:
        """The samples of batch `number`, and of those behind it in its epoch up to so many."""
        epoch, position = divmod(number, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, order(self.samples, self.seed, epoch))
        last = min(position + batches, self.per_epoch)
        return self._order[1][position * self.batch_size : last * self.batch_size]

    def batch(self, number: int) -> Batch:
        """Batch `number`."""
        if not isinstance(self.data, tuple):
            return self.taken(self.indices(number))
        within = number % self.per_epoch % self._together
        first = number - within
        if self._block[0] != first:
            columns = self.taken(self.indices(first, self._together))
            parts = (column.split(self.batch_size) for column in columns)
            self._block = (first, list(zip(*parts, strict=True)))
        return self._block[1][within]

    def taken(self, indices: Tensor) -> Batch:
        """The samples at some indices as one batch, on the device. UserCodeError for what the data raise."""
        with self._guarded:
            batch = take(self.data, indices)
        return batch if self.in_memory else moved(batch, self.device)

    def first(self, count: int) -> Iterator[Batch]:
        """The first batches of the training, in the order of its first pass; no more than that has. They are
        copies: what a model does to them in place, the training does not see.
        """
        yield from (self.taken(self.indices(number)) for number in range(min(count, self.per_epoch)))

    def everything(self) -> Iterator[Batch]:
        """Every sample once, in the order of the data, in batches, the last of which may be shorter."""
        for start in range(0, self.samples, self.batch_size):
            yield self.taken(torch.arange(start, min(start + self.batch_size, self.samples)))
