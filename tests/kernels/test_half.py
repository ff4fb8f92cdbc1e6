"""Weights in half precision, rounded to the nearest even, or by chance where that is asked for; and the
random numbers of links.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, draw
from executors import buckets_of, stepped_by
from torch import Tensor, nn

import downslope as ds
from downslope.kernels import cpu
from downslope.rules import Chain, chain, rule

HALVES = (torch.bfloat16, torch.float16)
EXECUTORS = ("cpu", "eager")
BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
"""All patterns of 16 bits."""

KINDS = {
    torch.bfloat16: (7, -133, 3.3895313892515355e38),
    torch.float16: (10, -24, 65504.0),
}
"""Bits of the fraction, exponent of the smallest number above zero, and the largest."""


@rule("wanted")
def placed(g: Any, p: Any, s: Any) -> Any:
    """Makes a weight of zero whatever stands in the slot."""
    return -s.wanted


def stepped(
    made: Chain,
    weights: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    executor: str = "cpu",
    state: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The weights after these gradients."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = ds.Optimizer([(f"w{i}", p) for i, p in enumerate(parameters)], made)
    for parameter, value in zip(parameters, state, strict=False):
        optimizer.state[parameter] = {"wanted": value.clone(), "t": torch.zeros((), dtype=torch.int64)}
    with stepped_by(executor):
        for drawn in gradients:
            for parameter, gradient in zip(parameters, drawn, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    assert buckets_of(optimizer) == {"CpuBucket" if executor == "cpu" else "EagerBucket"}
    return [parameter.detach() for parameter in parameters]


def stored(wide: Tensor, dtype: torch.dtype, executor: str, *behind: Any) -> Tensor:
    """What becomes of float32 numbers in weights of a dtype."""
    weight = torch.zeros(wide.shape, dtype=dtype)
    return stepped(chain(placed(lr=1.0), *behind), [weight], [[weight]], executor, [wide])[0]


def nearest(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """IEEE 754's rounding to the nearest, ties to even, in exact arithmetic: multiples of the step that the
    exponent gives, of which float64 holds every one and every tie.
    """
    fraction, least, most = KINDS[dtype]
    x = wide.double().numpy()
    with np.errstate(all="ignore"):
        exponent = np.frexp(np.where(np.isfinite(x) & (x != 0), x, 1.0))[1] - 1
        step = np.ldexp(1.0, np.maximum(exponent - fraction, least))
        found = np.where(np.isfinite(x), np.rint(x / step) * step, x)
    return torch.from_numpy(np.where(np.abs(found) > most, np.copysign(np.inf, found), found))


def ulps(one: Tensor, two: Tensor) -> Tensor:
    """How many numbers of their dtype lie between two tensors."""
    places = [t.view(torch.int16).to(torch.int32) for t in (one, two)]
    lines = [torch.where(place < 0, -(place & 0x7FFF), place) for place in places]
    return (lines[0] - lines[1]).abs()


def drawn_wide() -> Tensor:
    """float32 numbers of every kind: any bits, ties between half-precision numbers and their neighbours, ends
    of both ranges.
    """
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    some = [torch.from_numpy(bits.view(np.float32).copy())]
    for dtype in HALVES:
        held = BITS.view(dtype).float()
        held = held[held.isfinite()]
        above = held + (held.abs() * torch.finfo(dtype).eps / 2).clamp(min=2.0 ** (KINDS[dtype][1] - 1))
        infinity = torch.full((), float("inf"))
        some += [above, torch.nextafter(above, infinity), torch.nextafter(above, -infinity)]
    ends = [65504.0, 65519.996, 65520.0, 65536.0, 3.3895e38, 3.3961e38, 3.4028e38, 2.0**-24, 2.0**-25]
    ends += [2.0**-133, 2.0**-134, 2.0**-149, 6e-8, 0.0]
    odd = torch.tensor([*ends, float("inf"), float("nan")])
    return torch.cat([*some, odd, -odd])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_weight_is_rounded_to_the_nearest_even(executor: str, dtype: torch.dtype) -> None:
    """NaN, infinities, numbers below the normal ones and overflow included."""
    wide = drawn_wide()
    got, want = stored(wide, dtype, executor).double(), nearest(wide, dtype)
    assert torch.equal(got.isnan(), want.isnan())
    kept = ~want.isnan()
    assert torch.equal(got[kept], want[kept])
    assert int(want.isinf().sum()) > 6
    assert int(((want != 0) & (want.abs() < torch.finfo(dtype).smallest_normal)).sum()) > 100


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_number_is_read_as_what_it_is(executor: str, dtype: torch.dtype) -> None:
    """All 65 536, as weights, which a rate of zero leaves alone, and as gradients, taken off zero."""
    every = BITS.view(dtype)
    finite = torch.where(every.isfinite(), every, 1.0)
    still = stepped(chain(ds.sgd(lr=0.0)), [every], [[torch.ones_like(every)]], executor)[0]
    assert torch.equal(still.isnan(), every.isnan())
    assert torch.equal(still[~every.isnan()].view(torch.int16), every[~every.isnan()].view(torch.int16))
    moved = stepped(chain(ds.sgd(lr=1.0)), [torch.zeros_like(every)], [[finite]], executor)[0]
    assert torch.equal(moved, -finite)


CHAINS = {
    **{name: chain(CASES[name].part) for name in ("sgd", "adamw", "nadam", "ftrl", "lamb", "adafactor")},
    "clip > adam > decay > l1": chain(ds.clip_norm(1.0), ds.adam(lr=0.05), ds.decay(0.1), ds.l1(1e-3)),
    "centralize > momentum > lookahead": chain(
        ds.centralize(), ds.momentum(lr=0.05), ds.lookahead(every=2, blend=0.5)
    ),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_executors_agree_to_the_last_bit_of_the_half(name: str, dtype: torch.dtype) -> None:
    """Both compute in float32, where the last bit may differ: seen only where a number lies beside a tie."""
    weights, steps = draw(6, shapes=((31, 40), (70,), ()))
    one, two = ([nn.Parameter(torch.tensor(np.asarray(w), dtype=dtype)) for w in weights] for _ in range(2))
    optimizers = [ds.Optimizer(held, CHAINS[name]) for held in (one, two)]
    off = count = 0
    for gradients in steps:
        for optimizer, held, executor in zip(optimizers, (one, two), EXECUTORS, strict=True):
            for parameter, gradient in zip(held, gradients, strict=True):
                parameter.grad = torch.tensor(np.asarray(gradient), dtype=dtype)
            with stepped_by(executor):
                optimizer.step()
        for ours, theirs in zip(one, two, strict=True):
            found = ulps(ours.detach(), theirs.detach())
            assert int(found.max()) <= 1
            off, count = off + int((found > 0).sum()), count + found.numel()
            theirs.data.copy_(ours.data)  # the next step starts from the same weights
    assert off <= count / 500
    assert [buckets_of(optimizer) for optimizer in optimizers] == [{"CpuBucket"}, {"EagerBucket"}]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_gradient_in_float32_counts_alike_on_every_executor(dtype: torch.dtype) -> None:
    """As torch allows it since `grad_dtype`: what is finer than the weight's grid is in it, and reaches the
    state.
    """
    found = []
    for executor in EXECUTORS:
        weight = nn.Parameter(torch.zeros(500, dtype=dtype))
        weight.grad_dtype = torch.float32
        weight.grad = torch.linspace(1.0, 1.001, 500)
        optimizer = ds.Optimizer([weight], chain(ds.momentum(lr=1.0)))
        with stepped_by(executor):
            optimizer.step()
        found.append(optimizer.state[weight]["v"])
    assert torch.equal(*found)


# Rounding by chance

ROUNDED = chain(ds.sgd(lr=1.0), ds.stochastic_rounding(seed=3))
COUNT = 200_000
SPOTS = {
    torch.bfloat16: [1.0009765625, -1.00341796875, 3.14159, -77.7, 1e-20, 1e-39, -3e-40, 2.5e38],
    torch.float16: [1.000244140625, -1.0009, 3.14159, -777.7, 1e-4, 7e-5, -3.3e-6, 1e-8, 60000.7],
}
"""Numbers between two that the dtype holds, below its normal ones too."""


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("dtype", "spot"), [(d, x) for d, spots in SPOTS.items() for x in spots], ids=str)
def test_rounding_by_chance_is_right_on_average(dtype: torch.dtype, spot: float, executor: str) -> None:
    """Both neighbours, and no other number; in the mean what was to be stored, within five deviations."""
    wide = torch.full((COUNT,), spot)
    got = stored(wide, dtype, executor, ds.stochastic_rounding(seed=1)).double()
    low, high = (float(end) for end in (got.min(), got.max()))
    held = {float(nearest(torch.tensor([spot]), dtype)[0])}
    x = float(wide[0].double())
    assert low < x < high
    assert held <= {low, high} == set(got.unique().tolist())
    assert int(ulps(torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype))) == 1
    share = (x - low) / (high - low)
    deviation = (high - low) * np.sqrt(share * (1 - share) / COUNT)
    assert abs(float(got.mean()) - x) < 5 * deviation


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_the_dtype_holds_is_not_moved_by_chance(executor: str, dtype: torch.dtype) -> None:
    every = BITS.view(dtype)
    got = stored(every.float(), dtype, executor, ds.stochastic_rounding(seed=1))
    nan = every.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan], every[~nan])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_overflows_by_chance(executor: str, dtype: torch.dtype) -> None:
    """Beyond the largest number there is no second neighbour to be right on average with: the nearest counts,
    as without the link, whatever is drawn.
    """
    fraction, _, most = KINDS[dtype]
    step = most / (2 ** (fraction + 1) - 1)
    shares = torch.tensor([0.01, 0.3, 0.49, 0.5, 0.51, 0.7, 0.99, 1.0, 1.01, 1.7], dtype=torch.float64)
    wide = (most + shares * step).clamp(max=torch.finfo(torch.float32).max).float().repeat(100)
    wide = torch.cat([wide, -wide])
    want = nearest(wide, dtype)
    assert set(want.tolist()) == {most, -most, float("inf"), -float("inf")}
    for seed in range(3):
        got = stored(wide, dtype, executor, ds.stochastic_rounding(seed=seed)).double()
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_steps_below_the_grid_add_up(dtype: torch.dtype) -> None:
    """A hundred steps of a hundredth of the grid: none without the link, one on average with it."""
    grid = torch.finfo(dtype).eps
    weight, slope = torch.ones(5000, dtype=dtype), torch.full((5000,), -grid / 100, dtype=dtype)
    slopes = [[slope]] * 100
    still = stepped(chain(ds.sgd(lr=1.0)), [weight], slopes)[0]
    moved = stepped(ROUNDED, [weight], slopes)[0]
    assert torch.equal(still, weight)
    mean = float((moved.double() - 1).mean()) / grid
    assert abs(mean - 100 * float(-slope[0]) / grid) < 5 / np.sqrt(5000)


def grids(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], steps: int) -> tuple[Any, Any]:
    """Weights and gradients."""
    made = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=made).to(dtype) for shape in shapes]
    gradients = [[torch.randn(s, generator=made).to(dtype) / 50 for s in shapes] for _ in range(steps)]
    return weights, gradients


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chance_is_the_same_on_every_executor(dtype: torch.dtype) -> None:
    weights, gradients = grids(dtype, ((31, 40), (70,), (), (0,)), 5)
    one, two = (stepped(ROUNDED, weights, gradients, executor) for executor in EXECUTORS)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [100, 1000, cpu.CHUNK])
def test_chance_does_not_depend_on_chunks(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, gradients = grids(dtype, ((cpu.CHUNK + 77,), (3, 50)), 2)
    whole = stepped(ROUNDED, weights, gradients, "eager")
    monkeypatch.setattr(cpu, "CHUNK", size)
    assert all(torch.equal(a, b) for a, b in zip(stepped(ROUNDED, weights, gradients), whole, strict=True))


def halves_of_a_run(made: Chain, weights: Any, gradients: Any, executor: str = "cpu") -> list[Tensor]:
    """The weights of a run that is saved in the middle and goes on elsewhere, parameters in another order."""
    names = [f"w{i}" for i in range(len(weights))]
    held = {name: nn.Parameter(weight.clone()) for name, weight in zip(names, weights, strict=True)}
    first = ds.Optimizer(held.items(), made)
    middle = len(gradients) // 2
    with stepped_by(executor):
        for half, optimizer in ((gradients[:middle], first), (gradients[middle:], None)):
            if optimizer is None:
                held = {name: nn.Parameter(held[name].detach().clone()) for name in reversed(names)}
                optimizer = ds.Optimizer(held.items(), made)
                optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
            for drawn in half:
                for name, gradient in zip(names, drawn, strict=True):
                    held[name].grad = gradient.clone()
                optimizer.step()
    return [held[name].detach() for name in names]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_chance_goes_on_after_a_load(executor: str, dtype: torch.dtype) -> None:
    made = chain(ds.adamw(lr=0.01), ds.stochastic_rounding(seed=2))
    weights, gradients = grids(dtype, ((31, 4), (70,)), 6)
    one = stepped(made, weights, gradients, executor)
    two = halves_of_a_run(made, weights, gradients, executor)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_wider_weights_are_not_rounded_by_chance(executor: str, dtype: torch.dtype) -> None:
    weights, gradients = grids(dtype, ((31, 4), (70,)), 3)
    one = stepped(ROUNDED, weights, gradients, executor)
    two = stepped(chain(ds.sgd(lr=1.0)), weights, gradients, executor)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("what", ["seed", "step", "name"])
def test_chance_differs_by_seed_step_and_name(what: str) -> None:
    """A hundred numbers in the middle between two: the same way for all of them has a chance of 2⁻¹⁰⁰."""
    wide = torch.full((100,), 1 + 2.0**-8)
    weight = torch.zeros(100, dtype=torch.bfloat16)
    parameters = [nn.Parameter(weight.clone()) for _ in range(2)]
    optimizer = ds.Optimizer(parameters, chain(placed(lr=1.0), ds.stochastic_rounding(seed=1)))
    found = []
    for step in range(2):
        for parameter in parameters:
            parameter.data.zero_()
            parameter.grad = torch.zeros_like(parameter)
            if not step:
                optimizer.state[parameter] = {"wanted": wide.clone(), "t": torch.zeros((), dtype=torch.int64)}
        optimizer.step()
        found.append([parameter.detach().clone() for parameter in parameters])
    other = stored(wide, torch.bfloat16, "cpu", ds.stochastic_rounding(seed=9))
    against = {"seed": other, "step": found[1][0], "name": found[0][1]}
    assert not torch.equal(found[0][0], against[what])


# Noise

QUIET = 0.55


def noises(steps: int, executor: str, make: Callable[[], Any], size: int = COUNT) -> list[Tensor]:
    """What the link added at every step."""
    weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = ds.Optimizer([("w", weight)], chain(make(), ds.sgd(lr=1.0)))
    found = []
    with stepped_by(executor):
        for _ in range(steps):
            before = weight.detach().clone()
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            found.append(before - weight.detach())
    return found


@pytest.mark.parametrize("executor", EXECUTORS)
def test_noise_has_the_moments_of_its_source(executor: str) -> None:
    """Neelakantan et al. 2015: normal, of variance η/(1 + t)^γ with t from 0; four moments within five
    deviations, and nothing in common between steps.
    """
    found = noises(3, executor, lambda: ds.noise(scale=0.3, power=QUIET, seed=5))
    unit = [x / np.sqrt(0.3 / (1 + t) ** QUIET) for t, x in enumerate(found)]
    for x in unit:
        for power, (want, spread) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
            assert abs(float((x**power).mean()) - want) < 5 * np.sqrt(spread / COUNT)
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert abs(float((unit[one] * unit[two]).mean())) < 5 / np.sqrt(COUNT)
    assert abs(float((unit[0][1:] * unit[0][:-1]).mean())) < 5 / np.sqrt(COUNT)


def test_noise_is_the_same_on_every_executor_and_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: ds.noise(scale=0.3, power=QUIET, seed=5)  # noqa: E731
    one = noises(3, "eager", make, 1000)
    two = noises(3, "cpu", make, 1000)
    monkeypatch.setattr(cpu, "CHUNK", 33)
    three = noises(3, "cpu", make, 1000)
    for a, b, c in zip(one, two, three, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert torch.equal(b, c)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_noise_goes_on_after_a_load(executor: str) -> None:
    made = chain(ds.noise(scale=0.3, seed=4), ds.adam(lr=0.01))
    weights, gradients = grids(torch.float32, ((31, 4), (70,)), 6)
    one = stepped(made, weights, gradients, executor)
    two = halves_of_a_run(made, weights, gradients, executor)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_noise_of_a_weight_does_not_depend_on_the_others() -> None:
    """Neither on how many there are, nor on whether they have gradients."""
    found = []
    for others in ([], ["frozen"], ["a", "b"]):
        weights = {name: nn.Parameter(torch.zeros(50)) for name in [*others, "w"]}
        optimizer = ds.Optimizer(weights.items(), chain(ds.noise(scale=1.0), ds.sgd(lr=1.0)))
        for _ in range(3):
            for name, weight in weights.items():
                weight.grad = None if name == "frozen" else torch.zeros(50)
            optimizer.step()
        found.append(weights["w"].detach())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_two_links_of_noise_in_a_chain_draw_apart() -> None:
    """Else their sum would have four times the variance of one, not twice."""
    both = chain(ds.noise(scale=1.0, power=0.0), ds.noise(scale=1.0, power=0.0), ds.sgd(lr=1.0))
    zero = torch.zeros(COUNT, dtype=torch.float64)
    got = stepped(both, [zero], [[zero]])[0]
    assert abs(float(got.square().mean()) - 2) < 5 * 2 * np.sqrt(2 / COUNT)


def test_equal_parameters_draw_apart() -> None:
    zero = torch.zeros(COUNT, dtype=torch.float64)
    one, two = stepped(chain(ds.noise(scale=1.0), ds.sgd(lr=1.0)), [zero, zero], [[zero, zero]])
    assert abs(float((one * two).mean())) < 5 / np.sqrt(COUNT)
