"""What every kind of schedule shares: how it is made, called, resolved, combined and written down."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeVar

from downslope.errors import BadInput, nearest, under
from downslope.schedule.curve import finite
from downslope.schedule.duration import Duration, in_steps
from downslope.schedule.glossary import term
from downslope.schedule.picture import draw

Seen: TypeAlias = Sequence[tuple[int, float]]
"""What was observed: (applied updates made by then, value), in this order of time."""

Bounds: TypeAlias = tuple[float, float]


@dataclass(frozen=True, repr=False)
class Schedule:
    """A pure function of the 0-based applied update, `schedule(step) -> float`. Equal by content, hashable.

    Made by the kinds (constant, cosine, …), by +, *, then, clamp and cooldown of others, or from data.
    Durations with a unit must be resolved before the first call, which a recipe does.

    >>> from downslope.schedule import cosine
    >>> cosine(0.1, steps="100 %", warmup="10 %").resolve(run_steps=50)
    cosine(peak=0.1, steps=50, end=0.0, warmup=5)
    """

    kind: str
    numbers: tuple[tuple[str, Any], ...]

    def __call__(self, step: int, /, seen: Seen = ()) -> float:
        """The value at the step-th applied update, from 0.

        `seen`: what was observed so far, for kinds that react; of it, what lies behind `step` does not count,
        so that the value of a past step never changes.
        """
        if step < 0:
            raise BadInput(f"{self.kind}: a step is at least 0, got {step}.")
        if not self.resolved:
            raise BadInput(f"{self!r} has durations that are not in steps: call resolve(...) first.")
        warmup, numbers = self._warm
        if step < warmup:
            return float(numbers["peak"] * ((step + 1) / (warmup + 1)))
        record = _RECORDS[self.kind]
        context = {"seen": since(seen, warmup)} if record.sees else {}
        return finite(float(record.shape(step - warmup, **numbers, **context)))

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.numbers)})"

    @property
    def reacts(self) -> bool:
        """Whether its values depend on what was observed, so that it must be told.

        >>> from downslope.schedule import cosine, plateau
        >>> cosine(0.1, steps=9).reacts, (cosine(0.1, steps=9) + plateau(0.1)).reacts
        (False, True)
        """
        return any(part.reacts for part in self.parts) if self.parts else _RECORDS[self.kind].sees

    @property
    def parts(self) -> tuple["Schedule", ...]:
        """The schedules that it is directly made of."""
        return tuple(one for _, value in self.numbers for one in _each(value) if isinstance(one, Schedule))

    @cached_property
    def resolved(self) -> bool:
        """Whether every duration is in steps."""
        texts = (
            isinstance(one, str) and term(name, self.kind).unit == "duration"
            for name, value in self.numbers
            for one in _each(value)
        )
        return not any(texts) and all(part.resolved for part in self.parts)

    @cached_property
    def bounds(self) -> Bounds:
        """The least and the greatest of the levels that it names, through sums, products and clamps.

        Between them lies every value, but for warmups and decays, which begin or end nearer to 0, and growth
        (a factor above 1), which has no bound.

        >>> from downslope.schedule import constant, linear
        >>> (2 * linear(0.3, steps=9, end=0.1) + constant(1.0)).bounds
        (1.2, 1.6)
        """
        return _RECORDS[self.kind].bounds(self)

    @property
    def peak(self) -> float:
        """The level by which schedules are compared: the `peak` of its own or of its trunk, or else the bound
        that is further from 0. It is scaled as the values are.
        """
        numbers = dict(self.numbers)
        if "trunk" in numbers:
            return float(numbers["trunk"].peak)
        return float(numbers["peak"] if "peak" in numbers else max(self.bounds, key=abs))

    @property
    def length(self) -> Duration | None:
        """The updates after which it has arrived at its end; None if it has none, or is to be resolved first.

        >>> from downslope.schedule import constant, linear
        >>> linear(1.0, steps="3 epochs").length, constant(1.0).cooldown(60, 20).length, constant(1.0).length
        ('3 epochs', 80, None)
        """
        numbers = dict(self.numbers)
        before, last = numbers.get("start"), numbers.get("cooldown")
        if self.kind == "sequence":
            before, last = (0, *numbers["at"])[-1], self.parts[-1].length
        return before + last if isinstance(before, int) and isinstance(last, int) else numbers.get("steps")

    def resolve(
        self,
        run_steps: int | None = None,
        steps_per_epoch: int | None = None,
        batch_size: int | None = None,
        tokens_per_step: int | None = None,
    ) -> "Schedule":
        """The same schedule with every duration in steps. BadInput if what a unit needs is not given.

        Rounded down, so that shares of a whole fit into it; but to 1 where 0 means nothing (`steps`,
        `every`).
        """
        rates = {
            "run_steps": run_steps,
            "steps_per_epoch": steps_per_epoch,
            "batch_size": batch_size,
            "tokens_per_step": tokens_per_step,
        }

        def resolved(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(resolved(name, one) for one in value)
            if isinstance(value, Schedule):
                return value.resolve(**rates)
            known = term(name, self.kind)
            if known.unit != "duration":
                return value
            return max(in_steps(value, f"{self.kind}: {name}", **rates), int(known.least))

        numbers = dict(self.numbers)
        if "steps" in numbers:
            numbers["steps"] = rates["run_steps"] = resolved("steps", numbers["steps"])
        return KINDS[self.kind](**{name: resolved(name, value) for name, value in numbers.items()})

    def scaled(self, factor: float) -> "Schedule":
        """The same shape with every value times `factor`; the ratio of the two is the same throughout.

        >>> from downslope.schedule import cosine
        >>> cosine(0.1, steps=10, end=0.01).scaled(10)
        cosine(peak=1.0, steps=10, end=0.1, warmup=0)
        """
        return KINDS[self.kind](**_RECORDS[self.kind].scaled(self, factor))

    def cooldown(
        self, start: Duration, steps: Duration, end: float = 0.0, shape: str = "linear"
    ) -> "Schedule":
        """This schedule up to the update `start`, then in `steps` updates down to `end`, as `wsd` does.

        A branch of a trunk, for judging it; behind a constant it equals `wsd` of the same lengths to the bit.
        """
        return KINDS["branch"](self, start, steps, end, shape)

    def then(self, other: "Schedule | float", at: Duration | None = None) -> "Schedule":
        """This schedule up to the update `at`, from there `other`, which counts its own steps from 0.

        Without `at`: where this one ends. A schedule that has no length is refused then (BadInput).

        >>> from downslope.schedule import constant, linear
        >>> [linear(1.0, steps=2).then(constant(5.0))(i) for i in range(4)]
        [1.0, 0.5, 5.0, 5.0]
        """
        at = self.length if at is None else at
        if at is None:
            raise BadInput(f"{self.kind} has no length of its own: say where the next begins, then(…, at=…).")
        before = dict(self.numbers)["at"] if self.kind == "sequence" else ()
        return KINDS["sequence"]((*self._flat("sequence"), _schedule(other)), (*before, at))

    def clamp(self, low: float | None = None, high: float | None = None) -> "Schedule":
        """This schedule, held at or above `low` and at or below `high`.

        >>> from downslope.schedule import linear
        >>> [linear(1.0, steps=4).clamp(0.3, 0.8)(i) for i in range(5)]
        [0.8, 0.75, 0.5, 0.3, 0.3]
        """
        return KINDS["clamp"](self, low, high)

    def __add__(self, other: "Schedule | float") -> "Schedule":
        return KINDS["sum"]((*self._flat("sum"), *_schedule(other)._flat("sum")))

    def __radd__(self, other: float) -> "Schedule":
        return _schedule(other) + self

    def __mul__(self, other: "Schedule | float") -> "Schedule":
        if not isinstance(other, Schedule):
            return self.scaled(_schedule(other).peak)
        return KINDS["product"]((*self._flat("product"), *other._flat("product")))

    __rmul__ = __mul__

    def preview(self, steps: int, points: int = 200, seen: Seen = ()) -> list[tuple[int, float]]:
        """(step, value) at no more than `points` even places of a run of `steps`, first and last included.

        >>> from downslope.schedule import linear
        >>> linear(1.0, steps=4).preview(steps=4, points=2)
        [(0, 1.0), (3, 0.25)]
        """
        if steps < 1 or points < 2:
            raise BadInput(f"a preview needs at least 1 step and 2 points, got {steps} and {points}.")
        gaps = max(min(points, steps) - 1, 1)
        places = dict.fromkeys(k * (steps - 1) // gaps for k in range(gaps + 1))
        return [(i, self(i, seen)) for i in places]

    def picture(
        self, steps: int, width: int = 72, height: int = 11, seen: Seen = (), *, plain: bool = False
    ) -> str:
        """A plot of the first `steps` updates for a terminal: `height` rows and an axis, no line longer than
        `width`. `plain`: in ASCII, for what has no braille. A kind that reacts is drawn for what was `seen`.
        """
        return draw(lambda i: self(i, seen), steps, width, height, plain)

    def data(self) -> dict[str, Any]:
        """The schedule as plain JSON or TOML data; `from_data` reads it back.

        >>> from downslope.schedule import constant
        >>> constant(0.1).data()
        {'schedule': 'constant', 'peak': 0.1, 'warmup': 0}
        """

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(one) for one in value]
            return value.data() if isinstance(value, Schedule) else value

        return {"schedule": self.kind, **{name: plain(value) for name, value in self.numbers}}

    @staticmethod
    def from_data(data: Any) -> "Schedule":
        """The schedule that `data()` describes. BadInput names a key that is unknown or missing.

        >>> Schedule.from_data({"schedule": "linear", "peak": 0.1, "steps": 10})
        linear(peak=0.1, steps=10, end=0.0, warmup=0)
        """
        if not isinstance(data, Mapping):
            example = {"schedule": "constant", "peak": 0.1}
            raise BadInput(f"a schedule is a table such as {example}, got {data!r}.")
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
        for name, value in numbers.items():
            if (known := term(name, kind)).unit == "schedule":
                with under(name):
                    numbers[name] = (
                        _read_all(f"{kind}: {name}", value) if known.many else Schedule.from_data(value)
                    )
        return KINDS[kind](**numbers)

    @cached_property
    def _warm(self) -> tuple[int, dict[str, Any]]:
        """The warmup, and the numbers of the shape behind it, which counts from the warmup's end."""
        numbers = dict(self.numbers)
        warmup = numbers.pop("warmup", 0)
        if "steps" in numbers:
            numbers["steps"] -= warmup
        if "at" in numbers:
            numbers["at"] = tuple(place - warmup for place in numbers["at"])
        return warmup, numbers

    def _flat(self, kind: str) -> tuple["Schedule", ...]:
        return self.parts if self.kind == kind else (self,)


