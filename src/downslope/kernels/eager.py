"""The eager executor: a program run word by word with torch, on any device and in any floating dtype. It
always works.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels.address import asks
from downslope.kernels.bucket import Member, Table, folded, refuse_sparse
from downslope.kernels.words import compute_type, evaluate, reduced
from downslope.rules.trace import Node, Program, Stage

CHUNK = 32_768
"""Numbers per partial sum: below torch's grain of parallel reduction, so that thread count cannot change the
bits.
"""


class EagerBucket:
    """Parameters stepped one by one with torch. `index` are their places among all that a program steps."""

    lines: Container[str] = ()

    def __init__(self, program: Program, members: Sequence[Member], index: Sequence[int]) -> None:
        self.program, self.members = program, list(members)
        self.index = np.array(index, dtype=np.int64)
        self.seen = [(member.weight.shape, asks(member.parameter)) for member in members]
        self.gradients: list[Tensor | None] = []
        self.arrays: dict[str, list[Tensor]] = {}

    def gather(self, everyone: bool = False) -> NDArray[np.bool_] | None:
        """Look up this step's gradients; which have one. None if a weight has another shape now, or was
        frozen or thawed.
        """
        if self.seen != [(member.weight.shape, asks(member.parameter)) for member in self.members]:
            return None
        self.gradients = [None if everyone else member.gradient for member in self.members]
        refuse_sparse(self.gradients)
        self.active = np.array([everyone or gradient is not None for gradient in self.gradients], dtype=bool)
        return self.active

    def release(self) -> None:
        """Let go of the gradients."""
        self.gradients = []

    def lay(self, arrays: Mapping[str, list[Tensor]]) -> None:
        """Take scratch memory, by name one tensor a member."""
        self.arrays.update(arrays)

    def reduce(
        self, stage: Stage, leaves: NDArray[np.float64], noise: Table
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Partial results of the stage's reductions, one row a chunk, and the parameter that each row belongs
        to; scratch is written.
        """
        rows, owners = [], []
        for i, known in self._known(stage, leaves, noise):
            self._write(i, stage, known)
            values = [
                known[node.operands[0]].expand_as(self.members[i].weight).reshape(-1).split(CHUNK)  # type: ignore[no-untyped-call]
                for node in stage.reductions
            ]
            for chunk in zip(*values, strict=True):
                partials = zip(stage.reductions, chunk, strict=True)
                rows.append([float(reduced(node.word_name, part, (0,))) for node, part in partials])
                owners.append(self.index[i])
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(stage.reductions))
        return table, np.array(owners, dtype=np.int64)

    def apply(self, stage: Stage, leaves: NDArray[np.float64], noise: Table) -> None:
        """Write the new weights and slots."""
        for i, known in self._known(stage, leaves, noise):
            self._write(i, stage, known)

    def _write(self, i: int, stage: Stage, known: dict[Node, Tensor]) -> None:
        member = self.members[i]
        for name, node in stage.stores.items():
            target = member.weight if name == "p" else member.slots.get(name)
            target = self.arrays[name][i] if target is None else target
            target.copy_(known[node].expand(member.weight.shape).reshape(target.shape))

    def _known(
        self, stage: Stage, leaves: NDArray[np.float64], noise: Table
    ) -> Iterator[tuple[int, dict[Node, Tensor]]]:
        table = folded(stage, leaves)
        for i, member in enumerate(self.members):
            if not self.active[i] or not member.weight.numel():
                continue
            dtype = compute_type(member.weight.dtype)
            known = {
                n: torch.tensor(float(v), dtype=dtype, device="cpu")
                for n, v in zip(stage.scalars, table[self.index[i] if len(table) > 1 else 0], strict=True)
            }
            for node in self._leaves(stage):
                known[node] = self._leaf(i, node, stage, dtype, noise)
            evaluate(stage.elements, known, member.weight.dtype)
            yield i, known

    def _leaf(self, i: int, node: Node, stage: Stage, dtype: torch.dtype, noise: Table) -> Tensor:
        member = self.members[i]
        if node.word_name == "constant":
            return torch.tensor(float.fromhex(node.payload), dtype=dtype, device="cpu")
        if node.word_name.startswith("noise:"):
            return member.draw(node, noise, int(self.index[i]), dtype)
        if node in stage.lent:
            return self.arrays[stage.lent[node]][i].reshape(member.weight.shape).to(dtype)
        held: Any = {"g": self.gradients[i], "p": member.weight, **member.slots}[node.payload]
        found: Tensor = held.detach().to(dtype)
        return found

    @staticmethod
    def _leaves(stage: Stage) -> set[Node]:
        results = [*stage.stores.values(), *(node.operands[0] for node in stage.reductions)]
        inner = [operand for node in stage.elements for operand in node.operands]
        every = [*results, *stage.elements, *inner, *stage.lent]
        return {
            node
            for node in every
            if node.word_name in ("input", "constant")
            or node.word_name.startswith("noise:")
            or node in stage.lent
        }
