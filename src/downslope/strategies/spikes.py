"""What a training does about a loss that jumps and gradients that are not finite: a ladder of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from torch import Tensor

from downslope.errors import BadInput, nearest, under
from downslope.optimizer import Optimizer
from downslope.strategies.strategy import Live, Setting, Strategy

RUNGS = ("skip", "cut", "back")
_ASTRAY = "its gradients were not finite"
_DEVIATION = 1.4826  # a normal distribution's standard deviation in its median absolute deviations


@dataclass(frozen=True, kw_only=True)
class spikes(Strategy):
    """Leave out a batch whose loss is `deviations` above the median of the last `window` (in median absolute
    deviations, scaled as standard ones), or whose gradients are not finite, and climb the `ladder`: "skip",
    that alone; "cut", the rate times `cut` for `calm` updates; "back", to weights, state and step of at most
    `keep` updates ago, never to see the batches since, the rate times `cut` for good.

    `calm` updates without a spike lead back to the bottom; after going back `most` times the training is
    given up. Costs a copy of weights and state for "back". Source: Chowdhery et al., arXiv:2204.02311, 5.1.
    Not for: losses that jump by nature (a GAN's, tiny batches).
    """

    unfair: ClassVar[str] = "it would forgive a candidate what another is cut for"
    deeds: ClassVar[Mapping[str, str]] = {
        "skip": "left the batch out",
        "cut": "left the batch out and cut the rate for a while",
        "back": "went back to the state that was kept and cut the rate for good",
    }

    deviations: float = 8.0
    window: int = 64
    calm: int = 32
    ladder: tuple[str, ...] = RUNGS
    cut: float = 0.5
    keep: int = 50
    most: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("window", 8), ("calm", 1), ("keep", 1), ("most", 1)):
            if getattr(self, name) < least:
                with under(name):
                    raise BadInput(f"{name} is a number of updates from {least}, got {getattr(self, name)}.")
        if not self.deviations > 0 or not 0 < self.cut < 1:
            raise BadInput(f"deviations is above 0, cut within 0 and 1, got {self.deviations}, {self.cut}.")
        for rung in self.ladder:
            if rung not in RUNGS:
                with under("ladder"):
                    raise BadInput(
                        f"a rung is one of {', '.join(RUNGS)}, got {rung!r}.{nearest(rung, RUNGS)}"
                    )
        if list(self.ladder) != [rung for rung in RUNGS if rung in self.ladder] or not self.ladder:
            with under("ladder"):
                raise BadInput(f"the rungs of a ladder come in the order {', '.join(RUNGS)}, each once.")

    def alone(self, shard: bool) -> str:
        """The state to go back to is a whole one."""
        lies = shard and "back" in self.ladder
        return 'the state that "back" keeps would lie whole on each' if lies else ""

    def refuse(self, others: Mapping[str, Strategy]) -> None:
        """Two strategies that take an optimizer back would take it from each other."""
        for name in ("switch", "restart"):
            if name in others and "back" in self.ladder:
                raise BadInput(
                    f'[{name}] goes back by itself: leave "back" out of the ladder, or leave it out.'
                )

    def begin(self, training: Setting) -> Live:
        """The watch, and the ladder."""
        assert training.optimizer is not None
        return _Ladder(self, training.optimizer)


class _Ladder(Live):
    judges = True

    def __init__(self, strategy: spikes, optimizer: Optimizer) -> None:
        self.strategy, self.optimizer = strategy, optimizer
        self.losses: list[tuple[int, float]] = []  # of the last updates that were made, and their steps
        self.rung = -1  # of the ladder, last climbed
        self.quiet = 0  # updates since
        self.cutting = 0  # updates for which the rate is still cut
        self.lasting = 1.0
        self.backs = 0
        self._step, self._loss = 0, math.nan
        self._why = _ASTRAY
        self._back = False
        self._rates: list[tuple[Any, Any]] = []

    @property
    def keeps(self) -> int:
        return self.strategy.keep if "back" in self.strategy.ladder else 0

    @property
    def returns(self) -> bool:
        return self._back

    @property
    def given_up(self) -> str:
        if self.backs <= self.strategy.most:
            return ""
        return f"it went back {self.strategy.most} times, and its loss jumped again"

    def admits(self, loss: float) -> bool:
        self._loss, self._why = loss, _ASTRAY
        if not math.isfinite(loss):
            self._why = "its loss was not finite"
        elif loss > self._limit():
            self._why = "its loss jumped"
        return self._why == _ASTRAY

    def before(self, step: int) -> None:
        self._step = step
        # Back at an earlier state, later and lower losses would make a spike of every batch.
        self.losses = [one for one in self.losses if one[0] < step]
        factor = self.lasting * (self.strategy.cut if self.cutting else 1.0)
        self._rates = []
        if factor != 1.0:
            for group in self.optimizer.param_groups:
                if "lr" in group:
                    self._rates.append((group["lr"], group["lr"] * factor))
                    group["lr"] = self._rates[-1][1]

    def after(self, applied: bool, names: Sequence[str]) -> None:
        groups = [group for group in self.optimizer.param_groups if "lr" in group]
        for group, (own, cut) in zip(groups, self._rates, strict=False):
            if group["lr"] == cut:  # else its schedule has written the next one
                group["lr"] = own
        self._back = False
        if applied:
            self.losses = [*self.losses, (self._step, self._loss)][-self.strategy.window :]
            self.quiet += 1
            self.cutting = max(0, self.cutting - 1)
            if self.quiet >= self.strategy.calm:
                self.rung = -1
        elif names or self._why != _ASTRAY:  # else fp16 finds its scale
            self._climb()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def data(self) -> dict[str, Any]:
        names = ("losses", "rung", "quiet", "cutting", "lasting", "backs")
        return {name: getattr(self, name) for name in names}

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name, value in data.items():
            setattr(self, name, value)
        self.losses = [(step, loss) for step, loss in self.losses]

    def _limit(self) -> float:
        """The loss from which on it is a spike; none while too few were seen."""
        if len(self.losses) < self.strategy.window // 2:
            return math.inf
        losses = [loss for _, loss in self.losses]
        middle = median(losses)
        spread = median(abs(loss - middle) for loss in losses)
        return middle + self.strategy.deviations * _DEVIATION * max(spread, 1e-3 * abs(middle))

    def _climb(self) -> None:
        ladder = self.strategy.ladder
        self.rung, self.quiet = min(self.rung + 1, len(ladder) - 1), 0
        rung, facts = ladder[self.rung], {"loss": self._loss}
        if rung == "cut":
            self.cutting = self.strategy.calm
        elif rung == "back":
            self.backs += 1
            self.lasting *= self.strategy.cut
            self._back = True
        if rung != "skip":
            facts["rate"] = self.lasting * (self.strategy.cut if rung == "cut" else 1.0)
        self.tell(self._step, rung, self._why, **facts)
