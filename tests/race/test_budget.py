"""Budgets: text, price, and the ladder that a budget buys."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.errors import BadInput
from downslope.race.budget import Budget, Length, cost, ladder, plan

USUAL = Length(340, 17, 68)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("20x", 20, "x"),
        ("0.5x", Fraction(1, 2), "x"),
        (" 3 x ", 3, "x"),
        ("5000 steps", 5000, "steps"),
        ("1 step", 1, "steps"),
        ("90s", 90, "s"),
        ("10m", 600, "s"),
        ("10 min", 600, "s"),
        ("2h", 7200, "s"),
    ],
)
def test_text(text, amount, unit):
    assert Budget.parse(text) == Budget(Fraction(amount), unit)


@pytest.mark.parametrize(
    "text", ["", "20", "x", "0x", "-1x", "20 X", "1e3x", "nanx", "10 days", "٣x", "1" * 40 + "x", 20, None]
)
def test_refused_text(text):
    with pytest.raises(BadInput, match="A budget is"):
        Budget.parse(text)


def test_what_a_budget_is_in_full_trainings():
    assert Budget.parse("20x").trainings(340, None, 2, 20) == 20
    assert Budget.parse("3400 steps").trainings(340, None, 2, 20) == 10
    assert Budget.parse("100s").trainings(340, 0.01, 2, 20) == pytest.approx(200 / 3.4 - 20)
    with pytest.raises(BadInput, match="finals alone take about 34 s"):
        Budget.parse("30s").trainings(340, 0.01, 2, 20)


def test_price_is_what_the_ladder_trains():
    """Counted update by update, from the lengths that the trials really run."""
    rungs = ladder(46, Fraction(1, 4), 3, 3)
    spent, before = 0, 0
    for rung in rungs:
        stop, end = USUAL.rung(rung.fraction)
        spent += rung.runners * (end - before)
        before = stop
    assert spent == cost(rungs) * 340


@settings(deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 5),
    st.fractions(1, 100),
    st.integers(20, 10_000),
    st.sampled_from([0, 1, 5, 20]),
)
def test_plans_keep_their_promises(count, given_, trainings, steps, percent):
    length = Length(steps, steps * percent // 100, round(steps / 5))
    try:
        rungs = plan([length] * count, min(given_, count), trainings, 3)
    except BadInput:
        assert trainings < given_ * 3
        return
    assert cost(rungs) <= trainings
    assert rungs[0].runners >= min(given_, count)
    assert rungs[-1].fraction == 1
    assert length.rung(Fraction(1)) == (steps - length.cooldown, steps)
    stops = [length.rung(rung.fraction)[0] for rung in rungs]
    assert stops == sorted(set(stops))
    assert all(stop >= 2 * length.warmup for stop in stops[:-1])
    assert stops[-1] > length.warmup


def test_the_usual_race():
    rungs = plan([USUAL] * 46, 0, Fraction(20), 3)
    assert [(float(rung.fraction), rung.runners) for rung in rungs] == [(0.25, 46), (0.5, 16), (1.0, 6)]


def test_a_small_budget_drops_the_last_candidates_but_none_that_was_asked_for():
    assert plan([USUAL] * 46, 0, Fraction(5), 3)[0].runners < 46
    with pytest.raises(BadInput, match="takes at least"):
        plan([USUAL] * 46, 40, Fraction(5), 3)


def test_a_rich_budget_trains_all_to_the_end():
    assert plan([USUAL] * 4, 0, Fraction(4), 3) == ladder(4, Fraction(1), 2, 3)


def test_warmup_that_swallows_the_training_is_refused():
    with pytest.raises(BadInput, match="nothing to judge"):
        plan([Length(100, 80, 20)], 0, Fraction(100), 3)
