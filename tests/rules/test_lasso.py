"""Proximal L1 behind every rule with an effective step reaches scikit-learn's lasso: its objective and its
zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso

import downslope as ds

ALPHA = 0.5
RATES: dict[str, tuple[float, int]] = {
    "sgd": (0.3, 4000),
    "momentum": (0.05, 4000),
    "nesterov": (0.05, 4000),
    "adagrad": (20.0, 8000),
    "rmsprop": (0.2, 8000),
    "rmsprop_centered": (0.2, 8000),
    "adam": (0.5, 12000),
    "adam_uncorrected": (0.5, 12000),
}


def data() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return x, y - y.mean()


def objective(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    return float(((y - x @ w) ** 2).mean() / 2 + ALPHA * np.abs(w).sum())


@pytest.mark.parametrize("name", RATES)
def test_proximal_l1_reaches_the_lasso(name: str) -> None:
    x, y = data()
    exact = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x, y).coef_
    lr, steps = RATES[name]
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    rate: Any = ds.cosine(lr, steps=steps, end=lr * 1e-3) if name.startswith(("adam", "rmsprop")) else lr
    optimizer = ds.Optimizer([weight], ds.chain(ds.rules()[name](lr=rate), ds.l1(ALPHA)))
    gram, moment = torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y))
    for _ in range(steps):
        weight.grad = gram @ weight.detach() - moment
        optimizer.step()
    found = weight.detach().numpy()
    best = objective(x, y, exact)
    assert abs(objective(x, y, found) - best) <= 1e-6 * best
    assert np.array_equal(found == 0, exact == 0)
    assert (exact == 0).any()


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_the_threshold_without_the_metric_would_be_wrong(name: str) -> None:
    """The test above can fail: lr·λ alone, whatever the rule, converges to another point."""
    x, y = data()
    exact = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x, y).coef_

    @ds.link(after="weight")
    def naive(p: Any, s: Any, *, lr: Any, l1: float = 0.0) -> Any:
        from downslope.rules.value import maximum, sign

        return sign(p) * maximum(abs(p) - lr * l1, 0.0)

    lr, steps = RATES[name]
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = ds.Optimizer([weight], ds.chain(ds.rules()[name](lr=lr), naive(ALPHA)))
    gram, moment = torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y))
    for _ in range(steps):
        weight.grad = gram @ weight.detach() - moment
        optimizer.step()
    assert objective(x, y, weight.detach().numpy()) > objective(x, y, exact) * 1.0001
