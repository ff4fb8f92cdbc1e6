"""One schedule by itself: warmup, refusals, previews and pictures."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule.rows import ROWS

from downslope.errors import BadInput
from downslope.schedule import (
    KINDS,
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    example,
    exponential,
    inverse_sqrt,
    linear,
    plateau,
    polynomial,
    step,
    wsd,
)


def test_the_shape_begins_where_the_warmup_ends() -> None:
    assert step(1.0, every=2, factor=0.5, warmup=3)(4) == 1.0
    assert step(1.0, every=2, factor=0.5, warmup=3)(5) == 0.5
    assert cosine(1.0, steps=30, warmup=10)(20) == pytest.approx(0.5)
    assert [cosine(1.0, steps=30, warmup=10)(10 + i) for i in range(25)] == [
        cosine(1.0, 20)(i) for i in range(25)
    ]


def test_the_inverse_root_is_the_transformers() -> None:
    """arXiv:1706.03762, eq. 3: d^-0.5 · min(t^-0.5, t · warmup_steps^-1.5), t from 1."""
    d, w = 512, 4000
    ours = inverse_sqrt((w * d) ** -0.5, every=w, warmup=w - 1)
    for t in (1, 2, 1000, 3999, 4000, 4001, 10_000, 10**6):
        assert ours(t - 1) == pytest.approx(d**-0.5 * min(t**-0.5, t * w**-1.5), rel=1e-12)


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
        (lambda: polynomial(0.1, 10, power=0), "polynomial: power must be above 0, got 0"),
        (lambda: cosine_restarts(0.1, 10, growth=0), "growth must be a whole number from 1, got 0"),
        (lambda: cosine_restarts(0.1, 10, growth=1.5), "growth must be a whole number from 1, got 1.5"),  # type: ignore[arg-type]
        (lambda: cyclic(0.1, 0.0, up=5, down=0), "cyclic: down must be at least 1, got 0"),
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
            lambda: constant(0.1).picture(0),
            "a picture needs at least 1 step, 30 columns and 3 rows, got 0, 72",
        ),
        (lambda: constant(0.1).picture(9, width=29), "a picture needs at least 1 step, 30 columns"),
        (lambda: example("cosin"), "unknown schedule 'cosin'. Did you mean 'cosine'"),
        (
            lambda: Schedule.from_data({"schedule": "cosin", "peak": 1}),
            "unknown schedule 'cosin'. Did you mean 'cosine'",
        ),
        (lambda: Schedule.from_data({"peak": 1}), "unknown schedule None"),
        (lambda: Schedule.from_data({"schedule": ["cosine"]}), r"unknown schedule \['cosine'\]"),
        (lambda: Schedule.from_data(0.1), "a schedule is a table such as"),
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
def test_what_makes_no_sense_is_refused_in_one_sentence(make: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@given(st.integers(1, 10**6), st.integers(2, 500))
def test_a_preview_shows_first_and_last_update(steps: int, points: int) -> None:
    shown = linear(1.0, steps=steps).preview(steps, points)
    places = [place for place, _ in shown]
    assert places == sorted(set(places))
    assert len(places) <= points
    assert (places[0], places[-1]) == (0, steps - 1)
    assert all(value == linear(1.0, steps=steps)(place) for place, value in shown)


# Pictures


def heights(picture: str, plain: bool) -> list[float]:
    """The mean height of the ink in each column of characters that has any, in rows from the foot; read back
    from the text alone.
    """
    *rows, axis, _ = picture.splitlines()
    left = len(axis) - len(axis.lstrip()) + 1
    width = max(map(len, rows))
    found = []
    for column in range(left, width):
        ink: list[float] = []
        for k, row in enumerate(reversed(rows)):
            one = row[column] if column < len(row) else " "
            if plain:
                ink += [k + 0.5] * (one == "*")
            else:
                bits = ord(one) - 0x2800 if one != " " else 0
                dots = {0x40: 0, 0x80: 0, 0x04: 1, 0x20: 1, 0x02: 2, 0x10: 2, 0x01: 3, 0x08: 3}
                ink += [k + (up + 0.5) / 4 for bit, up in dots.items() if bits & bit]
        found.append(sum(ink) / len(ink) if ink else math.nan)
    return found


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "one_cycle", "inverse_time"])
def test_a_picture_shows_the_curve(kind: str, plain: bool) -> None:
    """Every column of ink lies within a row of the values that it and its neighbours stand for."""
    schedule, height = example(kind), 11
    drawn = heights(schedule.picture(100, height=height, plain=plain), plain)
    assert len(drawn) > 60
    share = [schedule(i) / max(schedule(i) for i in range(100)) * height for i in range(100)]
    for column, ink in enumerate(drawn):
        near = share[max(0, (column - 1) * 100 // len(drawn)) : (column + 2) * 100 // len(drawn)]
        assert min(near) - 1 < ink < max(near) + 1


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(KINDS)).flatmap(lambda kind: ROWS[kind].any),
    st.integers(1, 10**7),
    st.integers(30, 120),
    st.integers(3, 30),
    st.booleans(),
)
def test_every_picture_fits_its_frame_and_has_no_gap(
    schedule: Schedule, steps: int, width: int, height: int, plain: bool
) -> None:
    lines = schedule.picture(steps, width, height, plain=plain).splitlines()
    assert len(lines) == height + 2
    assert all(len(line) <= width for line in lines)
    assert lines[-1].endswith(f"{steps} updates")
    assert all(line == line.rstrip() for line in lines)
    assert not plain or all(line.isascii() for line in lines)
    assert not any(math.isnan(ink) for ink in heights("\n".join(lines), plain))


@pytest.mark.parametrize("jump", [step(1.0, every=10, factor=0.0), constant(0.0).then(constant(1.0), at=10)])
def test_a_jump_is_drawn_as_an_unbroken_line(jump: Schedule) -> None:
    lines = jump.picture(20, width=40, height=8, plain=True).splitlines()[:-2]
    inked = [row.count("*") for row in lines]
    assert min(inked) >= 1
    assert max(inked[1:-1]) == 1


def test_the_axis_keeps_zero_where_the_curve_comes_near_and_drops_it_where_not() -> None:
    assert cosine(0.1, 50).picture(50).splitlines()[-3].lstrip().startswith("0 ")
    momentum = linear(0.85, 50, end=0.95).picture(50)
    assert momentum.splitlines()[-3].lstrip().startswith("0.85 ")
    assert constant(0.3).picture(5).splitlines()[0].lstrip().startswith("0.3 ")
    assert constant(0.0).picture(5).splitlines()[-3].lstrip().startswith("0 ┤⣀")


def test_a_picture_of_a_plateau_shows_what_was_seen() -> None:
    schedule = plateau(1.0, factor=0.5, patience=0)
    seen = [(0, 1.0), (50, 1.0)]
    assert schedule.picture(100) == constant(1.0).picture(100)
    assert schedule.picture(100, seen=seen) == step(1.0, every=50, factor=0.5).picture(100)
