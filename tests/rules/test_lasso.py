"""Proximal links behind every rule with an effective step reach scikit-learn's optimum: its objective and its
zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso

import downslope as ds
from downslope.errors import BadInput

Array = NDArray[np.float64]

ALPHA = 0.5
RATES: dict[str, tuple[float, int]] = {
    "gd": (0.3, 4000),
    "sgd": (0.3, 4000),
    "momentum": (0.05, 4000),
    "momentum_textbook": (0.03, 4000),
    "nesterov": (0.05, 4000),
    "asgd": (0.3, 4000),
    "adagrad": (20.0, 4000),
    "rmsprop": (0.2, 3000),
    "rmsprop_centered": (0.2, 3000),
    "adadelta": (10.0, 4000),
    "adam": (0.5, 3000),
    "adam_uncorrected": (0.5, 4000),
    "adamw": (0.5, 3000),
    "adamax": (1.0, 3000),
    "nadam": (0.5, 3000),
    "radam": (0.5, 3000),
    "amsgrad": (0.5, 4000),
    "adabelief": (0.5, 4000),
    "yogi": (0.5, 3000),
    "adan": (0.5, 3000),
    "adopt": (1.0, 6000),
    "ademamix": (0.1, 20000),
    "adafactor": (0.5, 2000),
}
"""A rate that gets there, in so many steps. Adaptive rules stand still only where it falls."""
STEADY = {"gd", "sgd", "momentum", "momentum_textbook", "nesterov", "asgd", "adagrad"}


def takes(name: str, link: Any) -> bool:
    """Whether a proximal link may stand behind the rule."""
    try:
        ds.chain(ds.rules()[name](), link)
    except BadInput:
        return False
    return True


def data() -> tuple[Array, Array]:
    x, y = load_diabetes(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return x, y - y.mean()


def fitted(name: str, link: Any, x: Array, y: Array, begun: Array, steps: int = 0) -> Array:
    """Least squares of y by the rule and the link behind it, on gradients of all samples."""
    lr, steps = RATES[name][0], steps or RATES[name][1]
    rule = ds.rules()[name]
    rate: Any = lr if name in STEADY else ds.cosine(lr, steps=steps, end=lr * 1e-3)
    numbers = {"weight_decay": 0.0} if "weight_decay" in rule.numbers else {}
    weight = torch.tensor(begun, requires_grad=True)
    optimizer = ds.Optimizer([weight], ds.chain(rule(lr=rate, **numbers), link))
    gram, moment = torch.tensor(x.T @ x / len(y)), torch.tensor(x.T @ y / len(y))
    for _ in range(steps):
        weight.grad = gram @ weight.detach() - moment
        optimizer.step()
    return weight.detach().numpy()


def least_squares(x: Array, y: Array, w: Array) -> float:
    return float(((y - x @ w) ** 2).sum() / (2 * len(y)))


def lasso(x: Array, y: Array, w: Array) -> float:
    return least_squares(x, y, w) + ALPHA * float(np.abs(w).sum())


def reached(found: Array, exact: Array, objective: Any) -> None:
    """To a millionth, with the same zeros, of which there are some."""
    assert abs(objective(found) - objective(exact)) <= 1e-6 * objective(exact)
    assert np.array_equal(found == 0, exact == 0)
    assert (exact == 0).any()


def test_every_rule_with_an_effective_step_is_tried() -> None:
    assert {name for name in ds.rules() if takes(name, ds.l1(0.1))} == set(RATES)


@pytest.mark.parametrize("name", RATES)
def test_proximal_l1_reaches_the_lasso(name: str) -> None:
    x, y = data()
    exact = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x, y).coef_
    reached(fitted(name, ds.l1(ALPHA), x, y, np.zeros(10)), exact, lambda w: lasso(x, y, w))


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "rmsprop"])
def test_the_elastic_net_reaches_scikit_learns(name: str) -> None:
    x, y = data()
    best = ElasticNet(alpha=2.0, l1_ratio=0.75, fit_intercept=False, tol=1e-14, max_iter=1_000_000)

    def objective(w: Array) -> float:
        return least_squares(x, y, w) + 1.5 * float(np.abs(w).sum()) + 0.25 * float(w @ w)

    reached(fitted(name, ds.elastic_net(1.5, 0.5), x, y, np.zeros(10)), best.fit(x, y).coef_, objective)


@pytest.mark.parametrize("name", ["nesterov", "adam", "rmsprop"])
def test_group_lasso_reaches_the_lasso_of_several_tasks_at_once(name: str) -> None:
    """A row of the weight is what one feature says to three targets: it is 0 as a whole, or not at all."""
    x, y = data()
    targets = np.stack([y, x[:, 2] * 20 + x[:, 8] * 30, np.abs(y)], axis=1)
    best = MultiTaskLasso(alpha=6.0, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x, targets)
    found = fitted(name, ds.group_lasso(6.0 / np.sqrt(3)), x, targets, np.zeros((10, 3)), steps=1200)

    def objective(w: Array) -> float:
        return least_squares(x, targets, w) + 6.0 * float(np.linalg.norm(w, axis=1).sum())

    reached(found, best.coef_.T, objective)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_the_threshold_without_the_metric_would_be_wrong(name: str) -> None:
    """The tests above can fail: lr·λ alone, whatever the rule, converges to another point."""
    x, y = data()
    exact = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-14, max_iter=1_000_000).fit(x, y).coef_

    @ds.link(after="weight")
    def naive(p: Any, s: Any, *, lr: Any, l1: float = 0.0) -> Any:
        from downslope.rules.value import maximum, sign

        return sign(p) * maximum(abs(p) - lr * l1, 0.0)

    assert lasso(x, y, fitted(name, naive(ALPHA), x, y, np.zeros(10))) > lasso(x, y, exact) * 1.0001
