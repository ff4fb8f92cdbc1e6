"""Curvature against dense matrices, closed forms and saddles whose eigenvalues are known."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from downslope import curvature as cv
from downslope.errors import BadInput


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(5), nn.Dropout(0.3)] if norm else []
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()


def data(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator).double()
    return x, torch.randint(3, (count,), generator=generator)


def loss_of(model: nn.Module, seed: int = 1) -> Callable[[], Tensor]:
    x, y = data(seed)
    return lambda: nn.functional.cross_entropy(model(x), y)


def dense(model: nn.Module, seed: int = 1) -> Tensor:
    """The whole Hessian by torch.func, column by column."""
    named = dict(model.named_parameters())
    shapes = [p.shape for p in named.values()]
    x, y = data(seed)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        weights = {n: part.view(s) for n, part, s in zip(named, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return torch.func.jacrev(torch.func.jacrev(loss))(flat)


def everything(model: nn.Module) -> list[Any]:
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [
        *tensors,
        torch.get_rng_state(),
        *(None if p.grad is None else p.grad.clone() for p in model.parameters()),
    ]


def same(one: list[Any], two: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in zip(one, two, strict=True))


# The Hessian


def test_products_are_those_of_the_dense_hessian() -> None:
    model = network()
    H, hessian = dense(model), cv.Hessian(loss_of(model), model)
    for seed in range(3):
        v = torch.randn(len(H), generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(hessian @ v, H @ v, rtol=1e-10, atol=1e-12)
    parts = [torch.ones_like(p) for p in model.parameters()]
    found = cv.hessian_vector(loss_of(model), list(model.parameters()), parts)
    assert [f.shape for f in found] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(torch.cat([f.reshape(-1) for f in found]), H.sum(1), rtol=1e-10, atol=1e-12)


def test_gradient_and_loss_are_torchs() -> None:
    model = network()
    hessian = cv.Hessian(loss_of(model), model)
    loss = loss_of(model)()
    loss.backward()
    torch.testing.assert_close(hessian.gradient, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert hessian.loss == pytest.approx(loss.item(), rel=1e-15)


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu").double()
    x = torch.randn(2, 3, 4).double()
    hessian = cv.Hessian(lambda: model(x).square().mean(), model)
    a, b = (torch.randn(len(hessian.gradient)).double() for _ in range(2))
    assert float(a @ (hessian @ b)) == pytest.approx(float(b @ (hessian @ a)), rel=1e-9)  # symmetric
    step = 1e-5

    def gradient(shift: float) -> Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            offset = 0
            for p in moved.parameters():
                p += shift * a[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
        return cv.Hessian(lambda: moved(x).square().mean(), moved).gradient

    difference = (gradient(step) - gradient(-step)) / (2 * step)
    torch.testing.assert_close(hessian @ a, difference, rtol=1e-5, atol=1e-7)


def test_parameters_without_curvature_or_use_give_zeros() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert (cv.Hessian(lambda: used.sum(), [used, unused]) @ torch.ones(5)).tolist() == [0] * 5
    assert (cv.Hessian(lambda: (used**3).sum(), [used, unused]) @ torch.ones(5)).tolist() == [6, 6, 0, 0, 0]


def test_what_is_no_loss_is_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(BadInput, match="one number"):
        cv.Hessian(lambda: w * w, [w])
    with pytest.raises(BadInput, match="does not depend"):
        cv.Hessian(lambda: torch.ones(()), [w])
    with pytest.raises(BadInput, match="no trainable parameters"):
        cv.Hessian(lambda: w.sum(), [w.detach()])
    c = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(BadInput, match="not complex"):
        cv.Hessian(lambda: c.abs().sum(), [c])
    with pytest.raises(BadInput, match=r"shape \(2,\), got \(3,\)"):
        cv.Hessian(lambda: (w * w).sum(), [w]) @ torch.ones(3)
    with pytest.raises(BadInput, match="not finite"):
        cv.eigenvalues(lambda: (w * math.inf).square().sum(), [w])


# Lanczos


def test_the_ends_of_the_spectrum_are_those_of_a_dense_solver() -> None:
    model = network()
    values, vectors = np.linalg.eigh(dense(model).numpy())
    found = cv.eigenvalues(loss_of(model), model, smallest=2, largest=3, tolerance=1e-9)
    for pairs, expected in ((found.smallest, (0, 1)), (found.largest, (-1, -2, -3))):
        for pair, index in zip(pairs, expected, strict=True):
            assert pair.converged
            assert pair.value == pytest.approx(values[index], rel=1e-8, abs=1e-12)
            assert abs(pair.vector.numpy() @ vectors[:, index]) == pytest.approx(1, abs=1e-5)
    again = cv.eigenvalues(loss_of(model), model, smallest=2, largest=3, tolerance=1e-9)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(found.largest, again.largest, strict=True))


@pytest.mark.parametrize("steps", [5, 20, 60])
def test_the_residual_bounds_the_error_also_before_convergence(steps: int) -> None:
    rng = np.random.default_rng(0)
    eigen = np.sort(rng.normal(size=200) ** 3)
    Q = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    A = torch.from_numpy(Q * eigen @ Q.T)
    start = torch.from_numpy(rng.normal(size=200))
    found = cv.lanczos(A.__matmul__, start, smallest=2, largest=2, steps=steps, tolerance=1e-10)
    assert found.steps <= steps + 4
    for pair in (*found.smallest, *found.largest):
        residual = float((A @ pair.vector - pair.value * pair.vector).norm())
        assert pair.residual == pytest.approx(residual, abs=1e-12)
        assert np.abs(eigen - pair.value).min() <= residual + 1e-12
        assert pair.converged == (residual <= 2e-10 * abs(pair.value) + 1e-12)
    assert found.smallest[0].value >= eigen[0] - 1e-12  # a Ritz value lies inside the spectrum
    assert all(pair.converged for pair in found.largest) == (steps == 60)


def test_a_clustered_spectrum_gives_no_ghosts() -> None:
    """Without full reorthogonalisation the largest value is found again and again."""
    eigen = torch.cat([torch.linspace(0, 1, 98).double(), torch.tensor([50.0, 100.0]).double()])
    found = cv.lanczos(lambda v: eigen * v, torch.ones(100).double(), largest=3, steps=100, tolerance=1e-8)
    assert [round(pair.value, 6) for pair in found.largest] == [100, 50, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_degenerate_matrices_are_exact(dtype: torch.dtype) -> None:
    start = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype)
    same_value = cv.lanczos(lambda v: 3 * v, start, largest=2)
    assert [pair.value for pair in same_value.largest] == [pytest.approx(3, rel=1e-6)]
    nothing = cv.lanczos(torch.zeros_like, start)
    assert (nothing.smallest[0].value, nothing.smallest[0].residual, nothing.smallest[0].converged) == (
        0,
        0,
        True,
    )
    one = cv.lanczos(lambda v: -2 * v, torch.ones(1, dtype=dtype), smallest=3)
    assert [pair.value for pair in one.smallest] == [pytest.approx(-2)]


def test_float32_finds_what_float64_finds() -> None:
    model = network()
    values = np.linalg.eigvalsh(dense(model).numpy())
    x, y = data(1)
    single = copy.deepcopy(model).float()
    found = cv.eigenvalues(lambda: nn.functional.cross_entropy(single(x.float()), y), single)
    assert found.largest[0].value == pytest.approx(values[-1], rel=1e-4)
    assert found.smallest[0].value == pytest.approx(values[0], rel=1e-3)
    assert found.largest[0].converged


# The noise of gradients

MEAN = torch.linspace(-0.5, 1, 20).double()
DEVIATIONS = torch.linspace(0.5, 2, 20).double()
TRACE, SQUARE = float(DEVIATIONS.square().sum()), float(MEAN.square().sum())


def micro_gradients(seed: int, sizes: list[int]) -> list[Tensor]:
    """Mean gradients of w·x at any w, for x with known mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (MEAN + DEVIATIONS * torch.randn(n, 20, generator=generator, dtype=torch.float64)).mean(0)
        for n in sizes
    ]


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 2, 3, 10, 4, 7], [1, 30]], ids=["even", "ragged", "two"])
def test_trap_38_the_estimates_are_unbiased_for_ragged_micro_batches_too(sizes: list[int]) -> None:
    found = [cv.noise_of(micro_gradients(seed, sizes), sizes) for seed in range(2000)]
    for values, truth in (([n.trace for n in found], TRACE), ([n.gradient for n in found], SQUARE)):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 3.5 * error
        assert error < 0.06 * truth  # small enough to tell


