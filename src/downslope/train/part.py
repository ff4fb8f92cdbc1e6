"""The parts of a training's state, each by what it is: how it is packed, compared and put back."""

from __future__ import annotations

import hashlib
import platform
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.kernels.collective import Parted, is_shared
from downslope.optimizer import Optimizer
from downslope.state import differences, listed, plain_name
from downslope.train.plain import Packed, pack, unpack
from downslope.train.sharded import placed, placed_all, put

FIRST, LAST = 0, 2


@dataclass
class Told:
    """What differed between a checkpoint and the program, as sentences: `wrong` is refused unless a load is
    partial; `changed` is numbers of the program that were replaced by the checkpoint's.
    """

    wrong: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


class Part:
    """A part of the state by the name `name`. `check` finds what does not fit and changes nothing; `load`
    puts back what fits.
    """

    turn = 1
    """When it is to be loaded: FIRST if its own load may refuse, LAST if others write into it."""

    def __init__(self, name: str, held: Any) -> None:
        self.name, self.held = name, held

    def pack(self) -> Packed:
        """As plain data and tensors, which are those in use, sharded as they are."""
        raise NotImplementedError

    def check(self, packed: Packed, told: Told) -> None:
        """Tell what does not fit."""

    def load(self, packed: Packed, told: Told) -> None:
        """Go on from what was packed."""
        raise NotImplementedError


class Module(Part):
    """A model: its state dict, and the buffers that this leaves out. Names are without what wrappers add."""

    def pack(self) -> Packed:
        """Its tensors by name."""
        tensors: dict[str, Tensor] = {}
        data: dict[str, Any] = {}
        for name, value in self._named().items():
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            else:  # what get_extra_state gave
                extra = pack(value, f"{name} of {self.name}")
                data[name] = extra.data
                tensors |= {f"{name}/{key}": tensor for key, tensor in extra.tensors.items()}
        return Packed(data, tensors)

    def check(self, packed: Packed, told: Told) -> None:
        """Tell which are missing, unknown, or of another shape or type."""
        mine = {name: value for name, value in self._named().items() if isinstance(value, Tensor)}
        extra = packed.data.keys()
        saved: dict[str, Tensor | Parted] = {**packed.tensors, **packed.parted}
        theirs = {name: value for name, value in saved.items() if name.split("/")[0] not in extra}
        told.wrong += unlike(self.name, mine, theirs)

    def load(self, packed: Packed, told: Told) -> None:
        """Copy what fits into its tensors."""
        raw = self.held.state_dict()
        hidden = hidden_buffers(self.held)
        tensors: dict[str, Tensor | Parted] = {**packed.tensors, **packed.parted}
        with torch.no_grad():
            for full, value in {**raw, **hidden}.items():
                name = plain_name(full)
                if name in packed.data:
                    mine = {
                        key.partition("/")[2]: placed(saved, None)
                        for key, saved in tensors.items()
                        if key.startswith(f"{name}/")
                    }
                    owner = full.rpartition("_extra_state")[0].rstrip(".")
                    self.held.get_submodule(owner).set_extra_state(unpack(Packed(packed.data[name], mine)))
                elif isinstance(value, Tensor) and name in tensors and tensors[name].shape == value.shape:
                    put(value, tensors[name])

    def _named(self) -> dict[str, Any]:
        held = {**self.held.state_dict(), **hidden_buffers(self.held)}
        return {plain_name(name): value for name, value in held.items()}


