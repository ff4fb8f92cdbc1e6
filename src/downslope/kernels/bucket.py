"""What executors are given: parameters with their slots, and what they must be able to do."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.errors import BadInput
from downslope.kernels.collective import Share, gradient_of, local
from downslope.kernels.words import compute_type, evaluate
from downslope.rules import noise as counter
from downslope.rules.fold import constants, fold
from downslope.rules.shape import shape_of_slot
from downslope.rules.slot import Slot
from downslope.rules.trace import Class, Node, Stage, Trace, scalars

Floats: TypeAlias = NDArray[np.float64]
Table: TypeAlias = Mapping[Node, Sequence[int]]
"""Streams of random numbers: for each word that draws, a key a parameter."""


@dataclass(frozen=True)
class Member:
    """A parameter as executors see it: the memory that lies here, of itself, its gradient and its slots."""

    name: str
    parameter: Any
    weight: Tensor
    slots: Mapping[str, Tensor]
    share: Share | None = None

    @classmethod
    def of(cls, name: str, parameter: Any, slots: Mapping[str, Any]) -> Member:
        """A member of a plain tensor or a DTensor, whose element slots are sharded alike."""
        share = Share(name, parameter) if hasattr(parameter, "placements") else None
        held = {slot: local(value) for slot, value in slots.items()}
        return cls(name, parameter, local(parameter.detach()) if share else parameter, held, share)

    @property
    def gradient(self) -> Tensor | None:
        """This step's gradient as it lies here, or None."""
        gradient: Tensor | None = self.parameter.grad
        if self.share is not None:
            return gradient_of(self.parameter)
        if gradient is not None and gradient.shape != self.weight.shape:
            mine, other = tuple(self.weight.shape), tuple(gradient.shape)
            raise BadInput(f"{self.name} has shape {mine}, its gradient {other}.")
        return gradient

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole parameter."""
        return self.share.shape if self.share else self.weight.shape

    def draw(self, node: Node, table: Table, place: int, dtype: torch.dtype) -> Tensor:
        """The random numbers of a word that draws, for the elements that lie here."""
        start = self.share.offset if self.share else 0
        index = np.arange(start, start + self.weight.numel(), dtype=np.uint64)
        drawn = counter.draw(node.word_name.removeprefix("noise:"), table[node][place], index)
        return torch.from_numpy(drawn).to(dtype).reshape(self.weight.shape).to(self.weight.device)


class Bucket(Protocol):
    """Parameters that one executor steps together. `index` are their places in the plan of the program,
    `lines` the lent arrays that it takes with a number a line.
    """

    index: NDArray[np.int64]
    members: list[Member]

    @property
    def lines(self) -> Container[str]: ...
    def gather(self, everyone: bool = False) -> NDArray[np.bool_] | None: ...
    def lay(self, arrays: Mapping[str, list[Tensor]]) -> None: ...
    def reduce(self, stage: Stage, leaves: Floats, noise: Table) -> tuple[Floats, NDArray[np.int64]]: ...
    def apply(self, stage: Stage, leaves: Floats, noise: Table) -> None: ...
    def release(self) -> None: ...


def folded(stage: Stage, leaves: Floats) -> Floats:
    """The scalars of a stage from its leaves, with as many rows: one a member of the program, or one for
    all.
    """
    known = constants([operand for node in stage.folded for operand in node.operands])
    known |= zip(stage.leaves, leaves.T, strict=True)
    fold(stage.folded, known)
    found = np.zeros((len(leaves), len(stage.scalars)))
    for place, node in enumerate(stage.scalars):
        found[:, place] = known[node]
    return found


class SparseGradientError(Exception):
    """A gradient that is no dense tensor, and its place in the bucket."""

    def __init__(self, place: int) -> None:
        super().__init__(f"the gradient in place {place} is sparse")
        self.place = place


def refuse_sparse(gradients: Sequence[Tensor | None]) -> None:
    """Raise SparseGradientError for the first gradient that is not dense."""
    for place, gradient in enumerate(gradients):
        if gradient is not None and gradient.layout is not torch.strided:
            raise SparseGradientError(place)


def initial(slot: Slot, parameter: Any, numbers: Mapping[str, float]) -> Any:
    """The tensor a slot starts as: of an element slot laid out, and sharded, like its parameter."""
    dtype = compute_type(parameter.dtype)
    value: Any = slot.initial
    if callable(value):
        value = _evaluated(value, parameter, numbers)
    if slot.per == "element":
        made = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return made.copy_(value) if isinstance(value, Tensor) else made.fill_(float(value))
    size = shape_of_slot(slot, parameter.shape)
    if slot.per == "tensor":
        return torch.full(size, float(value), dtype=torch.float64, device="cpu")
    if slot.per in ("left", "right"):
        return torch.eye(size[0], dtype=dtype, device=parameter.device) * float(value)
    return torch.full(size, float(value), dtype=dtype, device=parameter.device)


def _evaluated(initial: Any, parameter: Any, numbers: Mapping[str, float]) -> Any:
    tape = Trace()
    weight = tape.input("input", Class.ELEMENT, "p")
    value: Any = initial(weight, **numbers)
    if not isinstance(value, Node):
        return value
    dtype = compute_type(parameter.dtype)
    known: dict[Node, Tensor] = {weight: parameter.detach().to(dtype)}
    nodes = list(tape.nodes.values())
    folded = constants(nodes)
    fold(scalars(nodes), folded)
    for node, number in folded.items():
        known[node] = torch.tensor(float(number), dtype=dtype, device="cpu")
    evaluate(nodes, known)
    return known[value]
