"""TOML that knows its lines: the standard library's parser, and beside its data the line of every key.

And the way back: plain data written as TOML, and what differs between two documents.

`tomllib` decides what the text means; it is strict, and it is what other programs use. It keeps no
positions, so a second, smaller reading of the same text finds where each key stands. That reading may trust
that the text is TOML.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from downslope.errors import BadInput

LARGEST = 1_000_000
"""Bytes of the largest text that is read."""

DEEPEST = 20
"""Levels of nesting: brackets in brackets, or parts of a dotted key."""

LONGEST = 100
"""Characters of a number or a bare key; Python refuses to read integers of thousands of digits."""

Path: TypeAlias = tuple[str | int, ...]

_TOKEN = re.compile(
    r'''(?P<text>"""(?:\\[\s\S]|[^\\])*?"{3,5}|\'\'\'[\s\S]*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*')'''
    r"""|(?P<open>"{3}[\s\S]*|'{3}[\s\S]*|"[^\n]*|'[^\n]*)"""  # never closed: no second look at what follows
    r"|(?P<skip>#[^\n]*|[ \t]+)|(?P<mark>[\[\]{}=,.\n])|(?P<bare>[A-Za-z0-9_+:-]+)|(?P<other>.)"
)
_WHERE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True)
class Text:
    """What a text says, `data` as `tomllib` reads it, and where it says it."""

    data: dict[str, Any]
    text: str

    @cached_property
    def lines(self) -> Mapping[Path, int]:
        """The line of each key, from 1, by its path of keys and places in arrays: ("chain", 0, "lr")."""
        return _Lines(self.text).found

    def line(self, path: Path) -> int:
        """The line of the key at `path`, or of the nearest key that holds it; 1 if nothing does."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)


def parse(text: str, name: str) -> Text:
    """Read a TOML text. BadInput, "name:line: what is wrong", if it is not TOML, too long or too deep.

    >>> found = parse("steps = 9\\n[[chain]]\\npart = 'adam'", "recipe.toml")
    >>> found.data, found.line(("chain", 0, "part"))
    ({'steps': 9, 'chain': [{'part': 'adam'}]}, 3)
    """
    if len(text) > LARGEST:
        raise BadInput(f"{name}:1: a file of {len(text)} characters; at most {LARGEST} are read.")
    text = text.replace("\r\n", "\n")
    _check_size(text, name)
    try:
        data = tomllib.loads(text)
    except ValueError as error:
        where = _WHERE.search(str(error))
        line = where[1] if where and where[1] else text.count("\n") + 1 if where else 1
        raise BadInput(f"{name}:{line}: not TOML: {_WHERE.sub('', str(error))}.") from None
    return Text(data, text)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, text and line of each token; blanks and comments left out, strings whole."""
    line = 1
    for token in _TOKEN.finditer(text):
        if token.lastgroup != "skip":
            yield token.lastgroup or "", token[0], line
            line += token[0].count("\n")
    yield "end", "", line


def _check_size(text: str, name: str) -> None:
    """Before parsing, for parsers recurse: some hundred brackets would exhaust the stack."""
    brackets = dots = 0
    for kind, word, line in _tokens(text):
        if kind == "mark":
            brackets += (word in "[{") - (word in "]}")
            dots = dots + 1 if word == "." else 0
        if brackets > DEEPEST or dots >= DEEPEST:
            raise BadInput(f"{name}:{line}: nested more than {DEEPEST} levels deep.")
        if kind == "bare" and len(word) > LONGEST:
            raise BadInput(f"{name}:{line}: a number or key of more than {LONGEST} characters.")


class _Lines:
    """One walk through a text that is known to be TOML, noting the line of each key."""

    def __init__(self, text: str) -> None:
        self.found: dict[Path, int] = {}
        self._tokens = _tokens(text)
        self._sizes: dict[Path, int] = {}  # how many tables each array of tables has so far
        self._next()
        table: Path = ()
        while self._kind != "end":
            if self._word == "\n":
                self._next()
            elif self._word == "[":
                table = self._header()
            else:
                self._pair(table)

    def _next(self) -> None:
        self._kind, self._word, self._line = next(self._tokens)

    def _header(self) -> Path:
        self._next()
        array = self._word == "["
        if array:
            self._next()
        path, line = self._key(())
        for _ in range(1 + array):
            self._next()
        if array:
            self._sizes[path] = self._sizes.get(path, 0) + 1
            self.found.setdefault(path, line)
            path = (*path, self._sizes[path] - 1)
        self.found[path] = line
        return path

    def _pair(self, table: Path) -> None:
        path, _ = self._key(table)
        self._next()  # "="
        self._value(path)

    def _key(self, table: Path) -> tuple[Path, int]:
        """The full path of the dotted key that stands here; each of its parts is noted when first seen."""
        path, line = table, self._line
        while True:
            part = tomllib.loads(f"x={self._word}")["x"] if self._kind == "text" else self._word
            path = (*path, part)
            self._next()
            self.found.setdefault(path, line)
            if self._word != ".":
                return path, line
            if path in self._sizes:  # a header below an array of tables means its last table
                path = (*path, self._sizes[path] - 1)
            self._next()

    def _value(self, path: Path) -> None:
        if self._word == "[":
            self._inside("]", lambda place: self._value((*path, place)))
        elif self._word == "{":
            self._inside("}", lambda _: self._pair(path))
        else:
            while self._kind != "end" and (self._kind != "mark" or self._word == "."):
                self._next()

    def _inside(self, end: str, item: Any) -> None:
        """The items between brackets, separated by commas, on as many lines as they like."""
        self._next()
        place = 0
        while self._word != end or self._kind != "mark":
            if self._word in ("\n", ",") and self._kind == "mark":
                self._next()
            else:
                item(place)
                place += 1
        self._next()


class Difference(NamedTuple):
    """One value in which two documents differ; None where one does not have it."""

    key: str
    mine: Any
    theirs: Any

    def __str__(self) -> str:
        mine, theirs = ("-" if value is None else written(value) for value in (self.mine, self.theirs))
        return f"{self.key}: {mine} → {theirs}"


class Differences(list[Difference]):
    """All values in which two documents differ; prints one a line."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def differences(key: str, mine: Any, theirs: Any) -> Iterator[Difference]:
    """What differs between two values, tables entry by entry, but schedules of two kinds as a whole."""
    tables = isinstance(mine, dict) and isinstance(theirs, dict)
    if tables and mine.get("schedule") == theirs.get("schedule"):
        for name in dict.fromkeys([*mine, *theirs]):
            yield from differences(f"{key}.{name}".lstrip("."), mine.get(name), theirs.get(name))
    elif mine != theirs:
        yield Difference(key, mine, theirs)


def pairs(table: Mapping[str, Any]) -> list[str]:
    """The lines of a table."""
    return [
        f"{key if key.isidentifier() else json.dumps(key)} = {written(value)}" for key, value in table.items()
    ]


def written(value: Any) -> str:
    """A value as TOML writes it; its texts are plain words, which JSON and TOML write alike.

    >>> written({"part": "adam", "betas": [0.9, 0.99]})
    '{ part = "adam", betas = [0.9, 0.99] }'
    """
    if isinstance(value, dict):
        return f"{{ {', '.join(pairs(value))} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return json.dumps(value)
