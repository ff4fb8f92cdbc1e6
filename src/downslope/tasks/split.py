"""Data of the built-in tasks: where it comes from, and how it is split, once, by seed.

The train part alone says how inputs are standardised.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor

from downslope.errors import BadInput


class Parts(TypedDict):
    """The columns of each part of the data, (inputs, targets) unless a task says otherwise."""

    train: tuple[Tensor, ...]
    valid: tuple[Tensor, ...]
    test: tuple[Tensor, ...]


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Imports of the extra `tasks`: a missing one is BadInput that says how to get it.

    >>> with needs("scikit-learn"):
    ...     import a_package_that_is_not_installed
    Traceback (most recent call last):
    downslope.errors.BadInput: The built-in tasks need scikit-learn: pip install 'downslope[tasks]'.
    """
    try:
        yield
    except ImportError:
        raise BadInput(f"The built-in tasks need {package}: pip install 'downslope[tasks]'.") from None


def stratified(load: str, seed: int) -> Parts:
    """The data of `sklearn.datasets.load`: half for training, a quarter each for validation and test.

    Inputs float32 [items, features], targets int64 [items]; every class has the same share of each part.
    """
    with needs("scikit-learn"):
        from sklearn import datasets
        from sklearn.model_selection import train_test_split

    def halves(x: Any, y: Any) -> list[Any]:
        split: list[Any] = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
        return split

    train_x, rest_x, train_y, rest_y = halves(*getattr(datasets, load)(return_X_y=True))
    valid_x, test_x, valid_y, test_y = halves(rest_x, rest_y)
    pairs = ((train_x, train_y), (valid_x, valid_y), (test_x, test_y))
    train, valid, test = ((torch.tensor(x).float(), torch.tensor(y).long()) for x, y in pairs)
    return Parts(train=train, valid=valid, test=test)


def shuffled(columns: tuple[Tensor, ...], seed: int) -> Parts:
    """Items in an order drawn from `seed`: half for training, a quarter each for validation and test.

    >>> parts = shuffled((torch.arange(8), torch.arange(8)), seed=0)
    >>> [len(part[0]) for part in parts.values()]
    [4, 2, 2]
    """
    count = len(columns[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def part(start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(column[order[start:stop]] for column in columns)

    half, most = count // 2, count // 2 + count // 4
    return Parts(train=part(0, half), valid=part(half, most), test=part(most, count))


def standardised(parts: Parts, shape: tuple[int, ...], by: tuple[int, ...]) -> Parts:
    """Items of this shape, zero mean and unit deviation over the dimensions `by` of the train part."""
    train = parts["train"][0].view(-1, *shape)
    mean, deviation = train.mean(dim=by, keepdim=True), train.std(dim=by, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1.0)  # what is constant stays at zero

    def scaled(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (part[0].view(-1, *shape) - mean) / deviation, *part[1:]

    return Parts(train=scaled(parts["train"]), valid=scaled(parts["valid"]), test=scaled(parts["test"]))
