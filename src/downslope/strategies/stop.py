"""Early stopping: the training ends where validations stop getting better, and the best weights come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from downslope.augment import EarlyStopping
from downslope.errors import BadInput, nearest
from downslope.schedule import Duration, in_steps
from downslope.strategies.kept import Keeping
from downslope.strategies.strategy import Live, Setting, Strategy

WATCHED = ("loss", "metric")
WAITED = "validations got no better"


@dataclass(frozen=True, kw_only=True)
class stop(Strategy):
    """End the training after `patience` validations in a row that are no improvement by `min_delta`.

    `on`: the "metric" or the "loss" of the validations, which the recipe's `observe` spaces. `restore`: go
    back to the best weights. `relative`: min_delta is a share of the best. `warmup`: a duration in which
    nothing counts against the training. Source: Prechelt, "Early stopping - but when?", 1998. Not for: a
    schedule that falls to its end, whose last part is the best.
    """

    patience: int = 10
    min_delta: float = 0.0
    relative: bool = False
    on: str = "loss"
    restore: bool = True
    warmup: Duration = 0

    unfair: ClassVar[str] = "it ends a training early, by the validations that judge it"
    deeds: ClassVar[Mapping[str, str]] = {"stop": "ended the training"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in WATCHED:
            raise BadInput(
                f"on is one of {', '.join(WATCHED)}, got {self.on!r}.{nearest(str(self.on), WATCHED)}"
            )
        self._stopping("min", 0)

    def alone(self, shard: bool) -> str:
        """The best weights are kept whole."""
        return "with restore it keeps whole weights; restore = false goes" if shard and self.restore else ""

    def begin(self, training: Setting) -> Live:
        """The watch over the validations."""
        mode = "max" if self.on == "metric" and training.better else "min"
        warmup = in_steps(self.warmup, "warmup", **training.rates)
        return _Stopping(self, self._stopping(mode, warmup), training)

    def _stopping(self, mode: str, warmup: int) -> EarlyStopping:
        return EarlyStopping(self.patience, self.min_delta, self.relative, mode, warmup)


class _Stopping(Keeping):
    def __init__(self, strategy: stop, stopping: EarlyStopping, training: Setting) -> None:
        super().__init__(training.model)
        self.strategy, self.stopping = strategy, stopping

    @property
    def stopped(self) -> bool:
        return self.stopping.stopped

    def observed(self, step: int, loss: float, metric: float) -> None:
        self.stopping.update(loss if self.strategy.on == "loss" else metric, step)
        if self.stopping.improved and self.strategy.restore:
            self.keep()
        if self.stopped:
            best, at = self.stopping.best, self.stopping.best_step
            facts = {} if best is None or at is None else {f"best {self.strategy.on}": best, "at update": at}
            self.tell(step, "stop", WAITED, **facts)

    def data(self) -> dict[str, Any]:
        return asdict(self.stopping)

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load(data, tensors)
        self.stopping = EarlyStopping.from_state(data)
