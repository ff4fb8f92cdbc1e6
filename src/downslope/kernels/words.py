"""The words of the language in torch, and how partial results of reductions become whole ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels import sums
from downslope.rules.trace import Node


def _maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a >= b) | (a != a), a, b)


def _minimum(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a <= b) | (a != a), a, b)


def _sign(a: Tensor) -> Tensor:
    return torch.where(a > 0, 1.0, torch.where(a < 0, -1.0, a))


TORCH_WORDS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "pow": torch.pow,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "isfinite": torch.isfinite,
    "where": lambda condition, a, b: torch.where(condition != 0, a, b),
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
}
"""The words of the language in torch, equal to `downslope.rules.value.WORDS` for NaN, infinities, -0 and ties
too.
"""


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter's step is computed and its state kept: its own, but at least float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def evaluate(nodes: Sequence[Node], known: dict[Node, Tensor], stored: torch.dtype = torch.float64) -> None:
    """Add the values of `nodes`, operands first, to `known`, which holds the inputs and scalars; `stored` is
    the dtype of the weight.
    """
    for node in nodes:
        if node not in known:
            operands = [known[operand] for operand in node.operands]
            if node.word_name == "dither":
                known[node] = dithered(operands[0], operands[1], stored)
            else:
                known[node] = TORCH_WORDS[node.word_name](*operands)


def dithered(x: Tensor, chance: Tensor, stored: torch.dtype) -> Tensor:
    """float32 numbers that the half-precision dtype `stored` can hold: rounded up with the chance that makes
    the mean right; what is larger than all of them stays, to be rounded to the nearest. Of other dtypes x
    itself.
    """
    if stored not in DROPPED:
        return x
    step = 1 << DROPPED[stored]
    raised = x.view(torch.int32) + (chance * step).to(torch.int32)
    found = (raised & -step).view(torch.float32)
    if stored is torch.float16:  # below its least normal number the steps of float16 stay as wide
        fine = torch.floor(x * 2.0**24 + chance) * 2.0**-24
        found = torch.where(x.abs() < 2.0**-14, fine, found)
    return torch.where(x.abs() <= torch.finfo(stored).max, found, x)


DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that a half-precision number does not keep."""


def reduced(name: str, values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A reduction along some axes, which stay with length 1; sums are taken in float64 where there is one."""
    if name == "total" and all(values.shape[axis] == 1 for axis in axes):
        return values  # the rows of a vector
    if name == "largest":
        empty = any(values.shape[axis] == 0 for axis in axes)
        return values.sum(axes, keepdim=True) if empty else values.abs().amax(axes, keepdim=True)
    if sums.takes(name, values, axes):
        return sums.reduce(name, values, axes)
    wide = values if values.device.type == "mps" else values.double()
    return (wide * wide if name == "squares" else wide).sum(axes, keepdim=True)


def combine(name: str, values: NDArray[np.float64]) -> np.float64:
    """Partial results as one number, the same in whatever order they come: few are added up exactly, many in
    order of size. NaN and infinities survive.
    """
    if name == "largest":
        return np.float64(np.max(values, initial=0.0))
    if len(values) <= _FEW:
        try:
            return np.float64(fsum(values.tolist()))
        except (OverflowError, ValueError):  # beyond the largest number, or infinities of both signs
            pass
    with np.errstate(all="ignore"):
        return np.float64(np.sort(values).sum())


_FEW = 64
"""Up to so many numbers are added up faster by Python than by NumPy."""
