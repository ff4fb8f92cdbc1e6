"""Links: what changes a gradient or an update on its way, or the weight behind the step. They chain with
every rule.
"""

from __future__ import annotations

from typing import Any

from downslope.rules.drawn import noise, stochastic_rounding
from downslope.rules.proximal import elastic_net, l1
from downslope.rules.rule import Rule, link
from downslope.rules.shaped import agc, centralize, group_lasso, nuclear
from downslope.rules.slot import Slot, State, Step
from downslope.rules.value import clip, isfinite, maximum, mean, minimum, mod, norm, sign, sqrt, where

Weight = Any


@link(source="Pascanu, Mikolov & Bengio 2013, algorithm 1", sparse=True)
def clip_norm(u: Weight, p: Weight, s: State, *, max_norm: float = 1.0) -> Step:
    """Scale all gradients together so that their global norm is at most max_norm; their direction stays.

    max_norm: in units of the gradient. Not for: one bad layer among good ones, which it slows down too. Where
    torch adds 1e-6 to the norm this divides by it exactly, so a gradient within the bound passes unchanged.
    """
    size = norm(u, over="all")
    scale = where(size > max_norm, max_norm / size, 1.0)
    return Step(u * scale, metric=scale)


@link(source="Pascanu, Mikolov & Bengio 2013, algorithm 1, tensor by tensor", sparse=True)
def clip_tensor(u: Weight, p: Weight, s: State, *, max_norm: float = 1.0) -> Step:
    """Scale each tensor's gradient by itself so that its own norm is at most max_norm.

    max_norm: in units of the gradient, for each tensor. Not for: keeping the direction of the whole gradient,
    which it turns towards the tensors within the bound.
    """
    size = norm(u)
    scale = where(size > max_norm, max_norm / size, 1.0)
    return Step(u * scale, metric=scale)


@link(
    Slot("norms", per="tensor"),
    Slot("norm_mean", per="tensor"),
    Slot("norm_variance", per="tensor"),
    source="Kumar et al. 2025, arXiv:2504.02507, with the reciprocal threshold",
    sparse=True,
)
def clip_history(
    u: Weight,
    p: Weight,
    s: State,
    *,
    norm_decay: float = 0.97,
    deviations: float = 2.5,
    settle: float = 25,
) -> Step:
    """Scale all gradients together where their global norm stands out from its own history: the higher above
    it, the nearer to its mean.

    settle: finite norms that are only noted, for the first mean and variance; norm_decay: share of both that
    stays per step, of norms as they were clipped; deviations: distance from the mean that is let pass.
    Not for: norms that rise by design, as behind a growing batch. A norm that is not finite is not noted, and
    its gradient passes for the guard to see. A tensor keeps the history of the steps that it took part in.
    """
    size = s.let("size", norm(u, over="all"))
    fine = s.let("fine", isfinite(size))
    known = where(s.norms >= settle, fine, 0.0)
    high = s.let("high", where(size - s.norm_mean > deviations * sqrt(s.norm_variance), known, 0.0))
    bound = s.norm_mean + deviations**2 * s.norm_variance / (size - s.norm_mean)
    kept = s.let("kept", where(high > 0, bound, size))
    s.norms = s.norms + fine
    share = s.let("share", where(s.norms > settle, 1 - norm_decay, 1 / maximum(s.norms, 1.0)))
    apart = s.let("apart", kept - s.norm_mean)
    after = (1 - share) * apart  # from the new mean; a running sum needs both (Welford 1962)
    square = s.let("square", where(s.norms > settle, after, apart) * after)
    s.norm_mean = where(fine, s.norm_mean + share * apart, s.norm_mean)
    s.norm_variance = where(fine, s.norm_variance + share * (square - s.norm_variance), s.norm_variance)
    scale = where(high > 0, kept / size, 1.0)
    return Step(u * scale, metric=scale)


@link(source="Mikolov 2012, section 3.2", sparse=True)
def clip_value(u: Weight, p: Weight, s: State, *, max_value: float = 1.0) -> Step:
    """Move every number of the gradient into [-max_value, max_value]; NaN stays NaN.

    max_value: in units of the gradient. Not for: keeping the direction of the gradient, which it turns.
    """
    return Step(clip(u, -max_value, max_value), metric=minimum(1.0, max_value / abs(u)))


@link(source="Krogh & Hertz 1991, eq. 2", idle="l2")
def l2(u: Weight, p: Weight, s: State, *, l2: float = 0.0) -> Weight:
    """Add the gradient of the penalty λ/2 · ‖w‖², as torch's weight_decay of SGD and Adam does.

    l2: λ, in units of loss per squared weight. Not for: adaptive rules, which divide the penalty by the
    gradient's scale too: there use decay.
    """
    return u + l2 * p


