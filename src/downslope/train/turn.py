"""How a recipe goes on by another plan from some update on: as it was until there, then kept, warmed again or
decayed.

What comes out is a recipe as any other, whose schedules say every number from the first update to the last.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from downslope.errors import BadInput, nearest
from downslope.recipe import Recipe
from downslope.rules import Chain
from downslope.rules.route import REST
from downslope.schedule import (
    KINDS,
    Duration,
    Schedule,
    branch,
    constant,
    duration,
    in_steps,
    linear,
    product,
    sequence,
)
from downslope.strategies import Strategy
from downslope.strategies.chain import changed
from downslope.strategies.field import word

THEN = ("keep", "rewarm", "decay")
"""What a schedule may do from a branch on."""

WARMUP = "5 %"
"""Of the updates that are left, for a schedule that has no warmup of its own."""

_NONE_LEFT = "say which curve is to follow by a recipe of its own (--recipe)"
Rates = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """Where the numbers of one optimizer leave their course, and for what.

    `step`, `left`: its own updates so far and to come. `begun`: what durations needed when the run began;
    `now`: what they need from here on, `run_steps` being the whole new length. `rate`: the new peak in place
    of `of`, to which every part's rate keeps its ratio. `seen`: the validations that schedules went by.
    """

    then: str
    step: int
    left: int
    begun: Rates
    now: Rates
    rate: float | None = None
    of: float = 1.0
    warmup: Duration | None = None
    shape: str = "linear"
    seen: Sequence[tuple[int, float]] = ()

    def as_begun(self, number: Any) -> Any:
        """A number with its durations as long as they were when the run began."""
        if isinstance(number, tuple):
            return tuple(self.as_begun(one) for one in number)
        return number.resolve(**self.begun) if isinstance(number, Schedule) else number

    def present(self, number: Any) -> float:
        """What a number is worth at the branch."""
        begun = self.as_begun(number)
        return float(begun(self.step, self.seen) if isinstance(begun, Schedule) else begun)

    def depends(self, number: Any) -> bool:
        """Whether a number would have had another course, had the run begun as it now goes on."""
        if isinstance(number, tuple):
            return any(map(self.depends, number))
        try:
            return bool(
                isinstance(number, Schedule) and number.resolve(**self.now) != number.resolve(**self.begun)
            )
        except BadInput:  # its parts do not fit into the new length
            return True

    def number(self, key: str, old: Any, new: Any) -> Any:
        """The number called `key` over the whole run: `old` until the branch; `new` is what it goes on to."""
        if isinstance(old, tuple):
            return tuple(self.number(key, *both) for both in zip(old, new, strict=True))
        begun = old if self.then == "keep" and not self.depends(old) else self.as_begun(old)
        return getattr(self, f"_{self.then}")(key, old, new, begun)

    def _keep(self, key: str, old: Any, new: Any, begun: Any) -> Any:
        if new != old:
            if isinstance(new, Schedule):
                raise BadInput(
                    f"keep goes on with the schedule that was begun, and the recipe has another for {key}: "
                    "take rewarm, or leave it as it was."
                )
            return self._from_here(begun, constant(self._scaled(key, new)))
        if self._factor(key) == 1.0:
            return begun
        if isinstance(begun, Schedule):
            return product([begun, self._from_here(1.0, constant(self._factor(key)))])
        return self._from_here(begun, constant(self._scaled(key, begun)))

    def _rewarm(self, key: str, old: Any, new: Any, begun: Any) -> Any:
        now, warm = self.present(old), self.rise(new)
        if not isinstance(new, Schedule):
            goal = self._scaled(key, new)
            if not isinstance(old, Schedule) and goal == old:
                return old
            gentle = key == "lr" and warm and goal != now
            return self._from_here(begun, linear(now, warm, goal) if gentle else constant(goal))
        if new == old and new.parts:
            raise BadInput(f"the schedule of {key} is made of others already: {_NONE_LEFT}.")
        if new.kind == "one_cycle":  # it rises by itself
            numbers = {**dict(new.scaled(self._factor(key)).numbers), "base": now, "rise": warm}
            return self._from_here(begun, self._anew(KINDS["one_cycle"](**numbers), self.left))
        plan = self._anew(new.scaled(self._factor(key)), self.left - warm)
        if not warm:
            return self._from_here(begun, plan)
        rise = linear(now, warm, plan(0))
        return sequence([schedule_of(begun), rise, plan], at=[self.step, self.step + warm])

    def _decay(self, key: str, old: Any, new: Any, begun: Any) -> Any:
        if key == "lr":
            if new != old:
                raise BadInput("decay goes down from the present rate, and the recipe has another: rewarm.")
            trunk = schedule_of(begun)
            if self.rate is None:
                return branch(trunk, self.step, self.left, shape=self.shape)
            top = constant(self._scaled(key, self.present(old)))
            return self._from_here(begun, branch(top, 0, self.left, shape=self.shape))
        if new != old:
            return self._keep(key, old, new, begun)
        length = begun.length if isinstance(begun, Schedule) and not begun.reacts else None
        if not isinstance(length, int) or length <= self.step:
            return begun
        return branch(begun, self.step, self.left, begun(length), self.shape)

    def rise(self, new: Any) -> int:
        """Updates of the way up: as told, else those of the schedule's own warmup, else WARMUP."""
        rates = {**self.now, "run_steps": self.left}
        if self.warmup is not None:
            found = in_steps(self.warmup, "warmup", **rates)
        else:
            own = dict(new.numbers) if isinstance(new, Schedule) else {}
            lasting = own.get("warmup") or own.get("rise")
            found = in_steps(lasting, "warmup", **rates) if lasting else max(1, in_steps(WARMUP, **rates))
        if found >= self.left:
            raise BadInput(
                f"a warmup of {found} updates does not fit into the {self.left} that are left: give less."
            )
        return found

    def _anew(self, new: Schedule, steps: int) -> Schedule:
        """A schedule from its start, over what is left, without a warmup of its own."""
        numbers = dict(new.numbers)
        if "warmup" in numbers:
            numbers["warmup"] = 0
        if "steps" in numbers and in_steps(numbers["steps"], **self.begun) == self.begun["run_steps"]:
            numbers["steps"] = steps
        return KINDS[new.kind](**numbers).resolve(**{**self.now, "run_steps": steps})

    def _from_here(self, begun: Any, after: Schedule) -> Schedule:
        return sequence([schedule_of(begun), after], at=[self.step])

    def _factor(self, key: str) -> float:
        if key != "lr" or self.rate is None:
            return 1.0
        first = self.rate / self.of
        near = (first, math.nextafter(first, 0.0), math.nextafter(first, math.inf))
        return next((one for one in near if self.of * one == self.rate), first)

    def _scaled(self, key: str, level: float) -> float:
        return level if key != "lr" or self.rate is None else self.rate * (level / self.of)