def test_even_micro_batches_give_the_formulas_of_the_paper() -> None:
    """arXiv:1812.06162, appendix A.1: two batch sizes, the small one averaged over its micro-batches."""
    gradients, small, k = micro_gradients(0, [4] * 8), 4, 8
    g_small = np.mean([float(g @ g) for g in gradients])
    g_big = float(sum(gradients).div(k).square().sum())
    big = small * k
    expected = (big * g_big - small * g_small) / (big - small)
    trace = (g_small - g_big) / (1 / small - 1 / big)
    found = cv.noise_of(gradients, [small] * k)
    assert found.gradient == pytest.approx(expected, rel=1e-12)
    assert found.trace == pytest.approx(trace, rel=1e-12)
    assert found.critical_batch == pytest.approx(trace / expected, rel=1e-12)
    assert found.progress(found.critical_batch) == pytest.approx(0.5)


@pytest.mark.parametrize("sizes", [[8] * 6, [4, 12] * 8], ids=["6 even", "16 ragged"])
def test_the_interval_covers_the_truth_as_often_as_it_says(sizes: list[int]) -> None:
    found = [cv.noise_of(micro_gradients(seed, sizes), sizes, confidence=0.9) for seed in range(600)]
    covered = np.mean([n.low <= TRACE / SQUARE <= n.high for n in found])
    assert 0.87 <= covered <= 0.96
    assert np.mean([n.high < math.inf for n in found]) > 0.9


