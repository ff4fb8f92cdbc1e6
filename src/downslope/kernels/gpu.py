"""The GPU executor: parameters of one dtype on one device, walked chunk by chunk by Triton kernels over a
table of addresses.

Triton is no dependency: where it is missing, eager steps what lies on a GPU. With TRITON_INTERPRET=1 the same
kernels run on a machine without a GPU, slowly, on tensors of the CPU, for whoever asks for them by name.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels import cpu
from downslope.kernels.address import Addresses
from downslope.kernels.bucket import Floats, Member, Table, folded
from downslope.kernels.source import fixed
from downslope.kernels.tile import columns, load, source
from downslope.kernels.words import compute_type
from downslope.rules.trace import Program, Stage

CHUNK, BLOCK = 8192, 1024
"""Numbers per program instance, and how many of them it holds at a time. Fixed, so that sums are too."""


@cache
def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that its interpreter stands in for a GPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return not isinstance(triton.language.sum, triton.JITFunction)


@cache
def runs_here() -> bool:
    """Whether Triton is installed, and its interpreter is there, or a GPU that it can compile for. It starts
    kernels through a piece of C, so that a GPU needs a C compiler beside it.
    """
    if importlib.util.find_spec("triton") is None or interpreted():
        return interpreted()
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)


def takes(program: Program, member: Member) -> bool:
    """Whether this executor can step the parameter: floating, in plain, dense memory of a GPU, with state as
    wide as the computation.
    """
    weight, wide = member.weight, compute_type(member.weight.dtype)
    if not runs_here() or weight.device.type != ("cpu" if interpreted() else "cuda"):
        return False
    if weight.dtype not in cpu.STORED or weight.is_conj() or weight.is_neg() or not cpu.can(program):
        return False
    inside = [value for name, value in member.slots.items() if program.slots[name].per == "element"]
    if not all(value.stride() == weight.stride() and value.dtype == wide for value in inside):
        return False
    by_place = program.lends or program.noises  # these go by the order of the elements
    return weight.is_contiguous() or (not by_place and cpu._is_dense(weight))


def choice(program: Program, member: Member) -> tuple[type[GpuBucket], Any] | None:
    """Who makes the bucket of a parameter, and what it keeps apart; None where this executor cannot."""
    if not takes(program, member):
        return None
    return GpuBucket, (member.weight.dtype, member.weight.device)


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array on the device; the host does not wait for it."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(device, non_blocking=True)


class GpuBucket(cpu.CpuBucket):
    """Parameters of one dtype as a table: a row each, with its length, its row of scalars and its addresses.
    It is sent to the device where it changed: mostly when gradients lie elsewhere than before.
    """

    def __init__(self, program: Program, members: Sequence[Member], index: Sequence[int]) -> None:
        self.program, self.members = program, list(members)
        self.weights = [member.weight for member in members]
        self.index = np.array(index, dtype=np.int64)
        self.device, self.stored = self.weights[0].device, cpu.STORED[self.weights[0].dtype]
        self.contiguous = all(weight.is_contiguous() for weight in self.weights)
        self.copies, self.arrays = [], {}
        self.lengths = self.sizes = np.array([weight.numel() for weight in self.weights], dtype=np.int64)
        self.owner, self.begin = np.arange(len(members)), np.zeros(len(members), dtype=np.int64)
        self.whole, self.lines = True, {}
        self.column = {name: fixed(program) + place for place, name in enumerate(program.names)}
        self.table = np.zeros((len(members), columns(program)), dtype=np.int64)
        self.table[:, 0], self.table[:, 1] = self.sizes, self.index
        if program.noises:
            self.table[:, 2] = [member.share.offset if member.share else 0 for member in members]
        self.addresses = Addresses([member.parameter for member in members], self.weights)
        self._point("p", self.addresses.weights, self.weights[0].itemsize)
        for name, slot in program.slots.items():
            if slot.per == "element":
                self.lay({name: [member.slots[name] for member in members]})
        self.everyone = self.active = np.ones(len(members), dtype=bool)
        self._cut()

    def _cut(self) -> None:
        """Lay out chunks and buffers on the device."""
        chunks = -(-self.sizes // CHUNK)
        first = np.cumsum(chunks) - chunks
        self.rows = np.repeat(np.arange(len(chunks)), chunks)
        begin = (np.arange(len(self.rows)) - np.repeat(first, chunks)) * CHUNK
        self.chunks = sent(np.stack([self.rows, begin], axis=1), self.device)
        self.bounds = sent(np.append(first, len(self.rows)), self.device)
        self.places = sent(self.index, self.device)
        self.there = torch.zeros(self.table.shape, dtype=torch.int64, device=self.device)
        self.seen = np.zeros_like(self.table)
        self.fine = torch.ones(1, dtype=torch.int32, device=self.device)
        self.kernels: dict[int, Any] = {}
        self.kinds: dict[int, Tensor] = {}

    def reduce(self, stage: Stage, leaves: Floats, noise: Table) -> tuple[Floats, NDArray[np.int64]]:
        """Partial results of the stage's reductions, one row a chunk, and the parameter that each row belongs
        to. The host waits for them; `collect` leaves them on the device.
        """
        partials = self.launch(stage, self._folded(stage, leaves), noise)
        return partials.cpu().numpy().T, self.index[self.rows]

    def apply(self, stage: Stage, leaves: Floats, noise: Table) -> None:
        """Write the new weights and slots, and say so to autograd."""
        self.launch(stage, self._folded(stage, leaves), noise)
        self.addresses.written()

    def _folded(self, stage: Stage, leaves: Floats) -> Tensor:
        """The scalars of a stage on the device, a row a member of the program."""
        scalars = folded(stage, leaves)
        count = max(int(self.index.max()) + 1, len(scalars))
        return sent(np.broadcast_to(scalars, (count, scalars.shape[1])), self.device)

    def launch(self, stage: Stage, scalars: Tensor, noise: Table, fine: Tensor | None = None) -> Tensor:
        """Run a stage with scalars that lie on the device, a row a member of the program. Returns its partial
        results, a row a reduction and a column a chunk. The last stage writes nothing where `fine` is 0.
        """
        if id(stage) not in self.kernels:
            self.kernels[id(stage)] = load(source(stage, self.program, self.stored)).kernel
        for place, node in enumerate(self.program.noises):
            self.table[:, 3 + place] = np.array(noise[node], dtype=np.uint64)[self.index].view(np.int64)
        if not np.array_equal(self.table, self.seen):
            self.there.copy_(sent(self.table, self.device))
            self.seen[...] = self.table
        size = (len(stage.reductions), len(self.rows))
        partials = torch.empty(size, dtype=torch.float64, device=self.device)
        if len(self.rows):
            fine = self.fine if fine is None else fine
            with self._here():
                kernel = self.kernels[id(stage)][(len(self.rows),)]
                kernel(self.chunks, self.there, scalars, partials, fine, CHUNK=CHUNK, BLOCK=BLOCK)
        return partials

    def collect(self, stage: Stage, partials: Tensor, found: Tensor) -> None:
        """Put the results of the stage's reductions for every parameter into `found`: a row a member of the
        program, a column a reduction.
        """
        from downslope.kernels.block import collect

        if id(stage) not in self.kinds:
            kinds = np.array([node.word_name == "largest" for node in stage.reductions], dtype=np.int64)
            self.kinds[id(stage)] = sent(kinds, self.device)
        with self._here():
            kernel = collect[(len(self.members), len(stage.reductions))]
            kernel(partials, self.bounds, self.kinds[id(stage)], self.places, found, BLOCK=128)

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Launch on this device; the interpreter computes with NumPy, which must not warn of NaN."""
        device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with device, np.errstate(all="ignore"):
            yield
