"""A step whose scalars stay on the device: what follows from a reduction is folded there, by torch.

The host sends what follows from numbers and counters, once a step, launches everything and waits for nothing
but a guard. A graph captured by CUDA would freeze what the host sends, so capture is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.errors import BadInput
from downslope.kernels import gpu
from downslope.kernels.bucket import Bucket, Floats, Member
from downslope.kernels.gpu import GpuBucket, sent
from downslope.kernels.lender import Batch, Lender
from downslope.kernels.plan import Plan
from downslope.kernels.update import Update
from downslope.kernels.words import TORCH_WORDS, compute_type
from downslope.rules.fold import fold
from downslope.rules.trace import Class, Node, Program, scalars
from downslope.rules.value import REDUCTIONS

Vectors: TypeAlias = Mapping[str, Any]
"""Slots of one number a tensor: arrays, or tensors on the device, which alone cost no wait where they follow
from a reduction.
"""

Programs: TypeAlias = Sequence[tuple[Program, Sequence[int]]]


class DeviceLender(Lender):
    """A lender that reads and returns numbers, one a member of the plan, on the device."""

    def __init__(
        self, program: Program, members: Sequence[Member], index: NDArray[np.int64], dtype: torch.dtype
    ) -> None:
        super().__init__(program, members, index, dtype)
        device = members[0].weight.device
        self.rows = {id(batch): sent(index[batch.members], device) for batch in self.batches}

    def numbers(self, node: Node, known: Mapping[Node, Any], found: Tensor) -> None:
        """Compute a node that is one number a tensor, into the rows of `found` of these members."""
        for batch in self.batches:
            value = self._of(batch, node, known)
            found.index_copy_(0, self.rows[id(batch)], value.double().reshape(-1))

    def _operand(self, batch: Batch, node: Node, known: Mapping[Node, Any], rank: int = 2) -> Tensor:
        if node.kind >= Class.LENT:
            return super()._operand(batch, node, known, rank)
        value: Tensor = known[node]
        rows = self.rows[id(batch)]
        value = value.expand(len(rows)) if value.ndim == 0 else value[rows]
        return value.to(self.dtype).reshape(-1, *[1] * rank)


class DevicePlan(Plan):
    """One program of an update on one device. `known` holds what the host knows, `there` what is known there:
    float64 tensors, with one number or one a member.
    """

    def __init__(
        self, program: Program, every: Sequence[Member], places: NDArray[np.int64], vectors: Vectors
    ) -> None:
        super().__init__(program, every, places, "gpu")
        self.device = self.members[0].weight.device
        self.index = sent(places, self.device)
        self.late = _late(program, vectors)
        self.held = [node for node in self.counters if node in self.late]
        self.counters = [node for node in self.counters if node not in self.late]
        self.constants = {
            node: torch.tensor(float.fromhex(node.payload), dtype=torch.float64, device=self.device)
            for node in program.nodes
            if node.word_name == "constant"
        }
        there = [node for node in program.nodes if node in self.late or node.kind is Class.LENT]
        asked = dict.fromkeys([*(o for node in there for o in node.operands), *program.after.values()])
        known = self.late | self.constants.keys()
        self.extra = [node for node in asked if node.kind < Class.LENT and node not in known]
        columns = [node for stage in program.stages for node in stage.scalars if node not in self.late]
        self.order = scalars([*columns, *self.extra])
        self._share_one_buffer()

    def _share_one_buffer(self) -> None:
        """Let the columns of all stages, and the extra rows, be views of what is sent at once."""
        count = len(self.places)
        sizes = [count * len(stage.scalars) for stage in self.program.stages] + [count * len(self.extra)]
        self.cuts = np.cumsum(sizes)[:-1].tolist()
        self.buffer = np.zeros(sum(sizes))
        *columns, extra = np.split(self.buffer, self.cuts)
        self.columns = [part.reshape(count, -1) if part.size else part.reshape(count, 0) for part in columns]
        self.rows = extra.reshape(len(self.extra), count)

    def _lender(self, bucket: Bucket) -> Lender:
        dtype = compute_type(bucket.members[0].weight.dtype)
        lender = DeviceLender(self.program, bucket.members, bucket.index, dtype)
        bucket.lay(lender.works)
        return lender

    def send(self, vectors: Vectors) -> None:
        """Fold what the host knows, and send it."""
        fold(self.order, self.known)
        for stage, columns in zip(self.program.stages, self.columns, strict=True):
            for place, node in enumerate(stage.scalars):
                if node not in self.late:
                    columns[:, place] = self.known[node]
        for row, node in zip(self.rows, self.extra, strict=True):
            row[...] = self.known[node]
        *tables, extra = sent(self.buffer, self.device).tensor_split(self.cuts)
        self.tables = [
            table.view(len(self.places), len(stage.scalars))
            for table, stage in zip(tables, self.program.stages, strict=True)
        ]
        self.there: dict[Node, Any] = dict(self.constants)
        self.there |= zip(self.extra, extra.view(len(self.extra), len(self.places)), strict=True)
        self.there |= {node: vectors[node.payload][self.index] for node in self.held}

    def launch(self, depth: int, fine: Tensor | None) -> Tensor | None:
        """Run a stage: what it reduced, a row a member and a column a reduction. The last one returns None,
        and writes nothing where `fine` is 0.
        """
        stage = self.program.stages[depth]
        for place, node in enumerate(stage.scalars):
            if node in self.late:
                self.tables[depth][:, place] = self.value(node)
        for node in stage.lent:
            self.value(node)
        for bucket, lender in zip(self.buckets, self.lenders, strict=bool(self.lenders)):
            bucket.lay(lender.offer(stage.lent))
        size = (len(self.places), len(stage.reductions))
        found = torch.zeros(size, dtype=torch.float64, device=self.device)
        for bucket in self.buckets:
            assert isinstance(bucket, GpuBucket)
            partials = bucket.launch(stage, self.tables[depth], self.noise, fine)
            if stage.last:
                bucket.addresses.written()
            else:
                bucket.collect(stage, partials, found)
        return None if stage.last else found

    def value(self, node: Node) -> Any:
        """What a node is on the device; of a lent node None, since its lenders hold it."""
        if node not in self.there and node.kind is not Class.ELEMENT:
            self.there[node] = self._made(node)
        return self.there.get(node)

    def _made(self, node: Node) -> Any:
        chosen = self._chosen(node)
        if chosen is not None:
            self.value(chosen)
            for lender in self.lenders:
                lender.alias(node, chosen)
            return None
        operands = [self.value(operand) for operand in node.operands]
        if node.kind is Class.LENT:
            for lender in self.lenders:
                lender.compute(node, self.there)
            return None
        if not any(operand.kind is Class.LENT for operand in node.operands):
            return TORCH_WORDS[node.word_name](*operands)
        found = torch.zeros(len(self.places), dtype=torch.float64, device=self.device)
        for lender in self.lenders:
            assert isinstance(lender, DeviceLender)
            lender.numbers(node, self.there, found)
        return found

    def _chosen(self, node: Node) -> Node | None:
        """The lent side of a choice that the host can make; the other one need not be computed."""
        by_host = node.word_name == "where" and node.operands[0].kind < Class.LENT
        if not by_host or node.kind is not Class.LENT or node.operands[0] in self.late:
            return None
        held = np.broadcast_to(self.known[node.operands[0]], (len(self.places),))[self.active] != 0
        if not held.all() and held.any():
            return None
        chosen = node.operands[1 if held.all() else 2]
        return chosen if chosen.kind is Class.LENT else None

    def finish(self, vectors: Vectors) -> None:
        """Store what elementwise code does not."""
        active = sent(self.active, self.device)
        for name, node in self.program.after.items():
            value = self.value(node)
            if node.kind is Class.LENT or self.program.slots[name].per != "tensor":
                for lender in self.lenders:
                    lender.store(node, name, self.there)
            elif isinstance(vectors[name], Tensor):
                new = torch.where(active, value, vectors[name][self.index])
                vectors[name].index_copy_(0, self.index, new)
            else:
                host = value.cpu().numpy() if node in self.late else self.known[node]
                held = np.broadcast_to(host, (len(self.places),))
                vectors[name][self.places[self.active]] = held[self.active]


def _late(program: Program, vectors: Vectors) -> set[Node]:
    """The scalars that only the device knows: whatever follows from a reduction, a lent value, or a slot that
    lies there.
    """
    late: set[Node] = set()
    for node in program.nodes:
        if node.kind < Class.LENT and (
            node.word_name in REDUCTIONS
            or (node.word_name == "slot" and isinstance(vectors[node.payload], Tensor))
            or any(operand in late or operand.kind is Class.LENT for operand in node.operands)
        ):
            late.add(node)
    return late


class DeviceUpdate(Update):
    """One step over parameters of one GPU, for which the host does not wait. With a guard it reads once,
    behind the last launch, whether the gradients were finite: if not, that launch wrote nothing.
    """

    def __init__(
        self,
        programs: Programs,
        members: Sequence[Member],
        groups: Sequence[int],
        vectors: Vectors | None = None,
    ) -> None:
        super().__init__([], members, groups, vectors, "gpu")
        self.plans: list[Any] = [
            DevicePlan(program, members, np.array(places, dtype=np.int64), self.vectors)
            for program, places in programs
            if len(places)
        ]
        self.device = self.members[0].weight.device
        self.within: dict[Any, Tensor] = {}

    def run(
        self, numbers: Sequence[Floats], t: NDArray[np.int64], step: int, active: NDArray[np.bool_]
    ) -> NDArray[np.int64] | None:
        """Apply the step to what `gather` found, as `Update.run` does."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BadInput(
                "a step cannot be captured in a CUDA graph, which would repeat the rate, the step count and "
                "the bias corrections it was captured with; capture forward and backward, and step outside."
            )
        counts = self._counts(active)
        for plan, table in zip(self.plans, numbers, strict=True):
            plan.begin(table, t, step, active, counts, self.vectors)
        fine = self._passes(watching=True)
        if fine is not None and not bool(fine):
            culprits = self._culprits()
            if len(culprits):
                self.release()
                return culprits
            self._passes(watching=False)  # finite gradients whose squares are not
        for plan in self.plans:
            plan.finish(self.vectors)
        self.release()
        return None

    def _passes(self, watching: bool) -> Tensor | None:
        """Launch all stages; whether the guard let the last one write, if there is a guard."""
        fine = None
        for plan in self.plans:
            plan.send(self.vectors)
        for depth, running in enumerate(self.running):
            found = [(plan, plan.launch(depth, fine)) for plan in running]
            self._join(depth, [(plan, parts) for plan, parts in found if parts is not None])
            norms = [plan.there.get(plan.program.gradient_norm) for plan in running]
            watched = [torch.isfinite(norm).all() for norm in norms if norm is not None]
            if watched and watching and fine is None:
                fine = torch.stack(watched).all().to(torch.int32)
        return fine

    def _join(self, depth: int, parts: Iterable[tuple[DevicePlan, Tensor]]) -> None:
        """Tell every plan the numbers that it reduced, over tensors, groups, or all."""
        wide: dict[str, list[tuple[DevicePlan, Node, Tensor]]] = {}
        for plan, found in parts:
            for place, node in enumerate(plan.program.stages[depth].reductions):
                if node.payload == "tensor":
                    plan.there[node] = found[:, place]
                else:
                    wide.setdefault(node.meaning, []).append((plan, node, found[:, place]))
        for meaning, entries in wide.items():
            word, over = entries[0][1].word_name, entries[0][1].payload
            column = torch.cat([entry[2] for entry in entries])
            if over == "all":
                whole = _whole(word, column)
            else:
                places = np.concatenate([plan.places for plan, _, _ in entries])
                whole = torch.zeros(len(self.members), dtype=torch.float64, device=self.device)
                for group in np.unique(self.groups[places]).tolist():
                    own = self._rows((meaning, group), self.groups[places] == group)
                    whole[self._rows(group, self.groups == group)] = _whole(word, column[own])
            for plan, node, _ in entries:
                plan.there[node] = whole if over == "all" else whole[plan.index]

    def _rows(self, key: Any, chosen: NDArray[np.bool_]) -> Tensor:
        if key not in self.within:
            self.within[key] = sent(np.flatnonzero(chosen), self.device)
        return self.within[key]


def _whole(word: str, values: Tensor) -> Tensor:
    """One number of many; sums are taken in order of size, so that of the parameters changes nothing."""
    return values.amax() if word == "largest" else values.sort().values.sum()


def fits(programs: Programs, members: Sequence[Member]) -> bool:
    """Whether `DeviceUpdate` can step these: all on one device, whole, and with dense gradients."""
    if len({member.weight.device for member in members}) != 1:
        return False
    if any(m.share or (m.gradient is not None and m.gradient.layout is not torch.strided) for m in members):
        return False
    return all(gpu.takes(program, members[i]) for program, places in programs for i in places)


def update(
    programs: Programs,
    members: Sequence[Member],
    groups: Sequence[int],
    vectors: Vectors | None = None,
    executor: str = "auto",
) -> Update:
    """The update of these members: one whose scalars stay on the device where that can be, else one whose
    reductions the host waits for.
    """
    wanted = executor == "gpu" or (executor == "auto" and any(m.weight.is_cuda for m in members))
    if wanted and fits(programs, members):
        return DeviceUpdate(programs, members, groups, vectors)
    return Update(programs, members, groups, vectors, executor)
