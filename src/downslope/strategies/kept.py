"""A model and its optimizer as they were, to come back to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from downslope.optimizer import Optimizer
from downslope.schedule import Schedule


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


def _plain(value: Any) -> Any:
    """As JSON has it, so that what is read back is equal."""
    return float(value) if isinstance(value, Tensor) else [*value] if isinstance(value, tuple) else value


def _held(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
