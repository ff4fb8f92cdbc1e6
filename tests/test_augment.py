"""Regularisation: equal to torch where torch is right, elsewhere to the papers' formulas and statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from downslope.augment import (
    DROPOUTS,
    EarlyStopping,
    Mix,
    StochasticDepth,
    cutmix,
    dropped,
    linear_rates,
    mixup,
    set_dropout,
    smoothed_cross_entropy,
    soft_cross_entropy,
    soft_targets,
    stochastic_depth,
)
from downslope.errors import BadInput

CE = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Targets (traps 38, 52, 63)

LOGITS = drawn(8, 5)
TARGETS = torch.tensor([0, 4, 2, 2, 1, 3, 0, 4])
HOLED = torch.tensor([0, -100, 2, 2, -100, 3, 0, -100])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("targets", [TARGETS, HOLED], ids=["all", "holed"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weighed"])
def test_smoothed_cross_entropy_equals_torch(
    smoothing: float, targets: Tensor, weight: Tensor | None
) -> None:
    expected = CE(LOGITS, targets, weight=weight, label_smoothing=smoothing)
    found = smoothed_cross_entropy(LOGITS, targets, smoothing, weight=weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_smoothed_cross_entropy_equals_the_paper() -> None:
    """H(q′, p) with q′ = (1 − ε)·δ + ε/K, section 7 of arXiv:1512.00567."""
    terms = []
    for z, y in zip(LOGITS.numpy(), TARGETS.tolist(), strict=True):
        p = np.exp(z) / np.exp(z).sum()
        q = np.full(5, 0.1 / 5)
        q[y] += 0.9
        terms.append(-(q * np.log(p)).sum())
    assert float(smoothed_cross_entropy(LOGITS, TARGETS, 0.1)) == pytest.approx(np.mean(terms), rel=1e-12)
    soft = soft_targets(TARGETS, 5, 0.1).double()
    torch.testing.assert_close(
        soft_cross_entropy(LOGITS, soft), smoothed_cross_entropy(LOGITS, TARGETS, 0.1), rtol=1e-7, atol=0
    )


def test_tokens_have_their_classes_last() -> None:
    logits, targets = drawn(2, 4, 5), TARGETS.view(2, 4)
    expected = CE(logits.movedim(-1, 1), targets, label_smoothing=0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, 0.1), expected)


def test_soft_cross_entropy_equals_torch() -> None:
    targets = torch.softmax(drawn(8, 5, seed=1), 1)
    torch.testing.assert_close(soft_cross_entropy(LOGITS, targets), CE(LOGITS, targets), rtol=1e-12, atol=0)
    assert float(soft_cross_entropy(LOGITS[:0], targets[:0])) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weighed"])
@pytest.mark.parametrize("count", [None, 0, 3, torch.tensor(0.0)], ids=str)
def test_an_ignored_batch_gives_zero_where_torch_gives_nan(
    smoothing: float, weight: Tensor | None, count: Any
) -> None:
    logits, targets = LOGITS.clone().requires_grad_(), torch.full((8,), -100)
    assert CE(logits, targets, weight=weight, label_smoothing=smoothing).isnan()
    loss = smoothed_cross_entropy(logits, targets, smoothing, weight=weight, count=count)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_classes_without_weight_give_zero_where_torch_gives_nan() -> None:
    weightless = torch.full((8,), 3)
    assert CE(LOGITS, weightless, weight=WEIGHT).isnan()
    assert float(smoothed_cross_entropy(LOGITS, weightless, 0.0, weight=WEIGHT)) == 0


def test_ignored_positions_may_be_nan() -> None:
    counted = HOLED != -100
    logits = LOGITS.masked_fill(~counted.unsqueeze(1), torch.nan).requires_grad_()
    loss = smoothed_cross_entropy(logits, HOLED, 0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, CE(LOGITS[counted], HOLED[counted], label_smoothing=0.1))
    assert (gradient[~counted] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weighed"])
def test_ragged_micro_batches_add_up_to_the_big_batch(weight: Tensor | None) -> None:
    counted = HOLED != -100
    count = counted.sum() if weight is None else weight[HOLED[counted]].sum()
    big = smoothed_cross_entropy(LOGITS, HOLED, weight=weight)
    parts = [
        smoothed_cross_entropy(LOGITS[i:j], HOLED[i:j], weight=weight, count=count)
        for i, j in ((0, 2), (2, 5), (5, 8))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), big, rtol=1e-12, atol=0)
    soft = torch.softmax(drawn(8, 5, seed=1), 1)
    halves = [soft_cross_entropy(LOGITS[i:j], soft[i:j], count=8) for i, j in ((0, 3), (3, 8))]
    torch.testing.assert_close(sum(halves), soft_cross_entropy(LOGITS, soft))


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weighed"])
def test_gradients_equal_finite_differences(weight: Tensor | None) -> None:
    loss = partial(smoothed_cross_entropy, targets=HOLED, smoothing=0.2, weight=weight)
    assert torch.autograd.gradcheck(loss, LOGITS.clone().requires_grad_())
    soft = torch.softmax(drawn(8, 5, seed=1), 1)
    assert torch.autograd.gradcheck(
        partial(soft_cross_entropy, targets=soft), LOGITS.clone().requires_grad_()
    )


def test_half_precision_is_computed_in_float32() -> None:
    half = LOGITS.bfloat16()
    found = smoothed_cross_entropy(half, TARGETS)
    assert found.dtype == torch.float32
    assert float(found) == float(smoothed_cross_entropy(half.float(), TARGETS))


# Mixup and CutMix


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own_shares(mixed: Tensor) -> list[float]:
    """The shares by which rows of an identity matrix were mixed, of the items that met another one."""
    return [float(mixed[i, i]) for i in range(len(mixed)) if (mixed[i] != 0).sum() > 1]


@pytest.mark.parametrize("per_item", [False, True])
def test_mixup_mixes_inputs_and_targets_by_the_same_share(per_item: bool) -> None:
    """Inputs that say which item they are come out as their own targets."""
    inputs, targets = torch.eye(16), torch.arange(16)
    before = inputs.clone()
    mixed, soft = mixup(inputs, targets, 1.0, classes=16, per_item=per_item, generator=generator())
    torch.testing.assert_close(mixed, soft)
    torch.testing.assert_close(mixed.sum(1), torch.ones(16))
    torch.testing.assert_close(mixed.sum(0).mean(), torch.tensor(1.0))
    assert torch.equal(inputs, before)
    shares = {round(share, 5) for share in own_shares(mixed)}
    assert len(shares) == (len(own_shares(mixed)) if per_item else 1)
    assert ((mixed > 0).sum(1) <= 2).all()


def test_mixup_of_a_regression_keeps_a_linear_relation() -> None:
    inputs = drawn(32, 3)
    slope = drawn(3, 1, seed=2)
    mixed, targets = mixup(inputs, inputs @ slope, 0.4, per_item=True, generator=generator())
    assert not torch.equal(mixed, inputs)
    torch.testing.assert_close(mixed @ slope, targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_of_mixup_are_those_of_a_beta(alpha: float) -> None:
    source, inputs, targets = generator(), torch.eye(8, dtype=torch.float64), torch.arange(8)
    found = []
    for _ in range(1500):
        mixed, _ = mixup(inputs, targets, alpha, classes=8, generator=source)
        found += own_shares(mixed)[:1]
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert np.var(found) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_every_partner_is_as_likely() -> None:
    source, met = generator(), np.zeros((6, 6))
    for _ in range(2000):
        _, soft = mixup(torch.eye(6), torch.arange(6), 1.0, classes=6, generator=source)
        for i in range(6):
            others = [j for j in range(6) if soft[i, j] > 0 and j != i]
            met[i, others[0] if others else i] += 1
    assert stats.chisquare(met.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("per_item", [False, True])
def test_cutmix_pastes_one_box_and_counts_its_pixels(per_item: bool) -> None:
    items, height, width = 12, 9, 14
    inputs = torch.arange(items).float().view(-1, 1, 1, 1).expand(-1, 2, height, width)
    source, areas, clipped = generator(), set(), 0
    for _ in range(60):
        mixed, soft = cutmix(inputs, torch.arange(items), classes=items, per_item=per_item, generator=source)
        for i in range(items):
            foreign = mixed[i, 0] != i
            assert torch.equal(mixed[i, 0], mixed[i, 1])
            assert float(soft[i, i]) == pytest.approx(1 - float(foreign.float().mean()), abs=1e-6)
            rows, columns = foreign.any(1).nonzero(), foreign.any(0).nonzero()
            if len(rows):
                assert int(foreign.sum()) == (rows.max() - rows.min() + 1) * (
                    columns.max() - columns.min() + 1
                )
                other = int(mixed[i, 0][foreign].unique())
                assert float(soft[i, other]) == pytest.approx(float(foreign.float().mean()), abs=1e-6)
                areas.add(int(foreign.sum()))
                clipped += bool(rows.min() == 0 or columns.min() == 0)
    assert len(areas) > 15
    assert clipped > 50


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_areas_of_cutmix_are_those_of_the_paper(alpha: float) -> None:
    """Equation 2 of arXiv:1905.04899, simulated in NumPy: a uniform centre, sides by √(1 − λ), clipped."""
    height, width = 32, 48
    draw, expected = np.random.default_rng(7), []
    for _ in range(6000):
        side = math.sqrt(1 - draw.beta(alpha, alpha))
        y, x = draw.uniform(0, height), draw.uniform(0, width)
        tall = min(height, y + side * height / 2) - max(0, y - side * height / 2)
        wide = min(width, x + side * width / 2) - max(0, x - side * width / 2)
        expected.append(1 - tall * wide / (height * width))
    images, items = torch.zeros(4000, height, width), torch.arange(4000)
    _, soft = cutmix(images, items, alpha, classes=4000, per_item=True, generator=generator())
    found = soft.diagonal().double().numpy()
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.02)
    assert np.std(found) == pytest.approx(np.std(expected), abs=0.02)


def test_each_batch_is_mixed_or_cut_in_the_shares_asked_for() -> None:
    mix = Mix(classes=4, mixup=1.0, cutmix=1.0, probability=0.6, cutmix_share=0.25)
    inputs = torch.eye(4).repeat_interleave(16, 1).view(4, 8, 8)
    inputs = inputs.view(4, 4, 4, 4).contiguous()
    source, kinds = generator(), {"left": 0, "cut": 0, "mixed": 0}
    batches = 3000
    for _ in range(batches):
        mixed, soft = mix(inputs, torch.arange(4), source)
        if torch.equal(mixed, inputs):
            kinds["left"] += 1
        else:
            fractions = ((mixed > 0) & (mixed < 1)).any()
            kinds["mixed" if fractions else "cut"] += 1
        assert soft.shape == (4, 4)
    alone = 1 / 24  # every item met itself
    expected = {"mixed": 0.6 * 0.75 * (1 - alone), "cut": 0.6 * 0.25 * (1 - alone)}
    assert kinds["mixed"] / batches == pytest.approx(expected["mixed"], abs=0.03)
    assert 0.75 * expected["cut"] < kinds["cut"] / batches < expected["cut"]  # an empty box leaves all
    assert kinds["left"] / batches > 0.4


def test_items_draw_for_themselves() -> None:
    mix = Mix(classes=64, mixup=1.0, cutmix=1.0, probability=0.5, per_item=True)
    inputs = torch.arange(1, 65).double().view(-1, 1, 1).expand(-1, 8, 8)
    mixed, soft = mix(inputs, torch.arange(64), generator())
    left = [torch.equal(mixed[i], inputs[i]) for i in range(64)]
    even = [bool((mixed[i] == mixed[i, 0, 0]).all()) and not left[i] for i in range(64)]
    cut = [not even[i] and not left[i] for i in range(64)]
    assert all(8 < sum(kind) < 56 for kind in (left, even, cut))
    mean = (soft.double() * torch.arange(1, 65).double()).sum(1)
    torch.testing.assert_close(mixed.mean((1, 2)), mean, rtol=1e-5, atol=0)


def test_a_resumed_generator_mixes_the_same_and_other_generators_are_left_alone() -> None:
    mix = Mix(classes=8, mixup=0.4, cutmix=1.0)
    inputs, targets = torch.rand(8, 1, 6, 6), torch.arange(8)
    source = generator()
    mix(inputs, targets, source)
    saved, everywhere, numpy = source.get_state(), torch.get_rng_state(), np.random.get_state()[1].sum()
    straight = [mix(inputs, targets, source) for _ in range(5)]
    resumed = torch.Generator()
    resumed.set_state(saved)
    again = [mix(inputs, targets, resumed) for _ in range(5)]
    assert all(
        torch.equal(a, b)
        for one, two in zip(straight, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), everywhere)
    assert np.random.get_state()[1].sum() == numpy
    first = mix(inputs, targets)  # from torch's own
    assert not torch.equal(torch.get_rng_state(), everywhere)
    torch.set_rng_state(everywhere)
    assert torch.equal(mix(inputs, targets)[0], first[0])


def test_what_is_drawn_never_shifts_what_comes_after() -> None:
    ends = set()
    for mix in (
        Mix(classes=4),
        Mix(classes=4, per_item=True),
        Mix(classes=4, probability=0.0),
        Mix(4, 0.0, 1.0),
    ):
        source = generator()
        mix(torch.rand(4, 1, 6, 6), torch.arange(4), source)
        ends.add(int(torch.randint(2**31, (), generator=source)))
    source = generator()
    torch.randint(2**63 - 1, (), generator=source)
    assert ends == {int(torch.randint(2**31, (), generator=source))}


def test_what_is_not_applied_changes_no_bit() -> None:
    inputs = torch.rand(4, 3)
    mixed, soft = Mix(classes=4, probability=0.0, smoothing=0.1)(inputs, torch.arange(4))
    assert torch.equal(mixed, inputs)
    assert torch.equal(soft, soft_targets(torch.arange(4), 4, 0.1))
    inputs[1] = torch.inf  # an item that is not mixed must not meet 0·∞
    per_item = Mix(classes=4, probability=0.0, per_item=True)
    assert torch.equal(per_item(inputs, torch.arange(4))[0], inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_keep_their_dtype(dtype: torch.dtype) -> None:
    mixed, _ = Mix(4, 1.0, 1.0, per_item=True)(torch.rand(4, 1, 6, 6).to(dtype), torch.arange(4))
    assert mixed.dtype == dtype


# Dropout and stochastic depth


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 4),
        nn.Dropout(0.5),
        nn.Sequential(nn.Dropout2d(0.3), StochasticDepth(0.2)),
        nn.LSTM(4, 4, 2),
    )


def test_dropout_is_set_by_type_reported_and_restored() -> None:
    net = model()
    rates = set_dropout(net, 0.1)
    assert rates.changed == {"1": (0.5, 0.1), "2.0": (0.3, 0.1)}
    assert (net[1].p, net[2][0].p, net[2][1].p, net[3].dropout) == (0.1, 0.1, 0.2, 0.0)
    later = set_dropout(net, 0.05, nn.Dropout)
    assert later.changed == {"1": (0.1, 0.05)}
    later.restore()
    rates.restore()
    assert (net[1].p, net[2][0].p) == (0.5, 0.3)
    with set_dropout(net, 0.0, DROPOUTS) as inside:
        assert set(inside.changed) == {"1", "2.0", "2.1"}
        x = torch.randn(8, 4)
        assert torch.equal(net[1](x), x)
    assert net[2][1].p == 0.2


def test_dropout_is_set_by_name_and_where_it_has_another_one() -> None:
    net = model()
    assert set_dropout(net, {"1": 0.4}).changed == {"1": (0.5, 0.4)}
    assert set_dropout(net, 0.6, nn.LSTM).changed == {"3": (0.0, 0.6)}
    assert net[3].dropout == 0.6
    attention = nn.MultiheadAttention(4, 2, dropout=0.3)
    with set_dropout(attention, 0.0, nn.MultiheadAttention):
        assert attention.dropout == 0.0
    assert attention.dropout == 0.3


def test_a_rate_that_is_set_is_the_rate_that_drops() -> None:
    net, x = nn.Sequential(nn.Dropout(0.9)), torch.ones(20_000)
    set_dropout(net, 0.25)
    found = net(x)
    assert float((found == 0).double().mean()) == pytest.approx(0.25, abs=0.015)
    assert found.unique().tolist() == pytest.approx([0.0, 4 / 3])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_stochastic_depth_drops_whole_items_and_keeps_the_expectation(p: float) -> None:
    branch = torch.rand(20_000, 2, 3) + 0.5
    found = StochasticDepth(p)(branch)
    factor = found / branch
    assert torch.equal((found == 0).all((1, 2)), (found == 0).any((1, 2)))
    values = factor[:, 0, 0].double()
    assert values.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p) / 20_000) + 1e-6)
    assert (values == 0).double().mean().item() == pytest.approx(p, abs=0.02)
    torch.testing.assert_close(values[values > 0], torch.full_like(values[values > 0], 1 / (1 - p)))


def test_stochastic_depth_at_its_ends() -> None:
    branch = torch.rand(6, 2)
    before = torch.get_rng_state()
    assert torch.equal(StochasticDepth(0.5).eval()(branch), branch)
    assert torch.equal(StochasticDepth(0.0)(branch), branch)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    infinite = torch.full((6, 2), torch.inf, requires_grad=True)
    found = dropped(infinite, 1.0)
    found.sum().backward()
    assert torch.equal(found.detach(), torch.zeros(6, 2))
    assert infinite.grad is not None
    assert torch.equal(infinite.grad, torch.zeros(6, 2))
    before = torch.get_rng_state()
    first = StochasticDepth(0.5)(branch)
    torch.set_rng_state(before)
    assert torch.equal(StochasticDepth(0.5)(branch), first)


class Residual(nn.Module):
    """x + branch(x), three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


