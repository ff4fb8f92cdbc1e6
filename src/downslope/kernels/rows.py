"""Row-sparse gradients, as of `Embedding(sparse=True)`: only the rows in the gradient are stepped.

The rows of weight and state are gathered into dense tensors, stepped there like any parameter, and put back.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.errors import BadInput
from downslope.kernels import cpu
from downslope.kernels.address import asks
from downslope.kernels.bucket import Bucket, Floats, Member, Table
from downslope.kernels.eager import EagerBucket
from downslope.rules.trace import Program, Stage


class RowsBucket:
    """Parameters whose gradients are row-sparse; a dense gradient sends its parameter elsewhere."""

    lines: Container[str] = ()

    def __init__(self, program: Program, members: Sequence[Member], index: Sequence[int]) -> None:
        self.program, self.members = program, list(members)
        self.index = np.array(index, dtype=np.int64)
        self.asked = [asks(member.parameter) for member in members]
        self.rows: list[Tensor] = []
        self.inner: list[Bucket] = []

    def gather(self, everyone: bool = False) -> NDArray[np.bool_] | None:
        """Gather the rows of this step; None if a gradient is dense now, or a weight was frozen or thawed."""
        gradients = [member.gradient for member in self.members]
        if self.asked != [asks(member.parameter) for member in self.members] or any(
            g is not None and g.layout is not torch.sparse_coo for g in gradients
        ):
            return None
        active = np.array([gradient is not None for gradient in gradients], dtype=bool)
        self.rows, picked, places = [], [], []
        for i in np.flatnonzero(active):
            member, gradient = self.members[i], gradients[i].coalesce()  # type: ignore[union-attr]
            if gradient.sparse_dim() != 1:
                raise BadInput(
                    f"{member.name} has a gradient that is sparse in {gradient.sparse_dim()} dimensions; "
                    "only rows may be."
                )
            rows = gradient.indices()[0]
            self.rows.append(rows)
            weight = member.weight.detach()[rows]
            slots = {name: value[rows] for name, value in member.slots.items() if value.ndim}
            picked.append(Member(member.name, SimpleNamespace(grad=gradient.values()), weight, slots))
            places.append(int(i))
        self.picked, self.places = picked, places
        self._step(everyone)
        return active

    def _step(self, everyone: bool) -> None:
        kinds: dict[object, list[int]] = {}
        for k, member in enumerate(self.picked):
            compiled = cpu.can(self.program) and cpu.takes(self.program, member)
            kinds.setdefault(member.weight.dtype if compiled else None, []).append(k)
        self.inner = []
        for kind, held in kinds.items():
            make = EagerBucket if kind is None else cpu.CpuBucket
            index = [int(self.index[self.places[k]]) for k in held]
            self.inner.append(make(self.program, [self.picked[k] for k in held], index))
            self.inner[-1].gather(everyone)

    def lay(self, arrays: Mapping[str, list[Tensor]]) -> None:
        """Nothing is lent of rows: rules that lend take no sparse gradients."""

    def reduce(self, stage: Stage, leaves: Floats, noise: Table) -> tuple[Floats, NDArray[np.int64]]:
        """Partial results over the rows, and their owners."""
        parts = [bucket.reduce(stage, leaves, noise) for bucket in self.inner]
        if not parts:
            return np.zeros((0, len(stage.reductions))), np.zeros(0, dtype=np.int64)
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def apply(self, stage: Stage, leaves: Floats, noise: Table) -> None:
        """Step the rows and put them back."""
        for bucket in self.inner:
            bucket.apply(stage, leaves, noise)
        for i, rows, picked in zip(self.places, self.rows, self.picked, strict=True):
            member = self.members[i]
            member.weight.detach().index_copy_(0, rows, picked.weight)
            for name, value in picked.slots.items():
                member.slots[name].index_copy_(0, rows, value)

    def release(self) -> None:
        """Let go of the rows."""
        self.rows, self.inner, self.picked, self.places = [], [], [], []
