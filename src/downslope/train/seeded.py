"""Random numbers of a sample that depend on nothing but seed, epoch and index."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from downslope.errors import BadInput
from downslope.tasks.guest import guest
from downslope.train.random import Generators
from downslope.train.sampler import Index

_WORD = 2**64 - 1


class Seeded(Dataset[Any]):
    """A map-style dataset whose samples are drawn from (seed, epoch, index) alone: the same augmentation in
    any number of workers and ranks, persistent or not, and after a resume.

    While a sample is made, the global generators of python, numpy and torch (on the CPU) are seeded from its
    index, which must come from a `Sampler`; afterwards they are what they were. A generator of your own
    takes `index.key()`, which the dataset is given. It goes around everything else: `Seeded(Subset(...))`.
    Raises UserCodeError, naming index and epoch, where the dataset raises. Not for iterable datasets.

    >>> class Noise(Dataset):
    ...     def __getitem__(self, index):
    ...         return random.random()
    >>> Seeded(Noise())[Index(5, seed=0, epoch=1)]
    0.6682850688995619
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise BadInput(
                f"Seeded takes a dataset with __getitem__, got {type(dataset).__name__}, whose samples have "
                "no index."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast("Sequence[Any]", self.dataset))

    def __getitem__(self, index: Any) -> Any:
        with untouched():
            return self._drawn(index)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """A batch of samples, each as if alone; this is what a DataLoader calls."""
        with untouched():
            return [self._drawn(index) for index in indices]

    def _drawn(self, index: Any) -> Any:
        if not isinstance(index, Index):
            raise BadInput(
                f"sample {index!r} does not know its epoch: give the DataLoader batch_sampler=Sampler(...), "
                "and wrap what is outermost, as in Seeded(Subset(...))."
            )
        key = index.key()
        random.seed(key & _WORD)
        np.random.seed([key >> 64 & 0xFFFFFFFF, key >> 96 & 0xFFFFFFFF])
        torch.default_generator.manual_seed(key >> 128)
        with guest(f"sample {int(index)} of epoch {index.epoch}"):
            return self.dataset[index]


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever is drawn or seeded inside on the CPU, outside the global generators are as they were."""
    before = Generators(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())
    try:
        yield
    finally:
        before.restore()
