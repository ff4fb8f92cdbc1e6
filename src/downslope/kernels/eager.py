"""The eager executor: a program run word by word with torch, on any device and in any floating dtype. It
always works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.rules.slot import Slot
from downslope.rules.trace import Class, Node, Program, Stage, Trace, constants, fold, scalars

CHUNK = 32_768
"""Numbers per partial sum: below torch's grain of parallel reduction, so that thread count cannot change the
bits.
"""


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


def evaluate(nodes: Sequence[Node], known: dict[Node, Tensor]) -> None:
    """Add the values of `nodes`, operands first, to `known`, which holds the inputs and scalars."""
    for node in nodes:
        if node not in known:
            known[node] = TORCH_WORDS[node.word_name](*(known[operand] for operand in node.operands))


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


class EagerBucket:
    """Parameters stepped one by one with torch. `index` are their places among all parameters of the
    optimizer.
    """

    def __init__(
        self,
        program: Program,
        parameters: Sequence[Tensor],
        slots: Sequence[Mapping[str, Tensor]],
        index: Sequence[int],
    ) -> None:
        self.program, self.parameters, self.slots = program, list(parameters), list(slots)
        self.index = np.array(index, dtype=np.int64)
        self.gradients: list[Tensor | None] = []

    def gather(self) -> NDArray[np.bool_]:
        """Look up this step's gradients; which parameters have one."""
        self.gradients = [parameter.grad for parameter in self.parameters]
        refuse_sparse(self.gradients)
        return np.array([gradient is not None for gradient in self.gradients])

    def release(self) -> None:
        """Let go of the gradients."""
        self.gradients = []

    def reduce(
        self, stage: Stage, columns: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Partial results of the stage's reductions, one row a chunk, and the parameter that each row belongs
        to.
        """
        rows, owners = [], []
        for i, known in self._known(stage, columns):
            values = [
                known[node.operands[0]].expand_as(self.parameters[i]).reshape(-1).split(CHUNK)
                for node in stage.reductions
            ]
            for chunk in zip(*values, strict=True):
                rows.append(
                    [
                        _partial(node.word_name, part)
                        for node, part in zip(stage.reductions, chunk, strict=True)
                    ]
                )
                owners.append(self.index[i])
        return np.array(rows, dtype=np.float64).reshape(-1, len(stage.reductions)), np.array(
            owners, dtype=np.int64
        )

    def apply(self, stage: Stage, columns: NDArray[np.float64]) -> None:
        """Write the new weights and slots."""
        for i, known in self._known(stage, columns):
            for name, node in stage.stores.items():
                target = self.parameters[i] if name == "p" else self.slots[i][name]
                target.copy_(known[node])

    def _known(self, stage: Stage, columns: NDArray[np.float64]) -> Any:
        for i, gradient in enumerate(self.gradients):
            if gradient is None or not gradient.numel():
                continue
            dtype = compute_type(self.parameters[i].dtype)
            arrays = {"g": gradient, "p": self.parameters[i], **self.slots[i]}
            known = {
                n: torch.tensor(float(v), dtype=dtype)
                for n, v in zip(stage.scalars, columns[self.index[i]], strict=True)
            }
            for node in self._leaves(stage):
                if node.word_name == "constant":
                    known[node] = torch.tensor(float.fromhex(node.payload), dtype=dtype)
                else:
                    known[node] = arrays[node.payload].detach().to(dtype)
            evaluate(stage.elements, known)
            yield i, known

    @staticmethod
    def _leaves(stage: Stage) -> set[Node]:
        results = [*stage.stores.values(), *(node.operands[0] for node in stage.reductions)]
        nodes = [
            *results,
            *stage.elements,
            *(operand for node in stage.elements for operand in node.operands),
        ]
        return {node for node in nodes if node.word_name in ("input", "constant")}


def _partial(name: str, values: Tensor) -> float:
    if name == "squares":
        wide = values if values.device.type == "mps" else values.double()
        return float((wide * wide).sum())
    if name == "largest":
        return float(values.abs().max())
    return float(values.sum(dtype=None if values.device.type == "mps" else torch.float64))


def combine(name: str, values: NDArray[np.float64]) -> float:
    """Partial results added exactly, in whatever order they come; NaN and infinities survive."""
    if name == "largest":
        return float(np.max(values, initial=0.0))
    try:
        return math.fsum(values.tolist())
    except (OverflowError, ValueError):  # finite numbers that overflow, or infinities of both signs
        with np.errstate(all="ignore"):
            return float(np.sum(values))


def initial(slot: Slot, parameter: Tensor, numbers: Mapping[str, float]) -> Tensor:
    """The tensor a slot starts as, laid out in memory like its parameter."""
    if slot.per != "element":
        raise NotImplementedError(f"no executor keeps a slot per {slot.per} yet")
    dtype = parameter.dtype if slot.dtype == "parameter" else compute_type(parameter.dtype)
    if not callable(slot.initial):
        return torch.full_like(parameter, slot.initial, dtype=dtype, requires_grad=False)
    tape = Trace()
    weight = tape.input("input", Class.ELEMENT, "p")
    value: Any = slot.initial(weight, **numbers)
    if not isinstance(value, Node):
        return torch.full_like(parameter, float(value), dtype=dtype, requires_grad=False)
    known: dict[Node, Tensor] = {weight: parameter.detach().to(dtype)}
    nodes = list(tape.nodes.values())
    folded = constants(nodes)
    fold(scalars(nodes), folded)
    known.update({node: torch.tensor(float(number), dtype=dtype) for node, number in folded.items()})
    evaluate(nodes, known)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(known[value])
