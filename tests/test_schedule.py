"""Schedules against torch.optim.lr_scheduler in float64, and the traps of schedulers, named by the tests."""

import json
import math
import pickle
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from downslope.errors import BadInput
from downslope.schedule import (
    KINDS,
    Schedule,
    constant,
    cosine,
    duration,
    exponential,
    in_steps,
    linear,
    step,
    wsd,
)

values = st.floats(-1e6, 1e6)
lengths = st.integers(1, 10_000)


@st.composite
def schedules(draw: st.DrawFn, kind: str | None = None) -> Schedule:
    """Any schedule whose durations are in steps."""
    kind = kind or draw(st.sampled_from(sorted(KINDS)))
    peak, end, steps = draw(values), draw(values), draw(lengths)
    warmup = draw(st.integers(0, steps - 1))
    match kind:
        case "constant":
            return constant(peak, warmup)
        case "step" | "exponential":
            return KINDS[kind](peak, draw(lengths), draw(st.floats(0, 1)), warmup)
        case "wsd":
            return wsd(peak, steps, warmup, draw(st.integers(0, steps - warmup)), end)
        case "branch":
            trunk = draw(schedules(draw(st.sampled_from(["constant", "cosine"]))))
            return trunk.cooldown(draw(lengths), draw(lengths), end)
        case _:
            return KINDS[kind](peak, steps, end, warmup)


