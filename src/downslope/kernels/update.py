"""One step over all parameters: gather gradients, fold scalars, run the stages, and keep the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.errors import BadInput
from downslope.kernels import cpu
from downslope.kernels.eager import EagerBucket, SparseGradientError, combine
from downslope.rules.trace import Node, Program, Stage, constants, fold, scalars

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Skipped:
    """A step that was not made: the parameters whose gradient holds a NaN or an infinity."""

    names: tuple[str, ...]


class Bucket(Protocol):
    """Parameters that one executor steps together."""

    index: NDArray[np.int64]

    @property
    def gradients(self) -> list[Tensor | None]: ...
    def gather(self) -> NDArray[np.bool_] | None: ...
    def reduce(self, stage: Stage, scalars: Floats) -> tuple[Floats, NDArray[np.int64]]: ...
    def apply(self, stage: Stage, scalars: Floats) -> None: ...
    def release(self) -> None: ...


class Update:
    """A program over a fixed list of parameters, each with its slots. Executors are chosen by device, dtype
    and layout.
    """

    def __init__(
        self,
        program: Program,
        parameters: Sequence[Tensor],
        slots: Sequence[Mapping[str, Tensor]],
        groups: Sequence[int],
        executor: str = "auto",
        names: Sequence[str] | None = None,
    ) -> None:
        self.program = program
        self.names = names or [f"parameter {i}" for i in range(len(parameters))]
        self.sizes = np.array([parameter.numel() for parameter in parameters], dtype=np.float64)
        self.groups = np.array(groups, dtype=np.int64)
        unsupported = next((node for node in program.nodes if ":" in node.word_name), None)
        if unsupported is not None:
            raise BadInput(f"{program.name}: no executor has {unsupported.word_name!r} yet.")
        self.counters = [node for node in program.nodes if node.word_name in ("t", "step", "count")]
        self.orders = [scalars(stage.scalars) for stage in program.stages]
        self.columns = [np.zeros((len(parameters), len(stage.scalars))) for stage in program.stages]
        self.numbers: Floats | None = None
        self.steady: dict[Node, Any] = {}
        members: dict[Any, list[int]] = {}
        compiled = executor != "eager" and cpu.can(program)
        for i, parameter in enumerate(parameters):
            alike = all(
                slot.stride() == parameter.stride() and slot.dtype == parameter.dtype
                for slot in slots[i].values()
            )
            kind = parameter.dtype if compiled and alike and cpu.takes(parameter) else "eager"
            members.setdefault(kind, []).append(i)
        self.buckets: list[Bucket] = []
        for kind, index in members.items():
            make: Callable[..., Bucket] = EagerBucket if kind == "eager" else cpu.CpuBucket
            self.buckets.append(
                make(program, [parameters[i] for i in index], [slots[i] for i in index], index)
            )

    def gather(self) -> NDArray[np.bool_] | None:
        """Look up this step's gradients; which parameters have one. None if a parameter's memory moved, so
        that the update must be made anew. A sparse gradient is refused by name."""
        active = np.zeros(len(self.sizes), dtype=bool)
        for bucket in self.buckets:
            try:
                having = bucket.gather()
            except SparseGradientError as found:
                name = self.names[bucket.index[found.place]]
                raise BadInput(
                    f"{name} has a sparse gradient, which {self.program.name} cannot take; use sparse=False."
                ) from None
            if having is None:
                return None
            active[bucket.index] = having
        return active

    def run(
        self, numbers: Floats, t: NDArray[np.int64], step: int, active: NDArray[np.bool_]
    ) -> NDArray[np.int64] | None:
        """Apply the step to what `gather` found. None, or, where the guard stopped it with nothing written,
        the culprits.

        `numbers` has a row per entry of `program.numbers` and a column per parameter, and is another array
        whenever they change; `t` counts the updates of each parameter and `step` those of the run, this one
        included.
        """
        if numbers is not self.numbers:
            self._settle(numbers)
        known = self._known(t, step, active)
        for stage, order, columns in zip(self.program.stages, self.orders, self.columns, strict=True):
            fold(order, known)
            for place, node in enumerate(stage.scalars):
                if node not in self.steady:
                    columns[:, place] = known[node]
            if stage.stores:
                for bucket in self.buckets:
                    bucket.apply(stage, columns)
                break
            self._reduce(stage, columns, known)
            guard = self.program.gradient_norm
            if guard is not None and guard in known and not np.isfinite(known[guard]).all():
                culprits = self._culprits()
                if len(culprits):
                    self.release()
                    return culprits
        self.release()
        return None

    def release(self) -> None:
        """Let go of what was gathered."""
        for bucket in self.buckets:
            bucket.release()

    def _settle(self, numbers: Floats) -> None:
        """Compute what follows from numbers alone, once for all steps until they change."""
        self.numbers = numbers
        rows = {key: numbers[place] for place, key in enumerate(self.program.numbers)}
        self.steady = constants(self.program.nodes)
        self.steady |= {node: rows[node.payload] for node in self.program.nodes if node.word_name == "number"}
        for order in self.orders:
            for node in order:
                if node.operands and all(operand in self.steady for operand in node.operands):
                    fold([node], self.steady)
        for stage, columns in zip(self.program.stages, self.columns, strict=True):
            for place, node in enumerate(stage.scalars):
                if node in self.steady:
                    columns[:, place] = self.steady[node]

    def _known(self, t: NDArray[np.int64], step: int, active: NDArray[np.bool_]) -> dict[Node, Any]:
        known = dict(self.steady)
        for node in self.counters:
            if node.word_name == "t":
                known[node] = t.astype(np.float64)
            elif node.word_name == "step":
                known[node] = np.float64(step)
            else:
                known[node] = self._within(node.payload, self.sizes * active)
        return known

    def _within(self, over: str, values: Floats) -> Floats:
        if over == "tensor":
            return values
        if over == "all":
            return np.full(len(values), values.sum())
        return np.asarray(np.bincount(self.groups, values)[self.groups], dtype=np.float64)

    def _reduce(self, stage: Stage, columns: Floats, known: dict[Node, Any]) -> None:
        parts = [bucket.reduce(stage, columns) for bucket in self.buckets]
        values, owners = (
            np.concatenate([part[0] for part in parts]),
            np.concatenate([part[1] for part in parts]),
        )
        for place, node in enumerate(stage.reductions):
            column = values[:, place]
            if node.payload == "all":
                known[node] = np.full(len(self.sizes), combine(node.word_name, column))
                continue
            scope = owners if node.payload == "tensor" else self.groups[owners]
            order = np.argsort(scope, kind="stable")
            found, first = np.unique(scope[order], return_index=True)
            sums = np.zeros(len(self.sizes))
            sums[found] = [combine(node.word_name, part) for part in np.split(column[order], first[1:])]
            known[node] = sums if node.payload == "tensor" else sums[self.groups]

    def _culprits(self) -> NDArray[np.int64]:
        bad = [
            int(i)
            for bucket in self.buckets
            for i, gradient in zip(bucket.index, bucket.gradients, strict=True)
            if gradient is not None and not bool(torch.isfinite(gradient).all())
        ]
        return np.array(sorted(bad), dtype=np.int64)
