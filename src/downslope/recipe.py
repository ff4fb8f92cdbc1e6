"""Recipe: every optimisation choice of one training, as plain data in one TOML file.

What is left out of the file takes the package's default, and `text()` writes every number out: a saved recipe
means the same when a default changes. Two recipes are equal, and have one hash, when they say the same,
however they are written.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import nn

from downslope import toml
from downslope.errors import BadInput, nearest, under
from downslope.folder import read_file, write_file
from downslope.groups import ROLES, groups
from downslope.optimizer import Optimizer
from downslope.rules import LINKS, RULES, Chain, Part, Route, Rule, chain
from downslope.rules.route import REST
from downslope.rules.rule import check
from downslope.schedule import Duration, Schedule, duration, in_steps
from downslope.state import plain_name
from downslope.strategies import STRATEGIES, Pace, Rates, Strategy
from downslope.strategies.chain import changed, number_of, part_of, rate_factor, tables
from downslope.strategies.strategy import plain
from downslope.toml import Differences, differences, pairs, written

CATALOGUE = {**LINKS, **RULES}


@dataclass(frozen=True, eq=False)
class Recipe:
    """Every optimisation choice of one training; frozen, equal by content, hashable. Raises BadInput.

    `steps`: length of the training, applied updates or "20 epochs", "64000 samples", "2e6 tokens".
    `batch_size`: items per update. `route`: chains of their own for the parameters of a role (see
    `ds.groups`); `roles`: numbers overridden for a role. `guard`: skip updates whose gradients are not
    finite. `strategies`: what is chosen beyond the rule, by name or as a list (see `ds.strategies`);
    `observe`: how often those that react, and schedules such as plateau, see a validation. `players`: for
    players of a task with several (`ds.Player`), a chain, or a Recipe for roles and guard; without one they
    take this. A percentage is of the training.

    >>> import downslope as ds
    >>> rate = ds.cosine(3e-4, steps="100 %", warmup="5 %")
    >>> recipe = ds.Recipe(ds.chain(ds.adamw(lr=rate)), "20 epochs", 64, roles={"norm": {"weight_decay": 0}})
    >>> ds.Recipe.parse(recipe.text()) == recipe
    True
    """

    chain: Chain  # or, to begin with, a part, a rule or a route
    steps: Duration
    batch_size: int
    roles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guard: bool = True
    route: Mapping[str, Chain] = field(default_factory=dict)
    strategies: Mapping[str, Strategy] = field(default_factory=dict)  # or, to begin with, a list of them
    observe: Duration = "1 epoch"
    players: Mapping[str, "Recipe"] = field(default_factory=dict)  # or, to begin with, their chains

    def __post_init__(self) -> None:
        if isinstance(self.chain, Route):
            self._set("route", {**self.chain.chains, **self.route})
            self._set("chain", self.route.pop(REST, None) or self.chain.of(REST))  # type: ignore[attr-defined]
        with under("chain"):
            self._set("chain", _whole(self.chain))
        with under("steps"):
            self._set("steps", _length(self.steps))
        with under("batch_size"):
            if type(self.batch_size) is not int or not 1 <= self.batch_size <= 2**31:
                raise BadInput(f"batch_size must be a whole number from 1, got {self.batch_size!r}.")
        with under("guard"):
            if type(self.guard) is not bool:
                raise BadInput(f"guard must be true or false, got {self.guard!r}.")
        with under("route"):
            self._set("route", _routed(self.route))
        with under("roles"):
            self._set("roles", _overrides(self.roles, Route({**self.route, REST: self.chain})))
        self._set("strategies", _company(self.strategies))
        with under("observe"):
            self._set("observe", _length(self.observe))
        with under("player"):
            players = {name: self._player(name, given) for name, given in self.players.items()}
            self._set("players", MappingProxyType(players))
        for strategy in self.strategies.values():
            strategy.suit(self.data())

    def _player(self, name: str, given: Any) -> "Recipe":
        """What a player has of its own: a recipe of this one's length and batch."""
        with under(name):
            if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
                raise BadInput(f"a player is called as its submodule is, in plain letters, got {name!r}.")
            if isinstance(given, Recipe):
                if given.strategies or given.players:
                    raise BadInput(
                        "strategies and players belong to the recipe itself, not to a player's part."
                    )
                return replace(given, steps=self.steps, batch_size=self.batch_size, observe=self.observe)
            return Recipe(given, self.steps, self.batch_size, guard=self.guard, observe=self.observe)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The recipe in a TOML file of at most 1 MB. BadInput is "file:line: what is wrong"."""
        data = read_file(path, limit=toml.LARGEST)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise BadInput(f"{path}:{line}: not TOML: the text is not UTF-8.") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str = "recipe.toml") -> Self:
        """The recipe in a TOML text; `name` stands for the file in errors.

        >>> import downslope as ds
        >>> ds.Recipe.parse("batchsize = 64", "mine.toml")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        downslope.errors.BadInput: mine.toml:1: unknown key 'batchsize'. Did you mean 'batch_size'? ...
        """
        found = toml.parse(text, name)
        try:
            return cls.from_data(found.data)
        except BadInput as error:
            sentence = str(error)
            short = sentence if len(sentence) <= 400 else f"{sentence[:400]} …"
            raise BadInput(f"{name}:{found.line(error.key)}: {short}", key=error.key) from None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The recipe that plain data such as `data()` describes, strictly."""
        shape = _shape(data)
        with under("chain"):
            made = _parts(shape.chain)
        routed = {}
        for role, parts in shape.route.items():
            with under("route", role):
                routed[role] = _parts(parts)
        roles = {}
        for role, numbers in shape.roles.items():
            with under("roles", role):
                roles[role] = _numbers(numbers)
        strategies = {}
        for name, kind in STRATEGIES.items():
            if (table := getattr(shape, name)) is not None:
                with under(name):
                    strategies[name] = kind.from_data(table)
        players = {}
        for name, table in shape.player.items():
            with under("player", name):
                players[name] = cls.from_data(_inherited(data, table))
        more = {} if shape.observe is None else {"observe": shape.observe}
        made_of = (made, shape.steps, shape.batch_size, roles, shape.guard, routed, strategies)
        return cls(*made_of, players=players, **more)

    def data(self) -> dict[str, Any]:
        """The recipe as plain JSON or TOML data, with every number written out; `from_data` reads it back."""
        routed = {role: tables(made) for role, made in self.route.items()}
        players = {name: made._part_data() for name, made in self.players.items()}
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "guard": self.guard,
            "chain": tables(self.chain),
            **({"route": routed} if routed else {}),
            "roles": {role: plain(numbers) for role, numbers in self.roles.items()},
            **({"observe": self.observe} if self.observe != "1 epoch" else {}),
            **({"player": players} if players else {}),
            **{name: strategy.data() for name, strategy in self.strategies.items()},
        }

    def _part_data(self) -> dict[str, Any]:
        """A player's part as plain data."""
        return {key: value for key, value in self.data().items() if key in _OWN and value != {}}

    def text(self) -> str:
        """The recipe as TOML, every number written out; `parse` reads it back to an equal recipe."""
        data = self.data()
        first = ("steps", "batch_size", "guard", "observe")
        lines = [f"{key} = {written(data[key])}" for key in first if key in data]
        lines += _sections(data)
        for name, own in data.get("player", {}).items():
            lines += [
                "",
                f"[player.{name}]",
                *pairs({"guard": own["guard"]}),
                *_sections(own, f"player.{name}."),
            ]
        for name in self.strategies:
            lines += ["", f"[{name}]", *pairs(data[name])]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `text()` to a file, whole or not at all."""
        write_file(path, self.text().encode())

    @property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of what the recipe says, however its file is spelt and ordered."""
        text = json.dumps(self.data(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def diff(self, other: "Recipe") -> Differences:
        """What differs, as (key, mine, theirs); prints one difference a line.

        >>> import downslope as ds
        >>> recipe = ds.Recipe(ds.chain(ds.adamw(lr=1e-3)), steps=100, batch_size=64)
        >>> print(recipe.diff(recipe.with_(lr=3e-3, steps=200)))
        steps: 100 → 200
        adamw.lr: 0.001 → 0.003
        """
        return Differences(differences("", self._outline(), other._outline()))

    def with_(self, **changes: Any) -> "Recipe":
        """The same recipe but for these fields (`steps`, …) or numbers of its chain (`lr`, …)."""
        own = [item.name for item in fields(self)]
        made = replace(self, **{name: value for name, value in changes.items() if name in own})
        numbers = {name: value for name, value in changes.items() if name not in own}
        for name in numbers:
            if name not in made.chain.defaults:
                raise BadInput(_unknown(name, [*own, *made.chain.defaults]))
        return replace(made, chain=changed(made.chain, numbers)) if numbers else made

    def with_batch(self, size: int) -> "Recipe":
        """The same recipe at another batch size, each rate moved by its rule: times the ratio of the two for
        sgd and momentum, its square root for those like adam. BadInput for rules of which neither is known.

        Else nothing moves: lengths in steps then see other amounts of data, and adam's decay less of each
        pass. Both rules hold while noise outweighs the gradient (see `ds.scale_rate`).

        >>> import downslope as ds
        >>> recipe = ds.Recipe(ds.adamw(lr=1e-3), "20 epochs", batch_size=32)
        >>> print(recipe.diff(recipe.with_batch(128)))
        batch_size: 32 → 128
        adamw.lr: 0.001 → 0.002
        """
        made = replace(self, batch_size=size)

        def moved(of: Chain, rate: Any) -> Any:
            return rate * rate_factor(of, self.batch_size, size)

        chains = {REST: self.chain, **self.route}
        faster = {role: changed(of, {"lr": moved(of, of.defaults["lr"])}) for role, of in chains.items()}
        roles = {
            role: {
                key: moved(chains.get(role, self.chain), n) if key == "lr" else n for key, n in own.items()
            }
            for role, own in self.roles.items()
        }
        players = {name: part.with_batch(size) for name, part in self.players.items()}
        return replace(made, chain=faster.pop(REST), route=faster, roles=roles, players=players)

    def run_steps(self, steps_per_epoch: int | None = None, tokens_per_sample: int | None = None) -> int:
        """The length of the training in applied updates. `steps_per_epoch`: batches of an epoch, for a length
        in those; `tokens_per_sample`: for one in tokens. Both are lengths of the data: where updates take
        several batches, they hold fewer.
        """
        if isinstance(self.steps, int):
            return self.steps
        data = (steps_per_epoch, tokens_per_sample)
        return max(1, self.pace(*data).updates(in_steps(self.steps, "steps", **self.per_batch(*data))))

    def per_batch(self, steps_per_epoch: int | None = None, tokens_per_sample: int | None = None) -> Rates:
        """What durations of the data need to become batches of it: batches of an epoch, items, tokens."""
        tokens = tokens_per_sample and self.batch_size * tokens_per_sample
        return {"steps_per_epoch": steps_per_epoch, "batch_size": self.batch_size, "tokens_per_step": tokens}

    def pace(self, steps_per_epoch: int | None = None, tokens_per_sample: int | None = None) -> Pace:
        """How many batches each update takes: one, unless [growth] says otherwise."""
        batch = self.per_batch(steps_per_epoch, tokens_per_sample)
        told = (strategy.pace(self.steps, batch) for strategy in self.strategies.values())
        return next((pace for pace in told if pace is not None), Pace())

    def rates(
        self,
        steps_per_epoch: int | None = None,
        steps: int | None = None,
        tokens_per_sample: int | None = None,
    ) -> Rates:
        """What durations need: updates of the run (`steps`, if given) and of an epoch, items and tokens of an
        update. All but the first are None where updates differ, by [growth].
        """
        data = (steps_per_epoch, tokens_per_sample)
        run = self.run_steps(*data) if steps is None else steps
        return {"run_steps": run, **self.pace(*data).rates(self.per_batch(*data))}

    def build(
        self,
        model: nn.Module,
        steps: int | None = None,
        steps_per_epoch: int | None = None,
        tokens_per_sample: int | None = None,
    ) -> Optimizer:
        """The optimizer of this recipe for a model: a group per role with its own chain or numbers.

        `steps`: length of the training in applied updates, if not the recipe's; `steps_per_epoch`: batches of
        one, needed where a length is given in epochs; `tokens_per_sample`: where one is in tokens.

        >>> import downslope as ds, torch
        >>> recipe = ds.Recipe(ds.chain(ds.adamw(lr=ds.linear(1e-3, steps="100 %"))), "5 epochs", 64)
        >>> recipe.build(torch.nn.Linear(3, 1), steps_per_epoch=20).param_groups[0]["lr"]
        0.001
        """
        rates = self.rates(steps_per_epoch, steps, tokens_per_sample)
        named, slower = groups(model), self._multipliers(model)
        members: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = {(REST, 1.0): []}
        for name, parameter in model.named_parameters():
            role = named.role(name) if named.role(name) in {*self.roles, *self.route} else REST
            key = (role, slower.get(plain_name(name), 1.0))
            members.setdefault(key, []).append((plain_name(name), parameter))
        listed = []
        for (role, times), held in members.items():
            numbers = dict(self.roles.get(role, {}))
            if times != 1.0:
                rate = numbers.get("lr", self.route.get(role, self.chain).defaults["lr"])
                numbers["lr"] = rate.scaled(times) if isinstance(rate, Schedule) else rate * times
            if held:
                listed.append({"params": held, "role": role, **_resolved(numbers, rates)})
        chains = {**self.route, REST: self.chain}
        resolved = {role: changed(made, _resolved(made.defaults, rates)) for role, made in chains.items()}
        return Optimizer(listed, Route(resolved), guard=self.guard, model=model)

    def _multipliers(self, model: nn.Module) -> dict[str, float]:
        """Of the learning rate, by parameter name."""
        found: dict[str, float] = {}
        for strategy in self.strategies.values():
            for name, value in strategy.multipliers(model).items():
                found[name] = found.get(name, 1.0) * value
        return found

    def _outline(self) -> dict[str, Any]:
        """The recipe's data with the parts of its chain by name."""
        data: dict[str, Any] = {**self.data(), "chain": self.chain.name}
        roles, _ = data.pop("roles"), data.pop("route", None)
        data |= _named_parts(self.chain, data)
        routed = {role: {"chain": made.name, **_named_parts(made)} for role, made in self.route.items()}
        if self.players:
            data["player"] = {
                name: {
                    key: value for key, value in made._outline().items() if key not in ("steps", "batch_size")
                }
                for name, made in self.players.items()
            }
        return {**data, **({"route": routed} if routed else {}), "roles": roles}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.data() == other.data()

    def __hash__(self) -> int:
        return hash(self.hash)


class _Plain(BaseModel):
    """What a file must look like before anything in it is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)

    steps: Any = Field(examples=['steps = "20 epochs"'])
    batch_size: Any = Field(examples=["batch_size = 64"])
    guard: Any = True
    chain: list[dict[str, Any]] = Field(min_length=1, examples=['a table [[chain]] with part = "adamw"'])
    route: dict[str, list[dict[str, Any]]] = {}
    roles: dict[str, dict[str, Any]] = {}
    player: dict[str, dict[str, Any]] = {}
    observe: Any = None


_TABLES: dict[str, Any] = dict.fromkeys(STRATEGIES, (dict[str, Any] | None, None))
_Shape = create_model("_Shape", __base__=_Plain, **_TABLES)
"""The same with a table a strategy."""


def _shape(data: Mapping[str, Any]) -> Any:
    try:
        return _Shape.model_validate(data)
    except ValidationError as error:
        # A misspelt key is unknown and missing at once: the first is the better thing to say.
        worst = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        name = str(worst["loc"][0]) if worst["loc"] else ""
        known = _Shape.model_fields.get(name)
        if worst["type"] == "extra_forbidden":
            said = _unknown(name, _Shape.model_fields)
        elif worst["type"] == "missing" and known and known.examples:
            said = f"a recipe needs {name!r}, such as {known.examples[0]}."
        else:
            said = f"{name}: {worst['msg'][:1].lower()}{worst['msg'][1:]}, got {worst['input']!r}."
        raise BadInput(said, key=worst["loc"]) from None


_OWN = ("guard", "chain", "route", "roles")
"""What a player may have of its own."""


def _inherited(data: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A player's table with what it leaves out from the recipe; a chain of its own brings its own roles."""
    for key in own:
        if key not in _OWN:
            raise BadInput(_unknown(key, _OWN), key=(key,))
    shared = ("steps", "batch_size", "guard", *(() if "chain" in own else _OWN))
    return {**{key: data[key] for key in shared if key in data}, **own}


def _unknown(name: str, allowed: Iterable[str], what: str = "key") -> str:
    names = list(allowed)
    return f"unknown {what} {name!r}.{nearest(name, names)} Allowed: {', '.join(names)}."


def _parts(listed: Sequence[Mapping[str, Any]]) -> Chain:
    """The chain that a list of tables describes."""
    parts = []
    for place, numbers in enumerate(listed):
        with under(place):
            parts.append(part_of(numbers))
    with under(0):
        return chain(*parts)


def _named_parts(made: Chain, beside: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The numbers of the parts of a chain by name; twins are counted."""
    found: dict[str, Any] = {}
    for part in made.parts:
        twins = sum(key == part.name or key.startswith(f"{part.name}#") for key in [*beside, *found])
        found[f"{part.name}#{twins + 1}" if twins else part.name] = plain(part.given)
    return found


def _company(given: Any) -> Mapping[str, Strategy]:
    """Strategies by name, in the catalogue's order, none twice, all of them getting on with each other."""
    listed = list(given.values()) if isinstance(given, Mapping) else list(given)
    found: dict[str, Strategy] = {}
    for one in listed:
        if not isinstance(one, Strategy):
            raise BadInput(f"a strategy is one of {', '.join(STRATEGIES)} of ds.strategies, got {one!r}.")
        if one.name in found:
            raise BadInput(f"{one.name} stands twice; a recipe has one of each.")
        found[one.name] = one
    for name, one in found.items():
        with under(name):
            one.refuse({other: held for other, held in found.items() if other != name})
    return MappingProxyType({name: found[name] for name in STRATEGIES if name in found})


def _routed(given: Mapping[str, Any]) -> Mapping[str, Chain]:
    """The chains of a route, with every number written out."""
    found = {}
    for role, made in given.items():
        with under(role):
            if role not in ROLES:
                raise BadInput(_unknown(role, ROLES, "role"))
            found[role] = _whole(made)
    return MappingProxyType(found)


def _numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as data writes them, with tables read as schedules."""
    found = {}
    for key, value in table.items():
        with under(key):
            found[key] = number_of(value)
    return found


def _whole(given: Chain | Part | Rule) -> Chain:
    """The chain with every number written out, as only the catalogue's parts can be."""
    made = chain(given)
    if isinstance(given, Chain) and given.renamed:
        raise BadInput("the numbers of a recipe's chain have the catalogue's names; this chain renames some.")
    rules = [place for place, part in enumerate(made.parts) if part.rule.kind == "rule"]
    owner = next((place for place in rules if "lr" in made.parts[place].given), rules[0])
    parts = []
    for place, part in enumerate(made.parts):
        with under(place):
            if CATALOGUE.get(part.name) is not part.rule:
                raise BadInput(
                    f"a recipe is made of the catalogue's rules and links; {part.name} is not one."
                )
            numbers = {key: value for key, value in part.numbers.items() if key != "lr" or place == owner}
            parts.append(
                Part(
                    part.rule,
                    MappingProxyType(_settled(numbers, part.rule.numbers, partial(_named, part.name))),
                )
            )
    whole = chain(*parts)
    _ = whole.keys  # refuses a part that stands twice with numbers of one name
    return whole


def _named(part: str, key: str) -> tuple[str, str]:
    return part, key


def _settled(
    numbers: Mapping[str, Any], defaults: Mapping[str, Any], owner: Callable[[str], tuple[str, str]]
) -> dict[str, Any]:
    """Checked, and in one form: floats, tuples of floats, schedules; `owner` tells whose number a key is."""
    found = {}
    for key, value in numbers.items():
        with under(key):
            if key not in defaults:
                raise BadInput(_unknown(key, defaults, "number"))
            of, name = owner(key)
            check(key, name, value, defaults[key], of)
            found[key] = _one_form(key, value)
    return found


def _one_form(key: str, value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_one_form(key, one) for one in value)
    return value if isinstance(value, Schedule) else float(value) + 0.0  # and not -0.0


def _overrides(roles: Mapping[str, Mapping[str, Any]], routed: Route) -> Mapping[str, Mapping[str, Any]]:
    found = {}
    for role, numbers in roles.items():
        with under(role):
            if role not in ROLES:
                raise BadInput(_unknown(role, ROLES, "role"))
            made = routed.of(role)
            if settled := _settled(numbers, made.defaults, made.owner):
                found[role] = MappingProxyType(settled)
    return MappingProxyType(found)


def _length(value: object) -> Duration:
    steps = duration(value)
    if steps == 0 or str(steps).endswith("%"):
        raise BadInput(
            f'steps of a training are a whole number from 1, or such as "20 epochs", got {value!r}.'
        )
    return steps


def _resolved(numbers: Mapping[str, Any], rates: Mapping[str, int | None]) -> dict[str, Any]:
    def resolved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(resolved(one) for one in value)
        return value.resolve(**rates) if isinstance(value, Schedule) else value

    return {key: resolved(value) for key, value in numbers.items()}


def _sections(data: Mapping[str, Any], before: str = "") -> list[str]:
    """Chain, route and roles as TOML, in tables whose names begin with `before`."""
    chains = {"chain": data["chain"], **{f"route.{k}": v for k, v in data.get("route", {}).items()}}
    lines = []
    for name, parts in chains.items():
        for numbers in parts:
            lines += ["", f"[[{before}{name}]]", *pairs(numbers)]
    for role, numbers in data.get("roles", {}).items():
        lines += ["", f"[{before}roles.{role}]", *pairs(numbers)]
    return lines
