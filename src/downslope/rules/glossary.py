"""What the numbers of rules and links are called, mean and may be: one table for every rule, recipe and
page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Term:
    """One number: its meaning with unit, and the range in which it makes sense (`open_high`: high itself is
    out).
    """

    meaning: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    @property
    def allowed(self) -> str:
        """The range in words, such as "at least 0 and below 1"."""
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.open_low else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.open_high else 'at most'} {self.high:g}")
        return " and ".join(parts) or "any finite number"

    def admits(self, value: float) -> bool:
        """Whether `value` is finite (an infinite upper end admits infinity itself only where low is open) and
        in range.
        """
        if not math.isfinite(value):
            return False
        above = value > self.low or (value == self.low and not self.open_low)
        below = value < self.high or (value == self.high and not self.open_high)
        return above and below


ANY = Term("a number of the rule's own")

TERMS: Mapping[str, Term] = MappingProxyType(
    {
        "lr": Term("learning rate: the step per unit of the rule's direction", low=0),
        "betas": Term("decay of each running average per step", low=0, high=1, open_high=True),
        "momentum": Term(
            "share of the last step that goes on into the next (μ)", low=0, high=1, open_high=True
        ),
        "schedule_free_sgd.momentum": Term(
            "share of the mean in the weights where gradients are taken (β)",
            low=0,
            high=1,
            open_low=True,
            open_high=True,
        ),
        "dampening": Term("share of the gradient kept out of the momentum", low=0, high=1, open_high=True),
        "alpha": Term("decay of the running average of squares per step", low=0, high=1, open_high=True),
        "rho": Term("radius within which the second gradient is taken (ρ), or another rule's ρ", low=0),
        "adadelta.rho": Term(
            "decay of the running averages of squares per step (ρ)", low=0, high=1, open_high=True
        ),
        "sophia.rho": Term("curvature is multiplied by it before it divides (ρ)", low=0, open_low=True),
        "sam.rho": Term("radius, in units of the weight, over all tensors together (ρ)", low=0),
        "asam.rho": Term("radius, relative to the scale of every weight (ρ)", low=0),
        "eps": Term("added to the denominator, in units of the gradient", low=0),
        "adadelta.eps": Term(
            "added to both averages, in squared units of step and gradient", low=0, open_low=True
        ),
        "adafactor.eps": Term("least root mean square that divides, in units of the gradient", low=0),
        "adopt.eps": Term("least denominator, in units of the gradient", low=0, open_low=True),
        "shampoo.eps": Term("diagonal with which both matrices start", low=0, open_low=True),
        "agc.eps": Term("least norm of a unit's weight, in its own units", low=0),
        "sophia.eps": Term("least curvature that divides", low=0, open_low=True),
        "cautious.eps": Term(
            "least share of a tensor that the rest is scaled up by", low=0, high=1, open_low=True
        ),
        "dog.eps": Term(
            "added to the sum of squares, in squared units of the gradient", low=0, open_low=True
        ),
        "scale_eps": Term("least root mean square of a weight that scales its step", low=0),
        "lr_decay": Term("the rate is divided by 1 + lr_decay · (t - 1)", low=0),
        "initial_accumulator_value": Term("sum or average of squares before the first step", low=0),
        "weight_decay": Term("decoupled decay: lr · weight_decay of the weight is taken off per step", low=0),
        "decay_independent.weight_decay": Term(
            "share of the weight that is taken off per step", low=0, high=1
        ),
        "lars.weight_decay": Term("strength λ of the penalty λ/2 · ‖w‖² added to the loss", low=0),
        "schedule_free_sgd.weight_decay": Term(
            "strength λ of the penalty λ/2 · ‖w‖² added to the loss", low=0
        ),
        "l2": Term("strength λ of the penalty λ/2 · ‖w‖² added to the loss", low=0),
        "l1": Term("strength λ of the penalty λ · ‖w‖₁ added to the loss", low=0),
        "group_lasso": Term("strength λ of the penalty λ · √n · ‖w‖₂ of every unit of n weights", low=0),
        "nuclear": Term("strength λ of the penalty λ · (sum of singular values) of every matrix", low=0),
        "max_norm": Term("largest Euclidean norm of all gradients together", low=0, open_low=True),
        "clip_tensor.max_norm": Term("largest Euclidean norm of one tensor's gradient", low=0, open_low=True),
        "norm_decay": Term(
            "decay of the mean and variance of past norms per step", low=0, high=1, open_high=True
        ),
        "deviations": Term("how far above its mean a norm may be, in standard deviations", low=0),
        "settle": Term("norms that are only noted at first", low=2),
        "max_value": Term("largest magnitude of one number of the gradient", low=0, open_low=True),
        "clip": Term("largest root mean square of the update before the rate", low=0, open_low=True),
        "clipping": Term(
            "largest norm of a unit's gradient, as a share of its weight's", low=0, open_low=True
        ),
        "shrink": Term(
            "factor by which a step that did not help is shortened",
            low=0,
            high=1,
            open_low=True,
            open_high=True,
        ),
        "slope": Term(
            "share of the promised fall of the loss that is asked for", low=0, high=1, open_high=True
        ),
        "decay": Term("strength of the L2 penalty, and how fast the rate falls", low=0),
        "power": Term("exponent with which it falls with the steps", low=0),
        "start": Term("updates before averaging begins", low=0),
        "etas": Term(
            "factors of the step after a turn of the gradient's sign, and without one", low=0, open_low=True
        ),
        "step_sizes": Term("least and largest step of a weight, in its own units", low=0),
        "momentum_decay": Term("how fast the momentum warms up", low=0),
        "mix": Term("weight of the slow average beside the fast one (α)", low=0),
        "horizon": Term("steps over which the slow average warms up; 0 for none", low=0),
        "beta2_decay": Term("exponent of t in the decay of the average of squares", high=0),
        "trust": Term("first step of a tensor as a share of its norm, at a rate of 1", low=0, open_low=True),
        "every": Term("steps from one renewal to the next", low=1),
        "lookahead.every": Term("steps from one meeting with the slow weights to the next", low=1),
        "blend": Term("share of the way that the slow weights go", low=0, high=1),
        "shampoo_beta": Term(
            "decay of the averages of both matrices per step", low=0, high=1, open_high=True
        ),
        "precond_lr": Term("learning rate of the preconditioner, in no unit", low=0, open_low=True),
        "items": Term("items that the loss of an estimate is the mean of", low=0, open_low=True),
        "d0": Term(
            "first estimate of the distance to the solution, in units of the weight", low=0, open_low=True
        ),
        "initial": Term("first distance, as a share of 1 + ‖w‖", low=0, open_low=True),
        "beta": Term(
            "added to the root of the summed squares, in units of the gradient", low=0, open_low=True
        ),
        "scale": Term("variance of the noise at the first step (η)", low=0),
        "seed": Term("which random numbers are drawn", low=0),
        "eta": Term("least scale of a weight, in its own units (η)", low=0),
    }
)
"""Terms shared by the catalogue, and as "rule.number" those in which a rule differs. A number outside the
table, in a rule of the user's own, may be any finite one.
"""


def term(name: str, of: str = "") -> Term:
    """The term behind a number's name, in the rule or link `of` if one is given; `ANY` for one that is not in
    the table.

    >>> term("rho", of="adadelta").allowed
    'at least 0 and below 1'
    """
    return TERMS.get(f"{of}.{name}") or TERMS.get(name, ANY)