class _Record(NamedTuple):
    """What a kind is beside its constructor."""

    shape: Callable[..., float]
    bounds: Callable[[Schedule], Bounds]
    scaled: Callable[[Schedule, float], dict[str, Any]]
    sees: bool  # whether the shape asks for what was observed


KINDS: dict[str, Callable[..., Schedule]] = {}
"""The constructor of each kind, by the name it has in data."""

_RECORDS: dict[str, _Record] = {}
_Maker = TypeVar("_Maker", bound=Callable[..., Schedule])


def hull(of: Schedule) -> Bounds:
    """What holds every level of a schedule's own and of its parts."""
    levels = [value for name, value in of.numbers if term(name, of.kind).unit == "level"]
    every = [*levels, *(end for part in of.parts for end in part.bounds)]
    return min(every), max(every)


def levels_scaled(of: Schedule, factor: float) -> dict[str, Any]:
    """The numbers of a schedule, every level of its own and of its parts times `factor`."""

    def scaled(unit: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(scaled(unit, one) for one in value)
        if isinstance(value, Schedule):
            return value.scaled(factor)
        return value * factor if unit == "level" else value

    return {name: scaled(term(name, of.kind).unit, value) for name, value in of.numbers}


def kind(
    shape: Callable[..., float],
    bounds: Callable[[Schedule], Bounds] = hull,
    scaled: Callable[[Schedule, float], dict[str, Any]] = levels_scaled,
) -> Callable[[_Maker], _Maker]:
    """Make a constructor, which says its numbers and what they mean, a kind of schedule.

    `shape(i, **numbers)`: the value `i` updates after the end of the warmup, `steps` and `at` being counted
    from there too; it may ask for `seen`. `bounds`: of a schedule of the kind. `scaled`: the numbers of the
    schedule whose values are so many times greater.
    """

    def added(maker: _Maker) -> _Maker:
        sees = "seen" in signature(shape).parameters
        KINDS[maker.__name__] = maker
        _RECORDS[maker.__name__] = _Record(shape, bounds, scaled, sees)
        return maker

    return added


def make(kind: str, **numbers: Any) -> Schedule:
    """The one door: spells durations alike, makes values float, turns what can be into steps."""
    for name, value in numbers.items():
        with under(name):
            numbers[name] = _settled(f"{kind}: {name}", kind, name, value)
    whole = numbers.get("steps")
    for name, value in numbers.items():
        if isinstance(whole, int) and isinstance(value, str) and value.endswith("%"):
            numbers[name] = in_steps(value, run_steps=whole)
    _check_room(kind, numbers)
    return Schedule(kind, tuple(numbers.items()))


def in_order(made: Schedule) -> Schedule:
    """The schedule, if the updates `at` which it changes do not fall, as far as they are known yet."""
    numbers = dict(made.numbers)
    known = [place for place in numbers["at"] if isinstance(place, int)]
    warmup = numbers.get("warmup", 0)
    with under("at"):
        if known != sorted(known):
            raise BadInput(f"{made.kind}: at must not fall, got {list(numbers['at'])}.")
        if known and isinstance(warmup, int) and known[0] < warmup:
            raise BadInput(
                f"{made.kind}: at counts the warmup, and must not lie in its {warmup}, got {known[0]}."
            )
    return made


def since(seen: Seen, start: int) -> Seen:
    """What was observed from the update `start` on, counted from there."""
    return [(place - start, value) for place, value in seen if place >= start] if start else seen


def _settled(where: str, kind: str, name: str, value: Any) -> Any:
    known = term(name, kind)
    if known.many:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise BadInput(f"{where} must be a list, got {value!r}.")
        found = []
        for place, one in enumerate(value):
            with under(place):
                found.append(_one(f"{where}[{place}]", name, kind, one))
        return tuple(found)
    return _one(where, name, kind, value)


def _one(where: str, name: str, kind: str, value: Any) -> Any:
    if term(name, kind).unit != "schedule":
        return term(name, kind).settled(where, value)
    if not isinstance(value, Schedule):
        raise BadInput(f"{where} must be a schedule, got {value!r}.")
    return value


def _check_room(kind: str, numbers: Mapping[str, Any]) -> None:
    parts = {name: numbers.get(name, 0) for name in ("warmup", "cooldown", "rise")}
    steps = numbers.get("steps")
    if not isinstance(steps, int) or not all(isinstance(part, int) for part in parts.values()):
        return
    warmup, cooldown, rise = parts.values()
    with under("warmup"):
        if warmup >= steps:
            raise BadInput(f"{kind}: warmup must be below steps = {steps}, to reach the peak, got {warmup}.")
        if warmup + cooldown > steps:
            raise BadInput(
                f"{kind}: warmup {warmup} and cooldown {cooldown} do not fit into steps = {steps}."
            )
    with under("rise"):
        if rise > steps:
            raise BadInput(f"{kind}: rise must be at most steps = {steps}, got {rise}.")


def _schedule(value: Any) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadInput(f"a schedule combines with schedules and numbers, got {value!r}.")
    return KINDS["constant"](value)


def _read_all(where: str, tables: Any) -> tuple[Schedule, ...]:
    if not isinstance(tables, list | tuple):
        raise BadInput(f"{where} must be a list of tables, got {tables!r}.")
    found = []
    for place, table in enumerate(tables):
        with under(place):
            found.append(Schedule.from_data(table))
    return tuple(found)


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple) else (value,)
