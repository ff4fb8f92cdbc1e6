"""What there is, described: rules, links, schedules, tasks; as data for machines, as text for people."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from downslope.errors import BadInput, nearest
from downslope.rules import Rule, links, rules
from downslope.rules.glossary import term
from downslope.schedule import FORMS, KINDS, example
from downslope.schedule import term as term_of
from downslope.tasks import size, task, tasks


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
    """The rule, link, schedule or built-in task of that name. Raises BadInput, naming the nearest.

    >>> print(describe("sgd").text.splitlines()[2])
        p ← p - lr · g
    """
    known = {name: item for items in _kinds().values() for name, item in items.items()}
    if name not in known:
        raise BadInput(f"There is nothing called {name!r}.{nearest(name, known)} See: downslope list.")
    if name in tasks():
        return _task(name)
    return _schedule(name) if name in KINDS else _rule(known[name])


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
    return {"tasks": tasks(), "rules": rules(), "links": links(), "schedules": KINDS}


def _prose(item: Any) -> str:
    """The docstring without its doctest."""
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


def _schedule(name: str) -> Description:
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

Durations are applied updates, or text: {FORMS}.
"""
    return Description(data, text)


def _task(name: str) -> Description:
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
