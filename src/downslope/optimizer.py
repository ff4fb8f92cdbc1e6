"""The optimizer: a chain of rules behind torch's own face, `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from downslope.admission import Parameters, admit, listed
from downslope.errors import BadInput, nearest
from downslope.following import Following, now, times, top
from downslope.kernels.collective import agree, averaged, local, reshard
from downslope.kernels.update import Skipped
from downslope.machine import Machine, untracked
from downslope.rules import Chain, Part, Route, Rule
from downslope.rules import chain as make_chain
from downslope.rules.route import REST
from downslope.rules.rule import check
from downslope.state import BESIDE, Loaded, Table, plain_name, restore

TRIALS = 30
"""How often a step that backtracks is shortened before it is given up."""


class Optimizer(torch.optim.Optimizer):
    """Steps the parameters of a model by a chain, in one pass over memory.

    Args: a model, its `named_parameters()`, parameters, or param group dicts, which may override any number
    of the chain; a chain, part, rule or route; `guard`: skip a step whose gradients hold a NaN or an infinity
    (`skipped` then names them); `model`, where it is not given as the first: a second pass leaves its buffers
    alone. `group["lr"]` is the live number: what is written there counts for the next
    step; a schedule writes the one after. `group["step"]` counts applied updates and drives schedules;
    `state[p]["t"]` those that p received. Raises BadInput.

    >>> import torch, downslope as ds
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = ds.Optimizer(model, ds.chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(3e-4, steps=1000))))
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step(); optimizer.steps
    1
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over its scale instead of unscaling itself

    def __init__(
        self,
        parameters: Parameters,
        chain: Chain | Part | Rule | Route,
        *,
        guard: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.chain, self._route = _routed(chain)
        self.guard = guard
        self.skipped: Skipped | None = None
        self.seen: list[tuple[int, float]] = []
        self._ratios: list[float] = []
        self._model = parameters if isinstance(parameters, nn.Module) else model
        self._chains: list[Chain] = []
        self._following: list[Following] = []
        self._made: Machine | None = None
        self._averaging, self._passes = False, 1
        self._having: bytes | None = None
        super().__init__(listed(parameters, self._route), _shared(self._route))
        self.state = Table(dict)

    @property
    def steps(self) -> int:
        """Updates applied so far; steps that the guard skipped do not count."""
        return int(self.param_groups[0]["step"])

    @property
    def passes(self) -> int:
        """How often a step takes the gradient; `step` needs a closure where it is more than once."""
        return self._passes

    @property
    def reacts(self) -> bool:
        """Whether any number follows a schedule that goes by what `observe` is told, such as plateau."""
        return any(schedule.reacts for following in self._following for schedule in following.values())

    @property
    def averages(self) -> bool:
        """Whether a rule or link has evaluation weights of its own; see `averaged`."""
        return any(part.rule.evaluation for chain in self._chains for part in chain.parts)

    @property
    def _rules(self) -> list[str]:
        parts = [part for chain in self._chains for part in chain.parts]
        return sorted({part.name for part in parts if part.rule.kind == "rule"})

    @property
    def asks_again(self) -> bool:
        """Whether `step` makes use of a closure: for a second gradient, or to search along its step."""
        return self.passes > 1 or any(chain.search for chain in self._chains)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with numbers of their own where given. Their schedules are read at the run's step,
        as all are.
        """
        group = dict(param_group)
        chain = self._route.of(group.get("role"))
        settings = chain.defaults
        for key in group:
            if key not in settings and key not in BESIDE:
                raise BadInput(
                    f"a param group has no number {key!r}.{nearest(key, list(settings))} "
                    f"Allowed: {', '.join(settings)}."
                )
        if isinstance(group.get("params"), set):
            raise BadInput("parameters were given as a set, whose order changes between runs; give a list.")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["step"] = self.param_groups[0]["step"] if self.param_groups else 0
        following = Following()
        for key, default in settings.items():
            owner, name = chain.owner(key)
            check(key, name, group.get(key, default), default, owner)
            following.give(group, key, group.get(key, default), self.seen)
        admit(group["params"], chain.matrix.name if chain.matrix else None)
        super().add_param_group(group)
        self._chains.append(chain)
        self._passes = 2 if any(chain.ascent for chain in self._chains) else 1
        self._following.append(following)
        peak = top(settings["lr"])
        self._ratios.append(top(following.get(("lr", None), group["lr"])) / peak if peak else 1.0)
        self._made = None

    def follow(self, number: str, value: Any) -> None:
        """Let a number of every group follow `value` from now on: a schedule, read at the run's step, or a
        plain number. Learning rates keep their ratio to that of "rest": those of a route, and those that a
        group was given.
        """
        known = [chain.defaults for chain in self._chains]
        if not any(number in numbers for numbers in known):
            allowed = list(dict.fromkeys(key for numbers in known for key in numbers))
            hint = nearest(number, allowed)
            raise BadInput(
                f"{self.chain.name} has no number {number!r}.{hint} Allowed: {', '.join(allowed)}."
            )
        peaks = [top(numbers.get(number)) for numbers in known]
        main = self._route.chains.get(REST)
        first = top(main.defaults.get(number)) if main else peaks[0]
        for group, following, chain, numbers, peak, own in zip(
            self.param_groups, self._following, self._chains, known, peaks, self._ratios, strict=True
        ):
            if number in numbers:
                owner, name = chain.owner(number)
                check(number, name, value, numbers[number], owner)
                ratio = own * peak / first if number == "lr" and peak and first else 1.0
                following.give(group, number, times(value, ratio), self.seen)

    def become(
        self,
        chain: Chain | Part | Rule | Route,
        state: Mapping[Tensor, Mapping[str, Tensor]] = MappingProxyType({}),
    ) -> None:
        """Go on by another chain, at the same step, over the same parameters and groups.

        A group keeps its multiple of the chain's rate, and numbers of its own where the new chain has them.
        State begins anew, but for what `state` gives of it, by parameter and slot ("t" is one). BadInput,
        with nothing changed, for a chain that cannot take the parameters. See also `ds.strategies.switch`.
        """
        made, route = _routed(chain)
        chains = [route.of(group.get("role")) for group in self.param_groups]
        for group, new in zip(self.param_groups, chains, strict=True):
            admit(group["params"], new.matrix.name if new.matrix else None)
        plans = [Following() for _ in chains]
        everything = (self.param_groups, self._following, self._chains, chains, self._ratios, plans)
        for group, old, before, new, ratio, plan in zip(*everything, strict=True):
            own = old.own(group, before)
            for key in before.defaults:
                del group[key]
            for key, value in {**new.defaults, "lr": times(new.defaults["lr"], ratio)}.items():
                plan.give(group, key, own.get(key, value), self.seen)
        self.chain, self._route, self._chains, self._following = made, route, chains, plans
        self.defaults, self._passes = _shared(route), 2 if any(new.ascent for new in chains) else 1
        self._made = None
        self.state.clear()
        self._machine.start(list(state))
        for parameter, slots in state.items():
            for name, value in slots.items():
                self.state[parameter][name].copy_(value)

    def observe(self, value: float) -> None:
        """Take note of a validation after `steps` updates; schedules that react go by it from the next on."""
        self.seen.append((self.steps, float(value)))
        for group, following in zip(self.param_groups, self._following, strict=True):
            following.read(group, self.seen, reacting=True)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of `step`, with its hooks and profiler label, where anybody listens to them."""
        listened = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **keywords: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return untraced(self, *args, **keywords)
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            if hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled():
                return listened(self, *args, **keywords)
            return func(self, *args, **keywords)

        # A training step that is compiled as a whole breaks off here: addresses cannot be traced.
        untraced: Callable[..., Any] = torch.compiler.disable(step)  # type: ignore[no-untyped-call]
        return step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, which looks at each gradient first, and makes a Python object of it to throw away."""
        if not set_to_none or _profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one update to every parameter that has a gradient, and return what `closure`, if given,
        returned.

        Gradients are only read. A parameter without one keeps its weight and state bit for bit. A chain with
        sam or asam calls the closure twice, a rule that backtracks as often as it must.
        """
        return untracked(self._step, closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._averaging:
            raise BadInput("the evaluation weights are in place; leave averaged() before the next step.")
        for group, following in zip(self.param_groups, self._following, strict=True):
            if "initial_lr" in group and ("lr", None) in following:
                raise BadInput("lr follows a schedule of the chain and one of torch's too; keep one.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.skipped = None
        machine = self._machine
        scaled = self._scaled(machine)
        if self._passes > 1:
            if closure is None:
                raise BadInput(f"{self.chain.name} takes the gradient twice; call step(closure).")
            if not self._ascend(machine, closure, scaled):
                return loss
        kind = "unscaled step" if scaled else "step"
        active = machine.gather(kind)
        self._notice_replaced(active)
        if active is None or not len(active) or not (active[0] or active.any()):
            self._check_gradients()
            return loss
        if self._overflowed(machine):
            self.skipped = Skipped(tuple(machine.culprits(active)))
        elif closure is not None and loss is not None and any(chain.search for chain in self._chains):
            self._search(machine, active, closure, _plain(loss))
        elif culprits := machine.run(kind, active, self.steps + 1):
            self.skipped = Skipped(tuple(culprits))
        if self.skipped is None:
            self._advance(machine, active)
        return loss

    @torch.no_grad()
    def estimate(self) -> None:
        """Take the present gradients into the state without a step: those of a loss on labels drawn from the
        model, for rules such as sophia that estimate curvature.
        """
        if not any(part.rule.estimate for chain in self._chains for part in chain.parts):
            raise BadInput(f"{self.chain.name} estimates nothing; sophia does.")
        active = self._machine.gather("estimate")
        if active is not None and active.any():
            self._machine.run("estimate", active, self.steps + 1)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The evaluation weights in place of those that are trained, which come back whatever happens inside.

        For rules and links that tell them apart (schedule_free, asgd, lookahead); else nothing changes.
        """
        if self._averaging or not self.averages:
            yield
            return
        with torch.no_grad():
            kept = self._machine.weights() if self._machine.ready() else []
            self._averaging = True
            try:
                self._machine.everyone("evaluation", self.steps)
                self._forget_gathered()
                yield
            finally:
                for weight, copy in kept:
                    weight.copy_(copy)
                self._forget_gathered()
                self._averaging = False

    def state_dict(self) -> dict[str, Any]:
        """torch's form: "state" by integer, "param_groups" with "param_names", and "schedules" as plain data
        beside them.
        """
        packed: dict[str, Any] = super().state_dict()
        # Copies of the numbers, in copies of torch's tables (which are the live ones): the live ones must
        # stay views of one vector, and file formats refuse such views.
        packed["state"] = {
            key: {name: v.clone() if v.ndim == 0 else v for name, v in slots.items()}
            for key, slots in packed["state"].items()
        }
        packed["schedules"] = [
            [[key, index, schedule.data()] for (key, index), schedule in following.items()]
            for following in self._following
        ]
        packed["seen"] = [list(one) for one in self.seen]
        packed["rules"] = self._rules
        return packed

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> Loaded:
        """Restore state by parameter name, whatever the order, from a checkpoint of ours or of torch's class
        of the same algorithm. Its numbers and schedules win, and a warning shows where they differ.

        Raises BadInput, with nothing changed, where the two do not fit. With `strict=False` the parameters
        that match by name and shape are restored, the others keep their state, and what is returned says
        which.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = changed if changed is not None else state_dict
        found = restore(self.param_groups, self._chains, self._following, state_dict, strict=strict)
        for line in found.warnings:
            warnings.warn(line, stacklevel=2)
        if found.loaded.restored and state_dict.get("rules", self._rules) != self._rules:
            theirs, mine = ", ".join(state_dict["rules"]), ", ".join(self._rules)
            warnings.warn(f"the state was made by {theirs}, and {mine} goes on with it.", stacklevel=2)
        kept = {parameter: self.state[parameter] for parameter in found.kept if parameter in self.state}
        self._made = None  # and with it the old state, before the new one is made
        self.state.clear()
        self.state.update(kept)
        self.state.update(found.state)
        for group, numbers in zip(self.param_groups, found.groups, strict=True):
            group.update(numbers)
        self._following = found.following
        self.seen = [(int(step), float(value)) for step, value in state_dict.get("seen", [])]
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)
        return found.loaded

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._made = None

    @property
    def _machine(self) -> Machine:
        made = self._made
        if made is None or made.groups is not self.param_groups or made.state is not self.state:
            every = [parameter for group in self.param_groups for parameter in group["params"]]
            admit(every)
            if not isinstance(self.state, Table):
                self.state = Table(dict, self.state)
            self._made = made = Machine(self.param_groups, self.state, self._chains, self.guard)
        return made

    def _notice_replaced(self, active: NDArray[Any] | None) -> None:
        """Refuse to go on without a parameter that was replaced in the model: the old one then has no
        gradient any more. Looked for only when other parameters lack a gradient than before.
        """
        having = None if active is None else active.tobytes()
        if self._model is None or having == self._having:
            return
        everyone = active is not None and active.all()
        groups = [group for group in self.param_groups if "param_names" in group]
        known = {n: p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        for name, parameter in () if everyone else self._model.named_parameters():
            mine = known.get(plain_name(name), parameter)
            if mine is not parameter and parameter.grad is not None:
                raise BadInput(
                    f"{name} was replaced in the model by another parameter, which the optimizer does not "
                    "have; make the optimizer after the model is complete."
                )
        self._having = having

    def _forget_gathered(self) -> None:
        if self._model is not None:
            reshard(self._model)

    def _scaled(self, machine: Machine) -> bool:
        """Whether gradients still carry the scale of a GradScaler, which is then taken off on their way."""
        scale = getattr(self, "grad_scale", None)
        machine.scale = 1.0 if scale is None else 1.0 / float(scale)
        return scale is not None

    def _overflowed(self, machine: Machine) -> bool:
        """Whether a GradScaler found an overflow, here or on any other rank."""
        found = getattr(self, "found_inf", None)
        return found is not None and averaged(float(found), [member.share for member in machine.members]) > 0

    def _check_gradients(self) -> None:
        """Where a GradScaler drives, say that there is no gradient; it would only say that it saw none."""
        every = (parameter for group in self.param_groups for parameter in group["params"])
        if hasattr(self, "found_inf") and all(parameter.grad is None for parameter in every):
            raise BadInput("no parameter has a gradient: call backward() on the scaled loss before the step.")

    def _ascend(self, machine: Machine, closure: Callable[[], Any], scaled: bool) -> bool:
        """Take the gradient again where the chain says; weights and the model's buffers come back as they
        were. False if there was no gradient to go by.
        """
        kind = "unscaled ascent" if scaled else "ascent"
        active = machine.gather(kind)
        if active is None or not active.any():
            return False
        kept = machine.weights()
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()] if self._model else []
        try:
            machine.run(kind, active, self.steps + 1)
            with torch.enable_grad():
                closure()
        finally:
            for tensor, copy in [*kept, *buffers]:
                tensor.copy_(copy)
        return True

    def _search(
        self, machine: Machine, active: NDArray[Any], closure: Callable[[], Any], loss: float
    ) -> None:
        """Shorten the step until the loss falls by the share of its slope that Armijo asks for."""
        part = next(part for chain in self._chains if (part := chain.search))
        if machine.scale != 1.0:
            raise BadInput(f"{part.name} compares losses with gradients: do without a GradScaler.")
        shrink, slope = (float(self.param_groups[0][name]) for name in ("shrink", "slope"))
        kept, rate = machine.weights(), 1.0
        shares = [member.share for member in machine.members]
        loss = averaged(loss, shares)
        gradients = [None if (g := m.parameter.grad) is None else g.clone() for m in machine.members]
        for _ in range(TRIALS):
            if culprits := machine.run("step", active, self.steps + 1, rate):
                self.skipped = Skipped(tuple(culprits))
                return
            falls = [
                0.0 if g is None else float((local(g) * (old - now)).sum())
                for g, (now, old) in zip(gradients, kept, strict=True)
            ]
            fall = float(agree(np.array(falls).reshape(-1, 1), shares, [False]).sum())
            with torch.enable_grad():
                new = averaged(_plain(closure()), shares)
            if new <= loss - slope * fall:
                return
            for weight, copy in kept:
                weight.copy_(copy)
            for member, gradient in zip(machine.members, gradients, strict=True):
                if gradient is not None:
                    member.parameter.grad = gradient.clone()
            rate *= shrink
            machine.gather("step")
        self.skipped = Skipped(())
        warnings.warn(
            f"{part.name} found no step that lowers the loss, down to {rate:.1g} of the rate: none was made.",
            stacklevel=3,
        )

    def _advance(self, machine: Machine, active: NDArray[Any]) -> None:
        machine.counts += active
        for group, following in zip(self.param_groups, self._following, strict=True):
            group["step"] += 1
            following.read(group, self.seen)


def _routed(chain: Chain | Part | Rule | Route) -> tuple[Chain | Route, Route]:
    made = chain if isinstance(chain, Chain | Route) else make_chain(chain)
    return made, made if isinstance(made, Route) else Route({REST: made})


def _shared(route: Route) -> dict[str, Any]:
    """The defaults of every param group."""
    first = next(iter(route.chains.values())).defaults
    return {k: now(v, 0) for k, v in (first if len(route.chains) == 1 else {"lr": first["lr"]}).items()}


def _plain(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
