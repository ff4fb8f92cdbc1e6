"""Who races: a grid of recipes that a practitioner would try, the recipes that the user brings, and the
baseline.

The grid is ordered by importance: the middle of each rule's own scale first, then outward; where a budget has
no room for all, the end of the grid stays out and every rule is still there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from downslope.errors import BadInput, nearest
from downslope.race.record import Trial
from downslope.recipe import Recipe
from downslope.rules import Part, chain, links, rules
from downslope.schedule import Schedule, constant, in_steps, wsd
from downslope.tasks import Task
from downslope.train.order import measures

RULES = ("adamw", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "lion")
WARMUP, COOLDOWN = "5 %", "20 %"
UNDECAYED = ("norm", "bias", "scale")
BASELINE = "AdamW, default"


@dataclass(frozen=True)
class Candidate:
    """A recipe with the name it races under, and its family, the best of which goes to the finals first."""

    name: str
    family: str
    origin: str
    recipe: Recipe


def grid(like: Recipe, names: Iterable[str] = RULES) -> list[Candidate]:
    """Each rule at each of its `rates`, the middle first; steps and batch size are those of `like`.

    All warm up for 5 % of the run, hold, and cool down over the last 20 %. Behind the rates come the decays
    and penalties that people use with a rule. A proximal penalty of `like` is part of the problem: every
    candidate keeps it, and a rule that cannot take it does not race. Errors: BadInput for an unknown rule, or
    one without rates, or if none is left.
    """
    ordered = {name: _outward(_rates(name)) for name in names if _takes(name, _penalties(like))}
    if not ordered and (kept := _penalties(like)):
        raise BadInput(
            f"None of the rules takes the recipe's {kept[0].name}: add one with an effective step."
        )
    found = []
    for place in range(max(map(len, ordered.values()), default=0)):
        for name, rates in ordered.items():
            found += [_of_grid(like, name, rate) for rate in rates[place : place + 1]]
        found += [_of_grid(like, *variant) for variant in VARIANTS.get(place, ()) if variant[0] in ordered]
    return found


VARIANTS: Mapping[int, Sequence[tuple[str, float, str, float]]] = {
    1: (("adamw", 3e-3, "decay", 0.1), ("nesterov", 0.03, "l2", 5e-4), ("lion", 3e-4, "decay", 1.0)),
    2: (("adamw", 1e-3, "decay", 0.1), ("momentum", 0.03, "l2", 5e-4), ("adam", 3e-3, "clip", 1.0)),
}
"""Behind the rates of the same place: rule, rate, what is added, how much of it."""


def _of_grid(like: Recipe, name: str, rate: float, extra: str = "", amount: float = 0.0) -> Candidate:
    numbers: dict[str, Any] = {"lr": wsd(rate, steps="100 %", warmup=WARMUP, cooldown=COOLDOWN)}
    if extra == "decay":
        numbers["weight_decay"] = amount
    link = {"l2": "l2", "clip": "clip_norm"}.get(extra)
    made = chain(*([links()[link](amount)] if link else []), rules()[name](**numbers), *_penalties(like))
    shrinking = [number for number in ("weight_decay", "l2") if made.defaults.get(number)]
    roles = _penalised(like)
    for role in UNDECAYED if shrinking else ():
        roles[role] = {**roles.get(role, {}), **dict.fromkeys(shrinking, 0.0)}
    title = f"{name} {rate:g}" + (f" {extra} {amount:g}" if extra else "")
    return Candidate(title, name, "grid", replace(like, chain=made, roles=roles, guard=True))


def _penalties(like: Recipe) -> list[Part]:
    return [part for part in like.chain.parts if "effective" in part.rule.context]


def _penalised(like: Recipe) -> dict[str, dict[str, Any]]:
    """What the recipe's roles say of its penalties."""
    keys = {key for part in _penalties(like) for key in part.rule.numbers}
    kept = {role: {k: v for k, v in numbers.items() if k in keys} for role, numbers in like.roles.items()}
    return {role: numbers for role, numbers in kept.items() if numbers}


def _takes(name: str, penalties: Sequence[Part]) -> bool:
    if name not in rules():
        return True  # refused where its rates are looked up
    try:
        chain(rules()[name](), *penalties)
    except BadInput:
        return False
    return True


