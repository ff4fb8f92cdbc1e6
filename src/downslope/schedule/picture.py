"""Plots of a curve for a terminal: braille dots, or plain ASCII."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from downslope.errors import BadInput

SAMPLES = 16  # of a column, so that a long run is drawn in no time; what lies between them is not seen
_LEAST = (30, 3)  # columns and rows in which labels still find room


@dataclass(frozen=True)
class _Ink:
    """What a plot is drawn with: dots in a character, and the characters of the axes."""

    across: int
    up: int
    tick: str
    side: str
    corner: str
    floor: str
    notch: str
    faint: str
    here: str
    mark: Callable[[list[tuple[int, int]]], str]


_DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # of a braille character, from its foot
_BRAILLE = _Ink(
    2, 4, "┤", "│", "└", "─", "┬", "·", "▲", lambda dots: chr(0x2800 + sum(_DOTS[x][y] for x, y in dots))
)
_ASCII = _Ink(1, 1, "+", "|", "+", "-", "+", ".", "^", lambda dots: "*")

Curve: TypeAlias = Callable[[int], float]


def draw(
    value: Curve,
    steps: int,
    width: int,
    height: int,
    plain: bool = False,
    *,
    behind: tuple[Curve, int] | None = None,
    at: int | None = None,
) -> str:
    """The curve of value(0) … value(steps - 1), `height` rows and an axis, no line longer than `width`.

    Every update has an equal share of the width. The axis starts from 0, unless the curve keeps far from it.
    `behind`: another curve and its updates, drawn in faint points where the first leaves room. `at`: an
    update that the axis marks.

    >>> print(draw(lambda i: i / 5, steps=6, width=30, height=3, plain=True))
      1 +                 ********
    0.5 +         ********
      0 +*********
        +------------+-----------+
         0           3   6 updates
    """
    if steps < 1 or width < _LEAST[0] or height < _LEAST[1]:
        least = f"1 step, {_LEAST[0]} columns and {_LEAST[1]} rows"
        raise BadInput(f"a picture needs at least {least}, got {steps}, {width} and {height}.")
    ink = _ASCII if plain else _BRAILLE
    other, length = behind or (value, steps)
    whole = max(steps, length)
    low, high = _range([*_columns(value, steps, width), *_columns(other, length, width)])
    labels = {0: high, height - 1: low} | ({height // 2: (low + high) / 2} if height % 2 else {})
    names = {row: f"{level:.3g}" for row, level in labels.items()}
    margin = max(map(len, names.values()))
    room = width - margin - 2
    spans = _spans(_columns(value, steps, room * ink.across * steps // whole), low, high, height * ink.up)
    faint = (
        _spans(_columns(other, length, room * length // whole), low, high, height * ink.up) if behind else []
    )
    rows = [
        f"{names.get(row, ''):>{margin}} {ink.tick if row in names else ink.side}{line}".rstrip()
        for row, line in enumerate(_lines(spans, faint, height, ink))
    ]
    axis, words = _floor(whole, room, margin, ink)
    if at is not None:
        place = margin + 2 + at * room // whole
        axis = f"{axis[:place]}{ink.here}{axis[place + 1 :]}"
    return "\n".join([*rows, axis, words])


def _range(columns: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """What the vertical axis spans: with 0 in it, where the curve comes near."""
    lows, highs = zip(*columns, strict=True)
    low, high = min(lows), max(highs)
    if low == high or 2 * min(abs(low), abs(high)) < max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if low < high else (0.0, 1.0)


def _columns(value: Curve, steps: int, count: int) -> Iterator[tuple[float, float]]:
    """The least and the greatest value in each of `count` columns."""
    for column in range(count):
        first = column * steps // count
        last = max(first, (column + 1) * steps // count - 1)
        gaps = min(SAMPLES, last - first + 1) - 1
        found = [value(first + k * (last - first) // max(gaps, 1)) for k in range(gaps + 1)]
        yield min(found), max(found)


def _spans(
    columns: Iterable[tuple[float, float]], low: float, high: float, count: int
) -> list[tuple[int, int]]:
    """The lowest and the highest dot of each column, of `count` from the foot; the line is unbroken."""

    def dot(level: float) -> int:
        share = (level / 2 - low / 2) / (high / 2 - low / 2)  # halves, for the largest floats
        return round(max(0.0, min(1.0, share)) * (count - 1))

    spans: list[tuple[int, int]] = []
    for least, greatest in columns:
        first, last = dot(least), dot(greatest)
        if spans:
            first, last = min(first, spans[-1][1] + 1), max(last, spans[-1][0] - 1)
        spans.append((first, last))
    return spans


def _lines(
    spans: Sequence[tuple[int, int]], faint: Sequence[tuple[int, int]], height: int, ink: _Ink
) -> Iterator[str]:
    """The rows of characters, from the top."""
    columns = max(-(-len(spans) // ink.across), len(faint))
    aside = [
        _aside(spans[k * ink.across : (k + 1) * ink.across], faint[k : k + 1], ink) for k in range(columns)
    ]
    for row in reversed(range(height)):
        line = ""
        for left in range(0, columns * ink.across, ink.across):
            here = [
                (x, y)
                for x, (first, last) in enumerate(spans[left : left + ink.across])
                for y in range(ink.up)
                if first <= row * ink.up + y <= last
            ]
            line += ink.mark(here) if here else ink.faint if row in aside[left // ink.across] else " "
        yield line


def _aside(own: Sequence[tuple[int, int]], faint: Sequence[tuple[int, int]], ink: _Ink) -> range:
    """The rows of a column in which the curve behind shows: none where it is the one in front."""
    for low, high in faint:
        if not own or low < min(own)[0] - 1 or high > max(last for _, last in own) + 1:
            return range(low // ink.up, high // ink.up + 1)
    return range(0)


def _floor(steps: int, room: int, margin: int, ink: _Ink) -> tuple[str, str]:
    """The axis of updates and its labels: 0, the middle where it is whole and there is room, the end."""
    axis = [ink.floor] * room
    axis[room // 2] = axis[-1] = ink.notch
    middle = "" if steps % 2 else str(steps // 2)
    end = f"{steps} updates"
    left = f"{'0':<{room // 2 - len(middle) // 2}}{middle}"
    if len(left) + len(end) >= room:
        left = "0"
    pad = " " * (margin + 2)
    return f"{pad[:-1]}{ink.corner}{''.join(axis)}", f"{pad}{left}{end:>{room - len(left)}}"
