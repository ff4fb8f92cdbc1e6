"""Restoring an optimizer's state: matched by parameter name, checked whole before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from downslope.errors import BadInput
from downslope.following import Following
from downslope.foreign import check_group, is_foreign, steps_of, translate_group, translate_state
from downslope.kernels.collective import Parted, Share, is_shared, local
from downslope.rules import Chain
from downslope.rules.shape import shape_of_slot
from downslope.schedule import Schedule

OF_SCHEDULERS = ("initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum")
"""What torch's schedulers write into a param group."""

BESIDE = ("params", "param_names", "name", "role", "step", *OF_SCHEDULERS)
"""Keys of a param group that are not numbers of the chain: what it holds, our counter, the schedulers'."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DDP, torch.compile, FSDP and activation checkpointing put into the names of parameters."""


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


class Table(defaultdict[Tensor, Any]):
    """The state by parameter, as torch keeps it. It counts how often anything was put in or taken out."""

    changes = 0

    def __setitem__(self, parameter: Tensor, slots: Any) -> None:
        super().__setitem__(parameter, slots)
        self.changes += 1

    def __delitem__(self, parameter: Tensor) -> None:
        super().__delitem__(parameter)
        self.changes += 1

    def update(self, *values: Any, **more: Any) -> None:
        """As a dict does it, item by item."""
        for parameter, slots in dict(*values, **more).items():
            self[parameter] = slots


class Loaded(NamedTuple):
    """What a load did, by the names of parameters: restored; in the program only; in the checkpoint only; of
    another shape or with other state.
    """

    restored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"{len(self.restored)} parameters restored"]
        told += [f"{listed(self.missing)} missing from the checkpoint"] if self.missing else []
        told += [f"{listed(self.unexpected)} not in the program"] if self.unexpected else []
        told += [f"{listed(self.misshapen)} of another shape"] if self.misshapen else []
        return "; ".join(told) + "."


@dataclass
class Restored:
    """What a checkpoint becomes in this program: numbers and schedules by group, what differed, the report,
    and the parameters that it has nothing for, whose state stays.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    following: list[Following] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    loaded: Loaded = field(default_factory=Loaded)
    kept: list[Tensor] = field(default_factory=list)
    held: dict[Tensor, tuple[Chain, dict[str, Any]]] = field(default_factory=dict)

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state by parameter, copied anew: nothing is shared with the checkpoint. Ask once, after letting
        go of what it replaces, so that there are never three of it.
        """
        return {parameter: _copied(parameter, *held) for parameter, held in self.held.items()}


@dataclass(frozen=True)
class _Match:
    """A parameter of the program, its group, and its key in the checkpoint; None if that has none."""

    parameter: Tensor
    name: str
    group: int
    key: Any


