"""The catalogue: the table of every built-in task, and how a task is found by its address."""

from dataclasses import replace
from typing import Protocol

from downslope.errors import BadInput, nearest
from downslope.tasks.clicks import clicks_deepfm
from downslope.tasks.definition import Task
from downslope.tasks.digits import digits_cnn, digits_factorisation, digits_lstm, digits_mlp, digits_resnet
from downslope.tasks.entry import Entry
from downslope.tasks.gan import digits_gan
from downslope.tasks.guest import load
from downslope.tasks.photo import photo_inr, photo_kmeans
from downslope.tasks.tables import cancer_logistic, cancer_svm, diabetes_lasso, diabetes_linear
from downslope.tasks.text import chars_transformer


class Maker(Protocol):
    """Makes a task, its data split by `seed`."""

    __name__: str

    def __call__(self, seed: int = 0) -> Task: ...


_MAKERS: tuple[Maker, ...] = (
    digits_mlp,
    digits_cnn,
    cancer_logistic,
    diabetes_linear,
    diabetes_lasso,
    cancer_svm,
    digits_factorisation,
    photo_kmeans,
    digits_resnet,
    digits_lstm,
    chars_transformer,
    clicks_deepfm,
    photo_inr,
    digits_gan,
)
_CATALOGUE = {make.__name__.replace("_", "-"): make for make in _MAKERS}


def tasks() -> dict[str, Maker]:
    """The built-in tasks by name.

    >>> list(tasks())[:3]
    ['digits-mlp', 'digits-cnn', 'cancer-logistic']
    """
    return dict(_CATALOGUE)


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
    if address not in _CATALOGUE:
        guess, known = nearest(address, _CATALOGUE), ", ".join(_CATALOGUE)
        raise BadInput(
            f"There is no task {address!r}.{guess} There are: {known}, and path/to/file.py:function."
        )
    return replace(_CATALOGUE[address](seed), name=address, entry=Entry(address, seed))


def reopen(entry: Entry, allow_code_change: bool = False) -> Task:
    """The task of an entry, as another process knew it; BadInput if the user's file is no longer the same."""
    if entry.own is None:
        return task(entry.address, entry.seed)
    return load(entry.address, entry.seed, "" if allow_code_change else entry.sha256)
