"""The machine behind an optimizer: its programs over the parameters that have state, made anew when these
change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.kernels import device
from downslope.kernels.address import Trained
from downslope.kernels.bucket import Member, initial
from downslope.kernels.collective import agree
from downslope.kernels.update import Update
from downslope.rules import Chain, Program, trace
from downslope.rules.shape import shape_of_slot
from downslope.rules.trace import UNSCALE, trace_ascent, trace_estimate, trace_evaluation
from downslope.state import Slots, Table

Groups = list[dict[str, Any]]

KINDS: Mapping[str, Callable[[Chain, bool], Program]] = {
    "step": lambda chain, guard: trace(chain, guard),
    # a scaler looks at the first gradient only
    "unscaled step": lambda chain, guard: trace(chain, guard or chain.ascent is not None, unscale=True),
    "ascent": lambda chain, guard: trace_ascent(chain),
    "unscaled ascent": lambda chain, guard: trace_ascent(chain, unscale=True),
    "evaluation": lambda chain, guard: trace_evaluation(chain),
    "estimate": lambda chain, guard: trace_estimate(chain),
}
"""What a chain may be traced for."""


class Machine:
    """Steps the parameters of `groups`, which live in an optimizer, by the chains of their groups."""

    def __init__(self, groups: Groups, state: Table, chains: list[Chain], guard: bool) -> None:
        self.groups, self.state, self.chains, self.guard = groups, state, chains, guard
        self.programs: dict[tuple[str, int], Program] = {}
        self.updates: dict[str, Update] = {}
        self.read: dict[str, list[tuple[int, str, int | None]]] = {}
        self.layouts: dict[str, list[_Layout]] = {}
        self.seen: dict[str, tuple[list[Any], list[NDArray[np.float64]]]] = {}
        self.frozen = Trained([])
        self.built = False
        self.scale = 1.0

    def forget(self) -> None:
        """Make everything anew at the next step."""
        self.updates, self.built = {}, False

    def gather(self, kind: str) -> NDArray[np.bool_] | None:
        """Which of the parameters with state have a gradient; None if nothing is to be stepped."""
        count = sum([len(group["params"]) for group in self.groups])
        fresh = self._fresh() if len(self.state) < count else []
        primes = bool(fresh) and not self.state and self._primes(fresh)
        if fresh or not self.built or self._replaced():
            self.start(fresh)
            self._build()
        if primes:
            return None
        if self.frozen.parameters and any(self.frozen.look()):
            self._build()
        active = self._update(kind).gather()
        if active is None:
            self._build()
            active = self._update(kind).gather()
        return active

    def run(self, kind: str, active: NDArray[np.bool_], step: int, rate: float = 1.0) -> list[str]:
        """Run the programs of a kind over what was gathered, counting as update `step`; the names of the
        culprits, where the guard stopped it. `rate` multiplies the learning rates.
        """
        if torch._C._current_graph_task_id() >= 0:  # a hook of autograd called us
            self._check_backward(kind)
        update = self._update(kind)
        found = update.run(self._tables(kind, rate), self.counts + 1, step, active)
        if found is None:
            return []
        return [update.names[i] for i in found]

    def everyone(self, kind: str, step: int) -> None:
        """Run programs that read no gradient over every parameter with state."""
        if not self.ready():
            return
        for _ in range(2):  # memory that moved is found once
            active = self._update(kind).gather(everyone=True)
            if active is not None:
                self.run(kind, active, step)
                return
            self._build()

    def ready(self) -> bool:
        """Whether any parameter has state."""
        if not self.built or self._replaced():
            self._build()
        return bool(self.members)

    def culprits(self, active: NDArray[np.bool_]) -> list[str]:
        """The parameters whose gradient holds a NaN or an infinity, here or on another rank."""
        gradients = [member.gradient if on else None for member, on in zip(self.members, active, strict=True)]
        bad = np.array([[float(g is not None and not _finite(g))] for g in gradients])
        bad = agree(bad, [member.share for member in self.members], [True])
        return [member.name for member, found in zip(self.members, bad[:, 0], strict=True) if found]

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Every weight with state as it lies here, and a copy."""
        held = [member.weight.detach() for member in self.members]
        return [(weight, weight.clone()) for weight in held]

    def _fresh(self) -> list[Tensor]:
        every = (parameter for group in self.groups for parameter in group["params"])
        return [
            parameter for parameter in every if parameter not in self.state and parameter.grad is not None
        ]

    def _primes(self, fresh: list[Tensor]) -> bool:
        """Whether this step, at rate 0 and with zero gradients, is only meant to create the state (torch's
        DCP does so).
        """
        idle = all(float(group["lr"]) == 0 for group in self.groups)
        return idle and not any(bool(p.grad.count_nonzero()) for p in fresh if p.grad is not None)

    def start(self, fresh: list[Tensor]) -> None:
        """Give these parameters the state with which their rules begin."""
        wanted = set(fresh)
        for chain, group in zip(self.chains, self.groups, strict=True):
            for parameter in group["params"]:
                if parameter in wanted:
                    self.state[parameter] = {
                        name: initial(slot, parameter, own_numbers(chain, place, group))
                        for name, (place, slot) in chain.slots.items()
                    } | {"t": torch.zeros((), dtype=torch.int64, device="cpu")}

    def _build(self) -> None:
        self.updates, self.read, self.layouts = {}, {}, {}
        held = [(g, p) for g, group in enumerate(self.groups) for p in group["params"] if p in self.state]
        self.owner = np.array([g for g, _ in held], dtype=np.int64)
        self.marks: list[str] = []
        for parameter, slots in self.state.items():
            self.state[parameter] = Slots(slots, self.marks)
        self.counts: NDArray[np.int64] = np.array([int(self.state[p]["t"]) for _, p in held], dtype=np.int64)
        counters = torch.from_numpy(self.counts)
        for i, (_, parameter) in enumerate(held):
            self.state[parameter]["t"] = counters[i]
        names = self._names()
        self._check_shapes(held, names)
        self.members = [
            Member.of(names[p], p, {name: self.state[p][name] for name in self.chains[g].slots})
            for g, p in held
        ]
        # A frozen parameter stays, even if its gradient is still there, as zeros. Tensors that never asked
        # for a gradient are stepped by those that they are given, as in torch.
        self.frozen = Trained([p for _, p in held if isinstance(p, nn.Parameter) and not p.requires_grad])
        self.vectors = self._vectors([(self.chains[g], p) for g, p in held])
        self.marks.clear()
        self.known = (self.state.changes, len(self.state))
        self.seen = {}
        self.built = True

    def _check_shapes(self, held: list[tuple[int, Tensor]], names: Mapping[Tensor, str]) -> None:
        """Refuse state that does not fit its parameter: behind its end lies other memory."""
        for g, parameter in held:
            for name, (_, slot) in self.chains[g].slots.items():
                found, needed = tuple(self.state[parameter][name].shape), shape_of_slot(slot, parameter.shape)
                if found != needed:
                    raise BadInput(
                        f"{names[parameter]} has shape {tuple(parameter.shape)}, its {name} {found}; "
                        "make a new optimizer where a weight changed its shape."
                    )

    def _vectors(self, held: list[tuple[Chain, Tensor]]) -> dict[str, Any]:
        """Slots of one number a tensor as vectors, of which the state holds the entries: arrays, or tensors
        where the whole step runs on a GPU.
        """
        there = self.members[0].weight.device if self.members else torch.device("cpu")
        if there.type == "cuda" and not device.fits(self._programs("step"), self.members):
            there = torch.device("cpu")
        found: dict[str, Tensor] = {}
        for i, (chain, parameter) in enumerate(held):
            for name, (_, slot) in chain.slots.items():
                if slot.per == "tensor":
                    zeros = torch.zeros(len(held), dtype=torch.float64, device=there)
                    vector = found.setdefault(name, zeros)
                    vector[i] = self.state[parameter][name].to(there)
                    self.state[parameter][name] = vector[i]
        return {name: vector if vector.is_cuda else vector.numpy() for name, vector in found.items()}

    def _update(self, kind: str) -> Update:
        if kind not in self.updates:
            programs = self._programs(kind)
            made = device.update(programs, self.members, self.owner.tolist(), self.vectors)
            self.updates[kind] = made
            self.read[kind] = [
                (-1 if key == UNSCALE else g, *key)
                for program, places in programs
                for key in program.numbers
                for g in np.unique(self.owner[places]).tolist()
            ]
            self.layouts[kind] = [_Layout(plan.program, self.owner[plan.places]) for plan in made.plans]
        return self.updates[kind]

    def _programs(self, kind: str) -> list[tuple[Program, list[int]]]:
        """The program of every chain that has parameters, and their places."""
        plans: dict[int, list[int]] = {}
        stays = {id(parameter) for parameter in self.frozen.parameters}
        for i, g in enumerate(self.owner):
            if kind != "evaluation" and id(self.members[i].parameter) in stays:
                continue
            plans.setdefault(id(self.chains[g]), []).append(i)
        by_id = {id(chain): chain for chain in self.chains}
        return [(self._program(kind, by_id[key]), places) for key, places in plans.items()]

    def _check_backward(self, kind: str) -> None:
        """BadInput for a step inside a backward pass by what needs the gradients that are yet to come."""
        crossing = [program.name for program, _ in self._programs(kind) if program.crosses]
        if crossing:
            raise BadInput(
                f"{'the guard' if self.guard else crossing[0]} looks at all gradients together, and a step "
                "inside a backward pass sees some of them: call step() after backward()."
            )

    def _program(self, kind: str, chain: Chain) -> Program:
        key = (kind, id(chain))
        if key not in self.programs:
            self.programs[key] = KINDS[kind](chain, self.guard)
        return self.programs[key]

    def _replaced(self) -> bool:
        """Whether someone put another tensor, or another table, into the state."""
        return bool(self.marks) or (self.state.changes, len(self.state)) != self.known

    def _tables(self, kind: str, rate: float) -> list[NDArray[np.float64]]:
        """A table a plan: a row per number of its program, a column per parameter, or one for all; built anew
        only when a group's numbers changed.
        """
        everything = [*self.groups, {UNSCALE[0]: self.scale}]
        now = [rate]
        for g, key, index in self.read[kind]:
            value = everything[g][key]
            now.append(float(value if index is None else value[index]))
        if kind not in self.seen or self.seen[kind][0] != now:
            tables, start = [], 1
            for layout in self.layouts[kind]:
                end = start + layout.size
                tables.append(layout.table(now[start:end], rate))
                start = end
            self.seen[kind] = (now, tables)
        return self.seen[kind][1]

    def _names(self) -> dict[Tensor, str]:
        found: dict[Tensor, str] = {}
        for group in self.groups:
            for i, parameter in enumerate(group["params"]):
                named = "param_names" in group
                found[parameter] = group["param_names"][i] if named else f"parameter {len(found)}"
        return found


