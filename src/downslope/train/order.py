"""The order of samples: a pure function of seed, epoch and index, the same on every machine and version.

Every batch is full: what an epoch leaves over sits that epoch out (the next epoch has another order), and
data smaller than a batch is one batch. So every update averages over equally many samples, and BatchNorm
never meets a batch of one.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.errors import BadInput
from downslope.tasks import Task, size

_GAMMA = 0x9E3779B97F4A7C15


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Full batches in one pass over the data, at least 1. BadInput if there is nothing to make a batch of.

    >>> steps_per_epoch(898, 32), steps_per_epoch(20, 32)
    (28, 1)
    """
    if samples < 1 or batch_size < 1:
        raise BadInput(f"a batch needs at least 1 sample, got {samples} samples in batches of {batch_size}.")
    return max(samples // batch_size, 1)


def measures(task: Task, batch_size: int) -> dict[str, int | None]:
    """What a recipe's durations need to know of a task's data (see `ds.Recipe.rates`).

    >>> from downslope.tasks import task
    >>> measures(task("digits-mlp"), 32)
    {'steps_per_epoch': 28, 'tokens_per_sample': None}
    """
    return {
        "steps_per_epoch": steps_per_epoch(size(task.train), batch_size),
        "tokens_per_sample": task.tokens,
    }


def order(samples: int, seed: int, epoch: int) -> Tensor:
    """The indices of all samples (int64) in the order of that epoch: sorted by a hash of seed, epoch, index.

    >>> order(5, seed=0, epoch=0).tolist(), order(5, seed=0, epoch=1).tolist()
    ([1, 4, 3, 2, 0], [3, 2, 1, 0, 4])
    """
    start = _mixed(np.array([_mixed(np.array([seed], np.uint64))[0] ^ np.uint64(epoch)], np.uint64))[0]
    with np.errstate(over="ignore"):
        keys = _mixed(start + np.arange(1, samples + 1, dtype=np.uint64) * np.uint64(_GAMMA))
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection; every bit depends on all."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_GAMMA)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
