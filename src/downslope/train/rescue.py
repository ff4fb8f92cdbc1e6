"""The state that a strategy may take a training back to; the batches go on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from downslope.strategies import Company
from downslope.train.player import Diverged, Side
from downslope.train.state import Snapshot, TrainState


class Rescue:
    """Keeps a state every `company.keeps` updates, and goes back to it where a strategy asks. What it keeps
    is a part of the training's state (`state`, `load`).
    """

    def __init__(self, model: nn.Module, company: Company, sides: Sequence[Side]) -> None:
        self.company = company
        self.moved = TrainState(model, strategies=company.moved(), generators=False)
        for side in sides:
            self.moved.add(side.part_name, side.optimizer)
        self._kept: Snapshot | None = None

    def keep(self, step: int) -> None:
        """Keep the state before update `step`, if it is time."""
        every = self.company.keeps
        if every and (self._kept is None or step >= self._kept.data["step"] + every):
            self.moved.step = step
            self._kept = self.moved.snapshot(into=self._kept)

    def step(self, step: int) -> int:
        """The step to go on from after an update that was not made. Diverged if a strategy gives up."""
        if why := self.company.given_up:
            raise Diverged(f"the training diverged at step {step}: {why}; a lower rate may help.")
        if not self.company.returns or self._kept is None:
            return step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that numbers differ is what this is for
            return self.moved.restore(self._kept).step

    def state(self) -> dict[str, Any]:
        """What is kept."""
        return {} if self._kept is None else {"data": self._kept.data, "tensors": self._kept.tensors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Keep what was kept then."""
        self._kept = None
        if state:
            tensors = {
                name: {key: tensor.clone() for key, tensor in held.items()}
                for name, held in state["tensors"].items()
            }
            self._kept = Snapshot(state["data"], tensors, None)
