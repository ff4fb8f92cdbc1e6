"""The optimizer: a chain of rules behind torch's own face, `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from operator import is_not
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from downslope.errors import BadInput, nearest
from downslope.kernels.eager import initial
from downslope.kernels.update import Skipped, Update
from downslope.rules import Chain, Part, Rule, trace
from downslope.rules import chain as make_chain
from downslope.rules.rule import check
from downslope.schedule import Schedule
from downslope.state import Slots, restore

Parameters: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

_FOREIGN = (
    "params",
    "param_names",
    "name",
    "role",
    "step",
    "initial_lr",
    "min_lr",
    "max_lr",
    "swa_lr",
    "base_momentum",
)
"""Keys of a param group that are not numbers of the chain: torch's, its schedulers', and our counter."""


class Optimizer(torch.optim.Optimizer):
    """Steps the parameters of a model by a chain, in one pass over memory.

    Args: a model, its `named_parameters()`, parameters, or param group dicts, which may override any number
    of the chain; a chain, part or rule; `guard`: skip a step whose gradients hold a NaN or an infinity
    (`skipped` then names them). `group["lr"]` is the live number: what is written there counts for the next
    step; a schedule writes the one after. `group["step"]` counts applied updates and drives schedules;
    `state[p]["t"]` those that p received. Raises BadInput.

    >>> import torch, downslope as ds
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = ds.Optimizer(model, ds.chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(3e-4, steps=1000))))
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step(); optimizer.steps
    1
    """

    def __init__(self, parameters: Parameters, chain: Chain | Part | Rule, *, guard: bool = False) -> None:
        self.chain = chain if isinstance(chain, Chain) else make_chain(chain)
        self.guard = guard
        self.skipped: Skipped | None = None
        self._settings = self.chain.defaults
        self._following: list[dict[tuple[str, int | None], Schedule]] = []
        self._program = trace(self.chain, guard=guard)
        self._update: Update | None = None
        live = {key: _live(value, 0) for key, value in self._settings.items()}
        super().__init__(_listed(parameters), live)

    @property
    def steps(self) -> int:
        """Updates applied so far; steps that the guard skipped do not count."""
        return int(self.param_groups[0]["step"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with numbers of their own where given. Their schedules are read at the run's step,
        as all are.
        """
        group = dict(param_group)
        for key in group:
            if key not in self._settings and key not in _FOREIGN:
                raise BadInput(
                    f"a param group has no number {key!r}.{nearest(key, list(self._settings))} "
                    f"Allowed: {', '.join(self._settings)}."
                )
        if isinstance(group.get("params"), set):
            raise BadInput("parameters were given as a set, whose order changes between runs; give a list.")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["step"] = self.param_groups[0]["step"] if self.param_groups else 0
        following: dict[tuple[str, int | None], Schedule] = {}
        for key, default in self._settings.items():
            check(key, key.split(".")[-1], group.get(key, default), default)
            _follow(following, group, key, group.get(key, default))
        _admit(group["params"])
        super().add_param_group(group)
        self._following.append(following)
        self._update = None

    def follow(self, number: str, value: Any) -> None:
        """Let a number of every group follow `value` from now on: a schedule, read at the run's step, or a
        plain number.
        """
        if number not in self._settings:
            hint, allowed = nearest(number, list(self._settings)), ", ".join(self._settings)
            raise BadInput(f"{self.chain.name} has no number {number!r}.{hint} Allowed: {allowed}.")
        check(number, number.split(".")[-1], value, self._settings[number])
        for group, following in zip(self.param_groups, self._following, strict=True):
            _follow(following, group, number, value)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of `step`, with its hooks and profiler label, where anybody listens to them."""
        listened = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **keywords: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            if hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled():
                return listened(self, *args, **keywords)
            return func(self, *args, **keywords)

        return step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one update to every parameter that has a gradient, and return what `closure`, if given,
        returned.

        Gradients are only read. A parameter without one keeps its weight and state bit for bit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.skipped = None
        active = self._gather()
        update = self._update
        if active is None or update is None or not active.any():
            return loss
        culprits = update.run(self._numbers(), self._counts + 1, self.steps + 1, active)
        if culprits is not None:
            self.skipped = Skipped(tuple(update.names[i] for i in culprits))
            return loss
        self._counts += active
        self._advance()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """torch's form: "state" by integer, "param_groups" with "param_names", and "schedules" as plain data
        beside them.
        """
        packed: dict[str, Any] = super().state_dict()
        # Copies of the counters, in copies of torch's tables (which are the live ones): the live counters
        # must stay views of one vector, and file formats refuse such views.
        packed["state"] = {key: {**slots, "t": slots["t"].clone()} for key, slots in packed["state"].items()}
        packed["schedules"] = [
            [[key, index, schedule.data()] for (key, index), schedule in following.items()]
            for following in self._following
        ]
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore state by parameter name, whatever the order. Numbers and schedules of the checkpoint win,
        and a warning shows where they differ from the program's. Raises BadInput, with nothing changed, where
        the two do not fit."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = changed if changed is not None else state_dict
        found = restore(
            self.param_groups, tuple(self._program.slots), self._following, state_dict, self.chain.name
        )
        for line in found.warnings:
            warnings.warn(line, stacklevel=2)
        self.state.clear()
        self.state.update(found.state)
        for group, numbers in zip(self.param_groups, found.groups, strict=True):
            group.update(numbers)
        self._following = found.following
        self._update = None
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        derived = (
            "_update",
            "_program",
            "_members",
            "_member_groups",
            "_marks",
            "_entries",
            "_counts",
            "_seen",
            "_table",
        )
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._program, self._update = trace(self.chain, guard=self.guard), None

    def _gather(self) -> NDArray[np.bool_] | None:
        """Which of the parameters with state have a gradient; None if nothing is to be stepped.

        The update over them is made anew when parameters, their memory or their state are others than before.
        """
        count = sum(len(group["params"]) for group in self.param_groups)
        fresh = self._fresh() if len(self.state) < count else []
        if self._update is not None and not fresh and not self._replaced():
            active = self._update.gather()
            if active is not None:
                return active
        _admit([parameter for group in self.param_groups for parameter in group["params"]])
        primes = bool(fresh) and not self.state and self._primes(fresh)
        self._start(fresh)
        if primes:
            return None
        return self._build().gather()

    def _fresh(self) -> list[Tensor]:
        every = (parameter for group in self.param_groups for parameter in group["params"])
        return [
            parameter for parameter in every if parameter not in self.state and parameter.grad is not None
        ]

    def _primes(self, fresh: list[Tensor]) -> bool:
        """Whether this step, at rate 0 and with zero gradients, is only meant to create the state (torch's
        DCP does so).
        """
        idle = all(float(group["lr"]) == 0 for group in self.param_groups)
        return idle and not any(bool(p.grad.count_nonzero()) for p in fresh if p.grad is not None)

    def _start(self, fresh: list[Tensor]) -> None:
        wanted = set(fresh)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in wanted:
                    slots = {
                        name: initial(slot, parameter, self._own_numbers(name, group))
                        for name, slot in self._program.slots.items()
                    }
                    self.state[parameter] = {**slots, "t": torch.zeros((), dtype=torch.int64)}

    def _own_numbers(self, slot: str, group: dict[str, Any]) -> dict[str, float]:
        keys = self.chain.keys[self.chain.slots[slot][0]]
        return {a: float(group[key] if i is None else group[key][i]) for a, (key, i) in keys.items()}

    def _build(self) -> Update:
        members = [
            (g, p) for g, group in enumerate(self.param_groups) for p in group["params"] if p in self.state
        ]
        self._members = [p for _, p in members]
        self._member_groups = np.array([g for g, _ in members], dtype=np.int64)
        self._marks: list[str] = []
        for parameter, held in self.state.items():
            self.state[parameter] = Slots(held, self._marks)
        self._entries = list(self.state.values())
        slots = [{name: self.state[p][name] for name in self._program.slots} for p in self._members]
        known = self._names()
        names = [known[parameter] for parameter in self._members]
        self._update = Update(self._program, self._members, slots, [g for g, _ in members], names=names)
        self._counts: NDArray[np.int64] = np.array(
            [int(self.state[p]["t"]) for p in self._members], dtype=np.int64
        )
        counters = torch.from_numpy(self._counts)
        for i, parameter in enumerate(self._members):
            self.state[parameter]["t"] = counters[i]
        self._marks.clear()
        self._seen: list[tuple[float, ...]] = []
        return self._update

    def _replaced(self) -> bool:
        """Whether someone put another tensor, or another table, into the state."""
        if self._marks or len(self.state) != len(self._entries):
            return True
        return any(map(is_not, self.state.values(), self._entries))

    def _numbers(self) -> NDArray[np.float64]:
        """A row per number of the program, a column per parameter; built anew only when a group's numbers
        changed.
        """
        for group, following in zip(self.param_groups, self._following, strict=True):
            if "initial_lr" in group and ("lr", None) in following:
                raise BadInput(
                    "lr follows a schedule of the chain and a scheduler of torch was attached too; keep one."
                )
        now = [
            tuple(
                float(group[key] if index is None else group[key][index])
                for key, index in self._program.numbers
            )
            for group in self.param_groups
        ]
        if now != self._seen:
            table = np.array(now, dtype=np.float64).reshape(len(now), -1)
            if not np.isfinite(table).all():
                found = {
                    key: column
                    for (key, _), column in zip(self._program.numbers, table.T.tolist(), strict=True)
                }
                raise BadInput(f"a number of the optimizer is not finite: {found}.")
            self._table = np.ascontiguousarray(table.T[:, self._member_groups])
            self._seen = now
        return self._table

    def _advance(self) -> None:
        for group, following in zip(self.param_groups, self._following, strict=True):
            group["step"] += 1
            for (key, index), schedule in following.items():
                _write(group, key, index, schedule(group["step"]))

    def _names(self) -> dict[Tensor, str]:
        found: dict[Tensor, str] = {}
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                found[parameter] = (
                    group["param_names"][i] if "param_names" in group else f"parameter {len(found)}"
                )
        return found


def _listed(parameters: Parameters) -> list[Any]:
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    if isinstance(parameters, Tensor):
        raise BadInput("parameters must be a model, a list of tensors or of groups; one tensor was given.")
    if isinstance(parameters, set):
        raise BadInput("parameters were given as a set, whose order changes between runs; give a list.")
    listed = list(parameters)
    if not listed:
        raise BadInput("the optimizer was given no parameters; is the model empty, or the generator used up?")
    return [(plain_name(entry[0]), entry[1]) if isinstance(entry, tuple) else entry for entry in listed]


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and DDP put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _admit(parameters: list[Any]) -> None:
    """Refuse, by name or place, what no executor may touch through a raw pointer."""
    seen: set[int] = set()
    for place, entry in enumerate(parameters):
        name, parameter = entry if isinstance(entry, tuple) else (f"parameter {place}", entry)
        if not isinstance(parameter, Tensor):
            raise BadInput(f"{name} must be a tensor; {type(parameter).__name__} was given.")
        if id(parameter) in seen:
            raise BadInput(f"{name} was given twice; a tied weight is one parameter.")
        seen.add(id(parameter))
        kind = type(parameter)
        if parameter.is_meta:
            raise BadInput(
                f"{name} is a meta tensor, which has no memory; materialise the model first (to_empty)."
            )
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and kind not in (Tensor, nn.Parameter):
            raise BadInput(
                f"{name} is a {kind.__name__}, a tensor subclass without plain memory; give plain tensors."
            )
        if parameter.layout is not torch.strided or not parameter.is_floating_point():
            what = str(
                parameter.dtype if parameter.layout is torch.strided else parameter.layout
            ).removeprefix("torch.")
            raise BadInput(
                f"{name} is {what}; parameters must be dense and float16, bfloat16, float32 or float64."
            )


def _live(value: Any, step: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_live(one, step) for one in value)
    return value(step) if isinstance(value, Schedule) else value


def _follow(
    following: dict[tuple[str, int | None], Schedule], group: dict[str, Any], key: str, value: Any
) -> None:
    """Set a number of a group, and note which of its parts follow schedules."""
    for known in [known for known in following if known[0] == key]:
        del following[known]
    parts = list(enumerate(value)) if isinstance(value, tuple | list) else [(None, value)]
    following.update({(key, index): part for index, part in parts if isinstance(part, Schedule)})
    group[key] = _live(tuple(value) if isinstance(value, list) else value, int(group["step"]))


def _write(group: dict[str, Any], key: str, index: int | None, value: float) -> None:
    if index is not None:
        group[key] = tuple(value if i == index else old for i, old in enumerate(group[key]))
    elif isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value
