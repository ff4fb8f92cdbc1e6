"""The laws of schedules, over every kind by one table: a kind without a row fails."""

import json
import math
import pickle
import re
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from inspect import getdoc, signature

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule.rows import ROWS, levels, truth

from downslope.errors import BadInput
from downslope.schedule import KINDS, Schedule, constant, cosine, example, linear, plateau, term, wsd

every_kind = pytest.mark.parametrize("kind", sorted(KINDS))
anything = st.sampled_from(sorted(ROWS)).flatmap(lambda kind: ROWS[kind].any)
SEEN = [(2, 1.0), (5, math.nan), (9, 3.0), (20, 0.5), (21, 0.7), (40, 0.9)]


def scale(of: Schedule) -> float:
    """The size of the numbers that a value is computed from."""
    own = [abs(value) for name, value in of.numbers if term(name, of.kind).unit == "level"]
    parts = [scale(part) for part in of.parts]
    return max([1e-300, *own, math.prod(parts) if of.kind == "product" else math.fsum(parts)])


def test_every_kind_has_a_row() -> None:
    assert set(ROWS) == set(KINDS)


@every_kind
@given(data=st.data())
def test_the_value_is_what_the_definition_says_up_to_millions_of_steps(
    kind: str, data: st.DataObject
) -> None:
    schedule = data.draw(ROWS[kind].any)
    for i in {0, 1, data.draw(st.integers(0, 20_000)), data.draw(st.integers(0, 3_000_000)), 1_000_000}:
        exact = truth(schedule, i)
        assert abs(Fraction(schedule(i)) - exact) <= Fraction(1e-12) * Fraction(scale(schedule))
        assert schedule(i) == pytest.approx(float(exact), rel=1e-10, abs=1e-13 * scale(schedule))


@every_kind
@given(data=st.data())
def test_what_has_an_end_keeps_it_for_ever(kind: str, data: st.DataObject) -> None:
    schedule = data.draw(ROWS[kind].any)
    last = schedule.length
    assert math.isfinite(schedule(sys.maxsize))
    if isinstance(last, int) and kind != "sequence":  # whose last part may go on
        end = dict(schedule.numbers)["end"]
        assert schedule(last) == schedule(last + 1) == schedule(2 * last) == schedule(10**15) == end


@every_kind
def test_behind_the_warmup_it_never_climbs(kind: str) -> None:
    falling = ROWS[kind].falling
    if falling is None:
        assert kind in {"cosine_restarts", "cyclic", "one_cycle"}  # these are made to come back
        assert "again" in str(getdoc(KINDS[kind])) or "From `base` to `peak`" in str(getdoc(KINDS[kind]))
        return
    warmup = 3
    values = [falling(i) for i in [*range(warmup, 400), 10**6, 10**12, sys.maxsize]]
    assert values == sorted(values, reverse=True)
    assert min(values) >= 0


@every_kind
def test_a_run_of_one_step_is_right(kind: str) -> None:
    given_as, first, second = ROWS[kind].short
    schedule = given_as.resolve(run_steps=1)
    assert (schedule(0), schedule(1)) == pytest.approx((first, second), rel=1e-15, abs=0)
    assert math.isfinite(schedule(10**9))
    if "warmup" in dict(schedule.numbers):
        assert dict(schedule.numbers)["warmup"] == 0


@every_kind
def test_an_end_above_the_peak_is_right_or_refused(kind: str) -> None:
    make, *expected = ROWS[kind].rising
    if isinstance(expected[0], str):
        with pytest.raises(BadInput, match=re.escape(expected[0])):
            make()
        return
    assert [make()(0), make()(10)] == pytest.approx(expected, rel=1e-15)


@given(anything, st.floats(-100, 100), st.integers(0, 20_000))
def test_two_groups_keep_their_ratio_under_every_schedule(schedule: Schedule, ratio: float, i: int) -> None:
    twin = schedule.scaled(ratio)
    assert twin(i, SEEN) == pytest.approx(
        ratio * schedule(i, SEEN), rel=1e-9, abs=1e-12 * scale(schedule) * abs(ratio)
    )
    assert twin.peak == pytest.approx(ratio * schedule.peak, rel=1e-9, abs=1e-300)


@given(anything)
def test_data_survives_json_and_pickle(schedule: Schedule) -> None:
    read = Schedule.from_data(json.loads(json.dumps(schedule.data())))
    assert read == schedule == pickle.loads(pickle.dumps(schedule))
    assert hash(read) == hash(schedule)
    assert read.data() == schedule.data()


@every_kind
def test_schedules_are_frozen_and_have_no_state(kind: str) -> None:
    one = example(kind)
    with pytest.raises(FrozenInstanceError):
        one.kind = "linear"  # type: ignore[misc]
    before = hash(one), repr(one)
    forward = [one(i, SEEN) for i in range(101)]
    assert forward == [one(i, SEEN) for i in reversed(range(101))][::-1]
    assert (hash(one), repr(one)) == before
    assert len({one, example(kind), Schedule.from_data(one.data())}) == 1


