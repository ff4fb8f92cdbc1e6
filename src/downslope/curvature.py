"""Curvature: products with the Hessian, its extreme eigenvalues, the noise of gradients and the batch size it
makes critical, and the way off a saddle. Nothing here leaves a trace on buffers, generators or gradients.

A loss is a function without arguments that gives a scalar; where `Losses` are taken, several stand for their
sum, each the same function at every call. Parameters are a model, whose trainable ones are meant and whose
buffers are put back, or an iterable of tensors. Vectors are flat, in the parameters' order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from downslope.errors import BadInput, nearest
from downslope.inspection import untouched

Loss = Callable[[], Tensor]
Losses = Loss | Sequence[Loss]
Parameters = nn.Module | Iterable[Tensor]
Array = NDArray[np.float64]


class NotFiniteError(BadInput):
    """A product with a Hessian that is no finite number."""


class _Space:
    """The parameters as one flat vector, in their widest dtype, on the device of the first."""

    def __init__(self, parameters: Parameters) -> None:
        self.model = (parameters,) if isinstance(parameters, nn.Module) else ()
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        self.parameters = list({id(p): p for p in given if p.requires_grad}.values())
        if not self.parameters:
            raise BadInput("there are no trainable parameters.")
        for p in self.parameters:
            if p.is_complex() or hasattr(p, "device_mesh"):
                raise BadInput(
                    "curvature is measured on real parameters that are whole, not complex or sharded ones."
                )
        self.size = sum(p.numel() for p in self.parameters)
        self.device, self.dtype = self.parameters[0].device, torch.float32
        for p in self.parameters:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def parts(self, vector: Tensor) -> list[Tensor]:
        if vector.shape != (self.size,):
            raise BadInput(
                f"a vector over these parameters has shape ({self.size},), got {tuple(vector.shape)}."
            )
        cut = torch.split(vector, [p.numel() for p in self.parameters])
        return [part.view_as(p).to(p) for part, p in zip(cut, self.parameters, strict=True)]

    def random(self, seed: int) -> Tensor:
        """Normal numbers that depend on the seed alone, not on device or dtype."""
        drawn = torch.randn(self.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn.to(self.device, self.dtype)

    @torch.no_grad()
    def move(self, vector: Tensor) -> None:
        for p, part in zip(self.parameters, self.parts(vector), strict=True):
            p.add_(part)

    @contextmanager
    def probed(self) -> Iterator[None]:
        with untouched(*self.model, *self.parameters), torch.enable_grad():
            yield

    def value(self, loss: Losses) -> float:
        with self.probed(), torch.no_grad():
            return math.fsum(_scalar(one()).item() for one in ([loss] if callable(loss) else loss))


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise BadInput(f"a loss is one number, got a tensor of shape {tuple(value.shape)}: take its mean.")
    return value


# The Hessian


class Hessian:
    """The Hessian of a loss at its parameters, as a product: `hessian @ vector`, by double backward.

    The loss is called once; its graph is kept, so every product is of the same function, whatever dropout
    drew, and costs about two backward passes. Attention runs in its plain form, which can be differentiated
    twice; cuDNN's recurrent layers cannot. `loss` is the value, `gradient` the flat gradient. In
    ReLU networks it is the Hessian of the piece that the parameters lie in. BadInput for a loss of more than
    one number, or none of whose parameters can be trained.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> (Hessian(lambda: x[0] ** 3 + x[0] * x[1], [x]) @ torch.tensor([1.0, 0.0])).tolist()
    [6.0, 1.0]
    """

    def __init__(self, loss: Loss, parameters: Parameters) -> None:
        self._space = space = _Space(parameters)
        with space.probed(), sdpa_kernel(SDPBackend.MATH):
            value = _scalar(loss())
            if not value.requires_grad:
                raise BadInput("the loss does not depend on the parameters.")
            self._slopes = torch.autograd.grad(
                value, space.parameters, create_graph=True, materialize_grads=True
            )
        self.loss = float(value.detach())
        self.gradient = space.flat(self._slopes)

    def __matmul__(self, vector: Tensor) -> Tensor:
        pairs = zip(self._slopes, self._space.parts(vector), strict=True)
        curved = [(slope, part) for slope, part in pairs if slope.requires_grad]
        if not curved:  # linear in every parameter
            return torch.zeros_like(vector)
        slopes, parts = zip(*curved, strict=True)
        with self._space.probed():
            found = torch.autograd.grad(
                slopes, self._space.parameters, parts, retain_graph=True, materialize_grads=True
            )
        return self._space.flat(found)


class _Summed:
    """The Hessian of a sum of losses. No two graphs are held at once: each product calls every loss anew."""

    def __init__(self, losses: Sequence[Loss], parameters: Parameters) -> None:
        self._space = space = _Space(parameters)
        self._losses, self._of = losses, space.model[0] if space.model else space.parameters
        self.loss, self.gradient = 0.0, torch.zeros(space.size, dtype=space.dtype, device=space.device)
        for loss in losses:
            hessian = Hessian(loss, self._of)
            self.loss += hessian.loss
            self.gradient += hessian.gradient
            del hessian  # and its graph, before there is another

    def __matmul__(self, vector: Tensor) -> Tensor:
        found = torch.zeros_like(vector)
        for loss in self._losses:
            found += Hessian(loss, self._of) @ vector
        return found


def _hessian(loss: Losses, parameters: Parameters) -> Hessian | _Summed:
    return Hessian(loss, parameters) if callable(loss) else _Summed(loss, parameters)


def hessian_vector(loss: Loss, parameters: Parameters, vector: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian times a vector, both as tensors shaped like the parameters. `Hessian` makes many."""
    hessian = Hessian(loss, parameters)
    return hessian._space.parts(hessian @ hessian._space.flat(vector))


