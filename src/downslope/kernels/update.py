"""One step over all parameters: gather gradients, fold scalars, run the stages, and keep the guard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from downslope.errors import BadInput
from downslope.kernels.bucket import Floats, Member, SparseGradientError
from downslope.kernels.collective import agree
from downslope.kernels.plan import Plan
from downslope.kernels.words import combine
from downslope.rules.trace import Node, Program


@dataclass(frozen=True)
class Skipped:
    """A step that was not made: the parameters whose gradient holds a NaN or an infinity."""

    names: tuple[str, ...]


class Update:
    """Programs over a fixed list of parameters, each with its slots; every program has its own parameters.

    `programs` are pairs of a program and the places of its members; `vectors` hold the slots that are one
    number a tensor, by name an entry a member. Reductions over "all" span the parameters of every program
    that computes the same.
    """

    def __init__(
        self,
        programs: Sequence[tuple[Program, Sequence[int]]],
        members: Sequence[Member],
        groups: Sequence[int],
        vectors: Mapping[str, Floats] | None = None,
        executor: str = "auto",
    ) -> None:
        self.members, self.groups = list(members), np.array(groups, dtype=np.int64)
        self.sizes = np.array([np.prod(member.shape) for member in members], dtype=np.float64)
        self.vectors = vectors or {}
        self.plans = [
            Plan(program, members, np.array(places, dtype=np.int64), executor)
            for program, places in programs
            if len(places)
        ]
        wanted = {node.payload for plan in self.plans for node in plan.counters if node.word_name == "count"}
        self.counted = sorted(wanted & {"group", "all"})
        self.shares = [member.share for member in members]
        self.sharded = any(share is not None for share in self.shares)

    @property
    def names(self) -> list[str]:
        """The parameters' names."""
        return [member.name for member in self.members]

    @cached_property
    def running(self) -> list[list[Any]]:
        """The plans that have a stage of a depth, by depth."""
        deepest = max(len(plan.program.stages) for plan in self.plans)
        return [[plan for plan in self.plans if depth < len(plan.program.stages)] for depth in range(deepest)]

    @cached_property
    def buckets(self) -> list[Any]:
        """What the executors step together."""
        return [bucket for plan in self.plans for bucket in plan.buckets]

    def gather(self, everyone: bool = False) -> NDArray[np.bool_] | None:
        """Look up this step's gradients; which parameters have one. None if a parameter's memory moved, so
        that the update must be made anew. With `everyone` the programs read no gradient, and step all."""
        gathered: list[tuple[Plan, NDArray[np.bool_]]] = []
        for plan in self.plans:
            try:
                having = plan.gather(everyone)
            except SparseGradientError as found:
                if plan.program.dense is None:
                    return None  # it was dense, or missing, when this was made
                name = self.names[plan.places[found.place]]
                raise BadInput(
                    f"{name} has a sparse gradient, which {plan.program.dense} cannot take; use sparse=False."
                ) from None
            if having is None or plan.everyone:  # there is no other
                return having
            gathered.append((plan, having))
        active = np.zeros(len(self.members), dtype=bool)
        for plan, having in gathered:
            active[plan.places] = having
        return active

    def run(
        self, numbers: Sequence[Floats], t: NDArray[np.int64], step: int, active: NDArray[np.bool_]
    ) -> NDArray[np.int64] | None:
        """Apply the step to what `gather` found. None, or, where the guard stopped it with nothing written,
        the culprits.

        `numbers` has a table a plan: a row per entry of `program.numbers` and a column per parameter, or one
        for all; another array whenever they change. `t` counts the updates of each parameter and `step` those
        of the run, this one included.
        """
        counts = self._counts(active)
        for plan, table in zip(self.plans, numbers, strict=True):
            plan.begin(table, t, step, active, counts, self.vectors)
        for depth, running in enumerate(self.running):
            wanted = [(plan, plan.pass_over(depth)) for plan in running]
            if parts := [(plan, parts) for plan, parts in wanted if parts is not None]:
                self._combine(depth, parts)
            if parts and any(plan.alarm() for plan in running):
                culprits = self._culprits()
                if len(culprits):
                    self.release()
                    return culprits
        for plan in self.plans:
            plan.finish(self.vectors)
        self.release()
        return None

    def release(self) -> None:
        """Let go of what was gathered."""
        for bucket in self.buckets:
            bucket.release()

    def _counts(self, active: NDArray[np.bool_]) -> dict[str, Floats]:
        """How many numbers are stepped in the scopes that a program asks of."""
        return {over: self._within(over, self.sizes * active) for over in self.counted}

    def _within(self, over: str, values: Floats) -> Floats:
        if over == "all":
            return np.full(len(values), values.sum())
        return np.asarray(np.bincount(self.groups, values)[self.groups], dtype=np.float64)

    def _combine(self, depth: int, parts: list[tuple[Plan, tuple[Floats, NDArray[np.int64]]]]) -> None:
        """Make whole numbers of the partial results of a pass, and tell every plan that wants them."""
        wide: dict[str, list[tuple[Plan, Node, Floats, NDArray[np.int64]]]] = {}
        for plan, (values, owners) in parts:
            reductions = plan.program.stages[depth].reductions
            if self.sharded and reductions:
                values, owners = self._over_ranks(plan, reductions, values, owners)
            for place, node in enumerate(reductions):
                column = values[:, place]
                if node.payload == "tensor":
                    plan.known[node] = _by_owner(node.word_name, column, owners, len(plan.places))
                elif plan.everyone and node.payload == "all":
                    plan.known[node] = combine(node.word_name, column)
                else:
                    wide.setdefault(node.meaning, []).append((plan, node, column, owners))
        for entries in wide.values():
            node = entries[0][1]
            columns = [entry[2] for entry in entries]
            column = columns[0] if len(columns) == 1 else np.concatenate(columns)
            if node.payload == "all":
                one = combine(node.word_name, column)
                for plan, own, _, _ in entries:
                    plan.known[own] = one
                continue
            home = self.groups[np.concatenate([plan.places[owners] for plan, _, _, owners in entries])]
            whole = _by_owner(node.word_name, column, home, int(self.groups.max()) + 1)[self.groups]
            for plan, own, _, _ in entries:
                plan.known[own] = whole[plan.places]

    def _over_ranks(
        self, plan: Plan, reductions: Sequence[Node], values: Floats, owners: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.int64]]:
        count = len(plan.places)
        columns = [_by_owner(n.word_name, values[:, i], owners, count) for i, n in enumerate(reductions)]
        table = np.stack(columns, axis=1)
        largest = [node.word_name == "largest" for node in reductions]
        return agree(table, [self.shares[i] for i in plan.places], largest), np.arange(count)

    def _culprits(self) -> NDArray[np.int64]:
        bad = np.zeros((len(self.members), 1))
        for plan, place, gradient in self._gradients():
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                bad[plan.places[place]] = 1
        if self.sharded:
            bad = agree(bad, self.shares, [True])
        return np.flatnonzero(bad[:, 0])

    def _gradients(self) -> Iterator[tuple[Plan, int, Any]]:
        for plan in self.plans:
            for bucket in plan.buckets:
                for place, member in zip(bucket.index, bucket.members, strict=True):
                    gradient = member.gradient
                    if gradient is not None and gradient.layout is torch.sparse_coo:
                        gradient = gradient.coalesce().values()
                    yield plan, int(place), gradient


def _by_owner(name: str, column: Floats, owners: NDArray[np.int64], count: int) -> Floats:
    """Partial results added up by their owner."""
    if len(owners) == count and np.array_equal(owners, np.arange(count)):
        return column.copy()
    sums = np.zeros(count)
    order = np.argsort(owners, kind="stable")
    found, first, parts = np.unique(owners[order], return_index=True, return_counts=True)
    ordered = column[order]
    sums[found] = ordered[first]  # most tensors are of one chunk, and have nothing to add
    for owner, start, size in zip(found[parts > 1], first[parts > 1], parts[parts > 1], strict=True):
        sums[owner] = combine(name, ordered[start : start + size])
    return sums
