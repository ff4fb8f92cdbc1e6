"""The built-in tasks: real data that ships with scikit-learn, split once by seed.

The train part alone says how inputs are standardised. A new task is one function here.
"""

from dataclasses import replace
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from downslope.errors import BadInput, nearest
from downslope.tasks.definition import Task, accuracy, cross_entropy, plain_recipe
from downslope.tasks.entry import Entry
from downslope.tasks.guest import load


class Maker(Protocol):
    """Makes a task, its data split by `seed`."""

    def __call__(self, seed: int = 0) -> Task: ...


class Parts(TypedDict):
    """(inputs, targets) of each part of the data."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


_catalogue: dict[str, Maker] = {}


def tasks() -> dict[str, Maker]:
    """The built-in tasks by name.

    >>> list(tasks())
    ['digits-mlp', 'digits-cnn', 'cancer-logistic']
    """
    return dict(_catalogue)


def task(address: str, seed: int = 0) -> Task:
    """The task of that name or `path/to/file.py:function`, its data split by `seed`.

    Raises BadInput for an unknown name, a wrong address or a missing extra, UserCodeError for what the
    user's code raises.

    >>> task("digits-cn")
    Traceback (most recent call last):
    downslope.errors.BadInput: There is no task 'digits-cn'. Did you mean 'digits-cnn'? ...
    """
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed must be a whole number from 0, below 2**32, got {seed}.")
    if Entry(address).own or ".py" in address:
        return load(address, seed)
    if address not in _catalogue:
        guess, known = nearest(address, _catalogue), ", ".join(_catalogue)
        raise BadInput(
            f"There is no task {address!r}.{guess} There are: {known}, and path/to/file.py:function."
        )
    return replace(_catalogue[address](seed), name=address, entry=Entry(address, seed))


def reopen(entry: Entry, allow_code_change: bool = False) -> Task:
    """The task of an entry, as another process knew it; BadInput if the user's file is no longer the same."""
    found = task(entry.address, entry.seed)
    if found.entry != entry and not allow_code_change:
        raise BadInput(
            f"The task file of {entry.address} has changed since this run began; resume it with the old file."
        )
    return found


def _built_in(make: Maker) -> Maker:
    _catalogue[make.__name__.replace("_", "-")] = make  # type: ignore[attr-defined]  # a function
    return make


def _split(load: str, seed: int) -> Parts:
    """Half for training, a quarter each for validation and test; every class has the same share of each."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise BadInput("The built-in tasks need scikit-learn: pip install 'downslope[tasks]'.") from None

    def halves(x: Any, y: Any) -> list[Any]:
        split: list[Any] = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
        return split

    train_x, rest_x, train_y, rest_y = halves(*getattr(datasets, load)(return_X_y=True))
    valid_x, test_x, valid_y, test_y = halves(rest_x, rest_y)
    pairs = ((train_x, train_y), (valid_x, valid_y), (test_x, test_y))
    train, valid, test = ((torch.tensor(x).float(), torch.tensor(y).long()) for x, y in pairs)
    return Parts(train=train, valid=valid, test=test)


def _standardised(parts: Parts, shape: tuple[int, ...], by: tuple[int, ...]) -> Parts:
    """Items of this shape, zero mean and unit deviation over the dimensions `by` of the train part."""
    train = parts["train"][0].view(-1, *shape)
    mean, deviation = train.mean(dim=by, keepdim=True), train.std(dim=by, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1.0)  # what is constant stays at zero

    def scaled(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (part[0].view(-1, *shape) - mean) / deviation, part[1]

    return Parts(train=scaled(parts["train"]), valid=scaled(parts["valid"]), test=scaled(parts["test"]))


def _stage(channels: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


@_built_in
def digits_mlp(seed: int = 0) -> Task:
    """8 x 8 digits by a perceptron with two hidden layers of 64: the quickest task."""
    return Task(
        **_standardised(_split("load_digits", seed), shape=(64,), by=(0, 1)),
        model=lambda: nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        loss=cross_entropy,
        metric=accuracy,
        target=0.975,
        reference="downslope train digits-mlp --seed S, S = 0 to 4: mean accuracy 0.961, on test 0.963",
    )


@_built_in
def digits_cnn(seed: int = 0) -> Task:
    """8 x 8 digits by two convolutions with BatchNorm: about a second of one core to train."""
    return Task(
        **_standardised(_split("load_digits", seed), shape=(1, 8, 8), by=(0, 1, 2, 3)),
        model=lambda: nn.Sequential(*_stage(1, 16), *_stage(16, 32), nn.Flatten(), nn.Linear(128, 10)),
        loss=cross_entropy,
        metric=accuracy,
        target=0.99,
        reference="downslope train digits-cnn --seed S, S = 0 to 4: mean accuracy 0.982, on test 0.984",
    )


@_built_in
def cancer_logistic(seed: int = 0) -> Task:
    """Breast cancer, 30 features, by logistic regression: convex, and judged by its loss."""
    return Task(
        **_standardised(_split("load_breast_cancer", seed), shape=(30,), by=(0,)),
        model=lambda: nn.Linear(30, 2),
        loss=cross_entropy,
        metric_name="log loss",
        target=0.07,
        reference="downslope train cancer-logistic --seed S, S = 0 to 4: mean log loss 0.074, on test 0.104",
        recipe=plain_recipe(rate=0.03),
    )
