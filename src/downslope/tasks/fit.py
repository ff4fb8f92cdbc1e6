"""Fits with a known optimum: how far above it the objective still is.

A fit explains the data it has and predicts nothing, so all samples are train and valid alike, and there is no
test part: what is judged is the optimisation alone.
"""

from typing import Any

from torch import Tensor, nn

from downslope.tasks.data import Batch
from downslope.tasks.definition import Loss, Metric, Task


def excess(objective: Loss, optimum: float) -> Metric:
    """The metric (objective - optimum) / optimum: 0 at the optimum, 1e-3 where it is missed by 0.1 %.

    Not for: an optimum of 0, to which nothing is relative.

    >>> excess(lambda model, batch: 1.5, optimum=1.0)(None, None)
    0.5
    """

    def metric(model: nn.Module, batch: Batch) -> Tensor | float:
        return objective(model, batch) / optimum - 1

    return metric


def fit(
    data: tuple[Tensor, ...],
    *,
    loss: Loss,
    objective: Loss,
    optimum: float,
    **given: Any,
) -> Task:
    """The task of bringing `objective` down to its `optimum`, on all samples of `data`.

    `objective` is the loss plus what proximal links of the recipe penalise. `given`: the other fields of a
    Task, such as model, target and recipe.
    """
    return Task(
        train=data,
        valid=data,
        loss=loss,
        metric=excess(objective, optimum),
        metric_name="excess over the optimum",
        higher_is_better=False,
        **given,
    )
