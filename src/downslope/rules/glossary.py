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
        "dampening": Term("share of the gradient kept out of the momentum", low=0, high=1, open_high=True),
        "alpha": Term("decay of the running average of squares per step", low=0, high=1, open_high=True),
        "eps": Term("added to the denominator, in units of the gradient", low=0),
        "lr_decay": Term("the rate is divided by 1 + lr_decay · (t - 1)", low=0),
        "initial_accumulator_value": Term("sum of squares before the first step", low=0),
        "weight_decay": Term("decoupled decay: lr · weight_decay of the weight is taken off per step", low=0),
        "l2": Term("strength λ of the penalty λ/2 · ‖w‖² added to the loss", low=0),
        "l1": Term("strength λ of the penalty λ · ‖w‖₁ added to the loss", low=0),
        "max_norm": Term("largest Euclidean norm of all gradients together", low=0, open_low=True),
        "max_value": Term("largest magnitude of one number of the gradient", low=0, open_low=True),
    }
)
"""Terms shared by the catalogue. A number outside the table, in a rule of the user's own, may be any finite
one.
"""


def term(name: str) -> Term:
    """The term behind a number's name; `ANY` for one that is not in the table."""
    return TERMS.get(name, ANY)
