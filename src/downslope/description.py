"""What there is, described: rules, links, schedules, strategies, tools, tasks; as data, and as text."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from textwrap import indent
from typing import Any

from downslope import curvature, init, norm
from downslope.augment import (
    EarlyStopping,
    Mix,
    cutmix,
    mixup,
    set_dropout,
    smoothed_cross_entropy,
    soft_targets,
    stochastic_depth,
)
from downslope.average import Average, ema, polynomial_average, swa, tail
from downslope.distill import Teacher, Teachers, TopK, born_again, distill, exits, mutual
from downslope.errors import BadInput, nearest
from downslope.groups import (
    discriminative,
    freeze,
    gradual_unfreeze,
    groups,
    layer_decay,
    layers,
    no_decay,
    param_groups,
    roster,
)
from downslope.rules import Rule, links, rules
from downslope.rules.glossary import term
from downslope.schedule import FORMS, KINDS, Schedule, example
from downslope.schedule import term as term_of
from downslope.strategies import STRATEGIES, Strategy
from downslope.strategies.field import word
from downslope.strategies.glossary import TOOLS, meaning
from downslope.tasks import Player, Task, size, task, tasks
from downslope.train import Batches, Checkpoints, Sampler, Seeded, TrainState, keep_generators, verify_resume

_OF_PAGES: Mapping[str, tuple[Any, ...]] = {
    "groups": (
        groups,
        layers,
        layer_decay,
        discriminative,
        freeze,
        gradual_unfreeze,
        no_decay,
        param_groups,
        roster,
    ),
    "initialisation": (init.initialise, init.lsuv, init.zero_residual, init.check),
    "normalisation": (
        norm.compare,
        norm.recalibrate,
        norm.recalibrated,
        norm.freeze,
        norm.unfreeze,
        norm.fold,
        norm.to_ghost,
        norm.to_group,
    ),
    "regularisation": (
        smoothed_cross_entropy,
        soft_targets,
        Mix,
        mixup,
        cutmix,
        set_dropout,
        stochastic_depth,
        EarlyStopping,
    ),
    "averages": (Average, ema, swa, tail, polynomial_average),
    "distillation": (distill, mutual, exits, born_again, Teacher, Teachers, TopK),
    "curvature": (
        curvature.eigenvalues,
        curvature.noise_scale,
        curvature.scale_rate,
        curvature.saddle,
        curvature.perturb,
        curvature.escape,
    ),
    "players": (Player,),
    "state": (TrainState, Checkpoints, verify_resume, keep_generators),
    "loading": (Sampler, Batches, Seeded),
}
_ROOMS = {
    "norm": ("freeze", "unfreeze", "compare"),
    "init": ("check",),
    "groups": ("freeze",),
    "curvature": ("escape",),
}
"""Tools whose names are a strategy's, or say something only behind that of their room."""

TOOLBOX: Mapping[str, tuple[Any, str]] = {
    f"{room}.{tool.__name__}" if tool.__name__ in _ROOMS.get(room, ()) else tool.__name__: (tool, page)
    for page, tools in _OF_PAGES.items()
    for tool in tools
    for room in [tool.__module__.split(".")[1]]
}
"""What works in a loop of one's own, by name: the tool, and the page in docs/ that says when to use it."""

_DURATIONS = f"applied updates, or text: {FORMS}"


@dataclass(frozen=True)
class Description:
    """One thing: plain JSON data, and a page of text that says the same."""

    data: dict[str, Any]
    text: str


def catalogue() -> dict[str, dict[str, str]]:
    """One sentence on everything there is: kind, then name.

    >>> catalogue()["schedules"]["constant"]
    '`peak` throughout.'
    """
    return {kind: {name: _summary(item) for name, item in items.items()} for kind, items in _kinds().items()}


def describe(name: str) -> Description:
    """The rule, link, schedule, strategy, tool or built-in task of that name; all of them, if it is the name
    of several. Raises BadInput, naming the nearest.

    >>> print(describe("sgd").text.splitlines()[2])
        p ← p - lr · g
    """
    kinds = _kinds()
    found = [_PAGES[kind](items[name]) for kind, items in kinds.items() if name in items]
    if not found:
        hint = nearest(name, [known for items in kinds.values() for known in items])
        raise BadInput(f"There is nothing called {name!r}.{hint} See: downslope list.")
    first, *others = found
    if not others:
        return first
    data = {"name": name, "entries": [one.data for one in found]}
    kind = " and ".join(f"a {one.data['kind']}" for one in found)
    return Description(data, "\n\n".join([f"{name} is {kind}.", *(one.text for one in found)]))


def columns(rows: Mapping[str, str]) -> str:
    """Two columns, indented.

    >>> print(columns({"a": "one", "bc": "two"}))
      a   one
      bc  two
    """
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())


def indented(text: str) -> str:
    """The text, four blanks to the right."""
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())


def _kinds() -> dict[str, Mapping[str, Any]]:
    return {
        "tasks": tasks(),
        "rules": rules(),
        "links": links(),
        "schedules": KINDS,
        "strategies": STRATEGIES,
        "tools": TOOLBOX,
    }


def _prose(item: Any) -> str:
    """The docstring without its doctest."""
    item = item[0] if isinstance(item, tuple) else item
    return (inspect.getdoc(item.body if isinstance(item, Rule) else item) or "").split(">>>")[0].strip()


