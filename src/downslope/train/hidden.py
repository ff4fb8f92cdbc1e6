"""Where state hides from a checkpoint: attributes of modules and data, globals, variables of functions."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from downslope.train.fingerprint import digest, fingerprint

_MODULE = frozenset(vars(nn.Module()))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def of_module(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(where, value) of plain attributes of every module."""
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _MODULE}
        where = f"of {path or 'the model'}, a {type(module).__name__}"
        yield from ((f"attribute {name!r} {where}", text) for name, text in _texts(own))


def of_object(held: Any, what: str) -> Iterator[tuple[str, str]]:
    """(where, value) of an object's attributes."""
    own = getattr(held, "__dict__", {})
    yield from ((f"attribute {name!r} of {what}", text) for name, text in _texts(own))


def of_file(path: Path) -> Iterator[tuple[str, str]]:
    """(where, value) of the globals of a file that was loaded."""
    own = vars(sys.modules[path.stem]) if path.stem in sys.modules else {}
    yield from ((f"global {name!r} of {path.name}", text) for name, text in _texts(own))


def of_function(function: Any, what: str) -> Iterator[tuple[str, str]]:
    """(where, value) of the variables that a function took along from where it was made."""
    if inspect.isfunction(function):
        own = dict(inspect.getclosurevars(function).nonlocals)
        yield from ((f"variable {name!r} of {what}", text) for name, text in _texts(own))


def loaders_of(function: Any) -> Iterator[str]:
    """The names of DataLoaders and running iterators that a function took along: they know no place."""
    if inspect.isfunction(function):
        for name, value in inspect.getclosurevars(function).nonlocals.items():
            if isinstance(value, DataLoader) or (
                isinstance(value, Iterator) and not hasattr(value, "state_dict")
            ):
                yield f"{name!r}, a {type(value).__name__}"


def _texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, bool | int | float) and not name.startswith("__"):
            yield name, repr(value)
        elif isinstance(value, Tensor):
            yield name, f"a tensor {fingerprint(value)[:8]}"
        elif isinstance(value, _GENERATORS):
            yield name, f"a generator at {_place(value)[:8]}"


def _place(generator: Any) -> str:
    """Where a generator stands."""
    if isinstance(generator, torch.Generator):
        return fingerprint(generator.get_state())
    if isinstance(generator, random.Random):
        return digest(repr(generator.getstate()).encode())
    state = generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else None
    return digest(repr(state or generator.bit_generator.state).encode())