@dataclass(frozen=True)
class _Checkpoint:
    """A state dict, of ours or of torch's; torch's is translated as it is read."""

    state: Mapping[Any, Any]
    groups: list[dict[str, Any]]
    schedules: Sequence[Any] | None
    foreign: bool
    step: int | None
    home: Mapping[Any, int]

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> _Checkpoint:
        state, groups = state_dict.get("state"), state_dict.get("param_groups")
        formed = isinstance(state, Mapping) and isinstance(groups, list)
        if not formed or not all("params" in group for group in groups or ()):
            given = listed([repr(key) for key in state_dict]) or "nothing"
            raise BadInput(f"a state dict has 'state' and 'param_groups' with 'params'; {given} was given.")
        foreign = is_foreign(state_dict)
        ours = max((int(group.get("step", 0)) for group in groups or ()), default=0)
        step = steps_of(state_dict) if foreign else ours
        home = {key: place for place, group in enumerate(groups or ()) for key in group["params"]}
        return cls(state or {}, groups or [], state_dict.get("schedules"), foreign, step, home)

    def entry(self, key: Any, chain: Chain) -> dict[str, Any]:
        """The state of a parameter, in the checkpoint's own tensors; empty if it has none."""
        if self.foreign:
            check_group(chain, self.groups[self.home[key]])
        raw = self.state.get(key)
        if not raw:
            return {}
        entry = (
            translate_state(chain, {slot: _read(value) for slot, value in raw.items()})
            if self.foreign
            else dict(raw)
        )
        for name, (_, slot) in chain.slots.items():
            if slot.per == "tensor" and name in entry and not isinstance(entry[name], Parted):
                entry[name] = torch.as_tensor(entry[name], dtype=torch.float64, device="cpu")
        return entry

    def numbers(
        self, place: int, chain: Chain, own: Mapping[str, Any], plans: Following
    ) -> tuple[dict[str, Any], Following]:
        """Numbers and schedules of a group; where the checkpoint has no schedules, `plans` are."""
        group = self.groups[place]
        kept = OF_SCHEDULERS if self.foreign else group.keys() - {"params", "param_names", "name", "role"}
        numbers = {key: _separate(group[key]) for key in kept if key in group}
        if self.foreign:
            numbers |= translate_group(chain, group, own)
        elif self.schedules is not None:
            made = {(key, index): Schedule.from_data(data) for key, index, data in self.schedules[place]}
            plans = Following(made)
        if ("lr", None) in plans:
            numbers.pop("initial_lr", None)
        return numbers, Following(plans)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it.

    >>> plain_name("module._orig_mod.encoder.module.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names with commas, the first of them where there are many.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def restore(
    groups: Sequence[Mapping[str, Any]],
    chains: Sequence[Chain],
    following: list[Following],
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
) -> Restored:
    """Match a `state_dict`, of ours or of torch's, to the program's param groups, each with its chain and
    with what follows schedules in it.

    Strict raises BadInput naming what does not match; else what matches by name and shape is restored.
    Nothing is changed here: what is to be written is returned.
    """
    saved, found = _Checkpoint.of(state_dict), Restored()
    # Of a new optimizer's empty state, which accelerate loads, there is nothing to tell.
    matches, unexpected = _matched(groups, saved.groups, found.warnings if saved.state else [])
    missing = tuple(match.name for match in matches if match.key is None)
    misfits: dict[str, str] = {}
    for place, match in enumerate(matches):
        chain = chains[match.group]
        entry = saved.entry(match.key, chain) if match.key is not None else {}
        if misfit := _misfit(match, chain, entry):
            misfits[match.name] = misfit
            matches[place] = replace(match, key=None)
        elif entry:
            found.held[match.parameter] = (chain, entry)
    if strict:
        _refuse(missing, unexpected, misfits)
    found.kept = [match.parameter for match in matches if match.key is None]
    restored = tuple(match.name for match in matches if match.key is not None)
    found.loaded = Loaded(restored, missing, unexpected, tuple(misfits))
    _restore_groups(groups, chains, following, saved, matches, strict, found)
    return found


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The parameters' names in the order of the groups; None if they are not known. A checkpoint of torch's
    DCP is keyed by names.
    """
    names: list[str] = []
    for group in groups:
        keyed = [key for key in group["params"] if isinstance(key, str)]
        own = keyed if len(keyed) == len(group["params"]) else group.get("param_names", ())
        if len(own) != len(group["params"]):
            return None
        names += own
    plain = list(map(plain_name, names))
    return plain if len(set(plain)) == len(names) else names


def _matched(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], warnings: list[str]
) -> tuple[list[_Match], tuple[str, ...]]:
    """Every parameter of the program with its match, and the names that only the checkpoint has."""
    mine, theirs = _names(groups), _names(saved)
    own = [(parameter, place) for place, group in enumerate(groups) for parameter in group["params"]]
    keys = [key for group in saved for key in group["params"]]
    names = mine or [f"parameter {place}" for place in range(len(own))]
    if mine is None or theirs is None:
        if len(keys) != len(own):
            raise BadInput(
                f"the checkpoint has {len(keys)} parameters, the program {len(own)}; names would tell which."
            )
        warnings.append(
            "parameters were matched by order, since their names are not known on both sides: pass the model."
        )
        theirs = names
    known = dict(zip(theirs, keys, strict=True))
    matches = [_Match(p, name, place, known.get(name)) for (p, place), name in zip(own, names, strict=True)]
    mine_too = set(names)
    return matches, tuple(name for name in known if name not in mine_too)


def _misfit(match: _Match, chain: Chain, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the state of a parameter; None if it fits."""
    of, shape = f"parameter {match.key}", tuple(match.parameter.shape)
    if entry and entry.keys() != {*chain.slots, "t"}:
        given, wanted = ", ".join(sorted(entry)), ", ".join([*chain.slots, "t"])
        return f"the checkpoint has {given} for {of}; {chain.name}: {wanted}"
    for name, (_, slot) in chain.slots.items() if entry else ():
        value, needed = entry[name], shape_of_slot(slot, shape)
        if not isinstance(value, Tensor | Parted):
            return f"{name} of {of} is {type(value).__name__}, not a tensor"
        if tuple(value.shape) != needed:
            why = "" if needed == shape else f", which needs {needed}"
            return f"{name} of {of} has shape {tuple(value.shape)}, the parameter {shape}{why}"
    return None


def _refuse(missing: Sequence[str], unexpected: Sequence[str], misfits: Mapping[str, str]) -> None:
    told = [f"the checkpoint lacks {listed(missing)}"] if missing else []
    told += [f"the program lacks {listed(unexpected)}"] if unexpected else []
    told += (
        [f"what is saved for {listed([*misfits])} does not fit ({next(iter(misfits.values()))})"]
        if misfits
        else []
    )
    if told:
        raise BadInput(f"the parameters differ: {' and '.join(told)}. strict=False restores what matches.")


