"""Clipping by the history of norms: what is clipped, and to what, where norms are planted."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import downslope as ds
from downslope.rules.links import clip_history

NORMS = [3.0, 5.0, 4.0, 4.5, 3.5, 40.0, 4.0]
"""A spike after five quiet ones."""


def stepped(norms: list[float], *, guard: bool = False) -> tuple[list[float], ds.Optimizer]:
    """How far a step at rate 1 goes, for gradients of these norms over two tensors."""
    weights = [torch.zeros(2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)]
    optimizer = ds.Optimizer(weights, ds.chain(clip_history(0.9, 2.0, 5), ds.sgd(lr=1.0)), guard=guard)
    found = []
    for size in norms:
        before = [w.clone() for w in weights]
        for weight, share in zip(weights, (0.6, 0.8), strict=True):
            weight.grad = torch.full_like(weight, size * share / math.sqrt(weight.numel()))
        optimizer.step()
        moved = [(w - old).flatten() for w, old in zip(weights, before, strict=True)]
        found.append(float(torch.cat(moved).norm()))
    return found, optimizer


def test_a_spike_is_clipped_and_the_quiet_is_left_alone() -> None:
    """z = 36/σ of the first five norms; the step has the mean + 2 · 2σ/z, and the history is that of it."""
    found, optimizer = stepped(NORMS)
    mean, deviation = np.mean(NORMS[:5]), np.std(NORMS[:5])
    bound = mean + 2.0 * deviation / ((40.0 - mean) / deviation / 2.0)
    np.testing.assert_allclose(found, [*NORMS[:5], bound, 4.0], rtol=1e-12)
    later = 0.9 * mean + 0.1 * bound
    spread = 0.9 * deviation**2 + 0.1 * (bound - later) ** 2
    last = 0.9 * later + 0.1 * 4.0
    for slots in optimizer.state.values():
        assert float(slots["norms"]) == 7
        assert float(slots["norm_mean"]) == pytest.approx(last, rel=1e-12)
        assert float(slots["norm_variance"]) == pytest.approx(
            0.9 * spread + 0.1 * (4.0 - last) ** 2, rel=1e-12
        )


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_no_trace_in_the_history(bad: float, guard: bool) -> None:
    """Without the guard the gradient passes as it is; the weights are lost, the history is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _, clean = stepped(NORMS, guard=guard)
        _, hurt = stepped([*NORMS[:2], bad, *NORMS[2:5], bad, *NORMS[5:]], guard=guard)
    for one, two in zip(clean.state.values(), hurt.state.values(), strict=True):
        assert {n: v.item() for n, v in one.items() if n != "t"} == {
            n: v.item() for n, v in two.items() if n != "t"
        }
    finite = [bool(torch.isfinite(p).all()) for p in hurt.param_groups[0]["params"]]
    assert finite == [guard, guard]


def test_equal_norms_are_never_clipped() -> None:
    found, _ = stepped([4.0] * 20)
    np.testing.assert_allclose(found, 4.0, rtol=1e-12)


def test_the_rows_numbers_clip_in_the_table_of_truth() -> None:
    """Else the laws that run over the table would say nothing."""
    from cases import LINK_CASES, draw

    row = LINK_CASES["clip_history"]
    _, gradients = draw(20)
    moment = type("Moment", (), {"memory": {}})()
    assert row.before is not None
    clipped = [row.before(drawn, moment, **row.numbers)[0].flat[0] != drawn[0].flat[0] for drawn in gradients]
    assert 3 <= sum(clipped) <= 15
