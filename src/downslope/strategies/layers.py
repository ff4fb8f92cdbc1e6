"""Choices by layer: rates, freezing, first weights, dropout, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import nn

from downslope import init, norm
from downslope.augment import set_dropout, stochastic_depth
from downslope.errors import BadInput, nearest, under
from downslope.groups import NEVER, Frozen, discriminative, gradual_unfreeze, layer_decay, named
from downslope.groups import freeze as frozen
from downslope.init import METHODS
from downslope.schedule import Duration, Schedule, duration
from downslope.strategies.field import extent
from downslope.strategies.strategy import Live, Setting, Strategy


@dataclass(frozen=True, kw_only=True)
class rates(Strategy):
    """Learning rates by layer, in a ratio that every schedule keeps: `decay`, or `of` by pattern, or both.

    `decay`: each layer learns this much slower than the one above it; `blocks` names the layers as globs
    where the model does not show them. `of`: multipliers by globs of parameter names. Source: Howard and
    Ruder, arXiv:1801.06146, section 3.1; BEiT, arXiv:2106.08254. Not for: training from scratch.
    """

    decay: float | None = None
    blocks: tuple[str, ...] | None = None
    of: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is None and not self.of:
            raise BadInput("[rates] does nothing: give decay or of.")
        if self.decay is not None and not 0 < self.decay <= 1:
            with under("decay"):
                raise BadInput(
                    f"decay is above 0 and at most 1, got {self.decay:g}; [freeze] holds a layer still."
                )
        for pattern, times in self.of.items():
            if times < 0:
                with under("of", pattern):
                    raise BadInput(f"of.{pattern} multiplies a rate, a number from 0, got {times:g}.")
        if self.blocks and self.decay is None:
            raise BadInput("blocks belong to decay; of names patterns of its own.")

    def multipliers(self, model: nn.Module) -> Mapping[str, float]:
        """By parameter name."""
        found = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
        parts = [discriminative(model, self.of)] if self.of else []
        parts += [layer_decay(model, self.decay, self.blocks)] if self.decay is not None else []
        for part in parts:
            for name, value in part.items():
                found[name] = found.get(name, 1.0) * value
        return found


@dataclass(frozen=True, kw_only=True)
class freeze(Strategy):
    """Train some parameters later or never: `until` by pattern, or from the top down, a layer every so often.

    `until`: globs or roles, each with the duration after which it is trained, or "never"; `every`: the
    duration between two layers. Source of the gradual form: Howard and Ruder, arXiv:1801.06146, section 3.3.
    Not for: a model that you wrapped by DDP or FSDP2.
    """

    deeds: ClassVar[Mapping[str, str]] = {"thaw": "began to train"}

    until: Mapping[str, Any] = field(default_factory=dict)
    every: Duration | None = None
    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.until) == (self.every is not None):
            raise BadInput("[freeze] takes either until = { pattern = duration } or every = duration.")
        if self.every == 0:
            with under("every"):
                raise BadInput("every is at least 1 update, got 0, which freezes nothing.")
        if self.blocks and self.every is None:
            raise BadInput("blocks belong to every = duration; until names patterns of its own.")
        for pattern, date in self.until.items():
            with under("until", pattern):
                _date(pattern, date)

    def alone(self, shard: bool) -> str:
        """FSDP2 decides once which weights are trained."""
        return "FSDP2 decides once which weights are trained" if shard else ""

    def begin(self, training: Setting) -> Live:
        """The thaw."""
        model, rates = training.model, training.rates
        if self.every is None:
            return _Thaw(frozen(model, self.until, **rates), training, "its date")
        plan = gradual_unfreeze(model, self.every, self.blocks, **rates)
        return _Thaw(plan, training, f"every = {self.every}")


def _date(pattern: str, date: object) -> None:
    """BadInput unless it is a duration or "never"."""
    try:
        _ = date == NEVER or duration(date, pattern)
    except BadInput as error:
        raise BadInput(f'{error} Or "{NEVER}".{nearest(str(date), [NEVER])}') from None


class _Thaw(Live):
    def __init__(self, plan: Frozen, training: Setting, why: str) -> None:
        self.plan, self.model, self.why = plan, training.model, why
        self.steps = training.rates["run_steps"]

    def before(self, step: int) -> None:
        self.plan.apply(self.model, step)

    def applied(self, step: int) -> None:
        # By the plan: a model that goes on from a checkpoint has not yet been told what was frozen.
        thawed = [name for name, until in self.plan.until.items() if until == step]
        if thawed and step != self.steps:
            self.tell(step, "thaw", self.why, parameters=named(thawed))


@dataclass(frozen=True, kw_only=True)
class start(Strategy):
    """The first weights: a `method`, then `lsuv` on training data, then residual branches at zero.

    `method`: "xavier_uniform", "kaiming_normal", "orthogonal" …; "" leaves the model's own. `lsuv`: scale
    every layer's output to unit variance (arXiv:1511.06422). `zero_residual`: the last layer of every
    residual branch starts at 0 (arXiv:1901.09321). Not for: pretrained weights.
    """

    method: str = ""
    lsuv: bool = False
    zero_residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.method or self.lsuv or self.zero_residual):
            raise BadInput("[start] does nothing: give a method, lsuv = true or zero_residual = true.")
        if self.method and self.method not in METHODS:
            with under("method"):
                hint = nearest(self.method, METHODS)
                raise BadInput(f"method is one of {', '.join(METHODS)}, got {self.method!r}.{hint}")

    def prepare(self, training: Setting) -> None:
        """Write them."""
        if self.method:
            init.initialise(training.model, self.method)
        if self.lsuv:
            (batch,) = training.batches(1)
            begun = None if self.method else "orthogonal"
            init.lsuv(training.model, batch, start=begun, call=training.loss)
        if self.zero_residual:
            init.zero_residual(training.model)


@dataclass(frozen=True, kw_only=True)
class dropout(Strategy):
    """The rate of the model's dropout layers: one number, or a schedule of the update.

    Source: Srivastava et al. 2014; by schedule: Liu et al., "Dropout reduces underfitting", arXiv:2303.01500.
    Not for: a model without dropout layers, which is refused.
    """

    rate: float | Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)

    def begin(self, training: Setting) -> Live:
        """The rate of every update."""
        return _Following(self.rate, training, partial(set_dropout, training.model))


@dataclass(frozen=True, kw_only=True)
class depth(Strategy):
    """Stochastic depth: residual `branches`, named from low to high, are left out at random.

    Their rates rise in a line up to `rate` at the last one, a number or a schedule of the update; what is
    kept is scaled, so that expectations stay. Source: Huang et al., arXiv:1603.09382. Not for: branches whose
    output is not added.
    """

    branches: tuple[str, ...]
    rate: float | Schedule = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)
        if not self.branches or len({*self.branches}) < len(self.branches):
            with under("branches"):
                raise BadInput(f"branches names residual branches, each once, got {list(self.branches)}.")

    def begin(self, training: Setting) -> Live:
        """The branches' rates at every update."""
        dropping = stochastic_depth(training.model, self.branches, 0.0)
        return _Following(self.rate, training, dropping.set)


