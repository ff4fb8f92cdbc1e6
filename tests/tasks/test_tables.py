"""Linear fits: the optimum is scikit-learn's, and training arrives there, at the weights themselves."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn

import downslope as ds
from downslope.tasks import Task, task
from downslope.tasks.fit import excess
from downslope.train import Training

Array = NDArray[np.float64]


def scaled(x: Any) -> Any:
    return (x - x.mean(0)) / x.std(0)


def trained(one: Task, recipe: ds.Recipe | None = None) -> tuple[Array, float, Training]:
    """Weights and bias after a whole training of a linear model."""
    state = Training(one, recipe, seed=1, threads=1)
    state.advance()
    assert isinstance(state.model, nn.Linear)
    weight, bias = (part.detach().double().numpy() for part in (state.model.weight, state.model.bias))
    return weight[0], float(bias[0]), state


def test_least_squares_reach_the_optimum_to_a_millionth() -> None:
    x, y = map(scaled, load_diabetes(return_X_y=True))
    best = LinearRegression().fit(x, y)
    w, b, state = trained(task("diabetes-linear"))
    objective, optimum = ((y - x @ w - b) ** 2).mean(), ((y - best.predict(x)) ** 2).mean()
    assert abs(objective / optimum - 1) < 1e-6
    assert state.evaluate().metric == pytest.approx(objective / optimum - 1, abs=1e-12)
    np.testing.assert_allclose(w, best.coef_, atol=1e-4)


def test_the_lasso_reaches_the_optimum_to_a_millionth_and_its_very_zeros() -> None:
    x, y = map(scaled, load_diabetes(return_X_y=True))
    best = Lasso(0.05, tol=1e-14, max_iter=100_000).fit(x, y)

    def objective(w: Array, b: float) -> float:
        return float(((y - x @ w - b) ** 2).mean() / 2 + 0.05 * np.abs(w).sum())

    w, b, state = trained(task("diabetes-lasso"))
    ratio = objective(w, b) / objective(best.coef_, best.intercept_)
    assert abs(ratio - 1) < 1e-6
    assert state.evaluate().metric == pytest.approx(ratio - 1, abs=1e-12)
    assert np.array_equal(w == 0, best.coef_ == 0)
    assert (w == 0).sum() == 4
    slope = x.T @ (y - x @ w - b) / len(y)  # Karush, Kuhn and Tucker's conditions, without scikit-learn
    np.testing.assert_allclose(slope[w != 0], 0.05 * np.sign(w[w != 0]), atol=1e-8)
    assert np.all(np.abs(slope[w == 0]) <= 0.05)


def test_without_its_penalty_the_lasso_is_missed() -> None:
    plain = ds.Recipe(ds.chain(ds.nesterov(lr=0.1)), steps=1000, batch_size=442)
    w, _, state = trained(task("diabetes-lasso"), plain)
    assert (w != 0).all()
    assert state.evaluate().metric > 1e-3


def test_the_support_vector_machine_reaches_the_optimum_to_a_ten_thousandth() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x, y = scaled(x), 2 * y - 1
    best = LinearSVC(C=1.0, loss="hinge", tol=1e-9, max_iter=1_000_000, random_state=0).fit(x, y)

    def objective(w: Array, b: float) -> float:
        """As scikit-learn's guide prints it, with the bias among the weights, as liblinear has it."""
        return float((w @ w + b * b) / 2 + np.maximum(0, 1 - y * (x @ w + b)).sum())

    w, b, state = trained(task("cancer-svm"))
    ratio = objective(w, b) / objective(best.coef_[0], float(best.intercept_[0]))
    assert abs(ratio - 1) < 1e-4
    assert state.evaluate().metric == pytest.approx(ratio - 1, abs=1e-12)
    assert np.array_equal(np.sign(x @ w + b), best.predict(x))


def test_the_penalised_logistic_reaches_the_optimum_to_a_ten_thousandth() -> None:
    """Two logits of weights ±w/2 are one of weight w, so λ/2 · ‖W‖² is λ/4 · ‖w‖², and C = 2/(λ · n)."""
    one = task("cancer-logistic")
    assert isinstance(one.train, tuple)
    inputs, targets = one.train
    x, y, penalty = inputs.double().numpy(), targets.numpy(), 0.01
    best = LogisticRegression(C=2 / (penalty * len(y)), tol=1e-12, max_iter=10_000).fit(x, y)

    def objective(w: Array, b: float) -> float:
        margin = (2 * y - 1) * (x @ w + b)
        return float(np.logaddexp(0, -margin).mean() + penalty / 4 * (w @ w))

    recipe = ds.Recipe(
        ds.chain(ds.l2(penalty), ds.lbfgs(lr=1.0)), steps=200, batch_size=len(y), roles={"bias": {"l2": 0.0}}
    )
    state = Training(one, recipe, seed=1, threads=1)
    state.advance()
    weight, bias = (part.detach().double().numpy() for part in state.model.parameters())
    assert np.allclose(weight[0], -weight[1], atol=1e-3), "the penalty leaves no other minimum"
    ratio = objective(weight[1] - weight[0], bias[1] - bias[0]) / objective(best.coef_[0], best.intercept_[0])
    assert abs(ratio - 1) < 1e-4


@pytest.mark.parametrize("name", ["diabetes-linear", "diabetes-lasso", "cancer-svm"])
def test_nothing_lies_below_the_optimum(name: str) -> None:
    one = task(name)
    _, _, state = trained(one)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-6, 1e-3, 0.1):
        for _ in range(10):
            other = one.model()
            with torch.no_grad():
                for mine, there in zip(other.parameters(), state.model.parameters(), strict=True):
                    mine.copy_(there + size * torch.randn(there.shape, generator=generator))
                assert float(one.metric(other, one.train)) > -1e-7


def test_an_excess_is_relative() -> None:
    metric = excess(lambda model, batch: torch.tensor(batch), optimum=4.0)
    assert [float(metric(nn.Identity(), value)) for value in (4.0, 5.0, 2.0)] == [0.0, 0.25, -0.5]


def test_the_logistic_loss_is_convex() -> None:
    """Along any chord of the weights the loss lies below the straight line between its ends."""
    convex = task("cancer-logistic")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, two, middle = convex.model(), convex.model(), convex.model()
        with torch.no_grad():
            for a, b, m in zip(one.parameters(), two.parameters(), middle.parameters(), strict=True):
                a.normal_(generator=generator)
                b.normal_(generator=generator)
                m.copy_((a + b) / 2)
            ends = (convex.loss(one, convex.train) + convex.loss(two, convex.train)) / 2
            assert convex.loss(middle, convex.train) <= ends + 1e-5
