"""A chain in a table of a strategy: read, written, put off to a later start, and what state goes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from downslope.curvature import scale_rate
from downslope.errors import BadInput, nearest, under
from downslope.optimizer import Optimizer
from downslope.rules import LINKS, RULES, Chain, Part, Rule, chain
from downslope.rules.rule import in_series
from downslope.schedule import Schedule, constant

SUMS = ("momentum", "nesterov")
"""Rules with v ← μv + g, which a steady gradient takes to g/(1 - μ)."""

MEANS = {
    **dict.fromkeys(
        ("adam", "adam_uncorrected", "adamw", "adamax", "nadam", "nadamw", "radam"), ("betas", 0)
    ),
    **dict.fromkeys(("amsgrad", "adabelief", "yogi", "lamb", "sophia"), ("betas", 0)),
    "lion": ("betas", 1),
    "signum": ("momentum", None),
}
"""Rules with m ← βm + (1 - β)g, a mean of gradients, and where their β is."""

UNCORRECTED = ("lion", "signum")
"""Those of them that take m as it is, so that it may start anywhere."""

WHOLE = (("adam", "adamw"),)
"""Rules whose whole state means the same."""

SCALES = {
    **dict.fromkeys(("sgd", "momentum", "momentum_textbook", "nesterov"), "sgd"),
    **dict.fromkeys(("adam", "adamw", "nadam", "amsgrad", "adabelief"), "adam"),
}
"""Rules of which it was checked how their rate goes with the batch: like which of `scale_rate`. What averages
squares without a correction, as rmsprop does, begins with larger steps for as many updates, however large.
"""


def rate_factor(made: Chain, batch: int, to: int) -> float:
    """What a chain's rate is multiplied by at batches of `to` items in place of `batch`.

    >>> from downslope.rules import rules
    >>> rate_factor(chain(rules()["sgd"]()), 32, 128), rate_factor(chain(rules()["adamw"]()), 32, 128)
    (4.0, 2.0)
    """
    likes = {SCALES.get(part.name) for part in made.parts if part.rule.kind == "rule"}
    like = likes.pop() if len(likes) == 1 else None
    if like is None:
        raise BadInput(
            f"it is not known how the rate of {made.name} goes with the batch size: only that of "
            f"{', '.join(SCALES)}."
        )
    return scale_rate(1.0, batch=batch, to=to, like=like).lr


def parsed(given: Any) -> Chain:
    """The chain that a list of tables as in [[chain]], a part, a rule or a chain says, every number written
    out.
    """
    if isinstance(given, Chain | Part | Rule):
        made = chain(given)
    elif isinstance(given, tuple | list) and given and all(isinstance(one, Mapping) for one in given):
        found = []
        for place, table in enumerate(given):
            with under(place):
                found.append(part_of(table))
        made = chain(*found)
    else:
        raise BadInput(f'to is a list of parts, such as [{{ part = "sgd", lr = 0.1 }}], got {given!r}.')
    rules = [part for part in made.parts if part.rule.kind == "rule"]
    owner = next((part for part in rules if "lr" in part.given), rules[0])
    for part in made.parts:
        if {**LINKS, **RULES}.get(part.name) is not part.rule:
            raise BadInput(f"to is made of the catalogue's rules and links; {part.name} is not one.")
    return _each(made, lambda _, value: value, lambda part, key: key != "lr" or part is owner)


def tables(made: Chain) -> list[dict[str, Any]]:
    """A chain as plain data, which `parsed` reads."""
    return [{"part": part.name, **{k: _plain(v) for k, v in part.given.items()}} for part in made.parts]


def staged(made: Chain, at: int, factor: float, rewarm: int, rates: Mapping[str, int | None]) -> Chain:
    """The chain for the updates from `at` on: its schedules count from there, and durations of a whole are
    of what `rates` say is left. The rate is multiplied by `factor`, and rises to it over `rewarm` updates.
    """

    def later(key: str, value: Any) -> Any:
        if key == "lr":
            value = value.scaled(factor) if isinstance(value, Schedule) else value * factor
            if rewarm:
                level = value if isinstance(value, Schedule) else constant(value)
                value = level * constant(1.0, warmup=rewarm)
        if not isinstance(value, Schedule):
            return value
        plan = value.resolve(**rates)
        return constant(plan.peak).then(plan, at=at)

    return _each(made, later)


def changed(made: Chain, numbers: Mapping[str, Any]) -> Chain:
    """The chain with these numbers, named as in its param groups."""
    parts = []
    for part, keys in zip(made.parts, made.keys, strict=True):
        own = {
            key: series[0] if (series := in_series(argument)) else argument
            for argument, (key, _) in keys.items()
        }
        own |= {"lr": "lr"} if "lr" in part.given else {}
        new = {own[key]: value for key, value in numbers.items() if key in own}
        parts.append(Part(part.rule, MappingProxyType({**part.given, **new})))
    return chain(*parts)


def numbers_of(made: Chain) -> Iterator[Any]:
    """Every number of a chain."""
    for part in made.parts:
        for value in part.numbers.values():
            yield from value if isinstance(value, tuple) else (value,)


def chain_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Chain:
    """The chain of a param group."""
    made = optimizer.chain
    return made if isinstance(made, Chain) else made.of(group.get("role"))


def carried(optimizer: Optimizer, new: Chain) -> dict[Tensor, dict[str, Tensor]]:
    """What of an optimizer's state goes on under a new chain, by parameter and slot.

    The whole state, `t` too, from a rule to itself and between adam and adamw. Else the mean gradient that
    the old momentum holds: m/(1 - βᵗ) of an adam, (1 - μ)v of a heavy ball; it becomes v = mean/(1 - μ) of
    momentum and nesterov and m of lion and signum. A new adam begins at 0, since its correction counts from
    there. A link that stands in both goes on. Nothing goes over where a chain has two rules.
    """
    found = {}
    for group in optimizer.param_groups:
        old = chain_of(optimizer, group)
        for parameter in group["params"]:
            if parameter in optimizer.state:
                found[parameter] = _carried(old, new, group, optimizer.state[parameter])
    return found


def _carried(
    old: Chain, new: Chain, group: Mapping[str, Any], slots: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    mine, theirs = _owners(old), _owners(new)
    same = {public: slots[mine[key]] for key, public in theirs.items() if key in mine and key[0] not in RULES}
    before, after = _only_rule(old), _only_rule(new)
    if before is None or after is None:
        return same
    if before.name == after.name or any({before.name, after.name} <= {*family} for family in WHOLE):
        whole = {
            public: slots[mine[before.name, key[1]]] for key, public in theirs.items() if key[0] in RULES
        }
        return {**same, **whole, "t": slots["t"]}
    mean = _mean(before, old, group, slots, mine)
    if mean is None:
        return same
    if after.name in SUMS:
        return {**same, theirs[after.name, "v"]: mean / (1 - _start(after.numbers["momentum"]))}
    return {**same, theirs[after.name, "m"]: mean} if after.name in UNCORRECTED else same


def _mean(
    rule: Part, of: Chain, group: Mapping[str, Any], slots: Mapping[str, Tensor], public: Mapping[Any, str]
) -> Tensor | None:
    """The mean gradient that a rule's momentum holds; None if it holds none."""
    place = of.parts.index(rule)
    keys = {
        argument: group[key] if i is None else group[key][i] for argument, (key, i) in of.keys[place].items()
    }
    if rule.name in SUMS:
        return slots[public[rule.name, "v"]] * (1 - float(keys["momentum"]))
    if rule.name not in MEANS or not int(slots["t"]):
        return None
    number, index = MEANS[rule.name]
    beta = float(keys[number if index is None else f"beta{index + 1}"])
    return slots[public[rule.name, "m"]] / (1 - beta ** int(slots["t"]))


