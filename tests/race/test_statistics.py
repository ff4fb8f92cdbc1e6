"""The t distribution against scipy, and the promise of the intervals against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from downslope.race.statistics import Difference, paired, quantile, within

LEVELS = [0.5, 0.8, 0.9, 0.95, 0.99, 1 - 0.05 / 6, 0.999, 0.9999]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 7, 9, 10, 19, 50, 99, 200])
@pytest.mark.parametrize("level", LEVELS)
def test_quantile_is_scipys(level, freedom):
    assert quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-10)


@given(st.floats(0, 50), st.integers(1, 60))
def test_probability_is_scipys(t, freedom):
    # not 2 · cdf - 1: scipy's cdf rounds to one half near t = 0 (seen at 1e-9)
    theirs = special.betainc(0.5, freedom / 2, t**2 / (freedom + t**2))
    assert within(t, freedom) == pytest.approx(theirs, abs=1e-13)


def test_no_freedom_tells_nothing():
    assert quantile(0.95, 0) == math.inf
    one = paired([0.9], [0.5])
    assert one == Difference(pytest.approx(0.4), None, None)
    assert one.tied


def test_interval_is_scipys():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=7), generator.normal(size=7)
    result = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    mine = paired(list(ours), list(theirs))
    assert (mine.low, mine.high) == pytest.approx((result.low, result.high), rel=1e-10)


def test_same_numbers_are_tied_and_a_steady_gap_is_not():
    values = [0.97, 0.95, 0.96, 0.98, 0.94]
    assert paired(values, values, comparisons=6).tied
    assert not paired([v - 0.3 for v in values], [0.97, 0.951, 0.962, 0.979, 0.94], comparisons=6).tied


def test_more_comparisons_widen():
    ours, theirs = [0.9, 0.92, 0.91, 0.93], [0.93, 0.94, 0.95, 0.93]
    narrow, wide = paired(ours, theirs), paired(ours, theirs, comparisons=6)
    assert narrow.low is not None
    assert wide.low is not None
    assert wide.low < narrow.low


def test_equal_recipes_are_called_apart_in_at_most_one_race_of_twenty():
    """Four recipes that differ by chance alone, the best picked by the data: the family-wise error stays
    within 5 %.
    """
    generator = np.random.default_rng(1)
    races, apart = 2000, 0
    for race in generator.normal(size=(races, 4, 5)):
        winner = race[race.mean(axis=1).argmax()]
        apart += any(not paired(list(row), list(winner), comparisons=6).tied for row in race)
    assert apart / races < 0.05


def test_correcting_for_the_three_rivals_only_would_not_keep_that_promise():
    generator = np.random.default_rng(1)
    races, apart = 2000, 0
    for race in generator.normal(size=(races, 4, 5)):
        winner = race[race.mean(axis=1).argmax()]
        apart += any(not paired(list(row), list(winner), comparisons=3).tied for row in race)
    assert apart / races > 0.05