@every_kind
@given(data=st.data())
def test_only_what_reacts_heeds_what_was_seen_and_only_what_was_seen_by_then(
    kind: str, data: st.DataObject
) -> None:
    schedule = data.draw(ROWS[kind].any)
    assert schedule.reacts == (kind == "plateau")
    i = data.draw(st.integers(0, 60))
    assert schedule(i, SEEN) == schedule(i, [one for one in SEEN if one[0] <= i])
    if not schedule.reacts:
        assert schedule(i, SEEN) == schedule(i)


@given(anything, st.integers(0, 30_000))
def test_the_value_lies_between_zero_and_the_bounds(schedule: Schedule, i: int) -> None:
    low, high = schedule.bounds
    slack = 1e-12 * scale(schedule)
    if schedule.kind in (
        "sum",
        "product",
        "clamp",
    ):  # parts at 0 in a warmup or decay leave the box of levels
        low, high = everywhere(schedule)
    else:
        low, high = min(low, 0), max(high, 0)
    assert low - slack <= schedule(i) <= high + slack


def everywhere(of: Schedule) -> tuple[float, float]:
    """The bounds where every part may be at 0 too."""
    widened = [(min(low, 0), max(high, 0)) for low, high in (part.bounds for part in of.parts)]
    if of.kind == "sum":
        return math.fsum(low for low, _ in widened), math.fsum(high for _, high in widened)
    if of.kind == "clamp":
        numbers = dict(of.numbers)
        low, high = numbers.get("low", -math.inf), numbers.get("high", math.inf)
        return min(max(widened[0][0], low), high), max(min(widened[0][1], high), low)
    size = math.prod(max(map(abs, pair)) for pair in widened)
    return -size, size


@every_kind
def test_a_warmup_wastes_neither_the_first_update_nor_repeats_the_peak(kind: str) -> None:
    if "warmup" not in signature(KINDS[kind]).parameters:
        assert kind in {"branch", "clamp", "cyclic", "one_cycle", "product", "sequence", "sum"}
        return
    numbers = {"peak": 0.6, "warmup": 4}
    plain = Schedule.from_data({**example(kind).data(), "peak": 0.6})
    schedule = Schedule.from_data({**plain.data(), **numbers})
    assert [schedule(i) for i in range(5)] == pytest.approx([0.12, 0.24, 0.36, 0.48, 0.6], rel=1e-15)
    assert schedule(3) < schedule(4) == plain(0) == 0.6


@every_kind
@pytest.mark.parametrize("unit", ["epochs", "samples", "tokens", "%"])
def test_every_duration_of_every_kind_takes_every_unit(kind: str, unit: str) -> None:
    """One epoch of one step, one sample and one token a step, a run of 100 steps: the numbers stay."""
    one = example(kind).data()
    durations = [name for name in one if name != "schedule" and term(name, kind).unit == "duration"]
    for name in durations:
        spelt = [f"{n} {unit}" for n in one[name]] if term(name, kind).many else f"{one[name]} {unit}"
        given_as = Schedule.from_data({**one, name: spelt})
        rates = {"steps_per_epoch": 1, "batch_size": 1, "tokens_per_step": 1, "run_steps": 100}
        assert given_as.resolve(**rates) == example(kind)
        assert given_as.resolve(**rates).resolved
        if not given_as.resolved:
            with pytest.raises(BadInput, match=r"call resolve\(...\) first"):
                given_as(0)
    assert durations or kind in {"clamp", "product", "sum"}


@every_kind
def test_parts_are_resolved_with_the_whole(kind: str) -> None:
    one = example(kind)
    if not one.parts:
        return
    part = linear(1.0, steps="3 epochs")
    data = {**one.data()}
    name = next(name for name, _ in one.numbers if term(name, kind).unit == "schedule")
    data[name] = [part.data()] * len(data[name]) if term(name, kind).many else part.data()
    open_ended = Schedule.from_data(data)
    assert not open_ended.resolved
    with pytest.raises(BadInput, match=r"call resolve\(...\) first"):
        open_ended(0)
    assert all(one == linear(1.0, steps=60) for one in open_ended.resolve(steps_per_epoch=20).parts)


@every_kind
def test_a_key_that_is_wrong_or_missing_is_named_with_the_nearest(kind: str) -> None:
    data = example(kind).data()
    first = next(name for name in data if name != "schedule")
    with pytest.raises(
        BadInput, match=f"{kind} has no key '{first}x'. Did you mean '{first}'. Allowed: {first}"
    ):
        Schedule.from_data({**data, f"{first}x": 1})
    with pytest.raises(BadInput, match=f"{kind} needs the key '{first}'"):
        Schedule.from_data({key: value for key, value in data.items() if key != first})
    with pytest.raises(BadInput, match=f"unknown schedule '{kind}x'. Did you mean '{kind}'"):
        Schedule.from_data({**data, "schedule": f"{kind}x"})


