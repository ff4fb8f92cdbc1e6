"""The catalogue: every update rule, said once. Each body reads as its paper prints it and is all that any
executor runs.

A square that is added to an average stands first in the sum, `(1 - beta2) * g * g + beta2 * s.v`: compiled
code then makes one operation of it, and squares of tiny gradients, denormal by themselves, cost no more than
others.
"""

from __future__ import annotations

from typing import Any

from downslope.rules.rule import Rule, rule
from downslope.rules.slot import Slot, State, Step
from downslope.rules.value import maximum, sign, sqrt, where

Weight = Any  # a Value: annotating each argument would say nothing that the first line of the file does not


@rule(source="Robbins & Monro 1951", lr=0.1, rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0))
def sgd(g: Weight, p: Weight, s: State) -> Step:
    """Step against the gradient; with the full batch, this is gradient descent.

    lr: weight per unit of gradient. Not for: badly scaled or sparse problems, where coordinates need rates of
    their own.
    """
    return Step(g, metric=1.0)


@rule(
    "v",
    source="Polyak 1964; Sutskever et al. 2013, in torch's convention",
    lr=0.01,
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
)
def momentum(
    g: Weight, p: Weight, s: State, *, t: Weight, momentum: float = 0.9, dampening: float = 0.0
) -> Step:
    """Heavy ball: go on with a share μ of the last step, which damps zigzags and sums up slopes that stay.

    lr: weight per unit of gradient; the steady step is lr/(1 - μ) times the gradient. The first step is not
    dampened (torch). Not for: very noisy gradients at large μ. Differs from the textbook's v ← μv - αg when
    lr changes: there old steps keep it.
    """
    s.v = momentum * s.v + where(t > 1, 1 - dampening, 1.0) * g
    return Step(s.v, metric=(1 - dampening) / (1 - momentum))


@rule(
    "v",
    source="Nesterov 1983; Sutskever et al. 2013, eq. 3-4",
    lr=0.01,
    rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
)
def nesterov(g: Weight, p: Weight, s: State, *, momentum: float = 0.9) -> Step:
    """Momentum that looks ahead: the gradient is weighed as if taken after the step that momentum is about to
    make.

    lr: as for momentum. Not for: gradients so noisy that the look ahead amplifies noise. The form is torch's
    g + μv.
    """
    s.v = momentum * s.v + g
    return Step(g + momentum * s.v, metric=1 / (1 - momentum))


@rule(
    Slot("sum", initial=lambda p, *, initial_accumulator_value, **_: initial_accumulator_value),
    source="Duchi, Hazan & Singer 2011, figure 1 (diagonal)",
    lr=0.01,
    rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
)
def adagrad(
    g: Weight,
    p: Weight,
    s: State,
    *,
    t: Weight,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    initial_accumulator_value: float = 0.0,
) -> Step:
    """Divide each coordinate by the root of its summed squares: rare features keep large steps.

    lr: about the first step of every weight. Not for: long non-convex training, since its steps only shrink.
    """
    s.sum = g * g + s.sum
    shrink = 1 / ((1 + (t - 1) * lr_decay) * (sqrt(s.sum) + eps))
    return Step(shrink * g, metric=shrink)


@rule("v", source="Tieleman & Hinton 2012, lecture 6.5", lr=0.01, rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03))
def rmsprop(g: Weight, p: Weight, s: State, *, alpha: float = 0.99, eps: float = 1e-8) -> Step:
    """Divide each coordinate by the root of a running mean of its squares, which forgets, unlike adagrad's
    sum.

    lr: about the step of every weight. Not for: the first steps at large lr, which are √(1/(1 - α)) times too
    long.
    """
    s.v = (1 - alpha) * g * g + alpha * s.v
    shrink = 1 / (sqrt(s.v) + eps)
    return Step(shrink * g, metric=shrink)


@rule("v", "mean", source="Graves 2013, eq. 38-45", lr=0.01, rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03))
def rmsprop_centered(g: Weight, p: Weight, s: State, *, alpha: float = 0.99, eps: float = 1e-8) -> Step:
    """RMSProp by the running variance instead of the raw second moment: steadier where gradients have a mean.

    lr: about the step of every weight. Not for: gradients that hardly vary, whose variance, and so the
    divisor, vanishes.
    """
    s.v = (1 - alpha) * g * g + alpha * s.v
    s.mean = alpha * s.mean + (1 - alpha) * g
    variance = maximum(s.v - s.mean * s.mean, 0.0)  # rounding may take it below zero, and its root to NaN
    shrink = 1 / (sqrt(variance) + eps)
    return Step(shrink * g, metric=shrink)


@rule("m", "v", source="Kingma & Ba 2015, algorithm 1", lr=1e-3, rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03))
def adam(
    g: Weight, p: Weight, s: State, *, t: Weight, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Step:
    """Momentum divided by the root of a running mean of squares, both corrected for starting at zero.

    lr: about the largest step of every weight. Not for: where the last bit of generalisation comes from plain
    momentum.
    """
    s.m = beta1 * s.m + (1 - beta1) * g
    s.v = (1 - beta2) * g * g + beta2 * s.v
    shrink = 1 / (sqrt(s.v) * (1 / sqrt(1 - beta2**t)) + eps)
    return Step(1 / (1 - beta1**t) * s.m * shrink, metric=shrink)


@rule(
    "m",
    "v",
    source="Kingma & Ba 2015, without section 3",
    lr=1e-3,
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03),
)
def adam_uncorrected(
    g: Weight, p: Weight, s: State, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Step:
    """Adam without its bias correction, as some older code bases run it.

    lr: as for adam. Not for: new work; its first steps are (1 - β₁)/√(1 - β₂) of adam's, about three times
    too long.
    """
    s.m = beta1 * s.m + (1 - beta1) * g
    s.v = (1 - beta2) * g * g + beta2 * s.v
    shrink = 1 / (sqrt(s.v) + eps)
    return Step(s.m * shrink, metric=shrink)


@rule(
    "m",
    "v",
    source="Loshchilov & Hutter 2019, algorithm 2",
    lr=1e-3,
    rates=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03),
)
def adamw(
    g: Weight,
    p: Weight,
    s: State,
    *,
    t: Weight,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Step:
    """Adam with decay decoupled from the gradient: lr · λ of the weight is taken off, whatever the gradient's
    scale.

    lr: about the largest step of every weight; it scales the decay too. Not for: where L2 in the loss is
    meant: put the link l2 before adam for that.
    """
    step = adam.body(g, p, s, t=t, beta1=beta1, beta2=beta2, eps=eps)
    return Step(step.direction + weight_decay * p, metric=step.metric)


@rule("m", source="Chen et al. 2023, program 1", lr=1e-4, rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3))
def lion(
    g: Weight, p: Weight, s: State, *, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.0
) -> Weight:
    """The sign of an interpolated momentum: every weight moves by lr, or not at all.

    lr: the step of every weight, three to ten times below adam's; weight_decay as much above. Not for: small
    batches, and proximal links: a sign has no scale, so it has no effective step.
    """
    direction = sign(beta1 * s.m + (1 - beta1) * g)
    s.m = beta2 * s.m + (1 - beta2) * g
    return direction + weight_decay * p


RULES: dict[str, Rule] = {
    entry.name: entry
    for entry in (
        sgd,
        momentum,
        nesterov,
        adagrad,
        rmsprop,
        rmsprop_centered,
        adam,
        adam_uncorrected,
        adamw,
        lion,
    )
}
