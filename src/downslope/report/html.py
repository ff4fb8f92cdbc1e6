"""A page as HTML: one text, no network, nothing in it that a journal could have written as code.

Jinja2 escapes everything; characters that cannot be seen are shown as codes; the data block is JSON with
<, >, &, U+2028 and U+2029 escaped; the content security policy allows our style and our script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from downslope.report.text import column, visible
from downslope.report.view import Page

_TOML = re.compile(
    r"""(?P<c>\#[^\n]*)|(?P<t>^\[+[^\n\]]*\]+)|(?P<k>^\s*[\w.-]+(?=\s*=))|(?P<s>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')""",
    re.MULTILINE,
)


def render(page: Page) -> str:
    """The page as one HTML text."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    template = _environment().get_template("page.html.j2")
    ours = {"style": style, "script": script, "data": _json(_data(page))}
    return template.render(
        page=page,
        policy=policy,
        **{name: Markup(text) for name, text in ours.items()},  # noqa: S704  the first two are files of ours
    )


def _data(page: Page) -> dict[str, Any]:
    every = [*(page.curves.panels if page.curves else ()), *(page.schedule.panels if page.schedule else ())]
    series = [
        {"name": s.name, "hue": s.hue % 8, "tracks": {key: asdict(track) for key, track in s.tracks.items()}}
        for s in page.series
    ]
    return {"series": series, "panels": {panel.key: panel.data() for panel in every}}


def _json(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it that HTML or JavaScript reads otherwise."""
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(data: Any) -> Any:
    """The same with hidden characters as codes, no number that JSON lacks, only the digits that are read."""
    match data:
        case str():
            return visible(data)
        case float():
            return float(f"{data:.6g}") if math.isfinite(data) else None
        case dict():
            return {key: _plain(value) for key, value in data.items()}
        case list() | tuple():
            return [_plain(value) for value in data]
        case _:
            return data


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("downslope.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pc"] = lambda place: f"{100 * place:.2f}%"
    environment.filters["toml"] = _toml
    environment.filters["column"] = column
    environment.filters["told"] = _told
    return environment


def _finalize(value: Any) -> Any:
    """Every string that a template prints goes through here, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _told(sentence: str, names: Sequence[str]) -> Markup:
    """A sentence in which the names stand out, and short ones are not broken at the end of a line."""
    known = sorted({visible(name) for name in names if name}, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, known))})" if known else r"(?!)", visible(sentence))
    named = Markup('<b class="{}">{}</b>')
    marks = {name: named.format("whole" if len(name) <= 24 else "", name) for name in known}
    return Markup("").join(marks.get(piece) or escape(piece) for piece in pieces)


def _toml(text: str) -> Markup:
    """A recipe with its comments, tables, keys and strings told apart; every piece is escaped by itself."""
    pieces, end = [], 0
    for match in _TOML.finditer(text := visible(text)):
        pieces += [
            escape(text[end : match.start()]),
            Markup('<span class="{}">{}</span>').format(match.lastgroup, match[0]),
        ]
        end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


@cache
def _asset(name: str) -> str:
    return (resources.files("downslope.report") / "assets" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
