"""Links: what changes a gradient or an update on its way, or the weight behind the step. They chain with
every rule.
"""

from __future__ import annotations

from typing import Any

from downslope.rules.rule import Rule, link
from downslope.rules.slot import State, Step
from downslope.rules.value import clip, maximum, minimum, norm, sign, where

Weight = Any


@link(source="Pascanu, Mikolov & Bengio 2013, algorithm 1")
def clip_norm(u: Weight, p: Weight, s: State, *, max_norm: float = 1.0) -> Step:
    """Scale all gradients together so that their global norm is at most max_norm; their direction stays.

    max_norm: in units of the gradient. Not for: one bad layer among good ones, which it slows down too. Where
    torch adds 1e-6 to the norm this divides by it exactly, so a gradient within the bound passes unchanged.
    """
    size = norm(u, over="all")
    scale = where(size > max_norm, max_norm / size, 1.0)
    return Step(u * scale, metric=scale)


@link(source="Mikolov 2012, section 3.2")
def clip_value(u: Weight, p: Weight, s: State, *, max_value: float = 1.0) -> Step:
    """Move every number of the gradient into [-max_value, max_value]; NaN stays NaN.

    max_value: in units of the gradient. Not for: keeping the direction of the gradient, which it turns.
    """
    return Step(clip(u, -max_value, max_value), metric=minimum(1.0, max_value / abs(u)))


@link(source="Krogh & Hertz 1991, eq. 2")
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


@link(
    source="Daubechies, Defrise & De Mol 2004; in a variable metric, Duchi et al. 2011, eq. 4", after="weight"
)
def l1(p: Weight, s: State, *, effective: Weight, l1: float = 0.0) -> Weight:
    """Proximal step of the penalty λ · ‖w‖₁, in the rule's own metric: exact zeros, and the right minimum.

    l1: λ, in units of loss per weight. Not for: rules without an effective step (sign rules), which refuse it
    by name.
    """
    return sign(p) * maximum(abs(p) - effective * l1, 0.0)


LINKS: dict[str, Rule] = {entry.name: entry for entry in (clip_norm, clip_value, l2, decay, l1)}
