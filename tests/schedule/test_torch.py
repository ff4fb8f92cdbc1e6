"""Equal to torch.optim.lr_scheduler in float64 where torch is right; else what torch does, and what we do."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from downslope.schedule import (
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    exponential,
    linear,
    multistep,
    one_cycle,
    polynomial,
    sequence,
    step,
)

Make = Callable[[Any], Any]


def drive(make: Make, peak: float, steps: int, key: str = "lr", **numbers: Any) -> list[float]:
    """What torch's scheduler sets before each of `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak, **numbers)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0][key])
        optimizer.step()
        scheduler.step()
    return found


def in_turn(parts: list[Make], milestones: list[int]) -> Make:
    return lambda o: lr_scheduler.SequentialLR(o, [part(o) for part in parts], milestones)


PAIRS: list[tuple[Schedule, Make]] = [
    (constant(0.3), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    (linear(0.3, steps=40), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=40)),
    (linear(0.3, steps=40, end=0.03), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=40)),
    (linear(0.03, steps=40, end=0.3), lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=40)),
    (step(0.3, every=7, factor=0.2), lambda o: lr_scheduler.StepLR(o, 7, gamma=0.2)),
    (multistep(0.3, (5, 12, 12, 30)), lambda o: lr_scheduler.MultiStepLR(o, [5, 12, 12, 30])),
    (multistep(0.3, (0, 9), factor=0.5), lambda o: lr_scheduler.MultiStepLR(o, [0, 9], gamma=0.5)),
    (exponential(0.3, every=10), lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5**0.1)),
    (polynomial(0.3, 40, power=1.0), lambda o: lr_scheduler.PolynomialLR(o, 40, power=1.0)),
    (polynomial(0.3, 40, power=0.9), lambda o: lr_scheduler.PolynomialLR(o, 40, power=0.9)),
    (polynomial(0.3, 40, power=2.5), lambda o: lr_scheduler.PolynomialLR(o, 40, power=2.5)),
    (cosine(0.3, steps=40), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40)),
    (cosine(0.3, steps=40, end=0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.01)),
    (cosine_restarts(0.3, every=7), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7)),
    (
        cosine_restarts(0.3, every=3, growth=3, end=0.01),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=3, eta_min=0.01),
    ),
    (cyclic(0.3, 0.01, up=4), lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 4, cycle_momentum=False)),
    (
        cyclic(0.3, 0.01, up=4, down=7, form="triangular2"),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 4, 7, "triangular2", cycle_momentum=False),
    ),
    (
        cyclic(0.3, 0.01, up=6, down=2, form="exp_range", factor=0.97),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 6, 2, "exp_range", 0.97, cycle_momentum=False),
    ),
    (
        cosine(0.3, steps=40, warmup=8),
        in_turn(
            [
                lambda o: lr_scheduler.LinearLR(o, 1 / 9, total_iters=8),
                lambda o: lr_scheduler.CosineAnnealingLR(o, 32),
            ],
            [8],
        ),
    ),
    (
        sequence([constant(0.3), exponential(0.3, every=10), cosine(0.3, steps=15)], at=[6, 25]),
        in_turn(
            [
                lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
                lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5**0.1),
                lambda o: lr_scheduler.CosineAnnealingLR(o, 15),
            ],
            [6, 25],
        ),
    ),
    (
        exponential(0.3, every=10) * step(1.0, every=7, factor=0.2),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(o, gamma=0.5**0.1), lr_scheduler.StepLR(o, 7, gamma=0.2)]
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"), PAIRS, ids=[f"{place}-{ours.kind}" for place, (ours, _) in enumerate(PAIRS)]
)
def test_equals_torch_where_torch_is_right(ours: Schedule, theirs: Make) -> None:
    assert [ours(i) for i in range(41)] == pytest.approx(drive(theirs, 0.3, 41), rel=1e-10, abs=1e-16)


