"""The CPU executor: parameters of one dtype, walked chunk by chunk by compiled code on as many threads as
torch has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels.address import PLAIN, SOME_MOVED, SOME_ODD, Addresses
from downslope.kernels.bucket import Floats, Member, Table, refuse_sparse
from downslope.kernels.source import CHUNK, fixed, lines, runs, source, width
from downslope.kernels.threads import spread
from downslope.kernels.words import compute_type
from downslope.rules.shape import spanned, view
from downslope.rules.trace import Program, Stage

SERIAL = 131_072
"""Up to this many numbers one thread is faster than the hand-over to a second."""

MOST_STAGES = 8
"""A program of more stages, such as that of lbfgs, would compile for longer than its problem takes."""

STORED = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""Dtypes of weights that generated code reads and writes; it computes in at least float32."""


def takes(program: Program, member: Member) -> bool:
    """Whether this executor can step the parameter: floating, in plain, dense memory of this machine, with
    state as wide as the computation.
    """
    weight, wide = member.weight, compute_type(member.weight.dtype)
    if weight.device.type != "cpu" or weight.dtype not in STORED or weight.is_conj() or weight.is_neg():
        return False
    if _finer(member):
        return False
    inside = [value for name, value in member.slots.items() if program.slots[name].per == "element"]
    if not all(value.stride() == weight.stride() and value.dtype == wide for value in inside):
        return False
    if program.lends or program.noises:  # both go by the order of the elements
        return weight.is_contiguous()
    return weight.is_contiguous() or _is_dense(weight)


def _finer(member: Member) -> bool:
    """Whether a half-precision weight has a gradient of a wider dtype, which eager takes as it is."""
    gradient = member.gradient
    return gradient is not None and member.weight.itemsize == 2 and gradient.dtype != member.weight.dtype


