"""Schedules: what a number is worth at each applied update.

A schedule is plain data and a pure function of the step: it has no state to save, attaches to nothing, cannot
drift. Step 0 is the first update. All of them agree on this:

- With `warmup=w` the value at step i < w is `peak·(i + 1)/(w + 1)`: it rises in equal steps and is `peak` at
  step w. The first update is not wasted on a rate of 0, and `peak` is not spent twice.
- `steps` is the whole length, warmup included. `end` is reached at step `steps`, one past the last update, so
  that the last update is not wasted either (torch counts like this too). From there on the value stays `end`.
- A duration is a whole number of applied updates, or text with a unit: "500 steps", "3 epochs",
  "64000 samples", "10 %". A percentage is of the schedule's own `steps`; of the run for `steps` itself and
  where there is no `steps`.
- Values have no sign of their own, and `end` may lie above `peak`: a rising beta2 or weight decay wants it.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, TypeAlias

from downslope.errors import BadInput, nearest, under

Duration: TypeAlias = int | str
"""Applied updates, or text with a unit: "500 steps", "3 epochs", "64000 samples", "10 %"."""

_LEAST = {"steps": 1, "every": 1, "warmup": 0, "cooldown": 0, "start": 0}
"""The numbers that are durations, and the least that each may be."""

_TEXT = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(step|epoch|sample|%)s?\s*", re.ASCII)
_LONGEST = 2**53  # beyond it a float no longer counts single steps
_RATE = {"epoch": "steps_per_epoch", "sample": "batch_size", "%": "run_steps"}


def duration(value: object, name: str = "steps") -> Duration:
    """The one spelling of a duration: an int for steps, else "number unit"; errors (BadInput) call it `name`.

    >>> duration("500 steps"), duration("3epochs"), duration("10%")
    (500, '3 epochs', '10 %')
    """
    if isinstance(value, int | Integral) and not isinstance(value, bool) and 0 <= int(value) <= _LONGEST:
        return int(value)
    if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        number, unit = format(Decimal(match[1]).normalize(), "f"), match[2]
        if unit != "step":
            return f"{number} {unit}" + "s" * (unit != "%" and number != "1")
        if "." not in number:
            return int(number)
    forms = '"500 steps", "3 epochs", "64000 samples", "10 %"'
    raise BadInput(f"{name} must be a whole number of steps from 0 or text such as {forms}, got {value!r}.")


def in_steps(
    value: Duration,
    name: str = "steps",
    *,
    run_steps: int | None = None,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
) -> int:
    """The duration in applied updates, rounded down. BadInput if what its unit needs is not given.

    >>> in_steps("3 epochs", steps_per_epoch=20), in_steps("5 %", run_steps=90)
    (60, 4)
    """
    value = duration(value, name)
    if isinstance(value, int):
        return value
    number, unit = value.split(" ")
    unit = unit.rstrip("s")
    rate = {"epoch": steps_per_epoch, "sample": batch_size, "%": run_steps}[unit]
    if rate is None or rate < 1:
        raise BadInput(
            f"{name} is {value!r}: to turn it into steps, {_RATE[unit]} must be given, got {rate}."
        )
    share = Fraction(number)
    return int(share / rate if unit == "sample" else share * rate / (100 if unit == "%" else 1))


@dataclass(frozen=True, repr=False)
class Schedule:
    """A pure function of the 0-based applied update, `schedule(step) -> float`. Equal by content, hashable.

    Made by constant, linear, step, exponential, cosine, wsd, or from data. Durations with a unit must be
    resolved before the first call, which a recipe does.

    >>> cosine(0.1, steps="100 %", warmup="10 %").resolve(run_steps=50)
    cosine(peak=0.1, steps=50, end=0.0, warmup=5)
    """

    kind: str
    numbers: tuple[tuple[str, Any], ...]

    def __call__(self, step: int, /) -> float:
        """The value at the step-th applied update, from 0."""
        if step < 0:
            raise BadInput(f"{self.kind}: a step is at least 0, got {step}.")
        if not self.resolved:
            raise BadInput(f"{self!r} has durations that are not in steps: call resolve(...) first.")
        numbers = dict(self.numbers)
        warmup = numbers.pop("warmup", 0)
        if step < warmup:
            return float(numbers["peak"] * ((step + 1) / (warmup + 1)))
        if "steps" in numbers:
            numbers["steps"] -= warmup
        return _SHAPES[self.kind](step - warmup, **numbers)

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.numbers)})"

    @property
    def resolved(self) -> bool:
        """Whether every duration is in steps."""
        return all(v.resolved if isinstance(v, Schedule) else not isinstance(v, str) for _, v in self.numbers)

    def resolve(
        self,
        run_steps: int | None = None,
        steps_per_epoch: int | None = None,
        batch_size: int | None = None,
    ) -> "Schedule":
        """The same schedule with every duration in steps. BadInput if what a unit needs is not given.

        Rounded down, so that shares of a whole fit into it; but to 1 where 0 means nothing (`steps`,
        `every`).
        """
        rates = {"run_steps": run_steps, "steps_per_epoch": steps_per_epoch, "batch_size": batch_size}

        def resolved(name: str, value: Any) -> Any:
            if isinstance(value, Schedule):
                return value.resolve(**rates)
            if not isinstance(value, str):
                return value
            return max(in_steps(value, f"{self.kind}: {name}", **rates), _LEAST[name])

        numbers = dict(self.numbers)
        if "steps" in numbers:
            numbers["steps"] = rates["run_steps"] = resolved("steps", numbers["steps"])
        return _schedule(self.kind, **{name: resolved(name, value) for name, value in numbers.items()})

    def scaled(self, factor: float) -> "Schedule":
        """The same shape with every value times `factor`; the ratio of the two is the same throughout.

        >>> cosine(0.1, steps=10, end=0.01).scaled(10)
        cosine(peak=1.0, steps=10, end=0.1, warmup=0)
        """
        numbers = dict(self.numbers)
        for name in numbers.keys() & {"peak", "end"}:
            numbers[name] *= factor
        if "trunk" in numbers:
            numbers["trunk"] = numbers["trunk"].scaled(factor)
        return _schedule(self.kind, **numbers)

    def cooldown(self, start: Duration, steps: Duration, end: float = 0.0) -> "Schedule":
        """This schedule up to the update `start`, then in `steps` updates straight down to `end`.

        A branch of a trunk, for judging it; behind a constant it equals `wsd` of the same lengths to the bit.
        """
        return branch(self, start, steps, end)

    def preview(self, steps: int, points: int = 200) -> list[tuple[int, float]]:
        """(step, value) at no more than `points` even places of a run of `steps`, first and last included.

        >>> linear(1.0, steps=4).preview(steps=4, points=2)
        [(0, 1.0), (3, 0.25)]
        """
        if steps < 1 or points < 2:
            raise BadInput(f"a preview needs at least 1 step and 2 points, got {steps} and {points}.")
        gaps = max(min(points, steps) - 1, 1)
        return [(i, self(i)) for i in dict.fromkeys(k * (steps - 1) // gaps for k in range(gaps + 1))]

    def data(self) -> dict[str, Any]:
        """The schedule as plain JSON or TOML data; `from_data` reads it back.

        >>> constant(0.1).data()
        {'schedule': 'constant', 'peak': 0.1, 'warmup': 0}
        """
        plain = {name: value.data() if isinstance(value, Schedule) else value for name, value in self.numbers}
        return {"schedule": self.kind, **plain}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> "Schedule":
        """The schedule that `data()` describes. BadInput names a key that is unknown or missing.

        >>> Schedule.from_data({"schedule": "linear", "peak": 0.1, "steps": 10})
        linear(peak=0.1, steps=10, end=0.0, warmup=0)
        """
        if not isinstance(data, Mapping):
            raise BadInput(f"a schedule is a table such as {constant(0.1).data()}, got {data!r}.")
        numbers = dict(data)
        kind = numbers.pop("schedule", None)
        with under("schedule"):
            if not isinstance(kind, str) or kind not in KINDS:
                hint = nearest(str(kind), KINDS)
                raise BadInput(f"unknown schedule {kind!r}.{hint} Allowed: {', '.join(KINDS)}.")
        allowed = signature(KINDS[kind]).parameters
        for name in numbers:
            if name not in allowed:
                hint = nearest(str(name), allowed)
                allowed_names = ", ".join(allowed)
                raise BadInput(f"{kind} has no key {name!r}.{hint} Allowed: {allowed_names}.", key=(name,))
        for name, parameter in allowed.items():
            if name not in numbers and parameter.default is Parameter.empty:
                raise BadInput(f"{kind} needs the key {name!r}.")
        if "trunk" in numbers:
            with under("trunk"):
                numbers["trunk"] = Schedule.from_data(numbers["trunk"])
        return KINDS[kind](**numbers)


def constant(peak: float, warmup: Duration = 0) -> Schedule:
    """`peak` throughout.

    >>> [constant(1.0, warmup=3)(i) for i in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return _schedule("constant", peak=peak, warmup=warmup)


def linear(peak: float, steps: Duration, end: float = 0.0, warmup: Duration = 0) -> Schedule:
    """A straight line from `peak` to `end`.

    >>> [linear(1.0, steps=4)(i) for i in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _schedule("linear", peak=peak, steps=steps, end=end, warmup=warmup)


def step(peak: float, every: Duration, factor: float = 0.1, warmup: Duration = 0) -> Schedule:
    """Stairs: times `factor` at each `every`-th update, counted from the end of the warmup.

    >>> [step(1.0, every=2, factor=0.5)(i) for i in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    return _schedule("step", peak=peak, every=every, factor=factor, warmup=warmup)


def exponential(peak: float, every: Duration, factor: float = 0.5, warmup: Duration = 0) -> Schedule:
    """Times `factor` in each `every` updates, smoothly: a half-life. torch's gamma is factor^(1/every).

    >>> [exponential(1.0, every=2, factor=0.25)(i) for i in range(5)]
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    return _schedule("exponential", peak=peak, every=every, factor=factor, warmup=warmup)


def cosine(peak: float, steps: Duration, end: float = 0.0, warmup: Duration = 0) -> Schedule:
    """Half a cosine from `peak` to `end`. Source: SGDR without restarts, arXiv:1608.03983, eq. 5.

    >>> [round(cosine(1.0, steps=4)(i), 4) for i in range(6)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """
    return _schedule("cosine", peak=peak, steps=steps, end=end, warmup=warmup)


def wsd(
    peak: float,
    steps: Duration,
    warmup: Duration = 0,
    cooldown: Duration = "20 %",
    end: float = 0.0,
) -> Schedule:
    """Warmup, stable, decay: `peak` until the last `cooldown` updates, a straight line to `end` over these.

    As good as a cosine of the same length, and its trunk can be cooled at any time. Source: arXiv:2405.18392.

    >>> [wsd(1.0, steps=5, cooldown=2)(i) for i in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return _schedule("wsd", peak=peak, steps=steps, warmup=warmup, cooldown=cooldown, end=end)


def branch(trunk: Schedule, start: Duration, cooldown: Duration, end: float = 0.0) -> Schedule:
    """`trunk` up to the update `start`, then a straight line to `end` over `cooldown` updates.

    >>> [branch(constant(1.0), start=3, cooldown=2)(i) for i in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return _schedule("branch", trunk=trunk, start=start, cooldown=cooldown, end=end)


KINDS: dict[str, Callable[..., Schedule]] = {
    made.__name__: made for made in (constant, linear, step, exponential, cosine, wsd, branch)
}
"""The constructor of each kind, by the name it has in data."""


def _line(start: float, end: float, i: float, steps: float) -> float:
    """Exact at both ends, and where they are equal in between too."""
    if i >= steps:
        return end
    return start + (end - start) * (i / steps) if i > 0 else start


def _cosine(i: int, peak: float, steps: int, end: float) -> float:
    # (1 - cos πx)/2 as sin²(πx/2), which loses no digits near the peak.
    return _line(peak, end, math.sin(math.pi / 2 * min(i / steps, 1.0)) ** 2, 1)


def _wsd(i: int, peak: float, steps: int, cooldown: int, end: float) -> float:
    return _line(peak, end, i - (steps - cooldown), cooldown)


def _branch(i: int, trunk: Schedule, start: int, cooldown: int, end: float) -> float:
    return trunk(i) if i < start else _line(trunk(start), end, i - start, cooldown)


def _power(factor: float, exponent: float) -> float:
    """A growing schedule stops at the largest float: it must not raise in the middle of a run."""
    try:
        return math.pow(factor, exponent)
    except OverflowError:
        return sys.float_info.max


_SHAPES: dict[str, Callable[..., float]] = {
    "constant": lambda i, peak: peak,
    "linear": lambda i, peak, steps, end: _line(peak, end, i, steps),
    "step": lambda i, peak, every, factor: peak * _power(factor, i // every),
    "exponential": lambda i, peak, every, factor: peak * _power(factor, i / every),
    "cosine": _cosine,
    "wsd": _wsd,
    "branch": _branch,
}
"""The value `i` updates after the end of the warmup, `steps` being what is left of the length then."""


def _schedule(kind: str, **numbers: Any) -> Schedule:
    """The one door: spells durations alike, makes values float, turns what can be into steps."""
    for name, value in numbers.items():
        with under(name):
            numbers[name] = _settled(f"{kind}: {name}", name, value)
    if whole := numbers.get("steps"):
        for name in numbers.keys() & {"warmup", "cooldown"}:
            if isinstance(whole, int) and str(numbers[name]).endswith("%"):
                numbers[name] = in_steps(numbers[name], run_steps=whole)
    _check_room(kind, numbers)
    return Schedule(kind, tuple(numbers.items()))


def _settled(where: str, name: str, value: Any) -> Any:
    if name == "trunk":
        if not isinstance(value, Schedule):
            raise BadInput(f"{where} must be a schedule, got {value!r}.")
        return value
    if name not in _LEAST:
        return _finite(where, value, at_least=0.0 if name == "factor" else -math.inf)
    value = duration(value, where)
    if isinstance(value, int) and value < _LEAST[name]:
        raise BadInput(f"{where} must be at least {_LEAST[name]}, got {value}.")
    return value


def _finite(where: str, value: Any, at_least: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadInput(f"{where} must be a finite number, got {value!r}.")
    if number < at_least:
        raise BadInput(f"{where} must be at least {at_least:g}, got {value!r}.")
    return number


def _check_room(kind: str, numbers: Mapping[str, Any]) -> None:
    steps, warmup, cooldown = numbers.get("steps"), numbers.get("warmup", 0), numbers.get("cooldown", 0)
    if not (isinstance(steps, int) and isinstance(warmup, int) and isinstance(cooldown, int)):
        return
    with under("warmup"):
        if warmup >= steps:
            raise BadInput(f"{kind}: warmup must be below steps = {steps}, to reach the peak, got {warmup}.")
        if warmup + cooldown > steps:
            raise BadInput(
                f"{kind}: warmup {warmup} and cooldown {cooldown} do not fit into steps = {steps}."
            )