def torch_rates(make: object, peak: float, steps: int) -> list[float]:
    """What torch's scheduler sets before each of `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (constant(0.3), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (linear(0.3, steps=40), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=40)),
        (linear(0.3, steps=40, end=0.03), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=40)),
        (step(0.3, every=7, factor=0.2), lambda o: lr_scheduler.StepLR(o, 7, gamma=0.2)),
        (exponential(0.3, every=10), lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5**0.1)),
        (cosine(0.3, steps=40), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40)),
        (
            cosine(0.3, steps=40, end=0.01),
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.01),
        ),
        (
            cosine(0.3, steps=40, warmup=8),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.LinearLR(o, 1 / 9, total_iters=8), lr_scheduler.CosineAnnealingLR(o, T_max=32)],
                milestones=[8],
            ),
        ),
    ],
    ids=lambda one: repr(one) if isinstance(one, Schedule) else "torch",
)
def test_equals_torch_where_torch_is_right(ours: Schedule, theirs: object) -> None:
    assert [ours(i) for i in range(41)] == pytest.approx(torch_rates(theirs, 0.3, 41), rel=1e-10, abs=1e-16)


def test_past_the_end_the_value_stays_where_torchs_cosine_climbs_back_to_the_peak() -> None:
    theirs = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10), 0.3, 21)
    assert theirs[20] == pytest.approx(0.3)
    assert {cosine(0.3, steps=10, end=0.01)(i) for i in (10, 11, 20, 10**9)} == {0.01}


def test_the_step_after_the_last_does_not_raise_where_torchs_onecycle_does() -> None:
    with pytest.raises(ValueError, match="Tried to step"):
        torch_rates(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10), 0.3, 12)
    assert linear(0.3, steps=10, warmup=3)(12) == 0.0


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(data=st.data())
def test_the_last_value_is_kept_for_ever(kind: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules(kind))
    numbers = dict(schedule.numbers)
    if "end" in numbers:
        last = numbers.get("steps", numbers.get("start", 0) + numbers.get("cooldown", 0))
        assert schedule(last) == schedule(last + 1) == schedule(sys.maxsize) == numbers["end"]
    else:
        assert math.isfinite(schedule(sys.maxsize))


@given(schedules(), st.integers(0, 30_000))
def test_the_value_lies_between_zero_peak_and_end(schedule: Schedule, i: int) -> None:
    def reached(of: Schedule) -> list[float]:
        numbers = dict(of.numbers)
        inner = reached(numbers["trunk"]) if "trunk" in numbers else []
        return [0.0, *inner, *(numbers[name] for name in ("peak", "end") if name in numbers)]

    slack = 1e-12 * max(map(abs, reached(schedule)))
    assert min(reached(schedule)) - slack <= schedule(i) <= max(reached(schedule)) + slack


@given(schedules())
def test_data_survives_json(schedule: Schedule) -> None:
    read = Schedule.from_data(json.loads(json.dumps(schedule.data())))
    assert read == schedule
    assert hash(read) == hash(schedule)
    assert read.data() == schedule.data()


def test_schedules_are_frozen_plain_data() -> None:
    schedule = cosine(0.1, steps=100, warmup=5)
    with pytest.raises(FrozenInstanceError):
        schedule.kind = "linear"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert schedule != cosine(0.1, steps=100, warmup=6)
    assert len({schedule, cosine(0.1, 100, warmup="5 %"), cosine(0.1, 100, 0, 5)}) == 1


# Warmup


@pytest.mark.parametrize(
    "schedule",
    [
        constant(0.6, 4),
        linear(0.6, 20, warmup=4),
        step(0.6, 5, warmup=4),
        cosine(0.6, 20, warmup=4),
        wsd(0.6, 20, 4),
    ],
    ids=repr,
)
def test_warmup_wastes_neither_the_first_update_nor_repeats_the_peak(schedule: Schedule) -> None:
    assert [schedule(i) for i in range(5)] == pytest.approx([0.12, 0.24, 0.36, 0.48, 0.6], rel=1e-15)
    assert schedule(3) < schedule(4) == 0.6


def test_the_shape_begins_where_the_warmup_ends() -> None:
    assert step(1.0, every=2, factor=0.5, warmup=3)(4) == 1.0
    assert step(1.0, every=2, factor=0.5, warmup=3)(5) == 0.5
    assert cosine(1.0, steps=30, warmup=10)(20) == pytest.approx(0.5)
    assert [cosine(1.0, steps=30, warmup=10)(10 + i) for i in range(25)] == [
        cosine(1.0, 20)(i) for i in range(25)
    ]


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_no_warmup_one_step_and_an_end_above_the_peak_are_right(kind: str) -> None:
    assert KINDS[kind](0.5, steps=1, warmup=0)(0) == 0.5
    assert KINDS[kind](0.5, steps=1, warmup=0, end=0.2)(1) == 0.2
    rising = [KINDS[kind](0.9, steps=10, end=0.99)(i) for i in range(11)]
    assert rising == sorted(rising)
    assert (rising[0], rising[10]) == (0.9, 0.99)


@given(values, st.integers(0, 200))
def test_from_a_value_to_itself_nothing_moves(value: float, i: int) -> None:
    assert {make(value, 100, end=value)(i) for make in (linear, cosine, wsd)} == {value}


def test_half_way_near_the_peak_no_digit_is_lost() -> None:
    exact = 1 - (math.pi * 1e-9) ** 2 / 4  # of (1 + cos πx)/2 at x = 1e-9, next term 1e-36
    assert cosine(1.0, steps=10**9)(1) == exact
    assert 1 - cosine(1.0, steps=10**6)(1) == pytest.approx((math.pi * 1e-6) ** 2 / 4, rel=1e-4)


# A trunk and its branches


@given(
    st.floats(0, 10),
    st.floats(0, 10),
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 200),
)
def test_a_branch_of_a_constant_trunk_is_wsd_to_the_bit(
    peak: float, end: float, warmup: int, stable: int, cooldown: int, i: int
) -> None:
    steps = warmup + stable + cooldown
    branch = constant(peak, warmup).cooldown(start=warmup + stable, steps=cooldown, end=end)
    assert branch(i) == wsd(peak, steps, warmup, cooldown, end)(i)


@given(schedules("cosine"), st.integers(0, 5000), st.integers(1, 500))
def test_a_branch_leaves_the_trunk_only_at_its_start(trunk: Schedule, start: int, steps: int) -> None:
    branch = trunk.cooldown(start, steps, end=0.25)
    assert all(branch(i) == trunk(i) for i in {0, start // 2, max(start - 1, 0), start})
    assert branch(start + steps) == branch(start + steps + 7) == 0.25
    assert branch(start + 1) == pytest.approx(trunk(start) + (0.25 - trunk(start)) / steps)


def test_a_branch_of_a_branch() -> None:
    twice = constant(1.0).cooldown(10, 10, end=0.5).cooldown(40, 10)
    assert [twice(i) for i in (9, 15, 20, 40, 45, 50)] == [1.0, 0.75, 0.5, 0.5, 0.25, 0.0]
    assert Schedule.from_data(twice.data()) == twice


# Counting


def test_building_a_schedule_changes_nothing_where_torchs_onecycle_rewrites_beta1() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=0.1)
    lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=10)
    assert theirs.param_groups[0]["betas"] != (0.9, 0.999)
    schedule = cosine(0.1, steps=10)
    first = [schedule(i) for i in range(10)]
    assert (
        first == [schedule(i) for i in reversed(range(10))][::-1]
    )  # no state: the order of questions is free


def test_a_million_steps_in_a_chain_drift_in_torch_and_not_here() -> None:
    gamma, steps = 0.5 ** (1 / 250_000), 1_000_000
    chained = 0.1
    for _ in range(steps):
        chained *= gamma  # what ExponentialLR does
    assert exponential(0.1, every=250_000)(steps) == 0.1 / 16
    assert chained != 0.1 / 16
    assert cosine(0.1, steps=steps)(steps // 2) == pytest.approx(0.05, rel=1e-15)


@given(schedules(), st.floats(-100, 100), st.integers(0, 20_000))
def test_two_groups_keep_their_ratio_under_every_schedule(schedule: Schedule, ratio: float, i: int) -> None:
    assert schedule.scaled(ratio)(i) == pytest.approx(ratio * schedule(i), rel=1e-9, abs=1e-6)


def test_growth_beyond_the_largest_float_does_not_raise_in_the_middle_of_a_run() -> None:
    assert exponential(1e-7, every=1, factor=10.0)(10**6) == 1e-7 * sys.float_info.max
    assert step(0.0, every=1, factor=10.0)(10**6) == 0.0


@given(st.integers(1, 10**6), st.integers(2, 500))
def test_a_preview_shows_first_and_last_update(steps: int, points: int) -> None:
    shown = linear(1.0, steps=steps).preview(steps, points)
    places = [place for place, _ in shown]
    assert places == sorted(set(places))
    assert len(places) <= points
    assert (places[0], places[-1]) == (0, steps - 1)
    assert all(value == linear(1.0, steps=steps)(place) for place, value in shown)


# Units


@pytest.mark.parametrize(
    ("given_as", "spelt"),
    [
        (500, 500),
        ("500 steps", 500),
        ("1 step", 1),
        ("500.0steps", 500),
        ("3 epochs", "3 epochs"),
        ("3 epoch", "3 epochs"),
        ("01 epochs", "1 epoch"),
        (" 0.50 epochs ", "0.5 epochs"),
        ("64000 samples", "64000 samples"),
        ("10%", "10 %"),
        ("100 %", "100 %"),
        ("12.50 %", "12.5 %"),
        (torch.tensor(7).item(), 7),
    ],
)
def test_a_duration_has_one_spelling(given_as: object, spelt: object) -> None:
    assert duration(given_as) == spelt
    assert duration(duration(given_as)) == spelt


@pytest.mark.parametrize(
    "wrong",
    [-1, 0.05, 500.0, True, None, "", "500", "ten steps", "1.5 steps", "-3 epochs", "10 percent", "3 tokens",
     "1e3 steps", "٣ epochs", "nan %", "9" * 40 + " steps", 10**400, [1], "10 % of it"],
)  # fmt: skip
def test_units_are_never_guessed(wrong: object) -> None:
    with pytest.raises(BadInput, match="warmup must be a whole number of steps from 0 or text such as"):
        cosine(0.1, steps=100, warmup=wrong)  # type: ignore[arg-type]


def test_percentages_epochs_and_samples_become_steps() -> None:
    given = cosine(0.1, steps="100 %", warmup="5 %")
    assert given.resolve(run_steps=200) == cosine(0.1, steps=200, warmup=10)
    assert linear(0.1, "3 epochs", warmup="0.5 epochs").resolve(steps_per_epoch=20) == linear(
        0.1, 60, warmup=10
    )
    assert step(0.1, every="640 samples").resolve(batch_size=64) == step(0.1, every=10)
    assert constant(0.1, warmup="5 %").resolve(run_steps=200) == constant(0.1, warmup=10)
    assert cosine(0.1, 50).resolve() == cosine(0.1, 50)
    trunk = constant(0.1, warmup="1 epoch").cooldown("80 %", "20 %")
    assert trunk.resolve(run_steps=100, steps_per_epoch=9) == constant(0.1, warmup=9).cooldown(80, 20)


def test_a_percentage_is_of_the_schedules_own_length_and_of_the_run_where_there_is_none() -> None:
    assert wsd(0.1, steps=1000) == wsd(0.1, steps=1000, cooldown=200)
    assert cosine(0.1, "50 %", warmup="10 %").resolve(run_steps=1000) == cosine(0.1, 500, warmup=50)
    assert step(0.1, every="10 %", warmup="5 %").resolve(run_steps=1000) == step(0.1, every=100, warmup=50)


def test_percentages_are_exact_and_rounded_down() -> None:
    assert in_steps("7 %", run_steps=100) == 7  # 0.07 · 100 is 7.000000000000001 in floats
    assert in_steps("29 %", run_steps=100) == 29  # and 0.29 · 100 is 28.999999999999996
    assert [in_steps("5 %", run_steps=n) for n in (1, 19, 20, 39)] == [0, 0, 1, 1]
    assert cosine(0.1, "10 %").resolve(run_steps=2) == cosine(0.1, 1)


@pytest.mark.parametrize(
    ("unit", "missing"),
    [("3 epochs", "steps_per_epoch"), ("64 samples", "batch_size"), ("10 %", "run_steps")],
)
def test_an_unknown_exchange_rate_is_named(unit: str, missing: str) -> None:
    rates = {"run_steps": 10, "steps_per_epoch": 10, "batch_size": 10}
    del rates[missing]
    with pytest.raises(BadInput, match=f"linear: steps is '{unit}'.*{missing} must be given"):
        linear(0.1, steps=unit).resolve(**rates)
    with pytest.raises(BadInput, match=missing):
        linear(0.1, steps=unit).resolve(**{**rates, missing: 0})
    with pytest.raises(BadInput, match=r"call resolve\(...\) first"):
        linear(0.1, steps=unit)(0)


def test_the_length_of_an_epoch_alone_changes_what_an_epoch_is() -> None:
    """World size and accumulation change steps_per_epoch and nothing else: a step is an applied update."""
    given = linear(1.0, steps="2 epochs")
    one, two = given.resolve(steps_per_epoch=100), given.resolve(steps_per_epoch=50)
    assert [one(2 * i) for i in range(100)] == [two(i) for i in range(100)]


@given(st.integers(1, 10_000), st.integers(0, 99), st.data())
def test_shares_of_a_run_fit_into_it_however_short_it_is(
    steps: int, warmup: int, data: st.DataObject
) -> None:
    cooldown = data.draw(st.integers(0, 100 - warmup))
    given = wsd(0.5, "100 %", warmup=f"{warmup} %", cooldown=f"{cooldown} %", end=0.1)
    assert given.resolve(run_steps=steps)(steps) == 0.1


# Refusals


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cosine(math.nan, 10), "cosine: peak must be a finite number, got nan"),
        (lambda: cosine("0.1", 10), "cosine: peak must be a finite number, got '0.1'"),  # type: ignore[arg-type]
        (lambda: cosine(True, 10), "cosine: peak must be a finite number, got True"),
        (lambda: cosine(10**400, 10), "cosine: peak must be a finite number"),
        (lambda: linear(0.1, 10, end=math.inf), "linear: end must be a finite number, got inf"),
        (lambda: linear(0.1, 0), "linear: steps must be at least 1, got 0"),
        (lambda: step(0.1, every=0), "step: every must be at least 1, got 0"),
        (lambda: exponential(0.1, every=5, factor=-0.5), "exponential: factor must be at least 0, got -0.5"),
        (
            lambda: cosine(0.1, 10, warmup=10),
            "cosine: warmup must be below steps = 10, to reach the peak, got 10",
        ),
        (
            lambda: wsd(0.1, 10, warmup=4, cooldown=7),
            "wsd: warmup 4 and cooldown 7 do not fit into steps = 10",
        ),
        (lambda: cosine(0.1, 10)(-1), "cosine: a step is at least 0, got -1"),
        (lambda: constant(0.1).preview(0), "a preview needs at least 1 step"),
        (
            lambda: Schedule.from_data({"schedule": "cosin", "peak": 1}),
            "unknown schedule 'cosin'. Did you mean 'cosine'",
        ),
        (lambda: Schedule.from_data({"peak": 1}), "unknown schedule None"),
        (lambda: Schedule.from_data({"schedule": ["cosine"]}), r"unknown schedule \['cosine'\]"),
        (lambda: Schedule.from_data(0.1), "a schedule is a table such as"),  # type: ignore[arg-type]
        (
            lambda: Schedule.from_data({"schedule": "cosine", "peak": 1, "stepz": 9}),
            "cosine has no key 'stepz'. Did you mean 'steps'. Allowed: peak, steps, end, warmup",
        ),
        (lambda: Schedule.from_data({"schedule": "cosine", "peak": 1}), "cosine needs the key 'steps'"),
        (
            lambda: Schedule.from_data({"schedule": "branch", "trunk": 3, "start": 1, "cooldown": 1}),
            "a schedule is a table such as",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(make: object, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_the_culprit_is_known_by_its_key() -> None:
    data = {
        "schedule": "branch",
        "trunk": {"schedule": "cosine", "peak": 1, "steps": "x"},
        "start": 1,
        "cooldown": 1,
    }
    with pytest.raises(BadInput) as caught:
        Schedule.from_data(data)
    assert caught.value.key == ("trunk", "steps")