def can(program: Program) -> bool:
    """Whether every stage of the program can be compiled, and few enough are that this is worth its time."""
    return len(program.stages) <= MOST_STAGES and all(runs(stage) for stage in program.stages)


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

    def __init__(self, stage: Stage, program: Program, table: NDArray[np.int64], stored: str) -> None:
        # numba takes half a second to import: only who steps pays that
        from downslope.kernels.compiled import load

        self.start: int = load(source(stage, program, stored)).start.address
        self.leaves: Floats = np.zeros((0, len(stage.leaves)))
        self.partials = np.zeros((len(table), len(stage.reductions)))
        self.cursor = np.zeros(2, dtype=np.int64)
        shapes = [len(table), table.shape[1], *self.leaves.shape, self.partials.shape[1]]
        arrays = (table, self.leaves, self.partials, self.cursor)
        self.job = np.array([*shapes, *(array.ctypes.data for array in arrays)], dtype=np.int64)
        self.address = self.job.ctypes.data
        self.table = table  # held, as the job knows only its address

    def run(self, leaves: Floats, threads: int) -> None:
        """Work through the whole table; `leaves` has a row a parameter of the program, or one for all."""
        if leaves is not self.leaves:
            self.leaves, self.job[2], self.job[6] = leaves, len(leaves), leaves.ctypes.data
        self.cursor[0], self.cursor[1] = 0, max(1, len(self.table) // (16 * threads))
        spread(self.start, self.address, threads)


class CpuBucket:
    """Parameters of one dtype as a table: a row per chunk, with its length, its row of scalars and its
    pointers.
    """

    def __init__(self, program: Program, members: Sequence[Member], index: Sequence[int]) -> None:
        # held, so that no pointer outlives its memory
        self.program, self.members = program, list(members)
        self.weights = [member.weight for member in members]
        self.index = np.array(index, dtype=np.int64)
        self.stored = STORED[self.weights[0].dtype]
        self.contiguous = all(weight.is_contiguous() for weight in self.weights)
        self.passes: dict[int, Pass] = {}
        self.copies: list[Tensor] = []
        self.arrays: dict[str, list[Tensor]] = {}
        self.sizes = sizes = np.array([weight.numel() for weight in self.weights], dtype=np.int64)
        chunks = -(-sizes // CHUNK)
        self.owner = np.repeat(np.arange(len(sizes)), chunks)
        self.owners = self.index[self.owner]
        self.begin = (np.arange(len(self.owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * CHUNK
        self.lengths = np.minimum(CHUNK, sizes[self.owner] - self.begin)
        self.whole = np.array_equal(self.owner, np.arange(len(sizes)))  # as where all tensors are small
        self.column = {name: fixed(program) + place for place, name in enumerate(program.names)}
        self.lines = lines(program)
        self.table = np.zeros((len(self.owner), width(program)), dtype=np.int64)
        self.table[:, 0], self.table[:, 1] = self.lengths, self.owners
        if self.lines:
            self.table[:, min(self.lines.values()) - 1] = self.begin
        if program.noises:
            before = np.array([member.share.offset if member.share else 0 for member in members])
            self.table[:, 2] = before[self.owner] + self.begin
        self.addresses = Addresses([member.parameter for member in members], self.weights)
        self._point("p", self.addresses.weights, self.weights[0].itemsize)
        for name, slot in program.slots.items():
            if slot.per == "element":
                self.lay({name: [member.slots[name] for member in members]})
        self.everyone = self.active = np.ones(len(sizes), dtype=bool)
        self.serial = int(sizes.sum()) <= SERIAL

    def _point(self, name: str, addresses: NDArray[np.int64], itemsize: int) -> None:
        if not self.whole:
            addresses = addresses[self.owner] + self.begin * itemsize
        self.table[:, self.column[name]] = addresses

    def lay(self, arrays: Mapping[str, list[Tensor]]) -> None:
        """Point the table at arrays, by name one tensor a member, contiguous as the weights are; or
        of a number a line.
        """
        for name, held in arrays.items():
            self.arrays[name] = held  # held, as the table knows only addresses
            addresses = np.array([tensor.data_ptr() for tensor in held], dtype=np.int64)
            if name in self.lines:
                pairs = zip(held, self.members, strict=True)
                spans = np.array([spanned(view(t.shape), view(m.weight.shape)) for t, m in pairs])
                self.table[:, self.lines[name] : self.lines[name] + 2] = spans[self.owner]
                self.table[:, self.column[name]] = addresses[self.owner]
            else:
                self._point(name, addresses, held[0].itemsize)

    def gather(self, everyone: bool = False) -> NDArray[np.bool_] | None:
        """Point the table at this step's gradients; a row without one gets length 0. Which have one.

        None if a parameter's memory moved since the table was made (`p.data = …`, `module.to(…)`).
        """
        found = self.addresses.look()
        if found & SOME_MOVED:
            return None
        if not everyone and found & SOME_ODD and any(map(_finer, self.members)):
            return None
        active, pointers = self.everyone, self.addresses.gradients
        if not everyone and (found & SOME_ODD or not self.contiguous):
            pointers = self._alike()
        if not everyone and found != PLAIN:
            active = pointers != 0
            active |= (self.sizes == 0) & [member.gradient is not None for member in self.members]
        if active is not self.active:
            self.table[:, 0] = np.where(active[self.owner], self.lengths, 0)
            self.active = active
        self._point("g", pointers, self.weights[0].itemsize)
        return active

    def _alike(self) -> NDArray[np.int64]:
        """The addresses of gradients laid out as their parameters are, or of copies that are; 0 for none."""
        gradients = [member.gradient for member in self.members]
        refuse_sparse(gradients)
        pointers = np.zeros(len(gradients), dtype=np.int64)
        for i, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            if gradient is None:
                continue
            alike = gradient.stride() == weight.stride() and gradient.dtype == weight.dtype
            if not alike or gradient.is_neg():
                gradient = torch.empty_like(weight, requires_grad=False).copy_(gradient)
                self.copies.append(gradient)
            if self.members[i].share is not None:
                self.copies.append(gradient)  # it may have come from other ranks, for this step alone
            pointers[i] = gradient.data_ptr()
        return pointers

    def release(self) -> None:
        """Let go of copies of gradients."""
        self.copies = []

    def reduce(self, stage: Stage, leaves: Floats, noise: Table) -> tuple[Floats, NDArray[np.int64]]:
        """Partial results of the stage's reductions, one row a chunk, and the parameter that each row belongs
        to; scratch is written.
        """
        done = self._run(stage, leaves, noise)
        return done.partials, self.owners

    def apply(self, stage: Stage, leaves: Floats, noise: Table) -> None:
        """Write the new weights and slots, and say so to autograd; first, as long as the look at the tensors
        has left them in the cache.
        """
        self.addresses.written()
        self._run(stage, leaves, noise)

    def _run(self, stage: Stage, leaves: Floats, noise: Table) -> Pass:
        if id(stage) not in self.passes:
            self.passes[id(stage)] = Pass(stage, self.program, self.table, self.stored)
        for place, node in enumerate(self.program.noises):
            keys = np.array(noise[node], dtype=np.uint64)[self.index].view(np.int64)
            self.table[:, 3 + place] = keys[self.owner]
        done = self.passes[id(stage)]
        done.run(leaves, 1 if self.serial else torch.get_num_threads())
        return done
