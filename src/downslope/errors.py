"""What goes wrong, told apart by whose fault it is.

A fault of the input ends in one sentence and exit code 2, a fault of the user's own code in that code's own
traceback and exit code 1. Whatever else escapes is a fault of ours.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_NAMED = r"[\w-]*(?:token|key|secret|password|passwd)[\w-]*"
_SECRETS = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@]+@"), r"\1[hidden]@"),
    (re.compile(rf"(?i)({_NAMED}[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|\S+)"), r"\1[hidden]"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]+"), r"\1[hidden]"),
    (
        re.compile(
            r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abeprs]-|AKIA|ASIA|AIza|pypi-)[\w-]{8,}"
            r"|\beyJ[\w-]+\.[\w-]+\.[\w-]+"
        ),
        "[hidden]",
    ),
)
_SHORTEST = 6  # characters of a variable's value that may be a secret; a shorter one is in every other word


class DownslopeError(Exception):
    """Whatever downslope raises on purpose."""

    exit_code = 1


class BadInput(DownslopeError, ValueError):  # noqa: N818  the sentence reads "bad input: …"
    """The input is wrong: one sentence saying what was given, what is allowed, and the nearest right thing.

    It stays on one line whatever was given: characters that do not print are shown as escapes. `key` is the
    path to the culprit inside what was given, where that is known: a file turns it into a line.

    >>> raise BadInput("lr must be at least 0, got -0.1.")
    Traceback (most recent call last):
    downslope.errors.BadInput: lr must be at least 0, got -0.1.
    """

    exit_code = 2

    def __init__(self, sentence: str, *, key: tuple[str | int, ...] = ()) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))
        self.key = key


class UserCodeError(DownslopeError):
    """The user's own code raised; `__cause__` is what it raised, with its own traceback."""


@contextmanager
def under(*keys: str | int) -> Iterator[None]:
    """Bad input found inside lies below these keys of what was given.

    >>> try:
    ...     with under("chain", 0):
    ...         raise BadInput("lr must be at least 0, got -0.1.", key=("lr",))
    ... except BadInput as error:
    ...     error.key
    ('chain', 0, 'lr')
    """
    try:
        yield
    except BadInput as error:
        error.key = (*keys, *error.key)
        raise


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The tail of a sentence that suggests the allowed word nearest to `word`; empty if none is near.

    >>> nearest("momentun", ["lr", "momentum"])
    " Did you mean 'momentum'?"
    >>> nearest("xyz", ["lr", "momentum"])
    ''
    """
    if len(word) > 80:  # the search is quadratic, and nobody meant this
        return ""
    matches = get_close_matches(word, list(allowed), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def redact(text: str) -> str:
    """Hide what looks like a password, a key or a token: error texts and commands quote the user's world.

    That is passwords in addresses, values behind such names, tokens of a known form, and wherever they stand
    the values of environment variables with such names. Not for texts that must keep every word.

    >>> redact("GET https://ann:hunter2@host/data failed, API_TOKEN=abc")
    'GET https://[hidden]@host/data failed, API_TOKEN=[hidden]'
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and re.fullmatch(_NAMED, name, re.IGNORECASE):
            text = text.replace(value, "[hidden]")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text