@pytest.mark.parametrize("shape", ["cos", "linear"])
@pytest.mark.parametrize(("total", "share"), [(11, 3 / 11), (40, 0.25), (100, 0.3)])
def test_one_cycle_for_rate_and_momentum_is_torchs_which_is_one_update_shorter(
    shape: str, total: int, share: float
) -> None:
    """torch meets the end at its last update; here it is met one past it, as by every other kind."""

    def make(o: Any) -> Any:
        return lr_scheduler.OneCycleLR(o, 0.3, total, pct_start=share, anneal_strategy=shape)  # type: ignore[arg-type]

    numbers = {
        "steps": total - 1,
        "rise": round(share * total) - 1,
        "shape": {"cos": "cosine"}.get(shape, shape),
    }
    rate = one_cycle(0.3, **numbers)
    momentum = one_cycle(0.85, base=0.95, end=0.95, **numbers)
    expected = drive(make, 0.3, total, momentum=0.9)
    assert [rate(i) for i in range(total)] == pytest.approx(expected, rel=1e-10)
    moved = drive(make, 0.3, total, "momentum", momentum=0.9)
    assert [momentum(i) for i in range(total)] == pytest.approx(moved, rel=1e-10)
    assert expected[-1] == pytest.approx(0.3 / 25 / 1e4)
    assert one_cycle(0.3, steps=total)(total - 1) > 2 * expected[-1]  # the last update is not wasted


def test_the_momentum_of_a_cycle_is_the_cycle_turned_over() -> None:
    def make(o: Any) -> Any:
        return lr_scheduler.CyclicLR(o, 0.01, 0.3, 4, 7, base_momentum=0.8, max_momentum=0.9)

    ours = cyclic(0.8, base=0.9, up=4, down=7)
    assert [ours(i) for i in range(50)] == pytest.approx(
        drive(make, 0.3, 50, "momentum", momentum=0.9), rel=1e-12
    )


def test_the_first_update_of_a_torch_one_cycle_that_peaks_at_once_divides_by_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        drive(lambda o: lr_scheduler.OneCycleLR(o, 0.3, 10, pct_start=0.1), 0.3, 2)
    assert one_cycle(0.3, steps=9, rise=0)(0) == 0.3


def test_past_the_end_the_value_stays_where_torchs_cosine_climbs_back_to_the_peak() -> None:
    theirs = drive(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10), 0.3, 21)
    assert theirs[20] == pytest.approx(0.3)
    assert {cosine(0.3, steps=10, end=0.01)(i) for i in (10, 11, 20, 10**9)} == {0.01}


def test_the_step_after_the_last_does_not_raise_where_torchs_onecycle_does() -> None:
    with pytest.raises(ValueError, match="Tried to step"):
        drive(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10), 0.3, 12)
    assert one_cycle(0.3, steps=10)(12) == pytest.approx(0.3 / 25e4)


def test_building_a_schedule_changes_nothing_where_torchs_onecycle_rewrites_beta1() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=0.1)
    before = copy.deepcopy(theirs.state_dict())
    one_cycle(0.1, steps=10)(3)
    assert theirs.state_dict() == before
    lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=10)
    assert theirs.param_groups[0]["betas"] != (0.9, 0.999)


def test_two_groups_keep_their_ratio_where_torchs_onecycle_makes_them_equal() -> None:
    two = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.1, 0.01)]
    theirs = torch.optim.SGD(two)
    lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=10, cycle_momentum=False)
    assert theirs.param_groups[0]["lr"] == theirs.param_groups[1]["lr"]
    one, other = one_cycle(0.1, steps=10), one_cycle(0.1, steps=10).scaled(0.1)
    assert [other(i) for i in range(12)] == pytest.approx([0.1 * one(i) for i in range(12)], rel=1e-14)


def test_a_jump_to_a_restart_is_at_the_peak_where_torchs_logarithm_stays_at_the_foot() -> None:
    """torch's closed form finds the period by a logarithm: log(243, 3) is 4.999… in floats."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=3)
    restart = sum(3**n for n in range(5))
    scheduler.step(restart)
    assert math.log(3**5, 3) < 5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-16)
    assert cosine_restarts(0.3, every=1, growth=3)(restart) == 0.3


def test_torchs_warmup_starts_at_a_third_unless_told_and_ours_in_equal_steps_from_the_first() -> None:
    theirs = drive(lambda o: lr_scheduler.LinearLR(o, total_iters=4), 0.3, 6)
    assert theirs[0] == pytest.approx(0.1)
    assert [constant(0.3, warmup=4)(i) for i in range(6)] == pytest.approx(
        [0.06, 0.12, 0.18, 0.24, 0.3, 0.3], rel=1e-14
    )


def test_rebuilding_torchs_schedule_scales_the_rate_again_and_ours_is_the_same_function() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    for _ in range(2):
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.003)
    assert constant(0.3, warmup=9)(0) == constant(0.3, warmup=9)(0) == pytest.approx(0.03)