@every_kind
def test_every_number_refuses_what_it_cannot_be(kind: str) -> None:
    """In one sentence that names the number, and with its key."""
    for name in example(kind).data():
        if name == "schedule":
            continue
        optional = signature(KINDS[kind]).parameters[name].default is None
        for wrong in ("x", True, math.nan, -math.inf, {"a": 1}, 10**400, *[None] * (not optional)):
            with pytest.raises(BadInput) as caught:
                Schedule.from_data({**example(kind).data(), name: wrong})
            assert "\n" not in str(caught.value)
            assert caught.value.key[:1] == (name,)


@every_kind
def test_every_number_is_explained_and_every_kind_says_what_torch_has(kind: str) -> None:
    assert all(term(name, kind).meaning for name in signature(KINDS[kind]).parameters)
    said = str(getdoc(KINDS[kind]))
    assert "torch" in said or kind in {"branch"}
    assert example(kind).kind == kind
    assert example(kind).peak == 1.0 or kind in {"clamp", "sum"}


@given(levels, st.integers(0, 200))
def test_from_a_value_to_itself_nothing_moves(value: float, i: int) -> None:
    shapes = ["linear", "cosine", "sqrt"] + ["exponential"] * (value != 0)
    falls = [make(value, 100, end=value) for make in (linear, cosine, KINDS["polynomial"])]
    assert {made(i) for made in [*falls, *(wsd(value, 100, end=value, shape=shape) for shape in shapes)]} == {
        value
    }


def test_a_million_steps_in_a_chain_drift_in_torch_and_not_here() -> None:
    gamma, steps = 0.5 ** (1 / 250_000), 1_000_000
    chained = 0.1
    for _ in range(steps):
        chained *= gamma  # what ExponentialLR does
    assert KINDS["exponential"](0.1, every=250_000)(steps) == 0.1 / 16
    assert chained != 0.1 / 16
    assert cosine(0.1, steps=steps)(steps // 2) == pytest.approx(0.05, rel=1e-15)


def test_half_way_near_the_peak_no_digit_is_lost() -> None:
    exact = 1 - (math.pi * 1e-9) ** 2 / 4  # of (1 + cos πx)/2 at x = 1e-9, next term 1e-36
    assert cosine(1.0, steps=10**9)(1) == exact
    assert 1 - cosine(1.0, steps=10**6)(1) == pytest.approx((math.pi * 1e-6) ** 2 / 4, rel=1e-4)


def test_the_last_update_of_a_billion_does_not_fall_below_the_end() -> None:
    assert 0.7 + (0.1 - 0.7) < 0.1
    assert cosine(0.7, steps=10**9, end=0.1)(10**9 - 1) == 0.1


def test_growth_beyond_the_largest_float_neither_raises_nor_becomes_nan() -> None:
    grown = KINDS["exponential"](10.0, every=1, factor=10.0)
    assert grown(10**6) == sys.float_info.max
    assert (grown + grown)(10**6) == (grown * grown)(10**6) == sys.float_info.max
    assert (grown + grown.scaled(-1.0))(10**6) == 0.0
    assert (grown * grown * constant(0.0))(10**6) == 0.0
    assert KINDS["step"](0.0, every=1, factor=10.0)(10**6) == 0.0
    assert (-1.0 * grown)(10**6) == -sys.float_info.max


def test_the_length_of_an_epoch_alone_changes_what_an_epoch_is() -> None:
    """World size and accumulation change steps_per_epoch and nothing else: a step is an applied update."""
    given_as = linear(1.0, steps="2 epochs")
    one, two = given_as.resolve(steps_per_epoch=100), given_as.resolve(steps_per_epoch=50)
    assert [one(2 * i) for i in range(100)] == [two(i) for i in range(100)]


@given(st.integers(1, 10_000), st.integers(0, 99), st.data())
def test_shares_of_a_run_fit_into_it_however_short_it_is(
    steps: int, warmup: int, data: st.DataObject
) -> None:
    cooldown = data.draw(st.integers(0, 100 - warmup))
    given_as = wsd(0.5, "100 %", warmup=f"{warmup} %", cooldown=f"{cooldown} %", end=0.1)
    assert given_as.resolve(run_steps=steps)(steps) == 0.1


def test_a_plateau_that_sees_nothing_is_a_constant() -> None:
    assert [plateau(0.3, warmup=2)(i) for i in range(50)] == [constant(0.3, warmup=2)(i) for i in range(50)]