def _owners(made: Chain) -> dict[tuple[str, str], str]:
    """The public name of each slot, by the part that keeps it and what that calls it; twins are left out."""
    names = [part.name for part in made.parts]
    return {
        (made.parts[place].name, slot.name): public
        for public, (place, slot) in made.slots.items()
        if names.count(made.parts[place].name) == 1
    }


def _only_rule(made: Chain) -> Part | None:
    rules = [part for part in made.parts if part.rule.kind == "rule"]
    return rules[0] if len(rules) == 1 else None


def _start(value: Any) -> float:
    return float(value(0) if isinstance(value, Schedule) else value)


def _each(
    made: Chain,
    change: Callable[[str, Any], Any],
    keep: Callable[[Part, str], bool] = lambda part, key: key != "lr" or "lr" in part.given,
) -> Chain:
    """The chain with every number changed, but for those that are left out."""

    def each(key: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(each(key, one) for one in value)
        return change(key, value if isinstance(value, Schedule) else float(value) + 0.0)  # and not -0.0

    parts = []
    for part in made.parts:
        numbers = {key: each(key, value) for key, value in part.numbers.items() if keep(part, key)}
        parts.append(Part(part.rule, MappingProxyType(numbers)))
    return chain(*parts)


def part_of(table: Mapping[str, Any]) -> Part:
    """The part of a chain that a table describes; BadInput, with its key, for what it does not have."""
    name, known = table.get("part"), {**LINKS, **RULES}
    if not isinstance(name, str) or name not in known:
        hint = nearest(str(name), list(known))
        raise BadInput(f"unknown part {name!r}.{hint} Allowed: {', '.join(known)}.", key=("part",))
    numbers = {}
    for key, value in table.items():
        if key != "part":
            with under(key):
                numbers[key] = number_of(value)
                Part(known[name], {key: numbers[key]})
    return Part(known[name], MappingProxyType(numbers))


def number_of(value: Any) -> Any:
    """A number of a part as data writes it, with tables read as schedules and lists as tuples."""
    if isinstance(value, Mapping):
        return Schedule.from_data(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise BadInput("a whole number of more than 64 bits.")
    return tuple(number_of(one) for one in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.data() if isinstance(value, Schedule) else value