@link(source="Hanson & Pratt 1988; Loshchilov & Hutter 2019, coupled to the rate")
def decay(u: Weight, p: Weight, s: State, *, weight_decay: float = 0.01) -> Weight:
    """Take lr · weight_decay of the weight off beside the step, untouched by the rule's metric.

    weight_decay: share of the weight per unit of lr. Not for: standing before an adaptive rule, where it is
    l2.
    """
    return u + weight_decay * p


@link(source="Loshchilov & Hutter 2019, eq. 1; named by Wortsman et al. 2024", after="weight")
def decay_independent(p: Weight, s: State, *, before: Weight, weight_decay: float = 1e-4) -> Weight:
    """Take weight_decay of the weight off at every step, whatever lr is.

    weight_decay: share of the weight per step, so lr · λ of a tuned decay. Not for: a falling lr whose last
    steps should stand still: the weight goes on shrinking; there use decay. Doubling lr leaves it as it is.
    What is shrunk is the weight before the step.
    """
    return p - weight_decay * before


@link(source="Liang et al. 2024, algorithm 1")
def cautious(u: Weight, p: Weight, s: State, *, gradient: Weight, eps: float = 1e-3) -> Step:
    """Leave out what would climb: numbers of the update whose sign is not the gradient's, and scale up the
    rest.

    eps: the least share of a tensor's numbers by which the rest is divided, in no unit. Not for: standing
    before a rule, where update and gradient are one. The gradient is the one that the chain received, before
    clipping.
    """
    agreed = where(sign(u) * gradient > 0, 1.0, 0.0)  # not u · gradient, which underflows
    scale = agreed * (1 / maximum(mean(agreed), eps))
    return Step(u * scale, metric=scale)


@link(source="Chen et al. 2025, algorithm 1")
def cautious_decay(u: Weight, p: Weight, s: State, *, weight_decay: float = 0.01) -> Weight:
    """Take lr · weight_decay of a weight off only where the update itself moves it towards zero.

    weight_decay: share of the weight per unit of lr. Not for: shrinking what the loss wants large: the minima
    are those of the loss itself. Stands behind the rule. An update of exactly zero leaves its weight alone,
    where the paper's mask, u · p ≥ 0, goes on shrinking it.
    """
    return u + weight_decay * where(sign(u) * p > 0, p, 0.0)  # not u · p, which underflows


@link(
    Slot("slow", initial=lambda p, **_: p),
    source="Zhang et al. 2019, algorithm 1",
    after="weight",
    evaluation=lambda p, s, **_: s.slow,
)
def lookahead(p: Weight, s: State, *, t: Weight, every: float = 5, blend: float = 0.5) -> Weight:
    """Let the rule run for some steps, then go only part of the way and start again from there.

    every: steps between two meetings; blend: the part of the way that is kept, from 0 to 1. Not for: runs of
    few steps, which it shortens. The rule's own state goes on over a meeting. The slow weights are what is
    evaluated and saved.
    """
    meet = mod(t, every) < 1
    s.slow = where(meet, s.slow + blend * (p - s.slow), s.slow)
    return where(meet, s.slow, p)


@link(source="Foret et al. 2021, algorithm 1, p = 2", after="ascent")
def sam(g: Weight, p: Weight, s: State, *, rho: float = 0.05) -> Weight:
    """Take the gradient where the loss is worst within rho of the weights: flat minima, at twice the cost.

    rho: radius in units of the weight, over all tensors together. Not for: tight budgets, since every step
    takes two gradients and needs a closure. Divides by the norm exactly; a gradient of zero stays where it
    is.
    """
    size = norm(g, over="all")
    return where(size > 0, rho / size, 0.0) * g


@link(source="Kwon et al. 2021, algorithm 1, p = 2", after="ascent")
def asam(g: Weight, p: Weight, s: State, *, rho: float = 0.5, eta: float = 0.01) -> Weight:
    """SAM in the weights' own scale: large weights are shaken more, so that rescaling layers changes nothing.

    rho: radius in no unit, about ten times sam's; eta: least scale of a weight, in its own units. Not for:
    tight budgets, as sam. The scale |w| + eta holds for every tensor, biases too.
    """
    scale = abs(p) + eta
    size = norm(scale * g, over="all")
    return where(size > 0, rho / size, 0.0) * (scale * scale * g)


LINKS: dict[str, Rule] = {
    entry.name: entry
    for entry in (
        clip_norm,
        clip_tensor,
        clip_history,
        clip_value,
        l2,
        decay,
        decay_independent,
        l1,
        elastic_net,
        cautious,
        cautious_decay,
        lookahead,
        sam,
        asam,
        agc,
        centralize,
        group_lasso,
        nuclear,
        noise,
        stochastic_rounding,
    )
}