@dataclass(frozen=True)
class Eigenpair:
    """An approximate eigenvalue with its unit vector v.

    residual: |H v − value v|; some true eigenvalue is no further away than that.
    """

    value: float
    vector: Tensor
    residual: float
    converged: bool


@dataclass(frozen=True)
class Spectrum:
    """The ends of a spectrum: `smallest` in rising, `largest` in falling order, after that many products."""

    smallest: tuple[Eigenpair, ...]
    largest: tuple[Eigenpair, ...]
    steps: int


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    smallest: int = 1,
    largest: int = 1,
    steps: int = 100,
    tolerance: float = 1e-3,
    floor: float = 0.0,
) -> Spectrum:
    """Extreme eigenpairs of a symmetric product, by Lanczos with full reorthogonalisation (Golub & Van Loan).

    start: a vector with a part along what is sought; a random one has it. Stops when all asked-for residuals
    are below tolerance·|value| or `floor`, or after `steps` products; the residual of each pair is then
    measured by one more. Memory: `steps` vectors. Of a repeated eigenvalue one vector is found. Raises
    NotFiniteError.
    """
    eps = torch.finfo(start.dtype).eps
    basis = start.new_empty(min(steps, start.numel()), start.numel())
    alphas: list[float] = []
    betas: list[float] = []
    vector = start / start.norm()
    for k in range(len(basis)):
        basis[k] = vector
        vector = product(vector)
        alphas.append(float(vector @ basis[k]))
        if not math.isfinite(alphas[-1]):
            raise NotFiniteError("a product is not finite: look at the loss and its gradient first.")
        for _ in range(2):  # once leaves what cancellation left
            vector = vector - basis[: k + 1].T @ (basis[: k + 1] @ vector)
        betas.append(float(vector.norm()))
        values, mixes = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
        order = range(k + 1)
        ends = [*order[:smallest], *order[max(0, k + 1 - largest) :]]
        scale = np.abs(values).max()
        bounds = np.maximum(tolerance * np.abs(values), max(floor, 16 * eps * scale))
        close = (betas[-1] * np.abs(mixes[-1]) <= bounds)[ends].all() and k + 1 >= smallest + largest
        if close or betas[-1] <= 16 * eps * scale:
            break
        vector = vector / betas[-1]
    pairs = {}
    for i in set(ends):
        mixed = basis[: k + 1].T @ torch.as_tensor(mixes[:, i]).to(basis)
        residual = float((product(mixed) - float(values[i]) * mixed).norm())
        pairs[i] = Eigenpair(float(values[i]), mixed, residual, residual <= 2 * float(bounds[i]))
    low, high = order[:smallest], order[::-1][:largest]
    return Spectrum(tuple(pairs[i] for i in low), tuple(pairs[i] for i in high), k + 1 + len(pairs))