def _copied(parameter: Tensor, chain: Chain, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """An entry in memory of its own, where the parameter has its slots; the precision stays."""
    copied = {"t": torch.tensor(int(entry["t"]), dtype=torch.int64, device="cpu")}
    for name, (_, slot) in chain.slots.items():
        value = entry[name] if isinstance(entry[name], Parted) else entry[name].detach()
        if slot.per != "element":
            value = _read(value)
            device = value.device if slot.per == "tensor" else parameter.device
            copied[name] = value.to(device, copy=True, memory_format=torch.contiguous_format)
            continue
        copied[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        if is_shared(parameter) and not is_shared(value):
            local(copied[name]).copy_(Share(name, parameter).part(value))
        elif isinstance(value, Parted):
            value.copy(copied[name])
        else:
            copied[name].copy_(value)
    return copied


def _read(value: Any) -> Any:
    """What lies in pieces, whole."""
    return value.part() if isinstance(value, Parted) else value


def _restore_groups(
    groups: Sequence[Mapping[str, Any]],
    chains: Sequence[Chain],
    following: list[Following],
    saved: _Checkpoint,
    matches: Sequence[_Match],
    strict: bool,
    found: Restored,
) -> None:
    """The checkpoint's numbers and schedules for every group of the program; groups are matched by their
    parameters. A group that the checkpoint has nothing for keeps its own, at the checkpoint's step.
    """
    homes: list[set[int]] = [set() for _ in groups]
    for match in matches:
        if match.key is not None:
            homes[match.group].add(saved.home[match.key])
    changes: list[str] = []
    for place, (group, chain, plans) in enumerate(zip(groups, chains, following, strict=True)):
        sources = [saved.numbers(at, chain, group, plans) for at in sorted(homes[place])]
        if any(source != sources[0] for source in sources):
            told = (
                f"group {place} of the program is spread over groups {sorted(homes[place])} of the checkpoint"
            )
            if strict:
                raise BadInput(f"{told}, whose numbers differ.")
            found.warnings.append(f"{told}, whose numbers differ: it keeps its own.")
            sources = []
        numbers, theirs = sources[0] if sources else ({}, Following(plans))
        fresh = saved.foreign or not sources
        changes += differences(f"group {place}", group, numbers, plans, theirs, one_sided=not fresh)
        numbers["step"] = int(group["step"]) if saved.step is None else saved.step
        if fresh:
            _follow(numbers, group, theirs)
        found.groups.append(numbers)
        found.following.append(theirs)
    if saved.step is None and any(following):
        found.warnings.append("torch counted no steps: schedules go on from the program's own step.")
    if changes:
        found.warnings.append("the checkpoint's numbers are used: " + "; ".join(sorted(changes)))


def _separate(value: Any) -> Any:
    """A number that shares nothing with the checkpoint, as a group holds it."""
    return tuple(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value


def _follow(numbers: dict[str, Any], group: Mapping[str, Any], plans: Following) -> None:
    """Set what follows schedules to what they say at the step."""
    for (key, index), plan in plans.items():
        value: Any = plan(numbers["step"])
        if index is not None:
            old = numbers.get(key, group[key])
            value = tuple(value if place == index else one for place, one in enumerate(old))
        numbers[key] = value


def differences(
    label: str,
    group: Mapping[str, Any],
    numbers: Mapping[str, Any],
    plans: Mapping[tuple[str, int | None], Schedule],
    theirs: Mapping[tuple[str, int | None], Schedule],
    one_sided: bool,
) -> list[str]:
    """What a checkpoint changes in a param group, in words; `one_sided`: those too that one lacks."""
    told = []
    scheduled = {key for key, _ in [*plans, *theirs]}
    for key in _own(group, numbers) - scheduled:
        if key in group and key in numbers:
            if not _same(numbers[key], group[key]):
                told.append(f"{label}: {key} {group[key]} here, {numbers[key]} in the checkpoint")
        elif one_sided:
            where = f"{group[key]} here" if key in group else f"{numbers[key]} in the checkpoint"
            told.append(f"{label}: {key} {where} only")
    for place in {*plans, *theirs}:
        if plans.get(place) != theirs.get(place):
            ours, saved = plans.get(place, "no schedule"), theirs.get(place, "no schedule")
            told.append(f"{label}: {place[0]} follows {ours} here, {saved} in the checkpoint")
    return told


def _own(group: Mapping[str, Any], numbers: Mapping[str, Any]) -> set[str]:
    """The numbers that somebody chose. Where schedulers of torch are attached on both sides, these have moved
    the rate since, and a cycle the betas; what the rate started from tells more.
    """
    both, own = group.keys() & numbers.keys(), {*group, *numbers} - {*BESIDE}
    if "initial_lr" in both:
        own = own - {"lr"} | {"initial_lr"}
    return own - {"betas", "momentum"} if "max_momentum" in both else own


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
