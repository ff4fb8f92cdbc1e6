"""Samples: tensors in memory, indexed by whole batches, or a map-style Dataset, collated sample by sample."""

from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from downslope.errors import BadInput

Batch: TypeAlias = Any
"""What loss and metric receive: a tuple of tensors, items first, or what `default_collate` makes."""


class Samples(Protocol):
    """A map-style dataset: a length, and the sample at an index from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Data: TypeAlias = tuple[Tensor, ...] | Samples


def checked(data: object, part: str) -> Data:
    """`data` as the package reads it; BadInput names the `part` (train, valid, test) that is not samples."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if (
        isinstance(data, tuple)
        and data
        and all(isinstance(column, Tensor) and column.ndim for column in data)
    ):
        lengths = [column.shape[0] for column in data]
        if len(set(lengths)) > 1:
            raise BadInput(f"The tensors of {part!r} must have equal first dimensions, got {lengths}.")
    elif isinstance(data, Tensor | tuple | str) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        allowed = "a tuple of tensors, items first, such as (inputs, targets), or a map-style Dataset"
        raise BadInput(f"{part!r} must be {allowed}, got {type(data).__name__}.")
    if size(data) == 0:
        raise BadInput(f"{part!r} holds no samples.")
    return data


def size(data: Data) -> int:
    """The number of samples.

    >>> import torch
    >>> size((torch.zeros(5, 2), torch.zeros(5)))
    5
    """
    return int(data[0].shape[0]) if isinstance(data, tuple) else len(data)


def take(data: Data, indices: Tensor) -> Batch:
    """The batch of the samples at `indices` (int64, one dimension), in that order.

    >>> import torch
    >>> take((torch.arange(5), torch.arange(5) * 10), torch.tensor([3, 0]))
    (tensor([3, 0]), tensor([30,  0]))
    """
    if isinstance(data, tuple):
        return tuple(column[indices] for column in data)
    return default_collate([data[index] for index in indices.tolist()])