def schedule_of(number: Any) -> Schedule:
    """A number as a schedule."""
    return number if isinstance(number, Schedule) else constant(number)


def peak(rate: Schedule, step: int) -> float:
    """The peak of the part of a rate that is in force at an update: what an earlier branch has left behind
    does not count.

    >>> peak(constant(1.0).then(constant(0.2), at=10), step=10)
    0.2
    """
    numbers = dict(rate.numbers)
    if rate.kind == "sequence":
        place = bisect_right(numbers["at"], step)
        return peak(rate.parts[place], step - (0, *numbers["at"])[place])
    if rate.kind == "product":
        return math.prod(peak(part, step) for part in rate.parts)
    if rate.kind == "branch":
        trunk, start = numbers["trunk"], numbers["start"]
        return peak(trunk, step) if step < start or trunk.reacts else float(trunk(start))
    return rate.peak


def course(then: str) -> str:
    """The name of a course, if there is one of that name."""
    if then not in THEN:
        raise BadInput(f"a run goes on by {', '.join(THEN)}, got {then!r}.{nearest(then, THEN)}")
    return then


def turned(old: Recipe, new: Recipe, turn: Turn) -> Recipe:
    """The recipe `new`, or a player's part of one, with every number of its chains as `old` has it until the
    branch. BadInput unless both have the same rules for the same roles.
    """
    mine, theirs = _chains(old), _chains(new)
    check_alike(old, new)
    made = {
        role: changed(of, {k: turn.number(k, mine[role].defaults[k], n) for k, n in of.defaults.items()})
        for role, of in theirs.items()
    }
    roles: dict[str, dict[str, Any]] = {}
    for role in new.roles:
        before, after = old.roles[role], new.roles[role]
        was, will = mine.get(role, old.chain).defaults, theirs.get(role, new.chain).defaults
        roles[role] = {
            key: turn.number(key, before.get(key, was[key]), after.get(key, will[key]))
            for key in dict.fromkeys([*before, *after])
        }
    return replace(new, chain=made.pop(REST), route=made, roles=roles)