class _Following(Live):
    """Sets a rate, before every update if it follows a schedule."""

    def __init__(self, rate: float | Schedule, training: Setting, write: Callable[[float], object]) -> None:
        self.rate = rate.resolve(**training.rates) if isinstance(rate, Schedule) else rate
        self.write = write
        write(self.rate(0) if isinstance(self.rate, Schedule) else self.rate)

    def before(self, step: int) -> None:
        if isinstance(self.rate, Schedule):
            self.write(self.rate(step))


def _check_rate(rate: float | Schedule) -> None:
    for level in extent(rate):
        if not 0 <= level <= 1:
            with under("rate"):
                raise BadInput(f"rate is the share that is left out, from 0 to 1, got {level:g}.")


NORMS = ("ghost", "group", "frozen")
GHOST = 32
"""Items of a ghost batch, if it is not said how many."""


@dataclass(frozen=True, kw_only=True)
class normalisation(Strategy):
    """What stands in BatchNorm's place: "ghost" batches of `size`, "group" norm in `groups`, or "frozen".

    ghost: statistics of parts of the batch (arXiv:1705.08741), for large batches. group: none of the batch at
    all (arXiv:1803.08494), for small ones. frozen: the running statistics that the model came with, for
    fine-tuning. Not for: a model without BatchNorm.
    """

    to: str
    size: int | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in NORMS:
            with under("to"):
                hint = nearest(self.to, NORMS)
                raise BadInput(f"to is one of {', '.join(NORMS)}, got {self.to!r}.{hint}")
        for key, of, least in (("size", "ghost", 2), ("groups", "group", 1)):
            value = getattr(self, key)
            with under(key):
                if value is not None and self.to != of:
                    raise BadInput(f"{key} belongs to to = {of!r}, not to {self.to!r}.")
                if value is not None and value < least:
                    raise BadInput(f"{key} must be at least {least}, got {value}.")
        if self.to == "ghost" and self.size is None:
            object.__setattr__(self, "size", GHOST)

    def shape(self, model: nn.Module) -> nn.Module:
        """The model with other normalisation, its parameters named as before."""
        if self.to == "frozen":
            norm.freeze(model)
            return model
        return (
            norm.to_ghost(model, self.size or GHOST)
            if self.to == "ghost"
            else norm.to_group(model, self.groups)
        )
