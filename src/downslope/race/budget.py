"""What a race may spend on its search, and the ladder of rungs that this buys.

A rung is a shorter training that is judged whole: the trunk goes to 80 % of the rung's length at full rate,
a branch cools down to the end. Later rungs are longer and have fewer runners. A trunk is never trained
twice, so a rung costs

    runners × (trunk from the last rung's stop to this one's + cooldown)

in units of one full training. The repeats of the finals come on top: (finalists + baseline) × seeds full
trainings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from downslope.errors import BadInput

_TEXT = re.compile(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*(x|steps?|s|min|m|h)\s*", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """An amount of search, in full trainings ("x"), in applied updates ("steps"), or in seconds ("s")."""

    amount: Fraction
    unit: Literal["x", "steps", "s"]

    @staticmethod
    def parse(text: str) -> Budget:
        """The budget that text such as "20x", "5000 steps", "90s", "10m" or "2h" names. Errors: BadInput.

        >>> Budget.parse("10m")
        Budget(amount=Fraction(600, 1), unit='s')
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if not match or not Fraction(match[1]):
            raise BadInput(
                f'A budget is "20x" (full trainings), "5000 steps" or a time such as "10m", above 0; '
                f"got {text!r}."
            )
        unit = match[2].rstrip("s") or "s"
        if unit in _SECONDS:
            return Budget(Fraction(match[1]) * _SECONDS[unit], "s")
        return Budget(Fraction(match[1]), "x" if unit == "x" else "steps")

    def trainings(self, steps: int, pace: float | None, workers: int, finals: int) -> Fraction:
        """The budget of the search in full trainings of `steps` updates.

        Multiples and steps count the search alone. A time is for the whole race, so what `finals` full
        trainings take is set aside first; `pace` is seconds per update of one worker, measured once.
        """
        if self.unit == "x":
            return self.amount
        if self.unit == "steps":
            return self.amount / steps
        assert pace is not None, "a budget in time needs a pace"
        whole = self.amount * workers / (Fraction(pace) * steps)
        if whole <= finals:
            least = math.ceil(finals * steps * pace / workers)
            raise BadInput(
                f"A budget of {float(self.amount):g} s is spent before the search begins: the {finals} "
                f"trainings of the finals alone take about {least} s. Give more time, or fewer seeds."
            )
        return whole - finals


@dataclass(frozen=True)
class Length:
    """The lengths of one candidate's full training, in applied updates."""

    steps: int
    warmup: int
    cooldown: int

    def rung(self, fraction: Fraction) -> tuple[int, int]:
        """(stop of the trunk, end of the branch) for a rung at this fraction of the full training.

        >>> Length(steps=340, warmup=17, cooldown=68).rung(Fraction(1, 4))
        (68, 85)
        """
        end = round(self.steps * fraction)
        return end - round(self.cooldown * fraction), end

    def clear(self, fraction: Fraction) -> bool:
        """Whether a cut there is well past the warmup: as far again at full rate, and a few updates at
        least.
        """
        stop, _ = self.rung(fraction)
        return stop >= max(4, 2 * self.warmup)


@dataclass(frozen=True)
class Rung:
    """One rung: its length as a fraction of the full training, and how many trials run there."""

    fraction: Fraction
    runners: int


def ladder(runners: int, first: Fraction, ratio: int, least: int) -> tuple[Rung, ...]:
    """Rungs that double in length from `first` to 1 and keep one runner of `ratio`, but never fewer than
    `least`.

    >>> [(str(rung.fraction), rung.runners) for rung in ladder(46, Fraction(1, 4), 3, 3)]
    [('1/4', 46), ('1/2', 16), ('1', 6)]
    """
    rungs = []
    while first <= 1:
        rungs.append(Rung(first, runners))
        runners = min(runners, max(least, math.ceil(Fraction(runners, ratio))))
        first *= 2
    return tuple(rungs)


def cost(rungs: Sequence[Rung], cooldown: Fraction = Fraction(1, 5)) -> Fraction:
    """What the rungs take, in full trainings.

    >>> float(cost(ladder(46, Fraction(1, 4), 3, 3)))
    19.9
    """
    total, before = Fraction(0), Fraction(0)
    for rung in rungs:
        total += rung.runners * (rung.fraction - (1 - cooldown) * before)
        before = rung.fraction
    return total


def plan(lengths: Sequence[Length], given: int, trainings: Fraction, least: int) -> tuple[Rung, ...]:
    """The ladder that a budget of full trainings buys for these candidates, in the order in which they
    matter.

    Prefers a long first rung, then a mild cut; where even the shortest and harshest is too dear, candidates
    are left out from the end, but never the first `given` ones, which a person asked for. No rung stops a
    trunk within twice its warmup.
    """
    for length in lengths:
        if not length.steps - length.cooldown > length.warmup:
            raise BadInput(
                f"A warmup of {length.warmup} of {length.steps} steps leaves nothing to judge at full rate."
            )
    firsts = [Fraction(1, 2**k) for k in range(7)]
    firsts = [first for first in firsts if first == 1 or all(length.clear(first) for length in lengths)]
    for count in range(len(lengths), max(given, 1) - 1, -1):
        for first in firsts:
            for ratio in (2, 3, 4):
                rungs = ladder(count, first, ratio, least)
                if cost(rungs) <= trainings:
                    return rungs
    needed = min(cost(ladder(max(given, 1), first, 4, least)) for first in firsts)
    enough = f"{math.ceil(needed * 10) / 10:g}x"
    raise BadInput(
        f"The budget buys {float(trainings):.3g} full trainings, but the search of {max(given, 1)} recipe(s) "
        f"takes at least {enough}: give {enough} or more."
    )