def check_alike(old: Recipe, new: Recipe) -> None:
    """BadInput unless the state of an optimizer of `old` is one of `new`."""
    mine, theirs = _chains(old), _chains(new)
    shapes = [{role: made.name for role, made in chains.items()} for chains in (mine, theirs)]
    if shapes[0] != shapes[1] or old.roles.keys() != new.roles.keys():
        was, will = (
            ", ".join([*map(": ".join, shape.items()), *(f"[roles.{role}]" for role in recipe.roles)])
            for shape, recipe in zip(shapes, (old, new), strict=True)
        )
        raise BadInput(
            f"a branch goes on with the state of its rules, and the recipe has others ({was} → {will}): "
            "keep rules and roles, or train the recipe from its start."
        )


def depends(recipe: Recipe, turn: Turn) -> bool:
    """Whether any number of a recipe depends on the length or the batch that changes."""
    numbers = [n for made in _chains(recipe).values() for n in made.defaults.values()]
    numbers += [n for own in recipe.roles.values() for n in own.values()]
    return any(map(turn.depends, numbers))


def _chains(recipe: Recipe) -> dict[str, Chain]:
    return {REST: recipe.chain, **recipe.route}


def dated(recipe: Recipe, rates: Rates, horizon: bool, batch: bool) -> dict[str, Strategy]:
    """The strategies of a run whose plan changes, each date of theirs at the update at which it was to be:
    `rates` are those with which the run began. BadInput for those of which that makes no sense.
    """
    for name, why in _WHOLE.items():
        if name in recipe.strategies:
            raise BadInput(f"[{name}] {why}: a run with it goes on only as it was begun.")
    found = dict(recipe.strategies)
    averaged, growing = (found[name].data() if name in found else {} for name in ("average", "growth"))
    if horizon and averaged.get("kind") == "tail":
        raise BadInput(
            '[average] kind = "tail" is of the last part of the whole length, which changes: '
            "a run with it goes on only at the length that it was begun with."
        )
    if growing and (batch or (horizon and "%" in str(growing))):
        raise BadInput(
            "[growth] counts batches, or shares of the length, from the first update: a run with it goes on "
            "only with the batch size and the length that it was begun with."
        )
    if not (horizon or batch):
        return found
    return {name: made if name == "growth" else _dated(made, rates) for name, made in found.items()}


_WHOLE = {
    "switch": "fits its second chain into the length and to the rate that it was begun with",
    "restart": "deals its starts out over the length that it was begun with",
}


def _dated(strategy: Strategy, rates: Rates) -> Strategy:
    changes: dict[str, Any] = {}
    for key, declared in strategy.declared().items():
        value = getattr(strategy, key)
        if isinstance(value, Schedule):
            changes[key] = value.resolve(**rates)
        elif isinstance(value, str) and word(declared) == "a duration":
            changes[key] = in_steps(value, key, **rates)
        elif strategy.name == "freeze" and key == "until":
            changes[key] = {
                pattern: date if date == "never" else in_steps(duration(date), key, **rates)
                for pattern, date in value.items()
            }
    return replace(strategy, **changes)
