"""Rules that see a weight as a matrix: its rows and columns, its singular values, its two sides.

All but adafactor take weights of two dimensions or more, flattened to the first dimension by the others; a
route gives vectors a rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from downslope.rules.rule import Rule, rule
from downslope.rules.slot import Slot, State, Step
from downslope.rules.value import (
    columns,
    dimensions,
    eigenbasis,
    inverse_root,
    lerp,
    maximum,
    mean,
    minimum,
    mod,
    norm,
    orthogonalise,
    orthonormal,
    rows,
    sqrt,
    where,
)

Weight = Any


@rule(
    Slot("row", per="row"),
    Slot("column", per="column"),
    source="Shazeer & Stern 2018, algorithms 4 and 5, as torch.optim.Adafactor",
    lr=0.01,
    rates=(1e-3, 3e-3, 0.01, 0.03, 0.1),
)
def adafactor(
    g: Weight,
    p: Weight,
    s: State,
    *,
    t: Weight,
    lr: Weight,
    beta2_decay: float = -0.8,
    eps: float = 1e-7,
    scale_eps: float = 1e-3,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> Step:
    """Adam's second moment from its row and column means alone: state of a row and a column, no more.

    lr: share of the weight's own size per step, at most 1/√t. Not for: where memory is no matter; adam's full
    moment is the better one. A vector is a matrix of one column, whose row means are the full moment.
    """
    share = t**beta2_decay
    s.row = lerp(s.row, mean(g * g, over="row"), share)
    s.column = lerp(s.column, mean(g * g, over="column"), share)
    factored = s.row * (s.column / maximum(mean(s.row, over="column"), eps))  # so ordered, lines divide lines
    variance = where(dimensions(p) > 1, factored, s.row)
    update = s.let("u", g / sqrt(maximum(variance, eps * eps)))
    size = maximum(sqrt(mean(p * p)), scale_eps) / maximum(sqrt(mean(update * update)) / clip, 1.0)
    metric = minimum(1 / (lr * sqrt(t)), 1.0) * size / sqrt(maximum(variance, eps * eps))
    return Step(minimum(lr, 1 / sqrt(t)) * size * update + lr * weight_decay * p, metric=metric)


def _orthogonal(g: Weight, s: State, momentum: Weight) -> Weight:
    s.m = momentum * s.m + (1 - momentum) * g
    return orthogonalise(lerp(g, s.m, momentum))


def _muon(
    source: str, lr: float = 0.02, rates: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
) -> Callable[[Callable[..., Any]], Rule]:
    return rule("m", source=source, lr=lr, rates=rates, takes="matrix")


@_muon("Jordan et al. 2024, as torch.optim.Muon")
def muon(g: Weight, p: Weight, s: State, *, momentum: float = 0.95, weight_decay: float = 0.0) -> Weight:
    """Momentum made orthogonal: every direction of the matrix moves equally far, rare ones too.

    lr: about the spectral norm of the step, √(rows/columns) times longer for tall matrices. Not for:
    embeddings, heads, vectors and convolutions of few channels: route those to adamw.
    """
    return sqrt(maximum(rows(g) / columns(g), 1.0)) * _orthogonal(g, s, momentum) + weight_decay * p


@_muon("Liu et al. 2025 (Moonlight), eq. 4", lr=1e-3, rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01))
def muon_rms(g: Weight, p: Weight, s: State, *, momentum: float = 0.95, weight_decay: float = 0.0) -> Weight:
    """Muon scaled so that a step is as long as adamw's: rates and decays tuned for adamw carry over.

    lr: as for adamw. Not for: rates tuned for muon, whose steps are 5/√columns as long.
    """
    return 0.2 * sqrt(maximum(rows(g), columns(g))) * _orthogonal(g, s, momentum) + weight_decay * p


@_muon("Bernstein & Newhouse 2024; Pethick et al. 2025")
def muon_spectral(
    g: Weight, p: Weight, s: State, *, momentum: float = 0.95, weight_decay: float = 0.0
) -> Weight:
    """Muon scaled by √(rows/columns): the step changes the layer's outputs alike at every width.

    lr: change of a normalised output per step. Not for: networks that are not parametrised for transfer
    over width; there muon's scale does as well.
    """
    return sqrt(rows(g) / columns(g)) * _orthogonal(g, s, momentum) + weight_decay * p


@rule(
    Slot("left", per="left", initial=lambda p, *, eps, **_: eps),
    Slot("right", per="right", initial=lambda p, *, eps, **_: eps),
    Slot("left_root", per="left", initial=1.0),
    Slot("right_root", per="right", initial=1.0),
    source="Gupta, Koren & Singer 2018, algorithm 1",
    lr=0.1,
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    takes="matrix",
)
def shampoo(g: Weight, p: Weight, s: State, *, t: Weight, eps: float = 1e-4, every: float = 1) -> Weight:
    """Adagrad on the two sides of a matrix: whiten rows and columns by the roots of their summed products.

    lr: about the spectral norm of the first step. Not for: sides of thousands, whose eigenvalues cost their
    size cubed; every: renew the roots each so many steps. Its steps only shrink, as adagrad's do.
    """
    s.left = s.left + g @ g.T
    s.right = s.right + g.T @ g
    due = mod(t - 1, every) < 1
    s.left_root = where(due, inverse_root(s.left, 4), s.left_root)
    s.right_root = where(due, inverse_root(s.right, 4), s.right_root)
    return s.left_root @ g @ s.right_root


@rule(
    "m",
    "v",
    Slot("left", per="left"),
    Slot("right", per="right"),
    Slot("left_basis", per="left", initial=1.0),
    Slot("right_basis", per="right", initial=1.0),
    source="Vyas et al. 2024, algorithms 3 and 4",
    lr=3e-3,
    rates=(3e-4, 1e-3, 3e-3, 0.01, 0.03),
    takes="matrix",
)
def soap(
    g: Weight,
    p: Weight,
    s: State,
    *,
    t: Weight,
    beta1: float = 0.95,
    beta2: float = 0.95,
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    every: float = 10,
) -> Weight:
    """Adam in the eigenbasis of shampoo's two sides, which turns slowly and is renewed each `every` steps.

    lr: as for adam. Not for: sides of many thousands. The first gradient only finds the basis, and moves
    nothing; bias corrections count from the second.
    """
    first, k = t < 2, maximum(t - 1, 1.0)
    turned = s.left_basis.T @ g @ s.right_basis
    s.m = where(first, s.m, beta1 * s.m + (1 - beta1) * g)
    s.v = where(first, s.v, (1 - beta2) * turned * turned + beta2 * s.v)
    inside = s.left_basis.T @ s.m @ s.right_basis
    inside = inside / (sqrt(s.v) * (1 / sqrt(1 - beta2**k)) + eps)
    step = s.left_basis @ inside @ s.right_basis.T
    s.left = shampoo_beta * s.left + (1 - shampoo_beta) * (g @ g.T)
    s.right = shampoo_beta * s.right + (1 - shampoo_beta) * (g.T @ g)
    due = mod(t - 1, every) < 1
    for side, basis in (("left", "left_basis"), ("right", "right_basis")):
        now, held = getattr(s, side), getattr(s, basis)
        renewed = where(due, orthonormal(now @ held), held)
        setattr(s, basis, where(first, eigenbasis(now), renewed))
    return where(first, 0.0, 1 / (1 - beta1**k) * step + weight_decay * p)


@rule(
    "m",
    Slot("left", per="left", initial=1.0),
    Slot("right", per="right", initial=1.0),
    Slot("left_bound", per="tensor"),
    Slot("right_bound", per="tensor"),
    source="Li 2018; Pooladzandi & Li 2024, Kronecker-factored whitening in the symmetric form (QUAD)",
    lr=1e-3,
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01),
    takes="matrix",
)
def psgd(
    g: Weight,
    p: Weight,
    s: State,
    *,
    t: Weight,
    momentum: float = 0.9,
    precond_lr: float = 0.1,
    clip: float = 1.1,
    weight_decay: float = 0.0,
) -> Weight:
    """Momentum whitened from both sides by factors that learn: each is moved until what it lets through is 1.

    lr: root mean square of the step, which clip bounds; precond_lr: share of the way per step that the
    factors go. Not for: sides of many thousands. Nothing is drawn: norms bound the factors' steps.
    """
    s.m = momentum * s.m + (1 - momentum) * g
    mean_m = s.let("u", s.m / (1 - momentum**t))
    white = s.let("h", s.left @ s.left @ mean_m @ s.right @ s.right)
    for side, gram, size in (("left", white @ white.T, columns(g)), ("right", white.T @ white, rows(g))):
        gram = s.let("k", gram)
        held, most = getattr(s, side), s.let("most", norm(gram) + size)
        setattr(s, f"{side}_bound", maximum(0.9 * getattr(s, f"{side}_bound") + 0.1 * most, most))
        rate = s.let("rate", precond_lr / 2 / getattr(s, f"{side}_bound"))
        moved = s.let("q", held - rate * (gram @ held - size * held))
        moved = s.let("q", moved - rate * (moved @ gram - size * moved))
        setattr(s, side, (moved + moved.T) / 2)
    step = s.let("step", s.left @ s.left @ mean_m @ s.right @ s.right)
    return minimum(clip / sqrt(mean(step * step)), 1.0) * step + weight_decay * p
