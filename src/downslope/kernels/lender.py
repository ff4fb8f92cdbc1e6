"""What elementwise code cannot do, lent to torch between two passes: lines, and whole matrices in batches.

Weights of one shape are one batch: the scratch memory that a pass writes for torch is one tensor with a
matrix a weight, so nothing is copied to be batched, and what comes back is read by the next pass from there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels.bucket import Member
from downslope.kernels.words import TORCH_WORDS, reduced
from downslope.rules.matrix_words import NEWTON_SCHULZ, STEPS
from downslope.rules.shape import counted, lines, spanned, view
from downslope.rules.trace import Class, Node, Program
from downslope.rules.value import LINES


def _orthogonalise(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    x = x * (1 / size.clamp(min=1e-7)).to(x.dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: Tensor = x.mT if tall else x
    return found


def _inverse_root(x: Tensor, order: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    found: Tensor = (vectors * values.pow(-1 / order.squeeze(-1)).unsqueeze(-2)) @ vectors.mT
    return found


def _shrink_units(p: Tensor, rate: Tensor, amount: Tensor) -> Tensor:
    units = p.mT if p.shape[-1] == 1 else p  # a vector is one unit
    scale = (amount * rate).expand_as(p)
    scale = scale.mT if p.shape[-1] == 1 else scale

    def size_at(middle: Tensor | float) -> Tensor:
        return (units / (middle + scale).clamp(min=1e-300)).square().sum(-1, keepdim=True)

    alive = size_at(0.0) > 1
    high = units.square().sum(-1, keepdim=True).sqrt()
    low = torch.zeros_like(high)
    for _ in range(100):
        middle = (low + high) / 2
        below = size_at(middle) > 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    size = (low + high) / 2
    kept = torch.where(scale > 0, size / torch.where(scale > 0, size + scale, 1.0), 1.0)
    return torch.where(alive, units * kept, 0.0).reshape(p.shape)


def _shrink_singular(p: Tensor, amount: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(p, full_matrices=False)
    found: Tensor = (left * (values - amount.squeeze(-1)).clamp(min=0).unsqueeze(-2)) @ right
    return found


TORCH_MATRIX_WORDS: dict[str, Callable[..., Tensor]] = {
    "transpose": lambda x: x.mT,
    "matmul": torch.matmul,
    "orthogonalise": _orthogonalise,
    "inverse_root": _inverse_root,
    "eigenbasis": lambda x: torch.linalg.eigh(x)[1].flip(-1),
    "orthonormal": lambda x: torch.linalg.qr(x)[0],
    "trace": lambda x: x.diagonal(dim1=-2, dim2=-1).sum(-1),
    "shrink_units": _shrink_units,
    "shrink_singular": _shrink_singular,
}
"""The matrix words in torch, for a batch of matrices each."""


SQUARES = ("left", "right", "turned")
"""Shapes of lent values that are matrices whatever the dimensions of the weight."""


class Batch:
    """Weights of one shape: their places in the bucket, and the lent values of this step, stacked."""

    def __init__(self, shape: Sequence[int], members: Sequence[int], empty: bool, shared: bool) -> None:
        self.shape, self.members, self.empty, self.shared = tuple(shape), list(members), empty, shared
        self.values: dict[Node, Tensor] = {}


class Lender:
    """The lent part of a program over the weights of one bucket.

    `works` are the arrays that passes write, by name one tensor a weight.
    """

    def __init__(
        self,
        program: Program,
        members: Sequence[Member],
        index: NDArray[np.int64],
        dtype: torch.dtype,
    ) -> None:
        self.members, self.index, self.dtype = members, index, dtype
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, member in enumerate(members):
            shapes.setdefault(tuple(member.shape), []).append(place)
        self.batches = [
            Batch(shape, held, not np.prod(shape), any(members[i].share for i in held))
            for shape, held in shapes.items()
        ]
        self.works: dict[str, list[Tensor]] = {}
        self.scratch: dict[tuple[Node, int], Tensor] = {}
        for name, node in program.works.items():
            made: list[Any] = [None] * len(members)
            for batch in self.batches:
                whole = all(members[i].share is None for i in batch.members)
                if whole:
                    size = (len(batch.members), *view(batch.shape))
                    stacked = torch.zeros(size, dtype=dtype, device=members[batch.members[0]].weight.device)
                    self.scratch[node, id(batch)] = stacked
                for row, i in enumerate(batch.members):
                    made[i] = stacked[row] if whole else torch.zeros_like(members[i].weight, dtype=dtype)
            self.works[name] = made
        self.names = {node: name for name, node in program.works.items()}

    def begin(self, active: NDArray[np.bool_]) -> None:
        """Forget the last step; `active` weights have a gradient."""
        self.active = active
        for batch in self.batches:
            batch.values = {}

    def compute(self, node: Node, known: Mapping[Node, Any]) -> NDArray[np.float64] | None:
        """Compute a lent node, whose operands are there; the numbers, if it is one number a tensor.

        `known` holds the scalars, one entry a member of the plan.
        """
        numbers = np.zeros(len(self.members))
        for batch in self.batches:
            value = self._of(batch, node, known)
            if node.kind is Class.LENT:
                batch.values[node] = value
            else:
                numbers[batch.members] = value.double().reshape(-1).cpu().numpy()
        return None if node.kind is Class.LENT else numbers

    def alias(self, node: Node, other: Node) -> None:
        """Let a node be what another one is."""
        for batch in self.batches:
            batch.values[node] = batch.values[other]

    def offer(self, lent: Mapping[Node, str], lines: Container[str] = ()) -> dict[str, list[Tensor]]:
        """What came back, as the arrays that a pass reads: by name one tensor a member, as large as the
        weight; of those in `lines` only a number a line.
        """
        arrays: dict[str, list[Tensor]] = {}
        for node, name in lent.items():
            arrays[name] = made = [torch.empty(0, device="cpu")] * len(self.members)
            for batch in self.batches:
                value, seen = batch.values[node], view(batch.shape)
                short = name in lines and spanned(value.shape[1:], seen) and not batch.shared
                full = (len(batch.members), *(value.shape[1:] if short else seen))
                value = value.expand(full).to(self.dtype).contiguous()
                for row, i in enumerate(batch.members):
                    share = self.members[i].share
                    made[i] = value[row] if share is None else share.part(value[row].reshape(batch.shape))
        return arrays

    def store(self, node: Node, name: str, known: Mapping[Node, Any]) -> None:
        """Write a lent node, or a number, into the slot that keeps it."""
        for batch in self.batches:
            value = self._operand(batch, node, known)
            for row, i in enumerate(batch.members):
                if self.active[self.index[i]]:
                    slot = self.members[i].slots[name]
                    slot.copy_(value[row].expand(slot.shape) if value[row].numel() == 1 else value[row])

    def _of(self, batch: Batch, node: Node, known: Mapping[Node, Any]) -> Tensor:
        if node.word_name == "slot":
            held = [self.members[i].slots[node.payload] for i in batch.members]
            return torch.stack(held).to(self.dtype)
        rank = 2 if node.shape in SQUARES else len(view(batch.shape))
        operands = [self._operand(batch, operand, known, rank) for operand in node.operands]
        if " of " in node.word_name:
            return self._reduced(batch, node, operands[0])
        if node.word_name in TORCH_WORDS:
            return TORCH_WORDS[node.word_name](*operands)
        return self._matrix(batch, node, operands)

    def _operand(self, batch: Batch, node: Node, known: Mapping[Node, Any], rank: int = 2) -> Tensor:
        if node.kind is Class.LENT:
            return batch.values[node]
        if node.kind is Class.ELEMENT:
            if (node, id(batch)) in self.scratch:
                return self.scratch[node, id(batch)]
            if node not in batch.values:
                parts = [(self.works[self.names[node]][i], self.members[i].share) for i in batch.members]
                whole = [part if share is None else share.whole(part) for part, share in parts]
                batch.values[node] = torch.stack(whole).reshape(len(whole), *view(batch.shape))
            return batch.values[node]
        column = np.asarray(known[node], dtype=np.float64)
        value = np.broadcast_to(column, (len(self.active),))[self.index[batch.members]]
        made = torch.tensor(value, dtype=self.dtype, device=self.members[batch.members[0]].weight.device)
        return made.reshape(-1, *[1] * rank)

    def _reduced(self, batch: Batch, node: Node, value: Tensor) -> Tensor:
        name, over = node.word_name.split(" of ")
        if over in LINES:
            axes = tuple(axis + 1 for axis in lines(over, batch.shape))
            full = (len(batch.members), *view(batch.shape))
            value = value.expand([full[i] if i in axes else size for i, size in enumerate(value.shape)])
        else:
            axes = tuple(range(1, value.ndim))
        return reduced(name, value, axes).to(value.dtype)

    def _matrix(self, batch: Batch, node: Node, operands: list[Tensor]) -> Tensor:
        flat = (int(counted("rows", batch.shape)), int(counted("columns", batch.shape)))
        matrices = []
        for operand, value in zip(node.operands, operands, strict=True):
            if operand.kind < Class.LENT:
                matrices.append(value.reshape(-1, 1, 1))
            else:
                count = len(batch.members)
                whole = value if operand.shape in SQUARES else value.expand(count, *view(batch.shape))
                matrices.append(value if operand.shape in SQUARES else whole.reshape(count, *flat))
        if batch.empty:
            return operands[0]
        out = TORCH_MATRIX_WORDS[node.word_name](*matrices)
        if node.kind is Class.LENT and node.shape == "element":
            return out.reshape(len(batch.members), *view(batch.shape))
        return out
