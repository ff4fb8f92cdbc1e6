"""Links that draw random numbers, from a counter: they resume and shard as if they were not random."""

from __future__ import annotations

from typing import Any

from downslope.rules.rule import link
from downslope.rules.slot import State
from downslope.rules.value import dither, normal, sqrt, uniform

Weight = Any


@link(source="Neelakantan et al. 2015, section 3")
def noise(
    u: Weight,
    p: Weight,
    s: State,
    *,
    step: Weight,
    scale: float = 0.01,
    power: float = 0.55,
    seed: float = 0,
) -> Weight:
    """Add normal noise of variance scale/(1 + t)^power, which dies down over the run, to every gradient.

    scale: in units of the squared gradient. Not for: small batches, which bring noise enough.
    """
    return u + sqrt(scale / step**power) * normal(u, seed)


@link(source="Gupta et al. 2015, section 3.2", after="weight")
def stochastic_rounding(p: Weight, s: State, *, seed: float = 0) -> Weight:
    """Round weights of half precision up or down by chance, so that steps smaller than their grid add up.

    Beyond the largest number of the dtype (65504 of float16) the nearest is taken: what overflows does so by
    its size, never by chance. Stands last in a chain. Not for: float32 weights, which it leaves as they are.
    """
    return dither(p, uniform(p, seed))