def eigenvalues(
    loss: Losses,
    parameters: Parameters,
    *,
    smallest: int = 1,
    largest: int = 1,
    steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Spectrum:
    """Extreme eigenvalues of a loss's Hessian, by `lanczos` from a start drawn from `seed`.

    The largest is the sharpness: gradient descent is stable below lr = 2 / largest. In float32 the ends are
    good to about 1e-6 of the largest. Not for: a loss that draws anew in each call, as with dropout.

    >>> x = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> ends = eigenvalues(lambda: x[0] ** 2 - x[1] ** 2, [x])
    >>> round(ends.smallest[0].value, 5), round(ends.largest[0].value, 5), ends.smallest[0].converged
    (-2.0, 2.0, True)
    """
    hessian = _hessian(loss, parameters)
    return lanczos(
        hessian.__matmul__,
        hessian._space.random(seed),
        smallest=smallest,
        largest=largest,
        steps=steps,
        tolerance=tolerance,
    )


# The noise of gradients


@dataclass(frozen=True)
class Noise:
    """Noise of a gradient, from micro-batches (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    gradient: |G|², trace: tr Σ of a single item's gradient; both unbiased, so `gradient` may be negative
    where noise hides it. low, high: the interval of the critical batch size at that confidence, `high`
    infinite where |G|² cannot be told from 0.
    """

    gradient: float
    trace: float
    low: float
    high: float
    confidence: float
    items: float
    micro_batches: int

    @property
    def critical_batch(self) -> float:
        """B = tr Σ / |G|², in items: the paper's simple noise scale, its guide to the critical batch."""
        return self.trace / self.gradient if self.gradient > 0 else math.inf

    def progress(self, batch: float) -> float:
        """What a step on `batch` items gains, as a part of the exact gradient's: 1 / (1 + B / batch)."""
        return 1 / (1 + self.critical_batch / batch)

    def __str__(self) -> str:
        return (
            f"critical batch {self.critical_batch:.3g} items ({self.low:.3g} to {self.high:.3g} at "
            f"{self.confidence:.0%}), from {self.items:g} items in {self.micro_batches} micro-batches"
        )


def noise_of(gradients: Sequence[Tensor], items: Sequence[float], *, confidence: float = 0.9) -> Noise:
    """Gradient noise from the mean gradients of micro-batches, flat, and the items in each, ragged or not.

    tr Σ = Σ nᵢ|gᵢ − g|² / (k − 1) and |G|² = |g|² − tr Σ / N, with g the mean over all N items; for even
    micro-batches these are the paper's. The interval is Fieller's for a ratio, with covariances by a
    jackknife over micro-batches (Busing et al. 1999, for ragged ones); below k = 3 it is everything.
    BadInput for fewer than 2 or sizes that do not fit.
    """
    k, n = len(gradients), np.asarray(items, dtype=np.float64)
    if k < 2 or n.shape != (k,) or not (n > 0).all():
        raise BadInput(
            f"noise needs at least 2 micro-batches, each with its number of items (above 0), "
            f"got {k} gradients and items {list(items)!r}."
        )
    N = float(n.sum())
    mean = torch.stack([g * (w / N) for g, w in zip(gradients, n, strict=True)]).sum(0)
    square = _dot(mean, mean)
    apart = np.array([_dot(g - mean, g - mean) for g in gradients])
    along = np.array([_dot(g - mean, mean) for g in gradients])
    trace, gradient = whole = _moments(square, float(n @ apart), k, N)
    if not math.isfinite(trace + gradient):
        raise BadInput("a gradient is not finite.")
    low, high = 0.0, math.inf
    if k > 2:
        rest = N - n  # the items without micro-batch j, whose mean gradient is g − n_j (g_j − g) / rest
        left = square - 2 * n / rest * along + (n / rest) ** 2 * apart
        without = _moments(left, n @ apart - n * apart * N / rest, k - 1, rest)
        covariance = _jackknife(np.array(whole), np.array(without), N / n)
        low, high = _fieller(trace, gradient, covariance, _student(confidence, k - 1))
    return Noise(gradient, trace, low, high, confidence, N, k)


def _jackknife(whole: Array, without: Array, h: Array) -> Array:
    """The covariance of estimates from those without each part, h = N / n_j (Busing et al. 1999)."""
    pseudo = h * whole[:, None] - (h - 1) * without
    centred = pseudo - (pseudo / h).sum(1, keepdims=True)
    found: Array = centred / (h - 1) @ centred.T / len(h)
    return found


def noise_scale(
    loss: Callable[[Any], Tensor],
    parameters: Parameters,
    batches: Iterable[Any],
    *,
    items: Callable[[Any], float] | None = None,
    confidence: float = 0.9,
) -> Noise:
    """Gradient noise at the present parameters; `loss(batch)` is the mean over the items of a micro-batch.

    items: how many items a batch holds, such as its tokens that are not ignored; by default the length of
    its first tensor. All micro-batch gradients are held at once. The noise is plain gradients', as
    for sgd; it grows during a training. Not for batches that are not drawn independently; BatchNorm in
    training mode couples the items of a batch.
    """
    space = _Space(parameters)
    gradients, counts = [], []
    for batch in batches:
        with space.probed():
            slopes = torch.autograd.grad(_scalar(loss(batch)), space.parameters, materialize_grads=True)
        gradients.append(space.flat(slopes))
        counts.append((items or _length)(batch))
    return noise_of(gradients, counts, confidence=confidence)


def _length(batch: Any) -> int:
    first = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(first, Tensor):
        raise BadInput(
            f"a batch that starts with a {type(first).__name__} needs `items`, to count its items."
        )
    return len(first)


def _dot(one: Tensor, two: Tensor) -> float:
    return float(torch.dot(one, two))


def _moments(square: Any, within: Any, k: int, N: Any) -> tuple[Any, Any]:
    """tr Σ and |G|² from |g|², the sum of squares within, k micro-batches and N items."""
    trace = within / (k - 1)
    return trace, square - trace / N


def _fieller(S: float, G: float, covariance: Array, t: float) -> tuple[float, float]:
    """All B ≥ 0 for which S − B·G is within t deviations of 0."""
    a = G * G - t * t * covariance[1, 1]
    b = S * G - t * t * covariance[0, 1]
    c = S * S - t * t * covariance[0, 0]
    root = math.sqrt(max(0.0, b * b - a * c))
    if a > 0 and G > 0:
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)
    if a >= 0 or c <= 0:
        return 0.0, math.inf
    return max(0.0, (b - root) / a), math.inf  # |G|² may be 0: bounded from below alone


