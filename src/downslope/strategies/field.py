"""The fields of a strategy: what each may hold, and the one form in which it is held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from downslope.errors import BadInput, under
from downslope.schedule import Schedule, duration

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Schedule: "a schedule",
    tuple: "a list",
    Mapping: "a table",
}


def settled(name: str, value: Any, declared: Any) -> Any:
    """The value of a field in one form: floats, durations in their one spelling, tuples, dicts.

    BadInput, saying what is allowed, for a value that is not of the declared type, and for a schedule that
    goes by validations: only numbers of the chain are told of those. What is declared as Any passes.
    """
    if value is None and NoneType in get_args(declared):
        return None
    options = _options(declared)
    if {int, str} <= {*options}:
        return duration(value, name)
    for option in options:
        kind = get_origin(option) or option
        if kind not in _WORDS:
            return value
        if _is(value, kind):
            return _form(name, value, kind, get_args(option))
    raise BadInput(f"{name} is {word(declared)}, got {value!r}.")


def word(declared: Any) -> str:
    """What a field holds, in words.

    >>> word(float | None), word(int | str), word(tuple[str, ...])
    ('a number', 'a duration', 'a list')
    """
    options = _options(declared)
    if {int, str} <= {*options}:
        return "a duration"
    return " or ".join(_WORDS.get(get_origin(one) or one, "data") for one in options)


def extent(number: float | Schedule) -> tuple[float, float]:
    """The least and the greatest of a number, or of the levels that a schedule of it names.

    >>> from downslope.schedule import linear
    >>> extent(0.3), extent(linear(0.3, 10, end=0.5))
    ((0.3, 0.3), (0.3, 0.5))
    """
    return number.bounds if isinstance(number, Schedule) else (number, number)


def _options(declared: Any) -> list[Any]:
    options = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    return [option for option in options if option is not NoneType]


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, tuple | list)
    return type(value) is kind if kind in (bool, int) else isinstance(value, kind)


def _form(name: str, value: Any, kind: Any, parts: tuple[Any, ...]) -> Any:
    if kind is float:
        return float(value) + 0.0  # and not -0.0
    if kind is Schedule and value.reacts:
        raise BadInput(f"{name} cannot follow a schedule that goes by validations, as {value.kind} does.")
    if kind is Mapping:
        found = {}
        for key, one in value.items():
            with under(key):
                found[key] = settled(f"{name}.{key}", one, parts[1])
        return found
    if kind is tuple:
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(kinds) != len(value):
            raise BadInput(f"{name} is a list of {len(kinds)}, got {len(value)}.")
        return tuple(settled(name, one, of) for one, of in zip(value, kinds, strict=True))
    return value
