"""Averages of the weights: trained are the live ones, evaluated and handed over the averaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from downslope import norm
from downslope.average import BUFFERS, KINDS, Average, Averaging
from downslope.errors import BadInput, nearest, under
from downslope.schedule import Duration
from downslope.strategies.strategy import Live, Setting, Strategy

RECALIBRATED = 64
"""Training batches by which BatchNorm's statistics are measured for averaged weights."""


@dataclass(frozen=True, kw_only=True)
class average(Strategy):
    """Evaluate, and end with, an average of the weights: "ema", "swa", "tail" or "polynomial_average".

    The numbers are those of `ds.ema`, `ds.swa`, `ds.tail`, `ds.polynomial_average`. `buffers`: BatchNorm's
    statistics for the averaged weights, "recompute" (from the first training batches), "copy" or "average".
    Source: Polyak and Juditsky 1992; Izmailov et al., arXiv:1803.05407. Not for: a rate that ends at 0, after
    which little is left to average; rules that average by themselves, which are refused.
    """

    kind: str = "ema"
    decay: float | None = None
    warmup: str | None = None
    gamma: float | None = None
    power: float | None = None
    fraction: float | None = None
    eta: float | None = None
    start: Duration | None = None
    every: Duration | None = None
    buffers: str = "recompute"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffers not in BUFFERS:
            with under("buffers"):
                hint = nearest(str(self.buffers), BUFFERS)
                raise BadInput(f"buffers is one of {', '.join(BUFFERS)}, got {self.buffers!r}.{hint}")
        for name, value in self.averaging.numbers:  # written out, whatever the defaults will be one day
            if name in self.declared():
                object.__setattr__(self, name, value)

    @property
    def averaging(self) -> Averaging:
        """What is averaged, as plain data."""
        numbers = {key: value for key, value in self.data().items() if key not in ("kind", "buffers")}
        if self.kind not in KINDS:
            with under("kind"):
                hint = nearest(self.kind, KINDS)
                raise BadInput(f"kind is one of {', '.join(KINDS)}, got {self.kind!r}.{hint}")
        return Averaging.from_data({"average": self.kind, **numbers})

    def alone(self, shard: bool) -> str:
        """The average is kept whole."""
        return "it keeps an average of whole weights" if shard else ""

    def begin(self, training: Setting) -> Live:
        """The average beside the training."""
        optimizer = training.optimizer
        assert optimizer is not None
        if optimizer.averages:
            raise BadInput(
                f"{optimizer.chain.name} has evaluation weights of its own, which are no part of an average: "
                "leave out [average], or take another rule."
            )
        return _Averaged(self, training)


class _Averaged(Live):
    def __init__(self, strategy: average, training: Setting) -> None:
        self.training = training
        averaging = strategy.averaging.resolve(**training.rates)
        self.average = Average(training.model, averaging, buffers=strategy.buffers)
        self.anew = strategy.buffers == "recompute" and _has_statistics(training.model)

    def applied(self, step: int) -> None:
        self.average.update(step)

    def evaluating(self) -> AbstractContextManager[object]:
        return self.average.swapped(recalibrate=self._recalibrate if self.anew else None)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.average.state()["tensors"])

    def data(self) -> dict[str, Any]:
        return dict(self.average.state()["numbers"])

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.average.load({"numbers": data, "tensors": tensors})

    def _recalibrate(self, model: nn.Module) -> None:
        # Through the task's loss, which knows what of a batch the model takes.
        norm.recalibrate(model, self.training.batches(RECALIBRATED), call=self.training.loss)


def _has_statistics(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())
