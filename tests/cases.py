"""The one table: every rule and link with an independent float64 form of it. A rule without a row fails the
suite.

References are torch.optim where it has the algorithm, else NumPy written from the paper; nothing here looks
at our bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from downslope.rules import LINKS, RULES, Chain, Part, chain

SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2), (0,), (1, 1))


class Judge:
    """Steps float64 weights by an independent implementation; `metric(i)` is its first-order scale of a
    gradient.
    """

    weights: list[np.ndarray]

    def step(self, gradients: list[np.ndarray]) -> None:
        raise NotImplementedError

    def metric(self, i: int) -> Any:
        raise NotImplementedError

    def add(self, i: int, change: np.ndarray) -> None:
        raise NotImplementedError


class TorchJudge(Judge):
    def __init__(
        self, weights: list[np.ndarray], make: Callable[..., Any], metric: Callable[..., Any] | None
    ) -> None:
        self.parameters = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in weights]
        self.optimizer = make(self.parameters)
        self.scale = metric

    @property
    def weights(self) -> list[np.ndarray]:  # type: ignore[override]
        return [p.detach().numpy().copy() for p in self.parameters]

    def step(self, gradients: list[np.ndarray]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        self.optimizer.step()

    def metric(self, i: int) -> Any:
        assert self.scale is not None
        state = self.optimizer.state[self.parameters[i]]
        return self.scale({key: np.asarray(value, dtype=np.float64) for key, value in state.items()})

    def add(self, i: int, change: np.ndarray) -> None:
        with torch.no_grad():
            self.parameters[i].add_(torch.as_tensor(change))


class NumpyJudge(Judge):
    def __init__(
        self, weights: list[np.ndarray], make: Callable[..., Any], metric: Callable[..., Any] | None
    ) -> None:
        self.weights = [w.copy() for w in weights]
        self.update, self.scale = make, metric
        self.state: list[dict[str, Any]] = [{} for _ in weights]

    def step(self, gradients: list[np.ndarray]) -> None:
        for i, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            self.weights[i] = self.update(weight, gradient, self.state[i])

    def metric(self, i: int) -> Any:
        assert self.scale is not None
        return self.scale(self.state[i])

    def add(self, i: int, change: np.ndarray) -> None:
        self.weights[i] = self.weights[i] + change


@dataclass(frozen=True)
class Case:
    """A rule with numbers away from its defaults, its judge, and whether it has an effective step."""

    name: str
    numbers: dict[str, Any]
    judge: Callable[..., Judge]
    make: Callable[..., Any]
    metric: Callable[..., Any] | None = None
    lr: float = field(default=0.1)

    @property
    def part(self) -> Part:
        return RULES[self.name](lr=self.lr, **self.numbers)

    def judged(self, weights: list[np.ndarray]) -> Judge:
        return self.judge(weights, self.make, self.metric)


def lion(p: np.ndarray, g: np.ndarray, s: dict[str, Any]) -> np.ndarray:
    """Chen et al. 2023, program 1."""
    beta1, beta2, lr, wd = 0.8, 0.95, 0.1, 0.3
    m = s.get("m", np.zeros_like(g))
    c = m * beta1 + g * (1 - beta1)
    s["m"] = m * beta2 + g * (1 - beta2)
    return p - lr * (np.sign(c) + p * wd)


def adam_uncorrected(p: np.ndarray, g: np.ndarray, s: dict[str, Any]) -> np.ndarray:
    """Kingma & Ba 2015, algorithm 1 with m and v in place of their corrected forms."""
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    s["v"] = 0.95 * s.get("v", 0) + 0.05 * g**2
    return p - 0.1 * s["m"] / (np.sqrt(s["v"]) + 1e-6)


def _adam_metric(beta2: float, eps: float) -> Callable[..., Any]:
    return lambda s: 1 / (np.sqrt(s["exp_avg_sq"] / (1 - beta2 ** s["step"])) + eps)


_ADAM = {"betas": (0.8, 0.95), "eps": 1e-6}
_OPTIM = torch.optim

CASES = {
    case.name: case
    for case in (
        Case("sgd", {}, TorchJudge, lambda ps: _OPTIM.SGD(ps, lr=0.1), lambda s: 1.0),
        Case(
            "momentum",
            {"momentum": 0.8, "dampening": 0.3},
            TorchJudge,
            lambda ps: _OPTIM.SGD(ps, lr=0.1, momentum=0.8, dampening=0.3),
            lambda s: 0.7 / 0.2,
        ),
        Case(
            "nesterov",
            {"momentum": 0.8},
            TorchJudge,
            lambda ps: _OPTIM.SGD(ps, lr=0.1, momentum=0.8, nesterov=True),
            lambda s: 1 / 0.2,
        ),
        Case(
            "adagrad",
            {"lr_decay": 0.1, "eps": 1e-6, "initial_accumulator_value": 0.2},
            TorchJudge,
            lambda ps: _OPTIM.Adagrad(ps, lr=0.1, lr_decay=0.1, eps=1e-6, initial_accumulator_value=0.2),
            lambda s: 1 / (1 + 0.1 * (s["step"] - 1)) / (np.sqrt(s["sum"]) + 1e-6),
        ),
        Case(
            "rmsprop",
            {"alpha": 0.9, "eps": 1e-6},
            TorchJudge,
            lambda ps: _OPTIM.RMSprop(ps, lr=0.1, alpha=0.9, eps=1e-6),
            lambda s: 1 / (np.sqrt(s["square_avg"]) + 1e-6),
        ),
        Case(
            "rmsprop_centered",
            {"alpha": 0.9, "eps": 1e-2},
            TorchJudge,
            lambda ps: _OPTIM.RMSprop(ps, lr=0.1, alpha=0.9, eps=1e-2, centered=True),
            lambda s: 1 / (np.sqrt(s["square_avg"] - s["grad_avg"] ** 2) + 1e-2),
        ),
        Case(
            "adam", _ADAM, TorchJudge, lambda ps: _OPTIM.Adam(ps, lr=0.1, **_ADAM), _adam_metric(0.95, 1e-6)
        ),
        Case("adam_uncorrected", _ADAM, NumpyJudge, adam_uncorrected, lambda s: 1 / (np.sqrt(s["v"]) + 1e-6)),
        Case(
            "adamw",
            {**_ADAM, "weight_decay": 0.2},
            TorchJudge,
            lambda ps: _OPTIM.AdamW(ps, lr=0.1, weight_decay=0.2, **_ADAM),
            _adam_metric(0.95, 1e-6),
        ),
        Case("lion", {"betas": (0.8, 0.95), "weight_decay": 0.3}, NumpyJudge, lion),
    )
}


@dataclass(frozen=True)
class LinkCase:
    """A link on one side of the rule, as what it does to gradients before, or to weights after, an
    independent step.

    `scale(gradients, i)` is what it multiplies a small gradient by, for the proximal step.
    """

    name: str
    numbers: dict[str, Any]
    before: Callable[[list[np.ndarray], list[np.ndarray]], list[np.ndarray]] | None = None
    after: Callable[[np.ndarray, np.ndarray, float, Any], np.ndarray] | None = None

    def chain(self, case: Case) -> Chain:
        part = LINKS[self.name](**self.numbers)
        return chain(part, case.part) if self.before else chain(case.part, part)


def _clip_norm(gradients: list[np.ndarray], weights: list[np.ndarray]) -> list[np.ndarray]:
    size = np.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1.0, 2.0 / size) for g in gradients]


LINK_CASES = {
    case.name: case
    for case in (
        LinkCase("clip_norm", {"max_norm": 2.0}, before=_clip_norm),
        LinkCase("clip_value", {"max_value": 0.5}, before=lambda gs, ws: [np.clip(g, -0.5, 0.5) for g in gs]),
        LinkCase("l2", {"l2": 0.3}, before=lambda gs, ws: [g + 0.3 * w for g, w in zip(gs, ws, strict=True)]),
        LinkCase("decay", {"weight_decay": 0.4}, after=lambda old, new, lr, metric: new - lr * 0.4 * old),
        LinkCase(
            "l1",
            {"l1": 0.2},
            after=lambda old, new, lr, metric: np.sign(new) * np.maximum(np.abs(new) - lr * metric * 0.2, 0),
        ),
    )
}


def draw(
    steps: int, seed: int = 0, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> tuple[list[Any], list[list[Any]]]:
    """Weights, and gradients for every step, at least 0.05 away from zero, where signs and thresholds
    jump.
    """
    rng = np.random.default_rng(seed)

    def arrays() -> list[np.ndarray]:
        found = [rng.standard_normal(shape) for shape in shapes]
        return [np.asarray(a + np.where(a >= 0, 0.05, -0.05)) for a in found]

    return arrays(), [arrays() for _ in range(steps)]
