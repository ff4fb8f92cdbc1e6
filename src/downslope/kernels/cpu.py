"""The CPU executor: parameters of one dtype, walked chunk by chunk by compiled code on as many threads as
torch has.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.kernels.address import PLAIN, SOME_ODD, Addresses
from downslope.kernels.eager import refuse_sparse
from downslope.kernels.source import FIXED, columns, runs, source
from downslope.rules.trace import Program, Stage

CHUNK = 32_768
"""Numbers per row of the table. Fixed, so that sums do not depend on the number of threads."""

SERIAL = 131_072
"""Up to this many numbers one thread is faster than the hand-over to a second."""

DTYPES = {torch.float32: ("float32", np.float32), torch.float64: ("float64", np.float64)}


class _Worker:
    """A thread that waits for one job at a time; two bare locks hand over faster than a future does."""

    def __init__(self) -> None:
        self.offered, self.done = threading.Lock(), threading.Lock()
        self.offered.acquire()
        self.done.acquire()
        self.job: Callable[[], None] = lambda: None
        self.fault: BaseException | None = None
        threading.Thread(target=self._serve, name="downslope-kernel", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.offered.acquire()
            try:
                self.job()
            except BaseException as fault:  # handed to the thread that waits
                self.fault = fault
            self.done.release()

    def offer(self, job: Callable[[], None]) -> None:
        """Let the thread do `job` when it wakes up; `settle` must follow."""
        self.job, self.fault = job, None
        self.offered.release()

    def settle(self) -> None:
        """Take the job back if the thread has not begun it, else wait for its end; raises what it raised."""
        if not self.offered.acquire(blocking=False):
            self.done.acquire()
        self.job = lambda: None
        if self.fault is not None:
            raise self.fault


class _Threads:
    """Threads of our own: compiled code runs without the GIL, so plain ones do; no threading layer aborts.

    They take chunks from one cursor, so a core that is busy elsewhere holds nobody up. In a forked child the
    threads are gone; there everything runs on the calling thread.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: list[_Worker] = []
        self.forked = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.lock, self.workers, self.forked = threading.Lock(), [], True

    def run(self, kernel: Callable[..., None], arrays: tuple[NDArray[Any], ...], threads: int) -> None:
        """Run `kernel` over all rows of the table on so many threads, this one included."""
        grain = max(1, len(arrays[0]) // (16 * threads))
        job = functools.partial(kernel, *arrays, np.zeros(1, dtype=np.int64), grain)
        with self.lock:
            wanted = 0 if self.forked else threads - 1
            while len(self.workers) < wanted:
                self.workers.append(_Worker())
            for worker in self.workers[:wanted]:
                worker.offer(job)
            try:
                job()
            finally:
                for worker in self.workers[:wanted]:
                    worker.settle()


_threads = _Threads()


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
        self.parameters, self.slots = (
            list(parameters),
            list(slots),
        )  # held, so that no pointer outlives its memory
        self.index = np.array(index, dtype=np.int64)
        self.name, self.type = DTYPES[self.parameters[0].dtype]
        self.names = tuple(program.slots)
        self.contiguous = all(parameter.is_contiguous() for parameter in self.parameters)
        self.kernels: dict[int, Callable[..., None]] = {}
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
        partials = np.zeros((len(self.owner), len(stage.reductions)))
        self._run(stage, scalars, partials)
        return partials, self.index[self.owner]

    def apply(self, stage: Stage, scalars: NDArray[np.float64]) -> None:
        """Write the new weights and slots, and say so to autograd."""
        self._run(stage, scalars, np.zeros((len(self.owner), 0)))
        self.addresses.written()

    def _run(self, stage: Stage, scalars: NDArray[np.float64], partials: NDArray[np.float64]) -> None:
        if id(stage) not in self.kernels:
            from downslope.kernels.compiled import (
                load,
            )  # numba takes half a second to import: only who steps pays it

            self.kernels[id(stage)] = load(source(stage, self.names, self.name))
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(scalars[self.index], dtype=self.type)
        _threads.run(
            self.kernels[id(stage)],
            (self.table, rows, partials),
            1 if self.serial else torch.get_num_threads(),
        )
