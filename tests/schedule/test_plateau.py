"""The kind that reacts: against torch's ReduceLROnPlateau on random sequences, and where torch is wrong."""

import json
import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from downslope.errors import BadInput
from downslope.schedule import Schedule, constant, cosine, linear, plateau


def torch_rates(values: list[float], peak: float, **numbers: Any) -> list[float]:
    """The rate after each observation."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = ReduceLROnPlateau(optimizer, **numbers)
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def our_rates(schedule: Schedule, values: list[float], places: list[int]) -> list[float]:
    seen = list(zip(places, values, strict=True))
    return [schedule(place, seen) for place in places]


# A grid, so that ties with the best and with the threshold happen; positive, where torch's "rel" is right.
observed = st.one_of(
    st.sampled_from([0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0]),
    st.floats(0.0, 3.0),
    st.sampled_from([math.nan, math.inf]),
)


@given(
    st.lists(observed, max_size=60),
    st.sampled_from(["min", "max"]),
    st.sampled_from(["rel", "abs"]),
    st.sampled_from([0.0, 1e-4, 0.01, 0.1, 0.5]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    st.sampled_from([0.0, 1e-3, 0.2]),
    st.data(),
)
def test_equals_torch_on_random_observations(
    values: list[float],
    mode: str,
    threshold_mode: str,
    threshold: float,
    patience: int,
    cooldown: int,
    factor: float,
    end: float,
    data: st.DataObject,
) -> None:
    numbers = {
        "mode": mode,
        "factor": factor,
        "patience": patience,
        "threshold": threshold,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
    }
    gaps = data.draw(st.lists(st.integers(0, 100), min_size=len(values), max_size=len(values)))
    # However many updates lie between two observations, they are counted alike.
    places = list(accumulate(gap + 1 for gap in gaps))
    ours = our_rates(plateau(0.3, end=end, **numbers), values, places)
    assert ours == pytest.approx(
        torch_rates(values, 0.3, min_lr=end, eps=0.0, **numbers), rel=1e-12, abs=1e-300
    )


def test_equals_torch_on_a_long_noisy_curve() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(3000, generator=generator, dtype=torch.float64)
    values = (1 / (1 + torch.arange(3000) / 100) + 0.3 * noise).tolist()
    numbers = {"factor": 0.7, "patience": 20, "cooldown": 10, "threshold": 0.01}
    theirs = torch_rates(values, 1.0, eps=0.0, **numbers)
    assert len(set(theirs)) > 10
    assert our_rates(plateau(1.0, **numbers), values, list(range(1, 3001))) == pytest.approx(
        theirs, rel=1e-12
    )


@pytest.mark.parametrize("mode", ["min", "max"])
def test_below_zero_worse_is_worse_where_torchs_relative_threshold_takes_it_for_better(mode: str) -> None:
    """A log-likelihood that gets worse by 5 % each time: torch never cuts, and its best goes with it."""
    worse = 1.05 if mode == "max" else 1 / 1.05
    values = [-10.0 * worse**k for k in range(12)]
    numbers = {"mode": mode, "threshold": 0.1, "patience": 2}
    assert torch_rates(values, 1.0, **numbers) == [1.0] * 12
    assert our_rates(plateau(1.0, **numbers), values, list(range(12)))[3:6] == pytest.approx([0.1, 0.1, 0.1])


def test_small_rates_go_on_falling_where_torchs_eps_stops_them() -> None:
    values = [1.0] * 8
    theirs = torch_rates(values, 1e-7, patience=0)
    assert theirs[-1] == pytest.approx(1e-8)  # 1e-8 - 1e-9 is not above its eps
    assert plateau(1e-7, patience=0)(8, list(enumerate(values))) == pytest.approx(1e-14)


def test_a_relative_threshold_of_one_begins_with_the_first_where_torch_calls_it_bad() -> None:
    """inf · (1 - 1) is NaN, so that nothing is ever better in torch."""
    numbers = {"threshold": 1.0, "patience": 0}
    assert torch_rates([1.0], 1.0, **numbers) == [0.1]
    assert plateau(1.0, **numbers)(0, [(0, 1.0)]) == 1.0


def test_nan_is_never_better_and_counts_like_any_observation_that_is_not() -> None:
    schedule = plateau(1.0, patience=1)
    assert schedule(9, [(1, 1.0), (2, math.nan)]) == 1.0
    assert schedule(9, [(1, 1.0), (2, math.nan), (3, math.nan)]) == 0.1
    assert schedule(9, [(1, math.nan), (2, 1.0), (3, 0.9)]) == 1.0  # nor does it become the best


def test_only_what_is_seen_by_the_step_counts_so_the_past_never_changes() -> None:
    schedule = plateau(1.0, factor=0.5, patience=0)
    seen: list[tuple[int, float]] = [(0, 1.0)]
    told = []
    for i in range(0, 100, 10):
        told.append((i, schedule(i, seen)))
        seen.append((i + 10, 1.0))
    assert [value for _, value in told] == [0.5**k for k in range(10)]
    assert all(schedule(i, seen) == value for i, value in told)
    assert schedule(19, seen) == 0.5
    assert schedule(20, seen) == 0.25  # an observation after 20 updates is known to the update of index 20


def test_it_resumes_from_the_journal_alone() -> None:
    """What was seen survives JSON, and the schedule has nothing else to remember."""
    seen = [(10 * k, value) for k, value in enumerate([3.0, 2.0, 2.5, 2.4, 2.3, 1.0, 1.1, 1.2, 1.3])]
    schedule = plateau(0.3, patience=2, cooldown=1)
    again = Schedule.from_data(json.loads(json.dumps(schedule.data())))
    read = [tuple(one) for one in json.loads(json.dumps(seen))]
    assert [again(i, read) for i in range(100)] == [schedule(i, seen) for i in range(100)]
    assert (again(39, read), again(40, read)) == pytest.approx((0.3, 0.03))


def test_what_is_seen_in_the_warmup_does_not_count() -> None:
    schedule = plateau(1.0, patience=0, warmup=10)
    assert schedule(12, [(2, 0.1), (5, 0.2), (9, 0.3)]) == 1.0
    assert schedule(12, [(2, 0.1), (10, 5.0), (11, 4.0)]) == 1.0
    assert schedule(12, [(10, 5.0), (11, 5.0)]) == 0.1
    assert schedule(4, [(1, 1.0), (2, 2.0)]) == pytest.approx(5 / 11)


def test_below_zero_it_falls_towards_its_end_too() -> None:
    schedule = plateau(-1.0, factor=0.1, patience=0, end=-0.05)
    assert [schedule(i, [(k, 1.0) for k in range(9)]) for i in range(4)] == pytest.approx(
        [-1, -0.1, -0.05, -0.05]
    )


def test_observations_out_of_order_are_refused() -> None:
    with pytest.raises(
        BadInput, match="plateau: observations must be in the order of their steps, got 3 behind 5"
    ):
        plateau(1.0)(9, [(5, 1.0), (3, 1.0)])


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"factor": 1.0}, "plateau: factor must be below 1, got 1.0"),
        ({"factor": -0.1}, "plateau: factor must be at least 0, got -0.1"),
        ({"patience": 1.5}, "plateau: patience must be a whole number from 0, got 1.5"),
        ({"patience": "3 epochs"}, "plateau: patience must be a whole number from 0, got '3 epochs'"),
        ({"cooldown": -1}, "plateau: cooldown must be a whole number from 0, got -1"),
        ({"mode": "minimum"}, "plateau: mode must be 'min' or 'max', got 'minimum'. Did you mean 'min'"),
        ({"threshold_mode": "relative"}, "plateau: threshold_mode must be 'rel' or 'abs', got 'relative'"),
        ({"threshold": -1}, "plateau: threshold must be at least 0, got -1"),
        ({"end": -0.1}, "plateau: end must lie between 0 and peak = 1, got -0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(numbers: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        plateau(1.0, **numbers)


# Within others


SEEN = [(0, 1.0), (10, 1.0), (20, 1.0), (30, 0.5), (40, 0.5)]


def test_sums_products_and_clamps_pass_on_what_was_seen() -> None:
    part = plateau(1.0, patience=0)
    for whole, expected in [
        (part + 0.5, lambda v: v + 0.5),
        (part * cosine(1.0, steps=100), lambda v: v * cosine(1.0, steps=100)(25)),
        (part.clamp(low=0.3), lambda v: max(v, 0.3)),
        (2 * part, lambda v: 2 * v),
    ]:
        assert whole.reacts
        assert whole(25, SEEN) == pytest.approx(expected(0.01), rel=1e-14)
        assert whole(25) == pytest.approx(expected(1.0), rel=1e-14)


def test_in_a_sequence_each_part_sees_what_is_observed_from_its_start_on() -> None:
    first = plateau(1.0, patience=0).then(plateau(5.0, patience=0), at=15)
    assert first(14, SEEN) == 0.1
    assert first(15, SEEN) == first(29, SEEN) == 5.0  # of what it may know, 20 is the first
    assert first(31, SEEN) == 5.0
    assert first(40, SEEN) == 0.5
    assert constant(1.0).then(plateau(5.0, patience=0), at=20)(20, SEEN) == 5.0


def test_a_branch_starts_from_where_the_plateau_is_and_heeds_nothing_after() -> None:
    branch = plateau(1.0, patience=0).cooldown(start=12, steps=10)
    assert branch(11, SEEN) == 0.1
    assert [branch(i, SEEN) for i in (12, 17, 22)] == pytest.approx([0.1, 0.05, 0.0])
    assert linear(1.0, 10).cooldown(5, 5).reacts is False


def test_a_preview_shows_what_was_seen() -> None:
    schedule = plateau(1.0, patience=0)
    assert dict(schedule.preview(41, points=5)) == dict.fromkeys([0, 10, 20, 30, 40], 1.0)
    values = [value for _, value in schedule.preview(41, points=5, seen=SEEN)]
    assert values == pytest.approx([1.0, 0.1, 0.01, 0.01, 0.001])