class _Layout:
    """How a plan's numbers, by number and group, become its table; `owners` are the groups of its members."""

    def __init__(self, program: Program, owners: NDArray[np.int64]) -> None:
        groups, self.columns = np.unique(owners, return_inverse=True)
        self.keys, self.groups = program.numbers, len(groups)
        self.size = len(self.keys) * self.groups
        self.rate = self.keys.index(("lr", None)) if ("lr", None) in self.keys else None

    def table(self, values: list[float], factor: float) -> NDArray[np.float64]:
        """The table of these values, with learning rates times `factor`. BadInput if one is not finite."""
        table = np.array(values).reshape(len(self.keys), self.groups)
        if not (isfinite(factor) and all(map(isfinite, values))):
            found = {key[0]: row.tolist() for key, row in zip(self.keys, table, strict=True)}
            raise BadInput(f"a number of the optimizer is not finite: {found}.")
        if self.rate is not None and factor != 1.0:
            table[self.rate] *= factor
        return table if self.groups == 1 else table[:, self.columns]


def untracked(call: Callable[..., Any], *given: Any) -> Any:
    """What a call returns that autograd shall not follow; torch.no_grad takes ten times as long for it."""
    tracked = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        return call(*given)
    finally:
        torch._C._set_grad_enabled(tracked)


def own_numbers(chain: Chain, place: int, group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one part of a chain as a group has them, by argument, and the learning rate."""
    keys = chain.keys[place]
    found = {a: float(group[key] if i is None else group[key][i]) for a, (key, i) in keys.items()}
    return {"lr": float(group["lr"]), **found}


def _finite(gradient: Any) -> bool:
    values = gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
    return bool(torch.isfinite(values).all())