def test_a_gradient_that_noise_hides_bounds_the_batch_from_below_alone() -> None:
    found = cv.noise_of([g - MEAN for g in micro_gradients(3, [4] * 16)], [4] * 16)
    assert found.high == math.inf
    assert found.low > 10
    assert (
        cv.noise_of(micro_gradients(0, [4, 4]), [4, 4]).high == math.inf
    )  # two tell nothing of their spread


def test_the_jackknife_is_the_one_that_leaves_each_out() -> None:
    sizes = [1, 2, 3, 10, 4, 7]
    gradients = micro_gradients(5, sizes)
    whole = cv.noise_of(gradients, sizes)
    rest = [
        cv.noise_of(gradients[:j] + gradients[j + 1 :], sizes[:j] + sizes[j + 1 :]) for j in range(len(sizes))
    ]
    h = sum(sizes) / np.array(sizes)
    pseudo = [
        h * getattr(whole, key) - (h - 1) * np.array([getattr(n, key) for n in rest])
        for key in ("trace", "gradient")
    ]
    (S, s), (G, g) = (
        (getattr(whole, k), p - (p / h).sum()) for k, p in zip(("trace", "gradient"), pseudo, strict=True)
    )
    t = 2.015  # Student's t, 5 degrees, 90 %, from a table
    if whole.high < math.inf:  # on the bounds, S − B·G is t deviations from 0
        for B in (whole.low, whole.high):
            spread = math.sqrt(float(((s - B * g) ** 2 / (h - 1)).mean()))
            assert abs(S - B * G) / spread == pytest.approx(t, rel=5e-3)
    assert whole.low < whole.critical_batch < whole.high < math.inf


