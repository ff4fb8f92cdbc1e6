"""What the numbers of schedules are called, mean and may be: one table for every kind, recipe and page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from downslope.errors import BadInput, nearest
from downslope.schedule.duration import Duration, duration

Unit: TypeAlias = Literal["level", "duration", "count", "number", "word", "schedule"]
"""A level is in the unit of the value itself, and scales with it; a count is of things, not of steps."""


@dataclass(frozen=True)
class Term:
    """One number of a schedule: meaning, unit, and what it may be. `many`: a tuple of such, not one."""

    meaning: str
    unit: Unit
    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    words: tuple[str, ...] = ()
    many: bool = False

    def settled(self, where: str, value: Any) -> Any:
        """The value in its one form: float, whole number, duration or word. BadInput, calling it `where`."""
        match self.unit:
            case "level" | "number":
                return self._in_range(where, _finite(where, value)) + 0.0  # and not -0.0
            case "duration":
                return self._long_enough(where, duration(value, where))
            case "count":
                return self._counted(where, value)
            case "word":
                if value not in self.words:
                    raise BadInput(
                        f"{where} must be {_one_of(self.words)}, got {value!r}.{self._near(value)}"
                    )
        return value

    def _near(self, value: Any) -> str:
        return nearest(value, self.words) if isinstance(value, str) else ""

    def _in_range(self, where: str, value: float) -> float:
        if value < self.least:
            raise BadInput(f"{where} must be at least {self.least:g}, got {value!r}.")
        if not self.above < value < self.below:
            bound = f"above {self.above:g}" if value <= self.above else f"below {self.below:g}"
            raise BadInput(f"{where} must be {bound}, got {value!r}.")
        return value

    def _counted(self, where: str, value: Any) -> int:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not self.least <= int(value) < 2**53:
            raise BadInput(f"{where} must be a whole number from {self.least:g}, got {value!r}.")
        return int(value)

    def _long_enough(self, where: str, value: Duration) -> Duration:
        if isinstance(value, int) and value < self.least:
            raise BadInput(f"{where} must be at least {self.least:g}, got {value}.")
        return value


def _finite(where: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadInput(f"{where} must be a finite number, got {value!r}.")
    return number


def _one_of(words: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"


CURVES = ("linear", "cosine", "sqrt", "exponential")

TERMS: Mapping[str, Term] = MappingProxyType(
    {
        "peak": Term("the level that it starts from, once warm", "level"),
        "end": Term("the level that it arrives at, and keeps", "level"),
        "base": Term("the level that a cycle starts from", "level"),
        "low": Term("the least value", "level"),
        "high": Term("the greatest value", "level"),
        "steps": Term("its whole length, warmup included", "duration", least=1),
        "warmup": Term("updates before the peak, in equal steps", "duration", least=0),
        "cooldown": Term("updates from the last high to the end", "duration", least=0),
        "every": Term(
            "updates from one change to the next; where smooth, its time scale", "duration", least=1
        ),
        "start": Term("the update at which it leaves its trunk", "duration", least=0),
        "rise": Term("updates from the base to the peak", "duration", least=0),
        "up": Term("updates of a cycle from the base to the peak", "duration", least=1),
        "down": Term("updates of a cycle from the peak to the base", "duration", least=1),
        "at": Term(
            "the updates at which it changes, counted from its own start", "duration", least=0, many=True
        ),
        "factor": Term("what a change multiplies by", "number", least=0),
        "power": Term("exponent of what is left of the way", "number", above=0),
        "growth": Term("how many times longer each period is than the last", "count", least=1),
        "shrink": Term("what a restart multiplies the height above the end by", "number", least=0),
        "shape": Term("the way down", "word", words=CURVES),
        "one_cycle.shape": Term("the way up and down", "word", words=("linear", "cosine")),
        "form": Term(
            "what becomes of the height of a cycle", "word", words=("triangular", "triangular2", "exp_range")
        ),
        "plateau.factor": Term("what a plateau multiplies by", "number", least=0, below=1),
        "plateau.end": Term("the least level that plateaus lead to", "level"),
        "patience": Term("observations without progress that are borne; the next one acts", "count", least=0),
        "plateau.cooldown": Term("observations after a cut that count for nothing", "count", least=0),
        "threshold": Term("progress that is too small to count", "number", least=0),
        "threshold_mode": Term("whether the threshold is a share of the best", "word", words=("rel", "abs")),
        "mode": Term("which observations are better", "word", words=("min", "max")),
        "trunk": Term("the schedule that is left", "schedule"),
        "part": Term("the schedule whose value is held", "schedule"),
        "parts": Term("the schedules that it is made of", "schedule", many=True),
    }
)


def term(name: str, of: str = "") -> Term:
    """The term of a number of the kind `of`.

    >>> term("cooldown", "wsd").unit, term("cooldown", "plateau").unit
    ('duration', 'count')
    """
    return TERMS.get(f"{of}.{name}") or TERMS[name]
