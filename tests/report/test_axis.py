"""Axes hold what is put on them, and their ticks are where a reader expects them."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.report.axis import Axis, spanning

VALUES = st.lists(st.floats(-1e12, 1e12), min_size=1)
POSITIVE = st.lists(st.floats(1e-30, 1e30), min_size=1)


@settings(deadline=None)
@given(VALUES)
def test_a_linear_axis_holds_its_values(values: list[float]) -> None:
    axis = spanning(values)
    assert axis.high > axis.low
    assert all(-1e-6 <= axis.place(v) <= 1 + 1e-6 for v in values)


@settings(deadline=None)
@given(POSITIVE)
def test_a_logarithmic_axis_holds_its_values(values: list[float]) -> None:
    axis = spanning(values, log=True)
    assert all(-1e-6 <= axis.place(v) <= 1 + 1e-6 for v in values)


@settings(deadline=None)
@given(st.lists(st.floats(), max_size=5), st.booleans())
def test_whatever_is_measured_gives_an_axis(values: list[float], log: bool) -> None:
    axis = spanning(values, log=log)
    assert math.isfinite(axis.place(1.0))
    axis.ticks()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1))
def test_an_accuracy_finds_its_place_whatever_it_is(values: list[float]) -> None:
    axis = spanning(values, flip=True, percent=True)
    assert all(-1e-6 <= axis.place(v) <= 1 + 1e-6 for v in values)
    ordered = [axis.place(v) for v in sorted(values)]
    assert ordered == sorted(ordered)
    labels = [tick.label for tick in axis.ticks()]
    assert len(set(labels)) == len(labels)


@settings(deadline=None)
@given(POSITIVE, st.booleans(), st.integers(2, 8))
def test_ticks_ascend_inside_the_axis_and_are_few(values: list[float], log: bool, count: int) -> None:
    axis = spanning(values, log=log)
    ticks = axis.ticks(count)
    places = [tick.place for tick in ticks]
    assert places == sorted(set(places))
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
    assert len(ticks) <= 2 * count + 1
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_decades_are_powers_of_ten() -> None:
    assert [tick.label for tick in Axis(1e-5, 1e-1, log=True).ticks()] == [
        "1e-5",
        "0.0001",
        "0.001",
        "0.01",
        "0.1",
    ]


def test_percent_is_written_as_percent() -> None:
    assert [tick.label for tick in Axis(0.9, 1.0, percent=True).ticks(2)] == ["90 %", "95 %", "100 %"]
