"""Which positions count, and means over them.

A position is what has one target: an item of a classifier, a token of a language model. Every loss is a sum
over the counted positions divided by a count, so that micro-batches with the count of the whole batch add up
to it.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from downslope.errors import BadInput

Count: TypeAlias = float | Tensor | None
"""By what a sum is divided: None for the positions counted here, or those of the whole accumulated batch."""


def counted(targets: Tensor | None, shape: tuple[int, ...], ignore_index: int) -> Tensor | None:
    """A mask [*shape] of the positions whose whole-number target is not `ignore_index`; None where all count.

    BadInput where `targets` are whole numbers of another shape.
    """
    if targets is None or targets.is_floating_point():
        return None
    if targets.shape != shape:
        raise BadInput(
            f"Targets of shape {list(targets.shape)} name no class for each position of {list(shape)}; "
            "logits have their classes last: [..., classes] (torch's [N, C, d] as logits.movedim(1, -1))."
        )
    return targets != ignore_index


def blank(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` [*positions, ...] in at least float32, 0 where not counted: NaN there reaches no gradient."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if mask is None:
        return values
    return values.masked_fill(~mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim)), 0)


def mean(terms: Tensor, mask: Tensor | None, count: Count = None) -> Tensor:
    """The sum of the counted `terms` over `count`; 0 with a gradient of zero where none is counted."""
    own = terms.numel() if mask is None else mask.sum()
    total = (terms if mask is None else torch.where(mask, terms, 0)).sum()
    return total / _at_least_one(own if count is None else count)


def shared(value: Tensor, own: int | Tensor, count: Count) -> Tensor:
    """The mean `value` over `own` positions as its part of a mean over `count` of them."""
    return value if count is None else value * own / _at_least_one(count)


def _at_least_one(count: float | Tensor) -> float | Tensor:
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    if not count >= 0:
        raise BadInput(f"count must be a number of positions, at least 0, got {count}.")
    return max(count, 1)
