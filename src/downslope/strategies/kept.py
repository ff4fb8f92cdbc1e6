"""What a strategy keeps to come back to: a model and its optimizer as they were, or the best weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from downslope.optimizer import Optimizer
from downslope.schedule import Schedule
from downslope.strategies.strategy import Live


@dataclass(frozen=True)
class Kept:
    """Weights, buffers and state as `tensors` by name, and what else the optimizer had as JSON data."""

    numbers: Mapping[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> Kept:
        """As they are now, in memory of its own."""
        packed = optimizer.state_dict()
        tensors = {f"weight/{name}": value.detach().clone() for name, value in _held(model).items()}
        for place, slots in packed.pop("state").items():
            tensors |= {f"slot/{place}/{name}": value.detach().clone() for name, value in slots.items()}
        groups = [{k: _plain(v) for k, v in group.items()} for group in packed.pop("param_groups")]
        return cls({"param_groups": groups, "schedules": packed["schedules"]}, tensors)

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put all back, but for the count of updates, at which schedules are read. The optimizer has the
        chain that it had.
        """
        held, state = _held(model), dict[int, dict[str, Tensor]]()
        with torch.no_grad():
            for key, value in self.tensors.items():
                kind, _, name = key.partition("/")
                if kind == "weight":
                    held[name].copy_(value)
                else:
                    place, _, slot = name.partition("/")
                    state.setdefault(int(place), {})[slot] = value
        groups = [{**group, "step": optimizer.steps} for group in self.numbers["param_groups"]]
        for group, plans in zip(groups, self.numbers["schedules"], strict=True):
            for key, index, plan in plans:
                now = Schedule.from_data(plan)(optimizer.steps, optimizer.seen)
                parts = None if index is None else [*group[key][:index], now, *group[key][index + 1 :]]
                group[key] = now if parts is None else tuple(parts)
        packed = {"state": state, "param_groups": groups, "schedules": self.numbers["schedules"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that numbers differ is what this is for
            optimizer.load_state_dict({**packed, "seen": optimizer.seen})


class Keeping(Live):
    """A live part with which the training ends with the weights that it kept last, if it kept any."""

    reacts: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[str, Tensor] = {}

    def keep(self) -> None:
        """The weights as they are judged: within `observed` a rule's averaged ones are in place, if any."""
        self.kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @property
    def best(self) -> Mapping[str, Tensor] | None:
        """What was kept."""
        return self.kept or None

    def tensors(self) -> dict[str, Tensor]:
        """What was kept."""
        return self.kept

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep what was kept then."""
        self.kept = dict(tensors)


def _plain(value: Any) -> Any:
    """As JSON has it, so that what is read back is equal."""
    return float(value) if isinstance(value, Tensor) else [*value] if isinstance(value, tuple) else value


def _held(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
