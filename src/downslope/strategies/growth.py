"""Batches that grow in the course of a training, where a rate would fall."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from downslope.errors import BadInput, under
from downslope.schedule import Duration, Schedule, duration, in_steps
from downslope.schedule.glossary import term
from downslope.strategies.pace import Growing, Pace, Rates, whole
from downslope.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class growth(Strategy):
    """Let each update take `times` batches in a row, as one of so many times the size, which no memory need
    hold: a number from 1, or a schedule, rounded to the nearest, halves up.

    In epochs, samples, tokens, or the % of a length in those, `times` follows the data; in steps, or their %,
    the updates. A training's length in epochs stays that of the data, up to the last update that fits in; an
    update may reach over the end of an epoch. [micro] cuts further. Source: Smith et al., arXiv:1711.00489.
    Not for: beside a rate that falls as well; batches beyond the critical size (see `ds.noise_scale`).
    """

    unfair: ClassVar[str] = "its updates see more data than those of the others"

    deeds: ClassVar[Mapping[str, str]] = {"grow": "changed the size of the batch"}

    times: float | Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.times.bounds[0] if isinstance(self.times, Schedule) else self.times
        if least < 1:
            with under("times"):
                raise BadInput(f"times is how many batches an update takes, from 1, got {least:g}.")

    def suit(self, recipe: Mapping[str, Any]) -> None:
        """An epoch must not mean a number of updates, where that changes."""
        if not isinstance(self.times, Schedule):
            return
        self._by_data(self.times, recipe["steps"])
        for path, value in _texts({k: v for k, v in recipe.items() if k not in _OWN}):
            if _is_data(value):
                with under(*path):
                    key = ".".join(str(part) for part in path if isinstance(part, str))
                    raise BadInput(
                        f"{key} = {value!r} has no fixed number of updates beside the schedule of [growth]: "
                        "give it in steps or in %."
                    )

    def pace(self, length: Duration, batch: Rates) -> Pace:
        """The batches of each update."""
        if not isinstance(self.times, Schedule):
            return Pace(whole(self.times))
        by_data = self._by_data(self.times, length)
        run = length if isinstance(length, int) else in_steps(length, "steps", **batch)
        return Growing(self.times.resolve(run, **batch), by_data)

    def _by_data(self, times: Schedule, length: Duration) -> bool:
        """Whether the schedule goes by the data, as all its durations or none must say."""
        found: dict[bool, Duration] = {}
        for value in _durations(times):
            data = isinstance(length if str(value).endswith("%") else value, str)
            found.setdefault(data, value)
        if len(found) > 1:
            with under(self.name, "times"):
                raise BadInput(
                    f"[growth] times goes by data ({found[True]!r}) or by updates ({found[False]!r}), not by "
                    f"both; a percentage is of steps = {length!r}."
                )
        return next(iter(found), False)


_OWN = ("steps", "observe", growth.__name__)
"""Durations that are measured in data where they are given so."""


def _durations(of: Schedule) -> Iterator[Duration]:
    """The durations of a schedule and of its parts; one of 0 is in every unit."""
    for name, value in of.numbers:
        if term(name, of.kind).unit == "duration":
            yield from (one for one in (value if isinstance(value, tuple) else (value,)) if one)
    for part in of.parts:
        yield from _durations(part)


def _is_data(text: str) -> bool:
    """Whether a text is a duration in epochs, samples or tokens."""
    try:
        spelt = duration(text)
    except BadInput:
        return False
    return isinstance(spelt, str) and not spelt.endswith("%")


def _texts(data: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The texts of plain data, each with its path."""
    if isinstance(data, str):
        yield (), data
    elif isinstance(data, Mapping | Sequence):
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from (((key, *path), text) for path, text in _texts(value))