BRANCHES = ["blocks.0", "blocks.1", "blocks.2"]


def test_branches_are_dropped_with_rates_that_rise_linearly() -> None:
    net, x = Residual(), torch.randn(8, 4)
    names, plain = list(net.state_dict()), net(x)
    depth = stochastic_depth(net, BRANCHES, 0.6)
    assert depth.rates == pytest.approx({"blocks.0": 0.2, "blocks.1": 0.4, "blocks.2": 0.6})
    assert list(net.state_dict()) == names
    torch.manual_seed(5)
    found = net(x)
    torch.manual_seed(5)
    expected = x
    for block, p in zip(net.blocks, (0.2, 0.4, 0.6), strict=True):
        kept = torch.empty(8, 1).bernoulli_(1 - p)
        expected = expected + kept * torch.nn.functional.linear(expected, block.weight, block.bias) / (1 - p)
    torch.testing.assert_close(found, expected)
    assert torch.equal(net.eval()(x), plain)
    net.train()
    depth.set(0.0)
    assert torch.equal(net(x), plain)
    depth.set(1.0)
    assert torch.equal(depth.rates["blocks.2"] * torch.ones(1), torch.ones(1))
    depth.remove()
    assert torch.equal(net(x), plain)
    assert not any(module._forward_hooks for module in net.modules())


