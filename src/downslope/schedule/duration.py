"""Durations: how long something lasts, in a unit that is always said."""

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from typing import TypeAlias

from downslope.errors import BadInput, nearest

Duration: TypeAlias = int | str
"""Applied updates, or text with a unit: "500 steps", "3 epochs", "64000 samples", "2e6 tokens", "10 %"."""

FORMS = '"500 steps", "3 epochs", "64000 samples", "2e6 tokens", "10 %"'
"""One of each unit, for those who are told what a duration is."""

UNITS = ("steps", "epochs", "samples", "tokens", "%")

_TEXT = re.compile(
    r"\s*(\d{1,15}(?:_\d{1,15}){0,5}(?:\.\d{1,15})?(?:[eE]\+?\d{1,2})?)\s*(step|epoch|sample|token|%)s?\s*",
    re.ASCII,
)
_LONGEST = 2**53  # beyond it a float no longer counts single steps
_RATE = {"epoch": "steps_per_epoch", "sample": "batch_size", "token": "tokens_per_step", "%": "run_steps"}


def duration(value: object, name: str = "steps") -> Duration:
    """The one spelling of a duration: an int for steps, else "number unit"; errors (BadInput) call it `name`.

    Digits may be grouped as Python groups them, and have an exponent; a comma is refused, which is a point in
    half of the world.

    >>> duration("500 steps"), duration("3epochs"), duration("10%"), duration("1_000 samples")
    (500, '3 epochs', '10 %', '1000 samples')
    """
    if isinstance(value, int | Integral) and not isinstance(value, bool) and 0 <= int(value) <= _LONGEST:
        return int(value)
    if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        size, unit = Decimal(match[1]), match[2]
        if size <= _LONGEST:
            number = format(size.normalize(), "f")
            if unit != "step":
                return f"{number} {unit}" + "s" * (unit != "%" and number != "1")
            if "." not in number:
                return int(number)
    said = f"{name} must be a whole number of steps from 0 or text such as {FORMS}, got {value!r}."
    raise BadInput(said + _hint(value))


def in_steps(
    value: Duration,
    name: str = "steps",
    *,
    run_steps: int | None = None,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
    tokens_per_step: int | None = None,
) -> int:
    """The duration in applied updates, rounded down. BadInput if what its unit needs is not given.

    `run_steps`: applied updates of the run. `batch_size`, `tokens_per_step`: samples and tokens that one
    applied update sees, over all ranks and accumulated micro-batches.

    >>> in_steps("3 epochs", steps_per_epoch=20), in_steps("5 %", run_steps=90)
    (60, 4)
    """
    value = duration(value, name)
    if isinstance(value, int):
        return value
    number, unit = value.split(" ")
    unit = unit.rstrip("s")
    rates: Mapping[str, int | None] = {
        "epoch": steps_per_epoch,
        "sample": batch_size,
        "token": tokens_per_step,
        "%": run_steps,
    }
    rate = rates[unit]
    if rate is None or rate < 1:
        tokens = "; a recipe has it from its task's field 'tokens': without that, say samples"
        raise BadInput(
            f"{name} is {value!r}: to turn it into steps, {_RATE[unit]} must be given, got {rate}"
            f"{tokens if unit == 'token' else ''}."
        )
    share = Fraction(number)
    return int(share / rate if unit in ("sample", "token") else share * rate / (100 if unit == "%" else 1))


def _hint(value: object) -> str:
    """What a text with another unit may have meant."""
    if not isinstance(value, str) or not (word := re.fullmatch(r"[\s\d._+-]*([^\W\d_]+)\s*", value)):
        return ""
    near = {"percent": "%", "pct": "%", "iterations": "steps", "updates": "steps", "batches": "steps"}
    meant = near.get(word[1].lower())
    return f" Did you mean {meant!r}?" if meant else nearest(word[1], UNITS)