def test_noise_is_measured_on_a_model_and_weighted_by_what_counts() -> None:
    model = network(norm=True).train()
    model[1].eval(), model[2].eval()
    batches = [data(seed, count) for seed, count in enumerate((4, 9, 6))]
    before = everything(model)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    found = cv.noise_scale(loss, model, iter(batches))
    assert same(everything(model), before)
    gradients = []
    for batch in batches:
        slopes = torch.autograd.grad(loss(batch), list(model.parameters()))
        gradients.append(torch.cat([s.reshape(-1) for s in slopes]))
    expected = cv.noise_of(gradients, [4, 9, 6])
    assert found.trace == pytest.approx(expected.trace, rel=1e-12)
    assert found.items == 19
    tokens = cv.noise_scale(loss, model, batches, items=lambda batch: 10 * len(batch[1]))
    assert tokens.trace == pytest.approx(10 * found.trace, rel=1e-12)
    assert "3 micro-batches" in str(found)


def test_what_is_no_sample_is_refused() -> None:
    g = torch.ones(2)
    with pytest.raises(BadInput, match="at least 2 micro-batches"):
        cv.noise_of([g], [4])
    with pytest.raises(BadInput, match="number of items"):
        cv.noise_of([g, g], [4, 0])
    with pytest.raises(BadInput, match="not finite"):
        cv.noise_of([g, g * math.nan], [4, 4])
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(BadInput, match="a dict needs `items`"):
        cv.noise_scale(lambda batch: w.sum(), [w], [{"x": g}, {"x": g}])


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"), [(0.9, 3, 2.353), (0.95, 10, 2.228), (0.9, 30, 1.697)]
)
def test_quantiles_are_those_of_students_table(confidence: float, freedom: int, expected: float) -> None:
    assert cv._student(confidence, freedom) == pytest.approx(expected, rel=5e-3)


# Rates


def test_rates_scale_by_their_rule_and_say_where_it_holds() -> None:
    linear = cv.scale_rate(0.1, batch=32, to=256, critical=300)
    assert (linear.lr, linear.rule, linear.limit, linear.holds) == (0.8, "linear", 300, True)
    assert cv.scale_rate(0.1, batch=32, to=512, critical=300).holds is False
    assert cv.scale_rate(0.1, batch=32, to=512).holds is None
    assert cv.scale_rate(0.1, batch=512, to=32, critical=300).holds is False  # the known rate lies outside
    root = cv.scale_rate(1e-3, batch=32, to=128, like="adam", betas=(0.9, 0.99), eps=1e-8, critical=1000)
    assert root.lr == pytest.approx(2e-3)
    assert root.betas == pytest.approx((0.6, 0.96))
    assert root.eps == pytest.approx(5e-9)
    assert (root.limit, root.holds) == (pytest.approx(320), True)  # 1 − β1 reaches 1 at 10 times the batch
    assert cv.scale_rate(1e-3, batch=32, to=640, like="adam", betas=(0.9,)).holds is False
    assert cv.scale_rate(1e-3, batch=32, to=64, like="adam", betas=(0.9,)).holds is None
    assert "holds up to 300 items: here it holds" in str(linear)
    with pytest.raises(BadInput, match=r"got 'adamw'.*Did you mean 'adam'"):
        cv.scale_rate(0.1, batch=1, to=2, like="adamw")
    with pytest.raises(BadInput, match="above 0"):
        cv.scale_rate(0.1, batch=0, to=2)