def test_the_expectation_of_a_linear_net_is_kept() -> None:
    net, x = Residual().double(), drawn(1, 4)
    plain = net(x)
    stochastic_depth(net, BRANCHES, 0.5)
    found = net(x.expand(40_000, 4))
    error = found.std(0) / math.sqrt(40_000)
    assert ((found.mean(0) - plain[0]).abs() < 5 * error).all()


def test_rates_rise_by_the_paper() -> None:
    survivals = [1 - index / 54 * (1 - 0.5) for index in range(1, 55)]
    assert [1 - rate for rate in linear_rates(54, 0.5)] == pytest.approx(survivals)


# Early stopping

VALUES = st.lists(
    st.one_of(st.integers(-6, 6).map(lambda n: n / 2), st.sampled_from([math.nan, math.inf, -math.inf])),
    max_size=25,
)


def judged(values: list[float], patience: int, delta: float, relative: bool, mode: str, warmup: int) -> Any:
    """Where it stops and what was best then, from the whole list: improvements, and the validations since."""
    sign = 1 if mode == "min" else -1
    best: tuple[float, int] | None = None
    for now, value in enumerate(values):
        if math.isfinite(value):
            needed = 0.0 if best is None else delta * (abs(best[0]) if relative else 1)
            if best is None or sign * (best[0] - value) > needed:
                best = (value, now)
        since = now - max(best[1] + 1 if best else 0, warmup) + 1
        if since >= patience:
            return now, best
    return None, best


