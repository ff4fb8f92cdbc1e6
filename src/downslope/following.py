"""Numbers of a param group that follow schedules: which, and what they are at a step."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from downslope.rules import Chain
from downslope.schedule import Schedule
from downslope.schedule.schedule import Seen


class Following(dict[tuple[str, int | None], Schedule]):
    """The schedules of one group, by the name of a number and, where it is one of several, its place.

    >>> from downslope.schedule import linear
    >>> group, following = {"step": 1}, Following()
    >>> following.give(group, "betas", (linear(1.0, steps=4), 0.99))
    >>> group["betas"]
    (0.75, 0.99)
    """

    def give(self, group: MutableMapping[str, Any], key: str, value: Any, seen: Seen = ()) -> None:
        """Let a number of the group be `value`, or follow it, or its parts do, from the group's step on."""
        for known in [known for known in self if known[0] == key]:
            del self[known]
        parts = list(enumerate(value)) if isinstance(value, tuple | list) else [(None, value)]
        self.update({(key, index): part for index, part in parts if isinstance(part, Schedule)})
        group[key] = now(tuple(value) if isinstance(value, list) else value, int(group["step"]), seen)

    def read(self, group: MutableMapping[str, Any], seen: Seen, *, reacting: bool = False) -> None:
        """Write what the schedules are at the group's step; with `reacting` only those that go by `seen`."""
        for (key, index), schedule in self.items():
            if reacting and not schedule.reacts:
                continue
            value = schedule(group["step"], seen)
            if index is not None:
                group[key] = tuple(value if i == index else old for i, old in enumerate(group[key]))
            elif isinstance(group[key], Tensor):
                group[key].fill_(value)
            else:
                group[key] = value

    def own(self, group: Mapping[str, Any], chain: Chain) -> dict[str, Any]:
        """The numbers of the group, its rate apart, that are not its chain's."""
        scheduled = {key for key, index in self if index is not None}
        held = {key: self.get((key, None), group[key]) for key in chain.defaults.keys() - scheduled}
        return {key: value for key, value in held.items() if key != "lr" and value != chain.defaults[key]}


def now(value: Any, step: int, seen: Seen = ()) -> Any:
    """A number, or several, at a step."""
    if isinstance(value, tuple):
        return tuple(now(one, step, seen) for one in value)
    return value(step, seen) if isinstance(value, Schedule) else value


def top(value: Any) -> float:
    """The number, or the highest that its schedule names; 0 for what is neither."""
    if isinstance(value, Schedule):
        return value.peak
    return float(value) if isinstance(value, float | int) else 0.0


def times(value: Any, ratio: float) -> Any:
    """A number, or its schedule, multiplied."""
    if ratio == 1.0:
        return value
    return value.scaled(ratio) if isinstance(value, Schedule) else value * ratio
