"""Words and numbers as the page shows them; nothing here knows HTML."""

from __future__ import annotations

import math
import unicodedata

from downslope.errors import redact as redact  # a page hides what a journal hides

_HIDDEN = frozenset(
    {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
)  # control, format (bidi, zero width), unassigned ...


def clip(text: str, length: int = 300) -> str:
    """The text, or its beginning if it is longer than `length` characters.

    >>> clip("momentum", 5)
    'mome…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def visible(text: str) -> str:
    """Show characters that cannot be seen, or that reorder their neighbours, as their codes.

    >>> visible("adam\\u202egnp")
    'adam[U+202E]gnp'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_code(c) if unicodedata.category(c) in _HIDDEN and c not in "\n\t" else c for c in text)


def _code(character: str) -> str:
    return f"[U+{ord(character):04X}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number in at most `digits` significant digits, as a practitioner writes it.

    >>> number(0.001), number(3e-5), number(12345.6), number(float("nan"))
    ('0.001', '3e-5', '12346', 'not a number')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "−")
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}".replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa.replace('-', '−')}e{int(exponent)}"


def column(value: float | None) -> str:
    """A number for a column of its like: four decimals where they say something.

    >>> column(0.3), column(123456.0), column(None)
    ('0.3000', '123456', '–')
    """
    return f"{value:.4f}" if value is not None and 1e-3 <= value < 1e3 else number(value)


def duration(seconds: float | None) -> str:
    """Seconds as a person says them.

    >>> duration(0.42), duration(75), duration(7300)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if rest >= 60 else f"{hours} h"


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "seed"), plural(5, "seed")
    ('1 seed', '5 seeds')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(names: list[str]) -> str:
    """Names as a sentence lists them.

    >>> listing(["adam"]), listing(["adam", "lion", "sgd"])
    ('adam', 'adam, lion and sgd')
    """
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
