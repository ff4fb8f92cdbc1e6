"""The CPU executor: parameters of one dtype, walked chunk by chunk by compiled code on as many threads as
torch has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels.address import PLAIN, SOME_ODD, Addresses
from downslope.kernels.eager import refuse_sparse
from downslope.kernels.source import FIXED, columns, runs, source
from downslope.kernels.threads import spread
from downslope.rules.trace import Program, Stage

CHUNK = 32_768
"""Numbers per row of the table. Fixed, so that sums do not depend on the number of threads."""

SERIAL = 131_072
"""Up to this many numbers one thread is faster than the hand-over to a second."""

DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def takes(parameter: Tensor) -> bool:
    """Whether this executor can step the parameter: float32 or float64 in plain, dense memory of this
    machine.
    """
    if (
        parameter.device.type != "cpu"
        or parameter.dtype not in DTYPES
        or parameter.is_conj()
        or parameter.is_neg()
    ):
        return False
    return parameter.is_contiguous() or _is_dense(parameter)


def can(program: Program) -> bool:
    """Whether every stage of the program can be compiled."""
    return all(runs(stage) for stage in program.stages)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(
        (st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


class Pass:
    """One stage over one table: its compiled code, and the memory that the code works in."""

    def __init__(
        self, stage: Stage, table: NDArray[np.int64], parameters: int, slots: Sequence[str], dtype: Any
    ) -> None:
        # numba takes half a second to import: only who steps pays that
        from downslope.kernels.compiled import load

        self.start: int = load(source(stage, slots, np.dtype(dtype).name)).start.address
        self.scalars = np.zeros((parameters, len(stage.scalars)), dtype=dtype)
        self.partials = np.zeros((len(table), len(stage.reductions)))
        self.cursor = np.zeros(2, dtype=np.int64)
        arrays = (table, self.scalars, self.partials)
        shapes = [len(table), table.shape[1], *self.scalars.shape, self.partials.shape[1]]
        self.job = np.array(
            [*shapes, *(array.ctypes.data for array in (*arrays, self.cursor))], dtype=np.int64
        )
        self.address = self.job.ctypes.data
        self.table = table  # held, as the job knows only its address

    def run(self, scalars: NDArray[np.float64], threads: int) -> None:
        """Work through the whole table."""
        with np.errstate(over="ignore"):
            self.scalars[...] = scalars
        self.cursor[0], self.cursor[1] = 0, max(1, len(self.table) // (16 * threads))
        spread(self.start, self.address, threads)


class CpuBucket:
    """Parameters of one dtype as a table: a row per chunk, with its length, its row of scalars and its
    pointers.
    """

    def __init__(
        self,
        program: Program,
        parameters: Sequence[Tensor],
        slots: Sequence[Mapping[str, Tensor]],
        index: Sequence[int],
    ) -> None:
        # held, so that no pointer outlives its memory
        self.parameters, self.slots = list(parameters), list(slots)
        self.index = np.array(index, dtype=np.int64)
        self.type = DTYPES[self.parameters[0].dtype]
        self.names = tuple(program.slots)
        self.contiguous = all(parameter.is_contiguous() for parameter in self.parameters)
        self.passes: dict[int, Pass] = {}
        self.copies: list[Tensor] = []
        self.sizes = sizes = np.array([parameter.numel() for parameter in self.parameters], dtype=np.int64)
        chunks = -(-sizes // CHUNK)
        self.owner = np.repeat(np.arange(len(sizes)), chunks)
        start = (np.arange(len(self.owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * CHUNK
        self.lengths = np.minimum(CHUNK, sizes[self.owner] - start)
        self.offsets = start * np.dtype(self.type).itemsize
        self.table = np.zeros((len(self.owner), FIXED + len(columns(self.names))), dtype=np.int64)
        self.table[:, 0], self.table[:, 1] = self.lengths, self.owner
        self.addresses = Addresses(self.parameters)
        self.addresses.look()
        self.weights = self.addresses.weights.copy()
        self.table[:, FIXED + 1] = self.weights[self.owner] + self.offsets
        for place, name in enumerate(self.names):
            pointers = np.array([slot[name].data_ptr() for slot in slots], dtype=np.int64)
            self.table[:, FIXED + 2 + place] = pointers[self.owner] + self.offsets
        self.everyone = self.active = np.ones(len(sizes), dtype=bool)
        self.serial = int(sizes.sum()) <= SERIAL

    def gather(self) -> NDArray[np.bool_] | None:
        """Point the table at this step's gradients; a row without one gets length 0. Which have one.

        None if a parameter's memory moved since the table was made (`p.data = …`, `module.to(…)`).
        """
        found = self.addresses.look()
        if not np.array_equal(self.addresses.weights, self.weights):
            return None
        active, pointers = self.everyone, self.addresses.gradients
        if found & SOME_ODD or not self.contiguous:
            pointers = self._alike()
        if found != PLAIN:
            active = pointers != 0
            active |= (self.sizes == 0) & [parameter.grad is not None for parameter in self.parameters]
        if active is not self.active:
            self.table[:, 0] = np.where(active[self.owner], self.lengths, 0)
            self.active = active
        self.table[:, FIXED] = pointers[self.owner] + self.offsets
        return active

    def _alike(self) -> NDArray[np.int64]:
        """The addresses of gradients laid out as their parameters are, or of copies that are; 0 for none."""
        gradients = [parameter.grad for parameter in self.parameters]
        refuse_sparse(gradients)
        pointers = np.zeros(len(gradients), dtype=np.int64)
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            if gradient.stride() != parameter.stride() or gradient.dtype != parameter.dtype:
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
                self.copies.append(gradient)
            pointers[i] = gradient.data_ptr()
        return pointers

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradients as they are."""
        return [parameter.grad for parameter in self.parameters]

    def release(self) -> None:
        """Let go of copies of gradients."""
        self.copies = []

    def reduce(
        self, stage: Stage, scalars: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Partial results of the stage's reductions, one row a chunk, and the parameter that each row belongs
        to.
        """
        done = self._run(stage, scalars)
        return done.partials, self.index[self.owner]

    def apply(self, stage: Stage, scalars: NDArray[np.float64]) -> None:
        """Write the new weights and slots, and say so to autograd."""
        self._run(stage, scalars)
        self.addresses.written()

    def _run(self, stage: Stage, scalars: NDArray[np.float64]) -> Pass:
        if id(stage) not in self.passes:
            self.passes[id(stage)] = Pass(stage, self.table, len(self.parameters), self.names, self.type)
        done = self.passes[id(stage)]
        done.run(scalars[self.index], 1 if self.serial else torch.get_num_threads())
        return done