def test_the_linear_rule_overshoots_as_the_stated_range_says() -> None:
    """On a quadratic with known noise the best rate is 1 / (1 + B_noise / batch) of the exact one's."""
    noise = 64.0

    def best(batch: float) -> float:  # minimises E|w'|² for w' = w − lr (w + noise), |w| = 1
        rates = np.linspace(0, 1.2, 120001)
        return float(rates[np.argmin((1 - rates) ** 2 + rates**2 * noise / batch)])

    small = best(0.64)
    scaled = cv.scale_rate(small, batch=0.64, to=64, critical=noise)
    assert scaled.holds
    assert scaled.lr / best(64) == pytest.approx(2, rel=0.02)  # twice the best one at the critical batch
    assert cv.scale_rate(small, batch=0.64, to=6.4, critical=noise).lr / best(6.4) == pytest.approx(
        1.09, abs=0.01
    )


def adam_on_noise(
    rate: float, betas: Sequence[float], spread: float, steps: int, *, flat: bool = False
) -> tuple[float, float]:
    """Mean and deviation of weights that begin at 1, by Adam as its paper prints it: on w²/2, or, if `flat`,
    on a slope of 1; the gradient has noise of this deviation.
    """
    rng = np.random.default_rng(0)
    w, m, v = np.ones(10_000), np.zeros(10_000), np.zeros(10_000)
    for t in range(1, steps + 1):
        g = (1.0 if flat else w) + spread * rng.standard_normal(w.size)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        w = w - rate * m / (1 - betas[0] ** t) / np.sqrt(v / (1 - betas[1] ** t))
    return float(w.mean()), float(w.std())


