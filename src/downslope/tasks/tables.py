"""Tables of numbers, by linear models: convex, so that the optimum is known from elsewhere."""

from typing import Any

import torch
from torch import Tensor, nn

from downslope.recipe import Recipe
from downslope.rules import chain
from downslope.rules.classic import momentum, nesterov
from downslope.rules.curvature import lbfgs
from downslope.rules.proximal import l1
from downslope.schedule import cosine
from downslope.tasks.data import Batch
from downslope.tasks.definition import Loss, Task, cross_entropy, plain_recipe, squared_error
from downslope.tasks.fit import fit
from downslope.tasks.split import needs, standardised, stratified

LASSO = 0.05
"""λ of `diabetes-lasso`, scikit-learn's alpha: four of ten weights are zero."""

MARGIN = 1 / 569
"""λ of `cancer-svm`, scikit-learn's C = 1 over 569 patients."""


def cancer_logistic(seed: int = 0) -> Task:
    """Breast cancer, 30 features, by logistic regression: convex, and judged by its loss."""
    return Task(
        **standardised(stratified("load_breast_cancer", seed), shape=(30,), by=(0,)),
        model=lambda: nn.Linear(30, 2),
        loss=cross_entropy,
        metric_name="log loss",
        target=0.07,
        reference="downslope train cancer-logistic --seed S, S = 0 to 4: mean log loss 0.074, on test 0.104",
        recipe=plain_recipe(rate=0.03),
    )


def diabetes_linear(seed: int = 0) -> Task:
    """Progression of diabetes from 10 features, least squares: a valley 22 times longer than wide."""
    with needs("scikit-learn"):
        from sklearn.linear_model import LinearRegression
    return _linear_fit(
        *_whole("load_diabetes"),
        LinearRegression(),
        loss=squared_error,
        target=1e-6,
        reference=(
            "downslope train diabetes-linear --seed S, S = 0 to 4: mean excess 2e-11 over "
            "scikit-learn's LinearRegression"
        ),
        recipe=Recipe(chain(lbfgs(lr=1.0)), steps=100, batch_size=442),
    )


def diabetes_lasso(seed: int = 0) -> Task:
    """The same, half the error and λ · ‖w‖₁ by a proximal link: exact zeros, where scikit-learn has them."""
    with needs("scikit-learn"):
        from sklearn.linear_model import Lasso
    return _linear_fit(
        *_whole("load_diabetes"),
        Lasso(LASSO, tol=1e-14, max_iter=100_000),
        loss=half_squared_error,
        objective=lasso,
        target=1e-6,
        reference=(
            "downslope train diabetes-lasso --seed S, S = 0 to 4: excess at most 3e-16 over "
            "scikit-learn's Lasso, four exact zeros"
        ),
        recipe=Recipe(
            chain(nesterov(lr=0.1), l1(LASSO)), steps=1000, batch_size=442, roles={"bias": {"l1": 0.0}}
        ),
    )


def cancer_svm(seed: int = 0) -> Task:
    """Breast cancer, 30 features, by a linear support vector machine: convex, with a kink at every margin."""
    with needs("scikit-learn"):
        from sklearn.svm import LinearSVC
    inputs, targets = _whole("load_breast_cancer")
    return _linear_fit(
        inputs,
        targets.sign(),
        LinearSVC(loss="hinge", tol=1e-9, max_iter=1_000_000, random_state=0),
        loss=soft_margin,
        target=1e-4,
        reference=(
            "downslope train cancer-svm --seed S, S = 0 to 4: mean excess 9e-6 over scikit-learn's LinearSVC"
        ),
        recipe=Recipe(chain(momentum(lr=cosine(0.3, steps="100 %"))), steps=3000, batch_size=569),
    )


def half_squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Half the mean squared error: the loss of scikit-learn's Lasso, and its gradient without a factor 2."""
    return squared_error(model, batch) / 2


def lasso(model: nn.Module, batch: Batch) -> Tensor:
    """Half the mean squared error plus λ · ‖w‖₁, the bias free: the objective of scikit-learn's Lasso."""
    return half_squared_error(model, batch) + LASSO * model.get_parameter("weight").abs().sum()


def soft_margin(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of max(0, 1 - y · f(x)), the hinge, plus λ/2 · (‖w‖² + b²); f(x) and y = ±1 are [items, 1].

    LinearSVC's objective with its loss "hinge", over C · items. Like liblinear, it penalises the bias too.
    """
    inputs, targets = batch
    shortfall: Tensor = (1 - targets * model(inputs)).clamp(min=0)
    return shortfall.mean() + MARGIN / 2 * sum(part.square().sum() for part in model.parameters())


def _whole(load: str) -> tuple[Tensor, Tensor]:
    """All samples of `sklearn.datasets.load`, every column with zero mean and unit deviation, float64."""
    with needs("scikit-learn"):
        from sklearn import datasets
    columns = (torch.tensor(part).double() for part in getattr(datasets, load)(return_X_y=True))
    inputs, targets = ((part - part.mean(0)) / part.std(0, correction=0) for part in columns)
    return inputs, targets[:, None]


def _linear_fit(
    inputs: Tensor,
    targets: Tensor,
    solver: Any,
    *,
    loss: Loss,
    objective: Loss | None = None,
    **given: Any,
) -> Task:
    """A linear model fitted to all samples; `solver` is scikit-learn's way to the optimum."""

    def model() -> nn.Linear:
        return nn.Linear(inputs.shape[1], 1, dtype=torch.float64)

    objective = objective or loss
    solver.fit(inputs.numpy(), targets[:, 0].numpy())
    with torch.no_grad(), torch.random.fork_rng([]):  # a model of ours draws weights; nobody shall notice
        solved = model()
        solved.weight.copy_(torch.as_tensor(solver.coef_))
        solved.bias.copy_(torch.as_tensor(solver.intercept_))
        optimum = float(objective(solved, (inputs, targets)))
    return fit((inputs, targets), model=model, loss=loss, objective=objective, optimum=optimum, **given)