@given(
    values=VALUES,
    patience=st.integers(1, 5),
    delta=st.sampled_from([0.0, 0.5, 1.0]),
    relative=st.booleans(),
    mode=st.sampled_from(["min", "max"]),
    warmup=st.integers(0, 6),
    cut=st.integers(0, 25),
)
def test_early_stopping_equals_the_definition_and_goes_on_from_its_state(
    values: list[float], patience: int, delta: float, relative: bool, mode: str, warmup: int, cut: int
) -> None:
    stopped, best = judged(values, patience, delta, relative, mode, warmup)
    stopping = EarlyStopping(patience, delta, relative, mode, warmup)
    for step, value in enumerate(values):
        if step == cut:
            stopping = EarlyStopping.from_state(json.loads(json.dumps(stopping.state(), allow_nan=False)))
        before = stopping.best
        asked = stopping.update(value, step)
        assert asked is (stopped is not None and step >= stopped)
        assert stopping.improved is (stopping.best != before or stopping.best_step == step)
        if asked:
            break
    assert (stopping.best, stopping.best_step) == (best or (None, None))


def test_early_stopping_takes_tensors_and_stays_stopped() -> None:
    stopping = EarlyStopping(patience=1, mode="max")
    assert not stopping.update(torch.tensor(0.5), 10)  # type: ignore[arg-type]
    assert stopping.update(0.5, 20)
    assert stopping.update(0.9, 30)
    assert (stopping.best, stopping.best_step, stopping.improved) == (0.5, 10, False)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "smoothing": (partial(smoothed_cross_entropy, LOGITS, TARGETS, 1.5), "from 0 to 1, got 1.5"),
    "layout": (partial(smoothed_cross_entropy, drawn(2, 5, 3), torch.zeros(2, 3).long()), "movedim"),
    "count": (partial(smoothed_cross_entropy, LOGITS, TARGETS, count=-1), "from 0, got -1"),
    "soft": (partial(soft_cross_entropy, LOGITS, TARGETS), "torch.int64"),
    "class": (partial(soft_targets, TARGETS, 4), "from 0 to 3, got 0 to 4"),
    "ignored": (partial(mixup, torch.rand(8, 2), HOLED, classes=5), "got -100 to 3"),
    "classes": (partial(mixup, torch.rand(8, 2), TARGETS), "classes="),
    "tokens": (partial(mixup, TARGETS, TARGETS, classes=5), "embed tokens first"),
    "items": (partial(mixup, torch.rand(3, 2), TARGETS, classes=5), "3 inputs do not go with 8 targets"),
    "image": (partial(cutmix, torch.rand(8, 2), TARGETS, classes=5), "height, width"),
    "alpha": (partial(Mix, mixup=-1.0), "a number from 0, got -1.0"),
    "probability": (partial(Mix, probability=1.1), "probability must be from 0 to 1, got 1.1"),
    "neither": (partial(Mix, mixup=0.0), "Neither mixup nor cutmix"),
    "rate": (lambda: set_dropout(model(), 1.5), "from 0 to 1, got 1.5"),
    "nan rate": (lambda: StochasticDepth(math.nan), "got nan"),
    "name": (lambda: set_dropout(model(), {"2.00": 0.1}), "no dropout '2.00'. Did you mean '2.0'"),
    "none": (lambda: set_dropout(nn.Linear(2, 2), 0.1), "no module of DropoutNd"),
    "no knob": (lambda: set_dropout(model(), 0.1, nn.Linear), "neither as p nor as dropout"),
    "branch": (
        lambda: stochastic_depth(Residual(), ["blocks.7"]),
        "no module 'blocks.7'. Did you mean 'blocks.",
    ),
    "output": (
        lambda: (net := model(), stochastic_depth(net, ["3"]), net[3](torch.rand(2, 4))),
        "puts out tuple",
    ),
    "mode": (partial(EarlyStopping, mode="down"), "min or max, got 'down'"),
    "patience": (partial(EarlyStopping, patience=0), "at least 1, got 0"),
    "delta": (partial(EarlyStopping, min_delta=math.nan), "got nan"),
    "warmup": (partial(EarlyStopping, warmup=-1), "from 0, got -1"),
    "state": (partial(EarlyStopping.from_state, {"patience": 1}), "missing or unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(BadInput, match=said):
        call()