class Stepper(Part):
    """An optimizer, ours or torch's: state by the name of the parameter, and the numbers of its groups, of
    which the checkpoint's win.
    """

    turn = LAST

    def __init__(self, name: str, held: Any, names: Mapping[int, str]) -> None:
        super().__init__(name, held)
        self.names = names

    def pack(self) -> Packed:
        """Its state by "<parameter>/<slot>", and its groups."""
        raw = self.held.state_dict()
        keys = [key for group in raw["param_groups"] for key in group["params"]]
        names = dict(zip(keys, self._names(), strict=True))
        tensors: dict[str, Tensor] = {}
        state: dict[str, dict[str, Any]] = {}
        for key, slots in raw["state"].items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"{names[key]}/{slot}"] = value.detach()
                else:
                    state.setdefault(names[key], {})[slot] = value
        groups = [
            {**group, "params": [names[key] for key in group["params"]]} for group in raw["param_groups"]
        ]
        for group in groups:
            group.pop("param_names", None)
        beside = {key: value for key, value in raw.items() if key not in ("state", "param_groups")}
        found = pack({"groups": groups, "state": state, "beside": beside}, self.name)
        return Packed(found.data, {**found.tensors, **tensors})

    def check(self, packed: Packed, told: Told) -> None:
        """Tell which parameters and numbers differ."""
        mine = list(self._names())
        theirs = [name for group in packed.data["groups"] for name in group["params"]]
        told.wrong += absent(self.name, mine, theirs)
        if isinstance(self.held, Optimizer):
            return  # it checks the rest by itself, whole, before it changes anything
        for label, group, numbers in self._numbers(unpack(packed)["groups"], told):
            begun = {"initial_lr": group["lr"], "max_momentum": None} if "lr" in group else {}
            like = {**{key: value for key, value in begun.items() if key in numbers}, **group}
            told.changed += differences(label, like, numbers, {}, {}, one_sided=True)

    def load(self, packed: Packed, told: Told) -> None:
        """Put back what fits, in the order and the groups of this program."""
        saved, state = unpack(packed), self._state(packed)
        if isinstance(self.held, Optimizer):
            with self._named(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.held.load_state_dict(self._as_saved(saved, state), strict=not told.wrong)
            told.changed += [f"{self.name}: {one.message}" for one in caught]
        else:
            self._load_torch(saved, state)

    def _load_torch(self, saved: Mapping[str, Any], state: Mapping[str, dict[str, Any]]) -> None:
        places = {name: place for place, name in enumerate(self._names())}
        parameters = [p for group in self.held.param_groups for p in group["params"]]
        groups, start = [], 0
        for _, group, numbers in self._numbers(saved["groups"], Told()):
            size = len(group["params"])
            made = {
                **{key: value for key, value in group.items() if key not in ("params", "param_names")},
                **numbers,
            }
            groups.append({**made, "params": list(range(start, start + size))})
            start += size
        mine = {
            places[name]: {slot: _like(parameters[places[name]], value) for slot, value in slots.items()}
            for name, slots in state.items()
            if name in places
        }
        self.held.load_state_dict({**saved["beside"], "state": mine, "param_groups": groups})
        for place, slots in mine.items():
            live = self.held.state[parameters[place]]
            for slot, value in slots.items():
                # torch casts floating state to the parameter's dtype, and keeps what need not be cast
                # without copying it; a state has its own precision, and its own memory.
                if isinstance(value, Tensor):
                    live[slot] = value.to(live[slot].device, copy=True)

    def _as_saved(self, saved: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for group in saved["groups"] for name in group["params"]]
        places = {name: place for place, name in enumerate(names)}
        groups = [
            {**group, "params": [places[name] for name in group["params"]], "param_names": group["params"]}
            for group in saved["groups"]
        ]
        return {
            **saved["beside"],
            "state": {places[name]: slots for name, slots in state.items()},
            "param_groups": groups,
        }

    @staticmethod
    def _state(packed: Packed) -> dict[str, dict[str, Any]]:
        """The state by the parameter's name."""
        state = {name: dict(slots) for name, slots in unpack(packed)["state"].items()}
        for path, tensor in {**packed.tensors, **packed.parted}.items():
            name, slash, slot = path.rpartition("/")
            if slash:
                state.setdefault(name, {})[slot] = tensor
        return state

    def _names(self) -> Iterator[str]:
        for group in self.held.param_groups:
            own = group.get("param_names", [None] * len(group["params"]))
            for parameter, told in zip(group["params"], own, strict=True):
                name = self.names.get(id(parameter)) or (told and plain_name(told))
                if name is None:
                    raise BadInput(
                        f"{self.name} has a parameter of shape {list(parameter.shape)} that no model of this "
                        "state holds: give the model too."
                    )
                yield name

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Within it, the groups of an optimizer of ours know the names that the checkpoint has."""
        names, before = iter(self._names()), [group.get("param_names") for group in self.held.param_groups]
        every = [[next(names) for _ in group["params"]] for group in self.held.param_groups]
        try:
            for group, mine in zip(self.held.param_groups, every, strict=True):
                group["param_names"] = mine
            yield
        finally:
            for group, own in zip(self.held.param_groups, before, strict=True):
                group.pop("param_names", None)
                if own is not None:
                    group["param_names"] = own

    def _numbers(
        self, saved: Sequence[Mapping[str, Any]], told: Told
    ) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Every group of the program: its label, itself, and the checkpoint's numbers for it."""
        home = {name: place for place, group in enumerate(saved) for name in group["params"]}
        names = self._names()
        for place, group in enumerate(self.held.param_groups):
            own = [next(names) for _ in group["params"]]
            homes = sorted({home[name] for name in own if name in home})
            found = [
                {key: value for key, value in saved[at].items() if key not in ("params", "param_names")}
                for at in homes
            ]
            label = f"{self.name}, group {place}"
            if any(numbers != found[0] for numbers in found):
                told.wrong.append(f"{label} has parameters of groups {homes}, whose numbers differ")
            yield label, group, found[0] if found else {}


class Keeper(Part):
    """Anything with state_dict and load_state_dict, or state and load, of plain data and tensors: schedulers
    and scalers of torch, averages, early stopping, samplers, loaders. Functions that it calls, such as those
    of LambdaLR, are known by the SHA-256 of their code.
    """

    turn = FIRST

    def pack(self) -> Packed:
        """What its state dict holds."""
        state = self.held.state_dict() if hasattr(self.held, "state_dict") else self.held.state()
        return pack({"state": state, "functions": dict(_functions(self.held))}, self.name)

    def check(self, packed: Packed, told: Told) -> None:
        """Tell which of its functions are others."""
        mine, theirs = dict(_functions(self.held)), packed.data["functions"]
        for place in dict.fromkeys([*mine, *theirs]):
            if mine.get(place) != theirs.get(place):
                told.wrong.append(f"{self.name}: the function {place} is another than the checkpoint's")

    def load(self, packed: Packed, told: Told) -> None:
        """Hand it its state."""
        # Only where parts were saved is it asked how it holds them.
        parted = placed_all(packed.parted, self.pack().tensors) if packed.parted else {}
        state = unpack(Packed(packed.data["state"], {**packed.tensors, **parted}))
        try:
            if hasattr(self.held, "load_state_dict"):
                self.held.load_state_dict(_own(state))
            else:  # ours, which copies what it is given
                self.held.load(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise BadInput(f"{self.name} does not take its state from the checkpoint: {error}") from error


class Generator(Part):
    """A random generator of the program's own, of torch, numpy or Python."""

    def pack(self) -> Packed:
        """Where it stands."""
        if isinstance(self.held, torch.Generator):
            return pack(self.held.get_state(), self.name)
        if isinstance(self.held, random.Random):
            return pack(self.held.getstate(), self.name)
        return pack(self.held.bit_generator.state, self.name)

    def load(self, packed: Packed, told: Told) -> None:
        """Let it stand there."""
        state = unpack(packed)
        if isinstance(self.held, torch.Generator):
            self.held.set_state(state)
        elif isinstance(self.held, random.Random):
            self.held.setstate(state)
        else:
            self.held.bit_generator.state = state


def part_of(name: str, held: Any, names: Mapping[int, str]) -> Part:
    """The part that keeps an object; `names` are those of parameters, by id. BadInput if it has no state."""
    if isinstance(held, nn.Module):
        return Module(name, held)
    if isinstance(held, torch.Generator | random.Random | np.random.Generator):
        return Generator(name, held)
    if hasattr(held, "param_groups") and hasattr(held, "load_state_dict"):
        return Stepper(name, held, names)
    pairs = [("state_dict", "load_state_dict"), ("state", "load")]
    if any(all(callable(getattr(held, one, None)) for one in pair) for pair in pairs):
        return Keeper(name, held)
    if isinstance(held, torch.utils.data.DataLoader):
        raise BadInput(
            f"{name} is a DataLoader, which does not know its place: give Batches(loader) and loop over that."
        )
    raise BadInput(
        f"{name} is a {type(held).__name__}, which has no state_dict and load_state_dict; numbers and texts "
        "go into `counters`."
    )


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the state dict leaves out (persistent=False), which a training may still need."""
    shown = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in shown}


def _like(parameter: Tensor, value: Any) -> Any:
    """What an optimizer of torch keeps of a parameter: where that is sharded, sharded too."""
    if not isinstance(value, Tensor | Parted):
        return value
    alike = is_shared(parameter) and value.shape == parameter.shape
    return placed(value, parameter if alike else None)


def absent(of: str, mine: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """What only one side has, in words."""
    here, there = set(mine), set(theirs)
    told = []
    if missing := [name for name in mine if name not in there]:
        told.append(f"{of}: the checkpoint lacks {listed(missing)}")
    if extra := [name for name in theirs if name not in here]:
        told.append(f"{of}: the program lacks {listed(extra)}")
    return told


def unlike(of: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor | Parted]) -> list[str]:
    """How two sets of tensors differ in names, shapes and types, in words."""
    told = absent(of, [*mine], [*theirs])
    for name in mine.keys() & theirs.keys():
        here, there = (f"{list(side[name].shape)} {side[name].dtype}" for side in (mine, theirs))
        if here != there:
            told.append(f"{of}: {name} is {there} in the checkpoint and {here} here")
    return sorted(told)


def _functions(held: Any) -> Iterator[tuple[str, str]]:
    """(where, SHA-256) of the functions that an object calls and its state dict does not have. The same
    source has other code in another version of Python, which is part of it.
    """
    for key, value in getattr(held, "__dict__", {}).items():
        for place, one in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(one, FunctionType):
                at = f"{key}[{place}]" if isinstance(value, list | tuple) else key
                text = "".join([platform.python_version(), *_code(one.__code__), *_closure(one)])
                yield at, hashlib.sha256(text.encode()).hexdigest()
            elif hasattr(one, "state_dict") and key in ("_schedulers", "schedulers"):
                yield from ((f"{key}[{place}].{inner}", sha) for inner, sha in _functions(one))


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)


def _closure(function: FunctionType) -> Iterator[str]:
    """The numbers and texts that a function took along from where it was made."""
    for cell in function.__closure__ or ():
        yield repr(cell.cell_contents) if isinstance(cell.cell_contents, bool | int | float | str) else ""


def _own(state: Any) -> Any:
    """The same with memory of its own: what was read lies in a file."""
    if isinstance(state, Tensor):
        return state.clone()
    if type(state) is dict:
        return {key: _own(value) for key, value in state.items()}
    return [_own(value) for value in state] if type(state) is list else state
