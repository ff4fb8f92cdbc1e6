"""Restoring an optimizer's state: matched by parameter name, checked whole before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from downslope.errors import BadInput
from downslope.schedule import Schedule

Following: TypeAlias = list[dict[tuple[str, int | None], Schedule]]


class Slots(dict[str, Tensor]):
    """The state of one parameter, as torch keeps it. It marks the list that all share when anything is put
    in, so that no step goes on with a tensor that was replaced.
    """

    marks: list[str] = []  # noqa: RUF012 - a stand-in while a copy is being made

    def __init__(self, values: Mapping[str, Tensor], marks: list[str]) -> None:
        super().__init__(values)
        self.marks = marks

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value)
        self.marks.append(name)

    def update(self, *values: Any, **more: Any) -> None:
        """As a dict does it, item by item."""
        for name, value in dict(*values, **more).items():
            self[name] = value


@dataclass
class Restored:
    """What a checkpoint becomes in this program: state by parameter, numbers and schedules by group, and what
    differed.
    """

    state: dict[Tensor, dict[str, Tensor]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    following: Following = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def restore(
    groups: Sequence[Mapping[str, Any]],
    slots: tuple[str, ...],
    following: Following,
    state_dict: Mapping[str, Any],
    chain: str,
) -> Restored:
    """Match a `state_dict` to the program's param groups and copy it; nothing is shared with it. Raises
    BadInput.
    """
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(
        state_dict.get("param_groups"), list
    ):
        raise BadInput(
            "a state dict has 'state' and 'param_groups'; "
            + (", ".join(map(repr, state_dict)) or "nothing")
            + " was given."
        )
    found = Restored()
    saved = state_dict["param_groups"]
    named = all("param_names" in group for group in [*groups, *saved])
    own = [p for group in groups for p in group["params"]]
    if named:
        ids = _by_name(groups, saved)
    else:
        ids = [i for group in saved for i in group["params"]]
        if len(ids) != len(own):
            raise BadInput(
                f"the checkpoint has {len(ids)} parameters, the program {len(own)}; names would tell which."
            )
        found.warnings.append(
            "parameters were matched by order, since their names are not known on both sides: pass the model."
        )
    for parameter, identity in zip(own, ids, strict=True):
        entry = state_dict["state"].get(identity)
        if entry:
            found.state[parameter] = _copy(parameter, entry, slots, chain, f"parameter {identity}")
    _numbers(groups, saved, ids, following, state_dict.get("schedules"), found)
    return found


def _by_name(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[Any]:
    theirs: dict[str, Any] = {}
    for group in saved:
        theirs.update(zip(group["param_names"], group["params"], strict=True))
    mine = [name for group in groups for name in group["param_names"]]
    missing, extra = [n for n in mine if n not in theirs], [n for n in theirs if n not in set(mine)]
    if missing or extra:
        told = [f"the checkpoint lacks {', '.join(missing)}"] if missing else []
        told += [f"the program lacks {', '.join(extra)}"] if extra else []
        raise BadInput(f"the parameters differ: {' and '.join(told)}.")
    return [theirs[name] for name in mine]


def _copy(
    parameter: Tensor, entry: Mapping[str, Any], slots: tuple[str, ...], chain: str, name: str
) -> dict[str, Tensor]:
    if set(entry) != {*slots, "t"}:
        raise BadInput(
            f"the checkpoint has {', '.join(sorted(entry))} for {name}; {chain}: {', '.join([*slots, 't'])}."
        )
    copied: dict[str, Tensor] = {"t": torch.tensor(int(entry["t"]), dtype=torch.int64)}
    for slot in slots:
        value = entry[slot]
        if value.shape != parameter.shape:
            raise BadInput(
                f"{slot} of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}."
            )
        copied[slot] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return copied


def _numbers(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    ids: list[Any],
    following: Following,
    schedules: Any,
    found: Restored,
) -> None:
    """The checkpoint's numbers and schedules for each group of the program; groups are matched by their
    parameters.
    """
    home = {identity: place for place, group in enumerate(saved) for identity in group["params"]}
    cursor = iter(ids)
    differences = []
    for place, group in enumerate(groups):
        homes = {home[next(cursor)] for _ in group["params"]}
        if len(homes) > 1:
            raise BadInput(
                f"group {place} of the program is spread over groups {sorted(homes)} of the checkpoint."
            )
        if not homes:  # an empty group has nothing to restore but its place
            found.groups.append({})
            found.following.append(dict(following[place]))
            continue
        source = homes.pop()
        theirs = {k: v for k, v in saved[source].items() if k not in ("params", "param_names")}
        plans = dict(following[place])
        if schedules is not None:
            plans = {(key, index): Schedule.from_data(data) for key, index, data in schedules[source]}
        scheduled = {key for key, _ in [*plans, *following[place]]}
        for key in sorted({*group, *theirs} - {"params", "param_names", "step", "initial_lr"}):
            if key in theirs and key in group and key not in scheduled and not _same(theirs[key], group[key]):
                differences.append(f"group {place}: {key} {group[key]} here, {theirs[key]} in the checkpoint")
        for where in {*plans, *following[place]}:
            if plans.get(where) != following[place].get(where):
                here, there = following[place].get(where, "no schedule"), plans.get(where, "no schedule")
                differences.append(
                    f"group {place}: {where[0]} follows {here} here, {there} in the checkpoint"
                )
        found.groups.append({k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items()})
        found.following.append(plans)
    if differences:
        found.warnings.append("the checkpoint's numbers are used: " + "; ".join(sorted(differences)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
