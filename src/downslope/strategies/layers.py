"""Choices by layer: rates, freezing, first weights, dropout, normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from downslope import init, norm
from downslope.augment import set_dropout, stochastic_depth
from downslope.errors import BadInput, nearest
from downslope.groups import Frozen, discriminative, gradual_unfreeze, layer_decay
from downslope.groups import freeze as frozen
from downslope.schedule import Duration, Schedule
from downslope.strategies.strategy import Live, Strategy, Training


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
    Not for: a model wrapped by DDP or FSDP2.
    """

    until: Mapping[str, Duration] = field(default_factory=dict)
    every: Duration | None = None
    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if bool(self.until) == (self.every is not None):
            raise BadInput("[freeze] takes either until = { pattern = duration } or every = duration.")

    def begin(self, training: Training) -> Live:
        """The thaw."""
        if self.every is None:
            return _Thaw(frozen(training.model, self.until, **training.rates), training.model)
        return _Thaw(
            gradual_unfreeze(training.model, self.every, self.blocks, **training.rates), training.model
        )


class _Thaw(Live):
    def __init__(self, plan: Frozen, model: nn.Module) -> None:
        self.plan, self.model = plan, model

    def before(self, step: int) -> None:
        self.plan.apply(self.model, step)


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

    def prepare(self, training: Training) -> None:
        """Write them."""
        if self.method:
            init.initialise(training.model, self.method)
        if self.lsuv:
            (batch,) = training.batches(1)
            init.lsuv(training.model, batch)
        if self.zero_residual:
            init.zero_residual(training.model)


@dataclass(frozen=True, kw_only=True)
class dropout(Strategy):
    """The rate of the model's dropout layers: one number, or a schedule of the update.

    Source: Srivastava et al. 2014; by schedule: Liu et al., "Dropout reduces underfitting", arXiv:2303.01500.
    Not for: a model without dropout layers, which is refused.
    """

    rate: float | Schedule

    def begin(self, training: Training) -> Live:
        """The rate of every update."""
        rate = self.rate.resolve(**training.rates) if isinstance(self.rate, Schedule) else float(self.rate)
        if not set_dropout(training.model, rate(0) if isinstance(rate, Schedule) else rate).changed:
            raise BadInput("[dropout] finds no dropout layer in the model.")
        return _Dropout(rate, training.model) if isinstance(rate, Schedule) else Live()


class _Dropout(Live):
    def __init__(self, rate: Schedule, model: nn.Module) -> None:
        self.rate, self.model = rate, model

    def before(self, step: int) -> None:
        set_dropout(self.model, self.rate(step))


@dataclass(frozen=True, kw_only=True)
class depth(Strategy):
    """Stochastic depth: residual `branches`, named from low to high, are left out at random.

    The rate rises in a line up to `rate` at the last branch; what is kept is scaled, so that expectations
    stay. Source: Huang et al., arXiv:1603.09382. Not for: branches whose output is not added.
    """

    branches: tuple[str, ...]
    rate: float = 0.2

    def shape(self, model: nn.Module) -> nn.Module:
        """The model with its branches wrapped."""
        stochastic_depth(model, self.branches, self.rate)
        return model


NORMS = ("ghost", "group", "frozen")


@dataclass(frozen=True, kw_only=True)
class normalisation(Strategy):
    """What stands in BatchNorm's place: "ghost" batches of `size`, "group" norm in `groups`, or "frozen".

    ghost: statistics of parts of the batch (arXiv:1705.08741), for large batches. group: none of the batch at
    all (arXiv:1803.08494), for small ones. frozen: the running statistics that the model came with, for
    fine-tuning. Not for: a model without BatchNorm.
    """

    to: str
    size: int = 32
    groups: int | None = None

    def __post_init__(self) -> None:
        if self.to not in NORMS:
            raise BadInput(f"to is one of {', '.join(NORMS)}, got {self.to!r}.{nearest(str(self.to), NORMS)}")

    def shape(self, model: nn.Module) -> nn.Module:
        """The model with other normalisation, its parameters named as before."""
        if self.to == "frozen":
            norm.freeze(model)
            return model
        return norm.to_ghost(model, self.size) if self.to == "ghost" else norm.to_group(model, self.groups)
