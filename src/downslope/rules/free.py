"""Rules without a schedule, rules that find their own rate, and the online rule of click prediction."""

from __future__ import annotations

from typing import Any

from downslope.rules.rule import rule
from downslope.rules.slot import Slot, State
from downslope.rules.value import clip, maximum, norm, sign, sqrt, total, where

Weight = Any

_START = Slot("start", initial=lambda p, **_: p)
_AVERAGING = (
    Slot("z", initial=lambda p, **_: p),
    Slot("largest", per="tensor"),
    Slot("weights", per="tensor"),
)


def _interpolate(u: Weight, p: Weight, s: State, rate: Weight, share: Weight) -> Weight:
    """One schedule-free step of length `rate` along u: z moves by all of it, the average x towards z, and the
    weight y = (1 - share) z + share x between them; x itself is never stored.
    """
    s.largest = maximum(s.largest, rate)
    s.weights = s.weights + s.largest**2
    new = where(s.weights > 0, s.largest**2 / s.weights, 0.0)  # zero only while all rates were
    step = new * (p - s.z) + rate * (1 - share * (1 - new)) * u
    s.z = s.z - rate * u
    return step


def _average(p: Weight, s: State, share: Weight) -> Weight:
    return p + where(share > 0, 1 - 1 / share, 0.0) * (s.z - p)


@rule(
    *_AVERAGING,
    source="Defazio et al. 2024, eq. 3-5",
    lr=1.0,
    rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    evaluation=lambda p, s, *, momentum, **_: _average(p, s, momentum),
)
def schedule_free_sgd(
    g: Weight, p: Weight, s: State, *, lr: Weight, momentum: float = 0.9, weight_decay: float = 0.0
) -> Weight:
    """SGD whose average replaces the schedule: gradients are taken between the fast weights and their mean.

    lr: weight per unit of gradient, five to ten times sgd's, held constant after a warmup; steps weigh in the
    mean by the square of the largest rate so far. weight_decay: an L2 penalty at the weight. Not for: falling
    schedules, which the mean stands in for, and links on the weight, which the fast weights do not see. The
    mean is what is evaluated and saved; with statistics of BatchNorm, pass data through it once more first.
    """
    return _interpolate(g + weight_decay * p, p, s, lr, momentum)


@rule(
    *_AVERAGING,
    "v",
    source="Defazio et al. 2024, algorithm 1",
    lr=2.5e-3,
    rates=(3e-4, 8e-4, 2.5e-3, 8e-3, 0.025),
    evaluation=lambda p, s, *, beta1, **_: _average(p, s, beta1),
)
def schedule_free_adamw(
    g: Weight,
    p: Weight,
    s: State,
    *,
    t: Weight,
    lr: Weight,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Weight:
    """AdamW whose average replaces the schedule; β₁ says where between it and the fast weights gradients are
    taken.

    lr: about the largest step of every fast weight, constant after a warmup; larger than adamw's.
    Not for: falling schedules, and links on the weight. v is corrected for starting at zero, as in the
    authors' code since 1.4; in the paper a factor √(1 - β₂ᵗ) of the rate stands for that, in the decay and in
    the weights of the mean too. The mean is what is evaluated and saved.
    """
    s.v = (1 - beta2) * g * g + beta2 * s.v
    update = g / (sqrt(s.v) * (1 / sqrt(1 - beta2**t)) + eps) + weight_decay * p
    return _interpolate(update, p, s, lr, beta1)


@rule(
    _START,
    "m",
    "v",
    "s",
    Slot("r", per="tensor"),
    Slot("d", per="tensor", initial=lambda p, *, d0, **_: d0),
    source="Mishchenko & Defazio 2023, algorithm 4",
    lr=1.0,
    rates=(0.3, 1.0, 3.0),
)
def prodigy(
    g: Weight,
    p: Weight,
    s: State,
    *,
    lr: Weight,
    beta1: float = 0.9,
    beta2: float = 0.999,
    d0: float = 1e-6,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Weight:
    """Adam that finds its own rate: d grows to an estimate of how far the solution lies from the first
    weights.

    lr: a factor of d, in no unit; leave it at 1, or let a schedule without jumps fall from 1. d0: where d
    starts, in units of the weight. Not for: tensors that need rates of their own, since d is one number for
    all. Differs from the authors' code in ε, which takes d before its update, as the paper prints it. A
    tensor that comes late starts at d0.
    """
    d, beta3 = s.d, sqrt(beta2)
    s.m = beta1 * s.m + (1 - beta1) * d * g
    s.v = (1 - beta2) * d * d * g * g + beta2 * s.v
    weight = (1 - beta3) * lr * d * d
    s.r = beta3 * s.r + weight * total(g * (s.start - p), over="all")
    s.s = beta3 * s.s + weight * g
    size = total(abs(s.s), over="all")
    s.d = maximum(d, where(size > 0, s.r / size, 0.0))
    return lr * d * (s.m / (sqrt(s.v) + d * eps) + weight_decay * p)


@rule(
    _START,
    Slot("reach", per="tensor"),
    Slot("squares", per="tensor"),
    source="Ivgi, Hinder & Carmon 2023, the formula named DoG",
    lr=1.0,
    rates=(0.3, 1.0, 3.0),
)
def dog(g: Weight, p: Weight, s: State, *, initial: float = 1e-6, eps: float = 1e-8) -> Weight:
    """SGD that finds its own rate: the largest distance from the first weights over the root of summed
    squares.

    lr: a factor of that rate, in no unit; leave it at 1. initial: the first step as a share of 1 + ‖w‖; 1e-4
    with BatchNorm. Not for: tensors of very different scales, since one rate serves all. The last weights are
    noisy: average them to evaluate.
    """
    first = initial * (1 + norm(s.start, over="all"))
    s.reach = maximum(maximum(s.reach, norm(p - s.start, over="all")), first)
    s.squares = s.squares + norm(g, over="all") ** 2
    return s.reach / sqrt(s.squares + eps) * g


@rule(
    Slot("z", initial=lambda p, *, l1, **_: -sign(p) * l1),
    "n",
    source="McMahan et al. 2013, algorithm 1",
    lr=0.1,
    rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    sparse=True,
)
def ftrl(
    g: Weight, p: Weight, s: State, *, lr: Weight, beta: float = 1.0, l1: float = 0.0, l2: float = 0.0
) -> Weight:
    """Adagrad that keeps rare weights at exactly zero until the sum of their gradients is worth more than l1.

    lr: α, about the first step of a weight whose gradient is large beside β. Not for: deep networks. The
    paper's z holds -w (1/η + l2) beside what is kept here, the part of it within ±l1; so stated, any weight
    may be a start, lr may change, and a weight without gradient keeps every bit. As in the paper neither
    penalty grows with the number of steps, so both fade; for a lasso put the link l1 behind adagrad.
    """
    s.n = g * g + s.n
    scale = beta + sqrt(s.n) + lr * l2
    held = s.z + g - where(abs(p) <= 0, 0.0, p * scale * (1 / lr))
    kept = clip(held, -l1, l1)
    paid = s.z - kept  # the threshold's part that p has paid already is left out
    s.z = kept
    return where(abs(held) < l1, p, lr / scale * (g + paid))