@pytest.mark.parametrize("times", [4, 16])
def test_the_square_root_rule_keeps_adams_mean_and_spread_far_below_the_critical_batch(times: int) -> None:
    """Over as many items, to the accuracy of the sample (0.007 of the mean); linear scaling, and betas left
    as they are, do not.
    """
    betas, noise, steps = (0.99, 0.9995), 900.0, 1600
    mean, spread = adam_on_noise(0.03, betas, noise**0.5, steps)
    found = cv.scale_rate(0.03, batch=1, to=times, like="adam", betas=betas, critical=noise)
    assert found.holds
    larger = (noise / times) ** 0.5
    scaled = adam_on_noise(found.lr, found.betas, larger, steps // times)
    assert scaled[0] == pytest.approx(mean, abs=0.02)
    assert scaled[1] == pytest.approx(spread, rel=0.03)
    assert adam_on_noise(0.03 * times, found.betas, larger, steps // times)[1] > 1.3 * spread
    assert adam_on_noise(found.lr, betas, larger, steps // times)[0] < mean - 0.06


@pytest.mark.parametrize(("share", "slower"), [(0.1, 1.1**0.5), (1.0, 2**0.5)])
def test_the_square_root_rule_falls_short_as_the_stated_range_says(share: float, slower: float) -> None:
    """Adam divides by the root of noise and gradient together, and goes √(1 + batch/critical) less far."""
    noise, first = 64.0, 0.64
    ways = []
    for batch in (first, share * noise):
        found = cv.scale_rate(1e-3, batch=first, to=batch, like="adam", betas=(0.9999, 0.99995))
        steps = round(8000 * first / batch)
        ways.append(1 - adam_on_noise(found.lr, found.betas, (noise / batch) ** 0.5, steps, flat=True)[0])
    assert ways[0] / ways[1] == pytest.approx(slower / 1.01**0.5, rel=0.01)


# Saddles


def bowl(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def factors(A: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """½|U Vᵀ − A|² at U = V = 0, where the gradient is 0 and the Hessian has ± the singular values of A."""
    U, V = (torch.zeros(n, 2, dtype=A.dtype, requires_grad=True) for n in A.shape)
    return [U, V], lambda: (U @ V.T - A).square().sum() / 2


def descend(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int, lr: float) -> float:
    for _ in range(steps):
        slopes = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, slope in zip(parameters, slopes, strict=True):
                p -= lr * slope
    return loss().item()


def test_an_analytic_saddle_is_found_and_left() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    evidence = cv.saddle(bowl(x), [x])
    assert evidence.found
    assert evidence.converged
    assert evidence.gradient_norm == 0
    assert evidence.curvature == pytest.approx(-2, rel=1e-12)
    assert evidence.direction.abs().tolist() == pytest.approx([0, 1], abs=1e-9)
    assert str(evidence).startswith("saddle: gradient norm 0")
    moved = cv.escape(bowl(x), [x], evidence, radius=0.5)
    assert (moved.before, moved.after) == (0, pytest.approx(-(0.5**2) + 0.5**4))
    assert bowl(x)().item() == moved.after
    assert descend(bowl(x), [x], 200, 0.1) == pytest.approx(-0.25)


def test_gradient_descent_stays_at_the_origin_of_a_factorisation_and_the_escape_leaves() -> None:
    A = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4)))
    singular = np.linalg.svd(A.numpy(), compute_uv=False)
    parameters, loss = factors(A)
    assert descend(loss, parameters, 500, 0.05) == pytest.approx((singular**2).sum() / 2)
    assert all(bool((p == 0).all()) for p in parameters)
    evidence = cv.saddle(loss, parameters)
    assert evidence.curvature == pytest.approx(-singular[0], rel=1e-3)
    ends = cv.eigenvalues(loss, parameters, smallest=1, largest=1, tolerance=1e-8)
    assert ends.smallest[0].value == pytest.approx(-singular[0], rel=1e-10)
    assert ends.largest[0].value == pytest.approx(singular[0], rel=1e-10)
    for _ in range(2):  # rank by rank, as each escape leads to the next saddle or to the minimum
        cv.escape(loss, parameters, cv.saddle(loss, parameters, gradient=1e-3), radius=0.1)
        descend(loss, parameters, 3000, 0.05)
    assert loss().item() == pytest.approx((singular[2:] ** 2).sum() / 2, rel=1e-6)
    assert not cv.saddle(loss, parameters).found  # Eckart and Young: the minimum


@pytest.mark.parametrize("at", ["minimum", "slope", "degenerate minimum"])
def test_elsewhere_nothing_is_found_and_nothing_moves(at: str) -> None:
    x = torch.tensor([0.0, 0.0 if at != "slope" else 0.3], dtype=torch.float64, requires_grad=True)
    losses = {"minimum": lambda: x.square().sum(), "slope": bowl(x), "degenerate minimum": lambda: x[0] ** 2}
    evidence = cv.saddle(losses[at], [x])
    assert not evidence.found
    assert str(evidence).startswith("no saddle")
    assert (evidence.curvature is None) == (at == "slope")
    start = x.detach().clone()
    assert cv.escape(losses[at], [x], evidence).distance == 0
    assert torch.equal(x, start)


def test_several_losses_stand_for_their_sum_in_the_memory_of_one() -> None:
    model, parts = network(), [data(0), data(1), data(2)]
    alive, most = weakref.WeakSet[Any](), 0

    class Watched(torch.autograd.Function):
        """The identity, counted for as long as a graph holds it."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal most
            ctx.mark = Mark()
            alive.add(ctx.mark)
            most = max(most, len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Mark:
        pass

    def loss(part: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(Watched.apply(model(part[0])), part[1])

    def whole() -> Tensor:
        return torch.stack([loss(part) for part in parts]).sum()

    several = [partial(loss, part) for part in parts]
    cv.saddle(several, model, gradient=1e9, steps=3)
    assert most == 1
    cv.saddle(whole, model, gradient=1e9, steps=3)
    assert most == 3
    one, other = (cv.saddle(losses, model, gradient=1e9, steps=300) for losses in (whole, several))
    assert other.curvature == pytest.approx(one.curvature, rel=1e-9)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-12)
    assert other.loss == pytest.approx(whole().item(), rel=1e-12)
    ends = [cv.eigenvalues(losses, model, tolerance=1e-6).largest[0].value for losses in (whole, several)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)
    moved = cv.escape(several, model, other, radius=0.1)
    assert moved.before == pytest.approx(other.loss, rel=1e-12)
    assert moved.after == pytest.approx(whole().item(), rel=1e-12)


def test_curvature_above_the_threshold_is_no_saddle() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert not cv.saddle(bowl(x), [x], curvature=2.1).found
    assert cv.saddle(bowl(x), [x], curvature=1.9).found


@pytest.mark.parametrize("side", [1, -1])
def test_the_sign_that_lowers_the_loss_is_taken_and_long_steps_are_halved(side: int) -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:  # falls further on one side, and only for short steps
        return x[0] ** 2 - x[1] ** 2 - side * 10 * x[1] ** 3 + 100 * x[1] ** 4

    evidence = cv.saddle(loss, [x])
    moved = cv.escape(loss, [x], evidence, radius=1.0)
    assert x[1].item() * side > 0
    assert 0 < abs(moved.distance) < 0.2
    assert moved.after == loss().item() < moved.before


def test_a_step_that_no_length_makes_lower_is_taken_back() -> None:
    x = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
    start = x.detach().clone()
    evidence = cv.Saddle(0.0, 0.0, 1.0, 0.1, -1.0, 0.0, True, torch.tensor([1.0, 0.0]).double())
    assert cv.escape(lambda: (x - start).square().sum(), [x], evidence).distance == 0
    assert torch.equal(x, start)
    calls = iter(range(3))

    def failing() -> Tensor:
        if next(calls) == 2:
            raise KeyError
        return (x - start).square().sum()

    with pytest.raises(KeyError):
        cv.escape(failing, [x], evidence)
    assert torch.equal(x, start)


def test_perturbations_are_even_in_the_ball_and_come_from_the_seed_alone() -> None:
    def drawn(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        p = torch.zeros(3, dtype=dtype, requires_grad=True)
        before = torch.get_rng_state()
        cv.perturb([p], 2.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return p.detach()

    sample = torch.stack([drawn(seed) for seed in range(3000)])
    radii = (
        np.sort((sample.norm(dim=1) / 2).numpy()) ** 3
    )  # evenly from 0 to 1 for a ball in three dimensions
    assert radii[-1] <= 1
    assert np.abs(radii - np.linspace(0, 1, 3000)).max() < 1.63 / math.sqrt(3000)  # Kolmogorov, 1 %
    directions = sample / sample.norm(dim=1, keepdim=True)
    assert float(directions.mean(0).norm()) < 3 / math.sqrt(3000) * math.sqrt(3)
    assert torch.equal(drawn(7), drawn(7))
    torch.testing.assert_close(drawn(7, torch.float32), drawn(7).float())


def test_perturbed_descent_leaves_a_saddle_too() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert descend(bowl(x), [x], 200, 0.1) == 0
    cv.perturb([x], 1e-3, seed=0)
    assert descend(bowl(x), [x], 200, 0.1) == pytest.approx(-0.25)


def test_trap_46_no_probe_leaves_a_trace() -> None:
    model = network(norm=True).train()
    loss_of(model)().backward()
    before = everything(model)
    hessian = cv.Hessian(loss_of(model), model)
    v = torch.ones_like(hessian.gradient)
    assert torch.equal(hessian @ v, hessian @ v)  # one function, whatever dropout would draw next
    cv.eigenvalues(loss_of(model), model, steps=5)
    cv.noise_scale(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), model, [data(0), data(1)])
    evidence = cv.saddle(loss_of(model), model, gradient=1e9, steps=5)
    assert evidence.curvature is not None
    assert same(everything(model), before)
    moved = cv.escape(loss_of(model), model, evidence, radius=1e-3)
    after, weights = everything(model), len(list(model.parameters()))
    assert same(after[weights:], before[weights:])  # buffers, generators, gradients
    assert same(after[:weights], before[:weights]) == (moved.distance == 0)
