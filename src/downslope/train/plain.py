"""State as plain data: nested values as JSON with tensors beside it, and back, without pickle."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from downslope.errors import BadInput
from downslope.kernels.collective import Parted

_KIND, _OF = "~", "of"
"""The keys of a JSON object that stands for what JSON has not."""


class Packed(NamedTuple):
    """A value as JSON `data`, and the tensors that it names; `parted`: those that lie in several files."""

    data: Any
    tensors: dict[str, Tensor]
    parted: Mapping[str, Parted] = MappingProxyType({})


def pack(value: Any, what: str = "the state") -> Packed:
    """A nested value as plain data, every number exact: numbers, texts, lists, tuples, dicts, sets, tensors,
    arrays, dtypes, devices. BadInput, naming the place, for anything else. Tensors are not copied.

    >>> packed = pack({"lr": (0.1, float("inf")), "m": torch.ones(2)})
    >>> packed.data["m"], unpack(packed)["lr"]
    ({'~': 'tensor', 'of': 'm'}, (0.1, inf))
    """
    tensors: dict[str, Tensor] = {}
    return Packed(_packed(value, (), tensors, what), tensors)


def unpack(packed: Packed) -> Any:
    """The value that was packed; ValueError for data that `pack` never makes."""
    return _unpacked(packed.data, packed.tensors)


def leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every number and text in plain data, by the way to it, as text that is equal if and only if they are.

    >>> dict(leaves({"a": [1, {"b": 0.5}]}))
    {'a 0': '1', 'a 1 b': '0.5'}
    """
    if isinstance(data, Mapping) and data.keys() != {_KIND, _OF}:
        for key, value in data.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(data, list):
        for place, value in enumerate(data):
            yield from leaves(value, (*path, str(place)))
    else:
        yield " ".join(path), repr(data)


def _packed(value: Any, path: tuple[Any, ...], tensors: dict[str, Tensor], what: str) -> Any:
    def inner(part: Any, key: Any) -> Any:
        return _packed(part, (*path, key), tensors, what)

    match value:
        case None | bool() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else _object("float", repr(float(value)))
        case int():
            return int(value)
        case Tensor() | np.ndarray() | np.generic():
            return _kept(value, path, tensors)
        case list() | tuple() | deque() | set() | frozenset():
            items = [inner(part, place) for place, part in enumerate(_in_order(value))]
            return items if type(value) is list else _object(_sequence(value), items)
        case Mapping():
            if all(isinstance(key, str) for key in value) and value.keys() != {_KIND, _OF}:
                found = {key: inner(part, key) for key, part in value.items()}
                return _object("counter", found) if isinstance(value, Counter) else found
            pairs = [[inner(key, "key"), inner(part, key)] for key, part in value.items()]
            return _object("counts" if isinstance(value, Counter) else "dict", pairs)
        case bytes():
            return _object("bytes", value.hex())
        case torch.dtype():
            return _object("dtype", str(value).removeprefix("torch."))
        case torch.device():
            return _object("device", str(value))
    where = ".".join(map(str, path)) or "it"
    raise BadInput(
        f"{what} cannot be saved: {where} is a {type(value).__name__}, and a checkpoint holds numbers, "
        "texts, lists, dicts and tensors."
    )


def _kept(value: Any, path: tuple[Any, ...], tensors: dict[str, Tensor]) -> dict[str, Any]:
    name = ".".join(map(str, path)) or "value"
    while name in tensors:
        name += "'"
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return _object("tensor", name)
    tensors[name] = torch.from_numpy(np.array(value))  # refuses objects and texts by itself: TypeError
    return _object("array" if isinstance(value, np.ndarray) else "number", name)


def _object(kind: str, of: Any) -> dict[str, Any]:
    return {_KIND: kind, _OF: of}


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else value


def _sequence(value: Any) -> str:
    kinds = {tuple: "tuple", deque: "deque", set: "set", frozenset: "frozenset", list: "list"}
    return next(name for kind, name in kinds.items() if isinstance(value, kind))


_MADE: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": tuple,
    "list": list,
    "deque": deque,
    "set": set,
    "frozenset": frozenset,
    "counter": Counter,
    "dict": dict,
    "counts": lambda pairs: Counter(dict(pairs)),
    "bytes": bytes.fromhex,
    "device": torch.device,
}


def _unpacked(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_unpacked(part, tensors) for part in data]
    if not isinstance(data, Mapping):
        return data
    if data.keys() != {_KIND, _OF}:
        return {key: _unpacked(part, tensors) for key, part in data.items()}
    kind, of = data[_KIND], data[_OF]
    match kind:
        case "tensor" | "array" | "number" if of in tensors:
            tensor = tensors[of]
            return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.numpy()[()]
        case "dtype" if isinstance(found := getattr(torch, str(of), None), torch.dtype):
            return found
        case str() if kind in _MADE:
            return _MADE[kind](_unpacked(of, tensors))
    raise ValueError(f"{kind!r} of {of!r} is no part of a state")