def _student(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t (Hill 1970's expansion, three terms)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


@dataclass(frozen=True)
class ScaledRate:
    """A learning rate carried to another batch size, and whether the rule that did it holds there.

    limit: the batch size up to which it holds, if known. holds: None where it is not known.
    """

    lr: float
    betas: tuple[float, ...]
    eps: float | None
    rule: str
    limit: float | None
    holds: bool | None

    def __str__(self) -> str:
        known = "an unknown critical batch size" if self.limit is None else f"{self.limit:.4g} items"
        verdict = {None: "not known to hold", True: "holds", False: "does not hold"}[self.holds]
        return f"lr {self.lr:.4g} by the {self.rule} rule, which holds up to {known}: here it {verdict}"


def scale_rate(
    lr: float,
    *,
    batch: float,
    to: float,
    like: str = "sgd",
    betas: Sequence[float] = (),
    eps: float | None = None,
    critical: float | None = None,
) -> ScaledRate:
    """The learning rate for batches of `to` items that matches `lr` at batches of `batch`.

    like="sgd": lr·κ, κ = to / batch (Goyal et al. 2017, arXiv:1706.02677). like="adam": lr·√κ, with 1 − β
    scaled by κ and eps by 1/√κ if they are given (Malladi et al. 2022, arXiv:2205.10287). Both hold only
    while noise outweighs the gradient. Not for: batches beyond the `critical` size (see `noise_scale`), where
    the best rate of sgd is already half of what the line says (arXiv:1812.06162, section 2.2); adam's betas
    end the range where 1 − β would pass 1.

    >>> scale_rate(0.1, batch=32, to=128, critical=100).lr, scale_rate(1e-3, batch=32, to=128, like="adam").lr
    (0.4, 0.002)
    """
    if like not in ("sgd", "adam"):
        raise BadInput(f"like is 'sgd' or 'adam', got {like!r}.{nearest(like, ('sgd', 'adam'))}")
    if not (batch > 0 and to > 0):
        raise BadInput(f"batch sizes must be above 0, got batch={batch!r}, to={to!r}.")
    scale = to / batch
    limits = [] if critical is None else [critical]
    if like == "adam":
        limits += [batch / (1 - min(betas))] if betas else []
        betas = [max(0.0, 1 - scale * (1 - beta)) for beta in betas]
        eps = None if eps is None else eps / scale**0.5
        lr, rule = lr * scale**0.5, "square-root"
    else:
        lr, rule = lr * scale, "linear"
    limit = min(limits, default=None)
    within = limit is None or max(batch, to) <= limit
    return ScaledRate(
        lr, tuple(betas), eps, rule, limit, False if not within else None if critical is None else True
    )


# Saddles


@dataclass(frozen=True)
class Saddle:
    """The evidence for or against a saddle: small gradient, and curvature below −threshold.

    curvature: the least eigenvalue found, a bound from above on the true one; None where the gradient was
    too large to ask. direction: its unit vector.
    """

    loss: float
    gradient_norm: float
    gradient_limit: float
    threshold: float
    curvature: float | None = None
    residual: float | None = None
    converged: bool = False
    direction: Tensor | None = None

    @property
    def found(self) -> bool:
        """Whether it is a strict saddle: the gradient within its limit, the curvature below −threshold."""
        return self.curvature is not None and self.curvature < -self.threshold

    def __str__(self) -> str:
        slope = f"gradient norm {self.gradient_norm:.3g} (limit {self.gradient_limit:.3g})"
        if self.curvature is None:
            return f"no saddle: {slope}"
        sure = "" if self.found or self.converged else ", not converged: more steps may find less"
        what = "saddle" if self.found else "no saddle"
        bend = f"least curvature {self.curvature:.3g} (threshold {-self.threshold:.3g}{sure})"
        return f"{what}: {slope}, {bend}"


def saddle(
    loss: Losses,
    parameters: Parameters,
    *,
    gradient: float = 1e-3,
    curvature: float = 1e-3,
    steps: int = 50,
    seed: int = 0,
) -> Saddle:
    """Whether the parameters are at a strict saddle: |∇| ≤ `gradient` and least eigenvalue < −`curvature`.

    Both limits are in the loss's own units, per unit of weight and per its square (ε and √(ρε) of
    Jin et al. 2017, arXiv:1703.00887). The eigenvalue comes from `lanczos`, at most `steps` products, and is
    not asked for where the gradient is large. Not for: one batch, whose saddle may be noise; give the losses
    of many, which take the memory of one.
    """
    hessian = _hessian(loss, parameters)
    norm = float(hessian.gradient.norm())
    if not norm <= gradient:
        return Saddle(hessian.loss, norm, gradient, curvature)
    least = lanczos(
        hessian.__matmul__,
        hessian._space.random(seed),
        largest=0,
        steps=steps,
        tolerance=1e-2,
        floor=curvature / 10,
    ).smallest[0]
    evidence = (least.value, least.residual, least.converged, least.vector)
    return Saddle(hessian.loss, norm, gradient, curvature, *evidence)


def perturb(parameters: Parameters, radius: float, *, seed: int) -> None:
    """Add to the parameters, in place, a vector drawn evenly from a ball (arXiv:1703.00887, algorithm 1).

    For perturbed gradient descent: where the gradient is small and no perturbation was added of late. The
    draw depends on `seed` alone, so give it another each time; no global generator is touched. Not for: every
    step.
    """
    space = _Space(parameters)
    direction = space.random(seed)
    uniform = torch.rand((), generator=torch.Generator().manual_seed(~seed & 0xFFFFFFFF), dtype=torch.float64)
    space.move(direction * (radius * float(uniform) ** (1 / space.size) / float(direction.norm())))


@dataclass(frozen=True)
class Escape:
    """How far the parameters moved along the direction, with sign (0: not at all), and the loss around it."""

    distance: float
    before: float
    after: float


def escape(
    loss: Losses, parameters: Parameters, evidence: Saddle, *, radius: float = 0.1, halvings: int = 20
) -> Escape:
    """Step off a saddle, in place, along its negative curvature, with the sign that lowers the loss.

    The step has length `radius`, halved until the loss falls; it falls by about |curvature|·radius²/2.
    Nothing moves, bit for bit, where `evidence` (from `saddle`) found none, or no length lowers the loss.
    Not for: local minima, which no direction leaves.

    >>> x = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> def loss(): return x[0] ** 2 - x[1] ** 2
    >>> round(escape(loss, [x], saddle(loss, [x]), radius=0.5).after, 4)
    -0.25
    """
    space = _Space(parameters)
    before = space.value(loss)
    if not evidence.found or evidence.direction is None:
        return Escape(0.0, before, before)
    start, direction = [p.detach().clone() for p in space.parameters], evidence.direction

    def go(distance: float) -> None:
        with torch.no_grad():
            for p, kept in zip(space.parameters, start, strict=True):
                p.copy_(kept)
        if distance:
            space.move(direction * distance)

    def reached(distance: float) -> float:
        go(distance)
        return space.value(loss)

    moved = Escape(0.0, before, before)
    try:
        for halving in range(halvings + 1):
            lengths = (radius / 2**halving, -radius / 2**halving)
            after, distance = min(((reached(d), d) for d in lengths), key=lambda end: _or_infinity(end[0]))
            if after < before:
                moved = Escape(distance, before, after)
                break
    finally:
        go(moved.distance)
    return moved


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf
