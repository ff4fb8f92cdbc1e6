"""Lines: what is drawn is what was measured."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.report.axis import Axis
from downslope.report.plot import Quantity, Series, Track, panels, path

LOSS = Quantity("train", "Training loss")
UNIT = Axis(0, 1)


def track(values: list[float]) -> Track:
    steps = tuple(float(i) for i in range(len(values)))
    return Track(steps, steps, tuple(values))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000), st.integers(8, 200))
def test_thinning_keeps_ends_and_extremes(values: list[float], points: int) -> None:
    thin = track(values).thinned(points)
    assert len(thin.values) <= points + 2
    assert (thin.values[0], thin.values[-1]) == (values[0], values[-1])
    assert (min(thin.values), max(thin.values)) == (min(values), max(values))
    assert list(thin.steps) == sorted(set(thin.steps))
    assert all(values[int(step)] == value for step, value in zip(thin.steps, thin.values, strict=True))


def test_thinning_keeps_where_a_loss_stopped_being_a_number() -> None:
    thin = track([1.0] * 500 + [math.nan] + [1.0] * 500).thinned(50)
    assert any(math.isnan(value) for value in thin.values)


def test_what_is_no_number_breaks_the_line() -> None:
    assert path([0, 0.5, 0.75, 1], [0.0, math.nan, 0.5, math.inf], UNIT, UNIT) == "M0 1000h0M750 500h0"


def test_a_logarithm_leaves_out_what_has_none() -> None:
    assert path([0, 0.5, 1], [0.1, 0.0, -1.0], UNIT, Axis(0.1, 1, log=True)) == "M0 1000h0"


def test_a_negative_loss_is_drawn_on_the_logarithmic_side_too() -> None:
    """As a critic's of Wasserstein is, or a log-likelihood of a density."""
    log, linear, *_ = panels([Series("a", 0, {"train": track([0.5, -2.0, -3.0])})], [LOSS])
    assert log.key == "train-steps-log"
    assert log.title == "Training loss, linear: a negative one has no logarithm"
    assert (log.y, log.paths) == (linear.y, linear.paths)
    assert linear.title == "Training loss"


@settings(deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=50))
def test_a_path_is_made_of_whole_numbers_only(values: list[float]) -> None:
    for drawn in panels([Series("a", 0, {"train": track(values)})], [LOSS]):
        assert set(drawn.paths[0].d) <= set("MLh -0123456789")


def test_a_bad_trial_does_not_flatten_the_others() -> None:
    good = Series("good", 0, {"train": track([1.0, 0.5])})
    bad = Series("bad", 1, {"train": track([1.0, 1e30])}, faint=True)
    linear = next(p for p in panels([bad, good], [LOSS]) if p.key == "train-steps-linear")
    assert linear.y.high < 2


def test_a_quantity_that_nobody_measured_has_no_panel() -> None:
    assert panels([Series("a", 0, {"train": track([1.0])})], [Quantity("metric", "")]) == []


def test_an_accuracy_is_drawn_by_the_logarithm_of_its_error() -> None:
    accuracy = Quantity("metric", "Accuracy", percent=True, flip=True)
    drawn = panels([Series("a", 0, {"metric": track([0.9, 0.99, 1.0])})], [accuracy])
    y = next(p for p in drawn if p.key == "metric-steps-log").y
    assert y.place(0.99) - y.place(0.9) == pytest.approx(y.place(0.9) - y.place(0.0))
    assert y.place(0.9) < y.place(0.99) < y.place(1.0) == 1


def test_dots_are_not_joined() -> None:
    dots = Series("a", 0, {"train": track([0.0, 1.0])}, dots=True)
    assert "L" not in panels([dots], [LOSS])[0].paths[0].d


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_a_running_mean_stays_between_the_extremes(values: list[float], span: float) -> None:
    smooth = track(values).smooth(span)
    assert smooth.steps == track(values).steps
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert all(min(values) - slack <= v <= max(values) + slack for v in smooth.values)
    if span < 1:
        assert smooth.values == tuple(values)