def _summary(item: Any) -> str:
    return _prose(item).split("\n\n")[0].replace("\n", " ")


def _rule(rule: Rule) -> Description:
    numbers = rule.numbers.items()
    data = {
        "name": rule.name,
        "kind": "rule" if rule.kind == "rule" else "link",
        "doc": _prose(rule),
        "formula": rule.formula.splitlines(),
        "source": rule.source,
        "numbers": {
            name: {"default": value, "meaning": term(name, rule.name).meaning} for name, value in numbers
        },
        "rates": list(rule.rates),
    }
    rates = ", ".join(f"{rate:g}" for rate in rule.rates)
    text = f"""{rule.name}

{indented(rule.formula)}

{_prose(rule)}

Source: {rule.source}

{columns({f"{name} = {value}": term(name, rule.name).meaning for name, value in numbers})}
"""
    return Description(data, text + (f"\nLearning rates worth trying: {rates}\n" if rates else ""))


def _schedule(made: Callable[..., Schedule]) -> Description:
    name = made.__name__
    shown = example(name)
    numbers = inspect.signature(KINDS[name]).parameters.items()
    data = {
        "name": name,
        "kind": "schedule",
        "doc": _prose(KINDS[name]),
        "numbers": {
            key: {
                "default": None if item.default is item.empty else item.default,
                "meaning": term_of(key, name).meaning,
            }
            for key, item in numbers
        },
        "example": {"data": shown.data(), "values": [[step, shown(step)] for step in range(0, 101, 5)]},
    }
    given = {
        key if item.default is item.empty else f"{key} = {item.default!r}": term_of(key, name).meaning
        for key, item in numbers
    }
    text = f"""{name}({", ".join(given)})

{_prose(KINDS[name])}

{indent(shown.picture(100, width=60, height=7), "    ")}

    {shown!r}

{columns(given)}

Durations are {_DURATIONS}.
"""
    return Description(data, text)


def _strategy(kind: type[Strategy]) -> Description:
    name, numbers = kind.__name__, {}
    for item in fields(kind):
        made = item.default if item.default_factory is MISSING else item.default_factory()
        numbers[item.name] = {
            "default": None if made is MISSING else made,
            "required": made is MISSING,
            "meaning": meaning(name, item.name),
            "is": word(kind.declared()[item.name]),
        }
    data = {
        "name": name,
        "kind": "strategy",
        "doc": _prose(kind),
        "numbers": numbers,
        "tool": TOOLS.get(name, ""),
        "page": f"docs/strategies.md#{name}",
    }
    rows = {
        key if one["required"] or one["default"] is None else f"{key} = {json.dumps(one['default'])}": (
            f"{one['meaning']} ({one['is']}{', needed' if one['required'] else ''})"
        )
        for key, one in numbers.items()
    }
    own = f"\nIn a loop of your own: {TOOLS[name]}\n" if name in TOOLS else ""
    lasting = f"\nDurations are {_DURATIONS}.\n" if any("duration" in row for row in rows.values()) else ""
    return Description(data, f"[{name}]\n\n{_prose(kind)}\n\n{columns(rows)}\n{lasting}{own}")


def _tool(entry: tuple[Any, str]) -> Description:
    tool, page = entry
    name = next(name for name, one in TOOLBOX.items() if one is entry)
    room = ".".join(tool.__module__.split(".")[:2])
    takes = ", ".join(map(_argument, inspect.signature(tool).parameters.values()))
    data = {
        "name": name,
        "kind": "tool",
        "doc": _prose(tool),
        "call": f"{tool.__name__}({takes})",
        "import": f"from {room} import {tool.__name__}",
        "page": f"docs/{page}.md",
    }
    text = f"""{data["call"]}

{_prose(tool)}

    {data["import"]}

When to use it, and when not: {data["page"]}
"""
    return Description(data, text)


def _argument(item: inspect.Parameter) -> str:
    if item.default is not item.empty:
        return f"{item.name}={getattr(item.default, '__name__', repr(item.default))}"
    return f"**{item.name}" if item.kind is item.VAR_KEYWORD else item.name


def _task(made: Callable[..., Task]) -> Description:
    name = next(name for name, one in tasks().items() if one is made)
    found = task(name)
    parts = {"train": found.train, "valid": found.valid, "test": found.test}
    samples = {part: size(data) for part, data in parts.items() if data is not None}
    data = {
        "name": name,
        "kind": "task",
        "doc": _prose(tasks()[name]),
        "samples": samples,
        "metric": found.metric_name,
        "higher_is_better": found.higher_is_better,
        "target": found.target,
        "reference": found.reference,
        "recipe": found.recipe.data(),
    }
    better = "higher" if found.higher_is_better else "lower"
    rows = {
        "samples": ", ".join(f"{part} {count}" for part, count in samples.items()),
        "metric": f"{found.metric_name}, {better} is better; target {found.target}",
        "reference": found.reference,
    }
    return Description(
        data, f"{name}\n\n{_prose(tasks()[name])}\n\n{columns(rows)}\n\n{indented(found.recipe.text())}\n"
    )


_PAGES: dict[str, Callable[[Any], Description]] = {
    "tasks": _task,
    "rules": _rule,
    "links": _rule,
    "schedules": _schedule,
    "strategies": _strategy,
    "tools": _tool,
}