def _rates(name: str) -> tuple[float, ...]:
    known = rules()
    if name not in known:
        raise BadInput(f"There is no rule {name!r}.{nearest(name, known)} There are: {', '.join(known)}.")
    if not known[name].rates:
        raise BadInput(f"The rule {name!r} does not say which learning rates are worth trying.")
    return known[name].rates


def _outward(rates: Sequence[float]) -> list[float]:
    """The middle, then its neighbours, upper first, then theirs.

    >>> _outward([1, 2, 3, 4, 5])
    [3, 4, 2, 5, 1]
    """
    middle = len(rates) // 2
    places = sorted(range(len(rates)), key=lambda place: (abs(place - middle), -place))
    return [rates[place] for place in places]


def baseline(like: Recipe) -> Candidate:
    """AdamW as it comes, with the problem's own penalties: its default rate and decay, held constant. What
    every winner is measured against.
    """
    made = chain(rules()["adamw"](), *_penalties(like))
    recipe = replace(like, chain=made, roles=_penalised(like), guard=True)
    _check_fair("The task's recipe", recipe)
    return Candidate(BASELINE, BASELINE, "baseline", recipe)


def brought(recipes: Mapping[str, Recipe | str | os.PathLike[str]]) -> list[Candidate]:
    """The user's recipes, or files of recipes, by name. Errors: BadInput."""
    found = []
    for name, given in recipes.items():
        if not isinstance(name, str) or not name.strip() or len(name) > 80 or not name.isprintable():
            raise BadInput(f"A recipe's name is 1 to 80 printable characters, got {name!r}.")
        recipe = given if isinstance(given, Recipe) else Recipe.load(given)
        _check_fair(f"The recipe {name!r}", recipe)
        if any("lr" in numbers for numbers in recipe.roles.values()):
            raise BadInput(
                f"The recipe {name!r} gives a role a learning rate of its own: a race cools down one rate "
                "for all; take lr out of its roles."
            )
        found.append(Candidate(name, name, "given", recipe))
    return found


def _check_fair(which: str, recipe: Recipe) -> None:
    """BadInput, with the reason, for a strategy that a race cannot judge."""
    for strategy in recipe.strategies.values():
        if strategy.unfair:
            raise BadInput(
                f"{which} has [{strategy.name}], which a race cannot judge: {strategy.unfair}. Race without "
                "it, and train the winner with it."
            )


def trials(candidates: Iterable[Candidate], task: Task) -> list[Trial]:
    """One trial for each distinct recipe, numbered in order; equal recipes share a trial under all their
    names. From the task's data epochs and tokens become steps.
    """
    found: dict[str, Trial] = {}
    for one in candidates:
        digest = one.recipe.hash
        if earlier := found.get(digest):
            found[digest] = replace(earlier, names=(*earlier.names, one.name))
        else:
            found[digest] = _trial(one, task, len(found))
    names = [name for trial in found.values() for name in trial.names]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"Two recipes are called {name!r}: give one of them another name.")
    return list(found.values())


def _trial(one: Candidate, task: Task, number: int) -> Trial:
    recipe = one.recipe
    known = measures(task, recipe.batch_size)
    steps = recipe.run_steps(**known)
    rate = recipe.chain.lr
    shape: dict[str, Any] = {"peak": rate}
    if isinstance(rate, Schedule):
        resolved = rate.resolve(**recipe.rates(**known))
        while resolved.kind == "branch":  # it is judged by what it branches off
            resolved = resolved.parts[0]
        shape = {"peak": resolved.peak, **dict(resolved.numbers)}
        if resolved.kind != "wsd":  # a plateau's counts observations
            shape.pop("cooldown", None)
    trunk = constant(shape["peak"], shape.get("warmup", 0))
    return Trial(
        trial=number,
        names=(one.name,),
        rule=next(part.name for part in recipe.chain.parts if part.rule.kind == "rule"),
        lr=float(shape["peak"]),
        family=one.family,
        origin=one.origin,
        steps=steps,
        warmup=shape.get("warmup", 0),
        cooldown=in_steps(shape.get("cooldown", COOLDOWN), run_steps=steps),
        end=shape.get("end", 0.0),
        trunk=trunk.data(),
        recipe=recipe.text(),
        hash=recipe.hash,
    )
