"""A program over its own parameters: its buckets, its scalars, and what it lends to a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from downslope.errors import BadInput
from downslope.kernels import cpu, gpu
from downslope.kernels.bucket import Bucket, Floats, Member
from downslope.kernels.eager import EagerBucket
from downslope.kernels.lender import Lender
from downslope.kernels.rows import RowsBucket
from downslope.kernels.words import compute_type
from downslope.rules import noise as counter
from downslope.rules.fold import constants, fold
from downslope.rules.shape import counted
from downslope.rules.trace import Class, Node, Program, Stage, scalars


class Plan:
    """One program of an update. Executors are chosen by device, dtype and layout.

    `places` are its members' places among all parameters of the update; `known` holds this step's scalars,
    one entry a member.
    """

    def __init__(
        self, program: Program, every: Sequence[Member], places: NDArray[np.int64], executor: str
    ) -> None:
        self.program, self.places = program, places
        self.everyone = np.array_equal(places, np.arange(len(every)))
        self.members = [every[i] for i in places]
        self.literals = constants(program.nodes)
        rows = {key: row for row, key in enumerate(program.numbers)}
        self.given = [(node, rows[node.payload]) for node in program.nodes if node.word_name == "number"]
        self.last = scalars(program.after.values())
        self.columns = [np.zeros((len(places), len(stage.leaves))) for stage in program.stages]
        self.alike = [np.zeros((1, columns.shape[1])) for columns in self.columns]
        self.counters = [node for node in program.nodes if node.word_name in ("t", "step", "count", "slot")]
        self.shapes = [tuple(member.shape) for member in self.members]
        self.sized: dict[str, Floats] = {}
        self.numbers: Floats | None = None
        self.steady: dict[Node, Any] = {}
        self.known: dict[Node, Any] = {}
        self.noise: dict[Node, list[int]] = {}
        self.buckets: list[Bucket] = []
        for make, index in _kinds(program, self.members, executor).items():
            self.buckets.append(make[0](program, [self.members[i] for i in index], index))
        self.lenders = [self._lender(bucket) for bucket in self.buckets] if program.lends else []
        self.sparse = [bucket for bucket in self.buckets if isinstance(bucket, RowsBucket)]

    def _lender(self, bucket: Bucket) -> Lender:
        types = {compute_type(member.weight.dtype) for member in bucket.members}
        lender = Lender(
            self.program, bucket.members, bucket.index, max(types, key=lambda kind: torch.finfo(kind).bits)
        )
        bucket.lay(lender.works)
        return lender

    def gather(self, everyone: bool) -> NDArray[np.bool_] | None:
        """Which of the plan's members have a gradient; None if memory moved."""
        if len(self.buckets) == 1:  # which holds the members in their order
            return self.buckets[0].gather(everyone)
        active = np.zeros(len(self.places), dtype=bool)
        for bucket in self.buckets:
            having = bucket.gather(everyone)
            if having is None:
                return None
            active[bucket.index] = having
        return active

    def begin(
        self,
        numbers: Floats,
        t: NDArray[np.int64],
        step: int,
        active: NDArray[np.bool_],
        counts: Mapping[str, Floats],
        vectors: Mapping[str, Floats],
    ) -> None:
        """Start a step: what is known before any pass."""
        if numbers is not self.numbers:
            self._settle(numbers)
        if self.sparse:
            self._check_idle(numbers)
        self.known, self.active = self.steady.copy(), self._own(active)
        for node in self.counters:
            if node.word_name == "t":
                self.known[node] = _shared(self._own(t)).astype(np.float64)
            elif node.word_name == "step":
                self.known[node] = np.float64(step)
            elif node.word_name == "count":
                over = node.payload
                self.known[node] = _shared(self._own(counts[over])) if over in counts else self._sizes(over)
            elif node.kind is Class.ROW:
                self.known[node] = _shared(self._own(vectors[node.payload]))
        for lender in self.lenders:
            lender.begin(self.active)
        for node in self.program.noises:
            self._settle_node(node.operands[0])
            seeds = np.broadcast_to(self.known[node.operands[0]], (len(self.places),))
            self.noise[node] = [
                counter.key(float(seed), step, member.name, node.payload)
                for seed, member in zip(seeds, self.members, strict=True)
            ]

    def _own(self, values: NDArray[Any]) -> NDArray[Any]:
        """The entries of the plan's members, of one a member of the update."""
        return values if self.everyone else values[self.places]

    def pass_over(self, depth: int) -> tuple[Floats, NDArray[np.int64]] | None:
        """Run a stage: partial results and their owners; None of the last stage, which writes."""
        stage = self.program.stages[depth]
        if self.program.lends:
            self._lend(stage)
        leaves = self._leaves(depth)
        if stage.last:
            for bucket in self.buckets:
                bucket.apply(stage, leaves, self.noise)
            return None
        parts = [bucket.reduce(stage, leaves, self.noise) for bucket in self.buckets]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _leaves(self, depth: int) -> Floats:
        """The leaves of a stage, a row a member; one row where all members have the same."""
        row, table = self.alike[depth], self.columns[depth]
        values = [self.known[node] for node in self.program.stages[depth].leaves]
        if np.ndarray not in map(type, values):
            row[0] = values
            return row
        for place, value in enumerate(values):
            table[:, place] = value
        return table

    def alarm(self) -> bool:
        """Whether the guard found the norm of the gradients not finite, in the pass just made."""
        norm = self.program.gradient_norm
        return norm is not None and norm in self.known and not isfinite(self.known[norm])

    def finish(self, vectors: Mapping[str, Floats]) -> None:
        """Store what elementwise code does not."""
        if not self.program.after:
            return
        if not self.program.lends:
            fold(self.last, self.known)
        for name, node in self.program.after.items():
            if node.kind is Class.LENT or self.program.slots[name].per != "tensor":
                for lender in self.lenders:
                    lender.store(node, name, self.known)
            elif self.everyone:
                np.copyto(vectors[name], self.known[node], where=self.active)
            else:
                values = np.broadcast_to(self.known[node], (len(self.places),))
                vectors[name][self.places[self.active]] = values[self.active]

    def _check_idle(self, numbers: Floats) -> None:
        """Refuse row-sparse gradients where a part that reads all of the weight is not idle."""
        rows = np.broadcast_to(numbers, (len(numbers), len(self.places)))
        for place, key in enumerate(self.program.numbers):
            part = self.program.idle.get(key)
            found = next((bucket for bucket in self.sparse if part and rows[place][bucket.index].any()), None)
            if found is not None:
                name = found.members[0].name
                raise BadInput(
                    f"{name} has a sparse gradient, which {part} cannot take unless it is 0; use "
                    "sparse=False."
                )

    def _sizes(self, over: str) -> Floats:
        if over not in self.sized:
            self.sized[over] = _shared(np.array([counted(over, shape) for shape in self.shapes]))
        return self.sized[over]

    def _settle(self, numbers: Floats) -> None:
        """Take up other numbers than those of the step before."""
        self.numbers = numbers
        values = numbers[:, 0] if numbers.shape[1] == 1 else [_shared(row) for row in numbers]
        self.steady = self.literals | {node: values[row] for node, row in self.given}

    def _lend(self, stage: Stage) -> None:
        """Let the library compute what this stage needs, and lay it out."""
        wanted = [*stage.leaves, *stage.lent, *(self.program.after.values() if stage.last else ())]
        for node in wanted:
            self._settle_node(node)
        for bucket, lender in zip(self.buckets, self.lenders, strict=True):
            bucket.lay(lender.offer(stage.lent, bucket.lines))

    def _settle_node(self, node: Node) -> None:
        """Make a scalar or lent node known. A choice by something that the host knows computes one side."""
        if node in self.known or node.kind is Class.ELEMENT:
            return
        if node.word_name == "where" and node.kind is Class.LENT and node.operands[0].kind is Class.HOST:
            self._settle_node(node.operands[0])
            held = np.broadcast_to(self.known[node.operands[0]], (len(self.places),))[self.active] != 0
            if held.all() or not held.any():
                chosen = node.operands[1 if held.all() else 2]
                if chosen.kind is Class.LENT:
                    self._settle_node(chosen)
                    self._alias(node, chosen)
                    return
        for operand in node.operands:
            self._settle_node(operand)
        if node.kind is Class.LENT or any(operand.kind is Class.LENT for operand in node.operands):
            self._compute(node)
        else:
            fold([node], self.known)

    def _alias(self, node: Node, other: Node) -> None:
        for lender in self.lenders:
            lender.alias(node, other)
        self.known[node] = self.known[other]

    def _compute(self, node: Node) -> None:
        numbers = np.zeros(len(self.places))
        for bucket, lender in zip(self.buckets, self.lenders, strict=True):
            found = lender.compute(node, self.known)
            if found is not None:
                numbers[bucket.index] = found
        self.known[node] = numbers


def _shared(values: NDArray[Any]) -> Any:
    """One number where every member has the same: what follows from it is then computed once."""
    bits = values.tobytes()  # -0 is not 0
    return values[0] if bits[8:] == bits[:-8] else values


def _kinds(
    program: Program, members: Sequence[Member], executor: str
) -> dict[tuple[Callable[..., Bucket], Any], list[int]]:
    """The executor of every member, and what it keeps apart: who makes buckets, and of which places."""
    compiled, found = cpu.can(program), {}  # type: ignore[var-annotated]
    for i, member in enumerate(members):
        key: tuple[Callable[..., Bucket], Any] = (EagerBucket, compute_type(member.weight.dtype))
        gradient = member.parameter.grad
        if gradient is not None and gradient.layout is not torch.strided and program.dense is None:
            key = (RowsBucket, compute_type(member.weight.dtype))
        elif executor == "gpu" or (executor == "auto" and member.weight.device.type == "cuda"):
            key = gpu.choice(program, member) or key
        elif executor == "auto" and compiled and cpu.takes(program, member):
            key = (cpu.CpuBucket, member.weight.dtype)
        found.setdefault(key, []).append(i)
    return found
