"""Rules and links as data: what a rule is made of, and the two decorators that make one from a function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from downslope.errors import BadInput, nearest
from downslope.rules.formula import read
from downslope.rules.glossary import term
from downslope.rules.slot import Slot
from downslope.rules.value import Number

CONTEXT = ("t", "step", "lr", "effective", "gradient", "before")
"""Names a body may ask for by keyword: updates this parameter received (from 1), updates applied (from 1),
the learning rate (a rule that asks for it returns the whole step, with the rate in it), the effective step
that a proximal link scales with, the gradient as the chain received it, and the weight before the step."""

SERIES = ("beta", "eta", "step_size")
"""Arguments that are numbered: `beta1, beta2` are public as the tuple `betas`."""

Setting: TypeAlias = "Number | tuple[Any, ...] | Follows"
Numbers: TypeAlias = Mapping[str, Setting]
Kind: TypeAlias = Literal["rule", "update", "weight", "ascent"]


class Follows(Protocol):
    """Whatever a number may follow: a pure function of the step, such as a Schedule."""

    def __call__(self, step: int, /) -> float: ...

    def data(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Rule:
    """One update rule or link, written once: its body, state, numbers and source. Call it to get a part of a
    chain.

    A rule turns a gradient into a direction, p ← p - lr · direction. A link changes what passes through
    ("update"), the weight after the step ("weight"), or says where the gradient is taken a second time
    ("ascent"). `evaluation` gives the weights to evaluate and save, where they are not those that are
    trained; `estimate` takes in a gradient of another loss between steps; `search` backtracks along the step;
    `takes` says which weights; `sparse`: touches only the rows of a row-sparse gradient; `idle`: so it does
    while this number is 0, where it does nothing.
    """

    name: str
    kind: Kind
    body: Callable[..., Any]
    slots: tuple[Slot, ...]
    numbers: Numbers
    arguments: tuple[str, ...]
    context: frozenset[str]
    source: str
    rates: tuple[float, ...] = ()
    evaluation: Callable[..., Any] | None = None
    estimate: Callable[..., Any] | None = None
    search: bool = False
    takes: Literal["any", "matrix"] = "any"
    sparse: bool = False
    idle: str = ""

    def __call__(self, *positional: Setting, **numbers: Setting) -> Part:
        """A part with these numbers; positional ones go in the order of `numbers`. Schedules may stand for
        numbers.
        """
        if len(positional) > len(self.numbers):
            raise BadInput(
                f"{self.name} takes at most {len(self.numbers)} numbers ({', '.join(self.numbers)})"
            )
        given = dict(zip(self.numbers, positional, strict=False))
        for name in numbers:
            if name in given:
                raise BadInput(f"{self.name}: {name} was given twice")
        return Part(self, {**given, **numbers})

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.body) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def formula(self) -> str:
        """The rule as a paper prints it, one assignment a line; read from the body that the executors run."""
        return "\n".join(self._read[0])

    @property
    def metric(self) -> str | None:
        """What the rule multiplies a small gradient by, in words; None where it does not say, as sign rules
        do not.
        """
        return self._read[1]

    @property
    def _read(self) -> tuple[list[str], str | None]:
        return read(self.kind, self.body, self.slots, self.arguments, self.context)

    def __repr__(self) -> str:
        return f"<{'rule' if self.kind == 'rule' else 'link'} {self.name}>"


@dataclass(frozen=True)
class Part:
    """A rule or link with its numbers: one member of a chain."""

    rule: Rule
    given: Numbers = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if name not in self.rule.numbers:
                allowed = ", ".join(self.rule.numbers) or "no numbers"
                hint = nearest(name, list(self.rule.numbers))
                raise BadInput(f"{self.name} has no number {name!r}.{hint} Allowed: {allowed}.")
            check(f"{self.name}: {name}", name, value, self.rule.numbers[name], self.name)

    @property
    def name(self) -> str:
        """The name of the rule or link."""
        return self.rule.name

    @property
    def numbers(self) -> Numbers:
        """Every number, defaults filled in; tuples stay tuples, schedules stay schedules."""
        return {
            **self.rule.numbers,
            **{k: tuple(v) if isinstance(v, list) else v for k, v in self.given.items()},
        }

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.given.items())})"


def check(where: str, name: str, value: Any, default: Setting | None = None, of: str = "") -> None:
    """Refuse a number that its term, in the rule or link `of`, does not admit; a schedule is checked by the
    ends that it names.
    """
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(default):
            raise BadInput(f"{where} must be {len(default)} numbers, such as {default}; {value!r} was given.")
        for one in value:
            check(where, name, one, of=of)
    elif callable(value) and hasattr(value, "data"):
        for end, level in value.data().items():
            if end in ("peak", "end"):
                check(f"{where} (its {end})", name, level, of=of)
        for level in getattr(value, "bounds", ()):
            check(f"{where} (somewhere in its schedule)", name, level, of=of)
    elif isinstance(value, bool) or not hasattr(value, "__float__") or getattr(value, "ndim", False):
        raise BadInput(f"{where} must be a number or a schedule; {value!r} was given.")
    elif not term(name, of).admits(float(value)):
        raise BadInput(f"{where} must be {term(name, of).allowed}; {float(value):g} was given.")


def _numbers(body: Callable[..., Any]) -> tuple[dict[str, Setting], tuple[str, ...], frozenset[str]]:
    """Public numbers, arguments and context of a body."""
    numbers: dict[str, Setting] = {}
    arguments, context = [], set()
    for name, parameter in inspect.signature(body).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.default is inspect.Parameter.empty:
            if name not in CONTEXT:
                hint = nearest(name, list(CONTEXT))
                raise BadInput(
                    f"{body.__name__}: {name!r} needs a default, or is one of {', '.join(CONTEXT)}.{hint}"
                )
            context.add(name)
            continue
        arguments.append(name)
        if series := in_series(name):
            earlier = numbers.get(series[0], ())
            assert isinstance(earlier, tuple)
            numbers[series[0]] = (*earlier, parameter.default)
        else:
            numbers[name] = parameter.default
    return numbers, tuple(arguments), frozenset(context)


def in_series(argument: str) -> tuple[str, int] | None:
    """The public tuple and the place in it of a numbered argument; None for every other.

    >>> in_series("beta2"), in_series("l2")
    (('betas', 1), None)
    """
    match = re.fullmatch(r"([a-z_]+)(\d)", argument)
    return (match[1] + "s", int(match[2]) - 1) if match and match[1] in SERIES else None


def _entry(
    body: Callable[..., Any], kind: Kind, slots: tuple[str | Slot, ...], name: str, lr: Any, **rest: Any
) -> Rule:
    numbers, arguments, context = _numbers(body)
    declared = tuple(Slot(slot) if isinstance(slot, str) else slot for slot in slots)
    numbers = {"lr": lr, **numbers} if kind == "rule" else numbers
    return Rule(name or body.__name__, kind, body, declared, numbers, arguments, context, **rest)


def rule(
    *slots: str | Slot, source: str = "", lr: float = 1e-3, name: str = "", **more: Any
) -> Callable[[Callable[..., Any]], Rule]:
    """Make a rule of a pure function `(g, p, s, *, t, …)` that returns a direction, or a `Step` with its
    metric.

    `g` and `p` are gradient and weight, `s` holds the slots (reading gives the old value, assigning the new),
    keywords with a default are the rule's numbers. `lr` is the default learning rate; `rates`, a spread worth
    trying, small to large, and the other fields of `Rule` may follow by name.

    >>> import downslope as ds
    >>> @ds.rule("v", source="Polyak 1964", lr=0.01)
    ... def heavy(g, p, s, *, momentum=0.9):
    ...     "Momentum in five lines."
    ...     s.v = momentum * s.v + g
    ...     return s.v
    >>> heavy(lr=0.1)
    heavy(lr=0.1)
    """
    return lambda body: _entry(body, "rule", slots, name, lr, source=source, **more)


def link(
    *slots: str | Slot,
    source: str = "",
    after: Literal["update", "weight", "ascent"] = "update",
    name: str = "",
    **more: Any,
) -> Callable[[Callable[..., Any]], Rule]:
    """Make a link: a function of the same form that changes an update on its way, or the weight behind the
    step.

    After "update" it is `(u, p, s, *, …)` and returns the new update; after "weight" it is `(p, s, *,
    effective, …)` and returns the new weight, where `effective` is the learning rate in the metric of the
    chain's rule; after "ascent" it is `(g, p, s, *, …)` and returns the offset to the point where the
    gradient is taken a second time. Fields of `Rule` may follow by name.
    """
    return lambda body: _entry(body, after, slots, name, None, source=source, **more)
