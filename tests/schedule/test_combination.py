"""Schedules of schedules: sums, products, sequences, clamps, branches."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule.rows import ROWS, levels, simple

from downslope.errors import BadInput
from downslope.schedule import (
    Schedule,
    constant,
    cosine,
    cyclic,
    exponential,
    linear,
    multistep,
    one_cycle,
    plateau,
    sequence,
    step,
    wsd,
)

steps = st.integers(0, 30_000)


@given(simple, simple, steps)
def test_operators_are_what_they_say_at_every_step(a: Schedule, b: Schedule, i: int) -> None:
    assert (a + b)(i) == a(i) + b(i) == (b + a)(i)
    assert (a * b)(i) == a(i) * b(i) == (b * a)(i)
    assert (a + 2.5)(i) == (2.5 + a)(i) == a(i) + 2.5
    assert (2 * a)(i) == (a * 2)(i) == a.scaled(2)(i) == 2 * a(i)
    assert a.clamp(low=1.0)(i) == max(a(i), 1.0)
    assert a.clamp(high=1.0)(i) == min(a(i), 1.0)


@given(simple, simple, st.integers(0, 1000), steps)
def test_then_hands_over_once_and_the_next_counts_from_its_own_start(
    a: Schedule, b: Schedule, at: int, i: int
) -> None:
    whole = a.then(b, at=at)
    assert whole(i) == (a(i) if i < at else b(i - at))
    assert whole(at) == b(0)


def test_chains_of_one_operator_are_flat() -> None:
    a, b, c = constant(1.0), linear(1.0, 10), cosine(1.0, 20)
    assert a + b + c == a + (b + c)
    assert a * b * c == a * (b * c)
    assert a.then(b, at=5).then(c, at=15) == sequence([a, b, c], at=[5, 15])
    assert [len((a + b + c).parts), len((a + b * c).parts)] == [3, 2]
    assert sum([a, b]) == constant(0.0) + a + b  # Python's own sum


def test_then_begins_where_the_first_ends_if_it_has_an_end() -> None:
    assert linear(1.0, 10).then(constant(2.0)) == linear(1.0, 10).then(constant(2.0), at=10)
    assert linear(1.0, "3 epochs").then(cosine(1.0, "2 epochs")).resolve(steps_per_epoch=5) == sequence(
        [linear(1.0, 15), cosine(1.0, 10)], at=[15]
    )
    branch = constant(1.0).cooldown(30, 10)
    assert branch.then(constant(2.0)) == branch.then(constant(2.0), at=40)
    three = linear(1.0, 10).then(cosine(1.0, 20)).then(constant(0.5))
    assert three == sequence([linear(1.0, 10), cosine(1.0, 20), constant(0.5)], at=[10, 30])
    assert one_cycle(1.0, steps=9).length == 9
    for endless in (constant(1.0), step(1.0, 10), cyclic(1.0, 0.0, 5), linear(1.0, 9) + 0.1, plateau(1.0)):
        with pytest.raises(BadInput, match="has no length of its own: say where the next begins"):
            endless.then(constant(1.0))


def test_a_recipe_line_of_several_phases_reads_back_from_json() -> None:
    """Warm, steady, then restarts under a floor: nested kinds as plain data."""
    floor = (0.5 * cosine(1.0, steps="100 %")).clamp(low=1e-3)
    whole = (constant(1.0, warmup="2 %").then(floor, at="50 %") + 0.01) * exponential(1.0, every="1 epoch")
    read = Schedule.from_data(json.loads(json.dumps(whole.data())))
    assert (read, hash(read)) == (whole, hash(whole))
    rates = {"run_steps": 1000, "steps_per_epoch": 250}
    assert read.resolve(**rates) == whole.resolve(**rates)
    resolved = whole.resolve(**rates)
    assert resolved.resolved
    assert resolved(500) == pytest.approx((0.5 + 0.01) * 0.25)
    assert resolved(10**6) == pytest.approx(0.0, abs=1e-300)


@given(st.sampled_from(["sum", "product", "sequence", "clamp", "branch"]), st.data())
def test_the_schedules_inside_are_given_as_parts(kind: str, data: st.DataObject) -> None:
    schedule = data.draw(ROWS[kind].any)
    assert schedule.parts
    assert all(isinstance(part, Schedule) for part in schedule.parts)


def test_a_negative_factor_turns_a_clamp_over() -> None:
    clamped = linear(1.0, 10).clamp(low=0.2, high=0.7)
    turned = clamped.scaled(-2)
    assert turned == linear(-2.0, 10).clamp(low=-1.4, high=-0.4)
    assert [turned(i) for i in range(12)] == pytest.approx([-2 * clamped(i) for i in range(12)])
    assert linear(1.0, 10).clamp(low=0.2).scaled(-1) == linear(-1.0, 10).clamp(high=-0.2)


@pytest.mark.parametrize(
    ("of", "bounds", "peak"),
    [
        (constant(0.3), (0.3, 0.3), 0.3),
        (cosine(0.3, 10, end=0.5), (0.3, 0.5), 0.3),
        (cyclic(0.85, base=0.95, up=3), (0.85, 0.95), 0.85),
        (cosine(0.3, 10).cooldown(5, 5, end=0.5), (0.0, 0.5), 0.3),
        (cosine(0.3, 10) + 0.1, (0.1, 0.4), 0.4),
        (linear(-1.0, 10, end=2.0) * linear(3.0, 10, end=-4.0), (-8.0, 6.0), -8.0),
        (constant(1.0).then(constant(-2.0), at=3), (-2.0, 1.0), -2.0),
        (linear(1.0, 10).clamp(low=0.2), (0.2, 1.0), 1.0),
        (linear(1.0, 10).clamp(2.0, 3.0), (2.0, 2.0), 2.0),
    ],
)
def test_bounds_and_peak_go_through_combinations(
    of: Schedule, bounds: tuple[float, float], peak: float
) -> None:
    assert of.bounds == pytest.approx(bounds)
    assert of.peak == pytest.approx(peak)


# A trunk and its branches


@given(
    st.floats(0, 10),
    st.floats(0, 10),
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 200),
    st.sampled_from(["linear", "cosine", "sqrt"]),
)
def test_a_branch_of_a_constant_trunk_is_wsd_to_the_bit(
    peak: float, end: float, warmup: int, stable: int, cooldown: int, i: int, shape: str
) -> None:
    steps = warmup + stable + cooldown
    branch = constant(peak, warmup).cooldown(start=warmup + stable, steps=cooldown, end=end, shape=shape)
    assert branch(i) == wsd(peak, steps, warmup, cooldown, end, shape)(i)


@given(ROWS["cosine"].any, st.integers(0, 5000), st.integers(1, 500))
def test_a_branch_leaves_the_trunk_only_at_its_start(trunk: Schedule, start: int, steps: int) -> None:
    branch = trunk.cooldown(start, steps, end=0.25)
    assert all(branch(i) == trunk(i) for i in {0, start // 2, max(start - 1, 0), start})
    assert branch(start + steps) == branch(start + steps + 7) == 0.25
    assert branch(start + 1) == pytest.approx(trunk(start) + (0.25 - trunk(start)) / steps)


def test_a_branch_of_a_branch() -> None:
    twice = constant(1.0).cooldown(10, 10, end=0.5).cooldown(40, 10)
    assert [twice(i) for i in (9, 15, 20, 40, 45, 50)] == [1.0, 0.75, 0.5, 0.5, 0.25, 0.0]
    assert Schedule.from_data(twice.data()) == twice


def test_a_sum_can_be_cooled_down_too() -> None:
    branch = (linear(1.0, 10, end=0.5) + 0.1).cooldown(10, 4)
    assert [branch(i) for i in (9, 10, 12, 14)] == pytest.approx([0.65, 0.6, 0.3, 0.0])


@pytest.mark.parametrize(
    ("shape", "half"),
    [("linear", 0.505), ("cosine", 0.505), ("sqrt", 1 - 0.99 * math.sqrt(0.5)), ("exponential", 0.1)],
)
def test_the_shapes_of_a_cooldown(shape: str, half: float) -> None:
    """arXiv:2405.18392: 1 - √x is below the line; arXiv:2404.06395: halves in equal times."""
    fall = wsd(1.0, steps=120, cooldown=20, end=0.01, shape=shape)
    assert (fall(99), fall(100), fall(120)) == (1.0, 1.0, 0.01)
    assert fall(110) == pytest.approx(half, rel=1e-12)
    values = [fall(i) for i in range(100, 121)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 21


def test_a_linear_cooldown_is_not_written_so_recipes_keep_their_hash() -> None:
    """A recipe of before there were shapes says the same, and is the same."""
    old = {"schedule": "wsd", "peak": 0.1, "steps": 100, "warmup": 5, "cooldown": 20, "end": 0.0}
    assert Schedule.from_data(old) == Schedule.from_data({**old, "shape": "linear"})
    assert Schedule.from_data({**old, "shape": "linear"}).data() == old
    assert Schedule.from_data({**old, "shape": "sqrt"}).data() == {**old, "shape": "sqrt"}


def test_an_exponential_way_from_zero_stays_there_until_its_end() -> None:
    """A trunk that is at 0 already: nothing divides by it in the middle of a run."""
    branch = linear(1.0, 10).cooldown(20, 10, end=0.1, shape="exponential")
    assert [branch(i) for i in (20, 25, 30)] == [0.0, 0.0, 0.1]


@pytest.mark.parametrize("end", [0.0, -0.1])
def test_an_exponential_way_to_zero_or_across_it_is_refused(end: float) -> None:
    for make in (
        lambda: wsd(1.0, 100, end=end, shape="exponential"),
        lambda: cosine(1.0, 100).cooldown(50, 10, end, "exponential"),
    ):
        with pytest.raises(
            BadInput, match="an exponential way neither arrives at 0 nor crosses it"
        ) as caught:
            make()
        assert caught.value.key == ("end",)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: constant(1.0) + "1", "a schedule combines with schedules and numbers, got '1'"),  # type: ignore[operator]
        (lambda: constant(1.0) * True, "a schedule combines with schedules and numbers, got True"),
        (lambda: constant(1.0).then(None), "has no length"),  # type: ignore[arg-type]
        (lambda: linear(1.0, 5).then(None), "combines with schedules and numbers, got None"),  # type: ignore[arg-type]
        (lambda: constant(1.0).clamp(), "clamp needs low, high or both"),
        (lambda: constant(1.0).clamp(2.0, 1.0), "clamp: low must be at most high = 1, got 2"),
        (lambda: constant(1.0).clamp(low=math.inf), "clamp: low must be a finite number"),
        (lambda: sequence([constant(1.0)], at=[3]), "at must hold one update fewer than parts, got 1 for 1"),
        (lambda: sequence([constant(1.0)] * 3, at=[9, 3]), r"sequence: at must not fall, got \[9, 3\]"),
        (lambda: linear(1.0, 9).then(constant(1.0)).then(constant(1.0), at=3), "sequence: at must not fall"),
        (lambda: sequence([3.0], at=[]), r"sequence: parts\[0\] must be a schedule, got 3.0"),  # type: ignore[list-item]
        (lambda: sequence([], at=[]), "sequence: at must hold one update fewer than parts, got 0 for 0"),
        (lambda: Schedule.from_data({"schedule": "sum", "parts": []}), "sum: parts must be at least one"),
        (lambda: Schedule.from_data({"schedule": "sum", "parts": 3}), "sum: parts must be a list of tables"),
        (lambda: multistep(1.0, at=30), "multistep: at must be a list, got 30"),  # type: ignore[arg-type]
        (lambda: multistep(1.0, at=(5, 3)), r"multistep: at must not fall, got \[5, 3\]"),
        (lambda: multistep(1.0, at=(3,), warmup=5), "at counts the warmup, and must not lie in its 5, got 3"),
        (lambda: constant(1.0).cooldown(3, 5, shape="sqr"), "shape must be .* Did you mean 'sqrt'"),
        (lambda: one_cycle(1.0, 10, rise=11), "one_cycle: rise must be at most steps = 10, got 11"),
        (lambda: one_cycle(1.0, 10, shape="sqrt"), "shape must be 'linear' or 'cosine', got 'sqrt'"),
        (lambda: cyclic(1.0, 0.0, 5, form="triangle"), "form must be .* Did you mean 'triangular'"),
        (lambda: cyclic(1.0, 0.0, 5, factor=0.9), "cyclic: only the form 'exp_range' has a factor"),
        (lambda: (0.1 + linear(1.0, "2 epochs")).resolve(), "linear: steps is '2 epochs'.*steps_per_epoch"),
    ],
)  # fmt: skip
def test_what_does_not_combine_is_refused_in_one_sentence(make: object, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"schedule": "branch", "trunk": {"schedule": "cosine", "peak": 1, "steps": "x"}, "start": 1,
          "cooldown": 1}, ("trunk", "steps")),
        ({"schedule": "sum", "parts": [constant(1.0).data(), {"schedule": "constant", "peak": "x"}]},
         ("parts", 1, "peak")),
        ({"schedule": "sum", "parts": [{"schedule": "constant", "peek": 1}]}, ("parts", 0, "peek")),
        ({"schedule": "multistep", "peak": 1, "at": [3, "x"]}, ("at", 1)),
        ({"schedule": "multistep", "peak": 1, "at": [3, 2]}, ("at",)),
        ({"schedule": "one_cycle", "peak": "x", "steps": 3}, ("peak",)),
        ({"schedule": "clamp", "part": {"schedule": "constant", "peak": 1}, "low": 2, "high": 1}, ("low",)),
        ({"schedule": "clamp", "part": 3, "low": 1}, ("part",)),
    ],
)  # fmt: skip
def test_the_culprit_is_known_by_its_key(data: dict[str, object], key: tuple[str | int, ...]) -> None:
    with pytest.raises(BadInput) as caught:
        Schedule.from_data(data)
    assert caught.value.key == key


@given(levels, levels, st.integers(1, 1000), steps)
def test_one_line_each_for_rate_and_momentum_share_their_turning_points(
    peak: float, base: float, length: int, i: int
) -> None:
    """The mirror: where one is at its highest the other is at its lowest, in equal shares of the way."""
    rate = one_cycle(1.0, length, base=0.0, end=0.0)
    mirror = one_cycle(peak, length, base=base, end=base)
    assert mirror(i) == pytest.approx(
        base + (peak - base) * rate(i), rel=1e-9, abs=1e-9 * max(abs(peak), abs(base))
    )
