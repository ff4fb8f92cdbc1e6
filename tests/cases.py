"""The one table: every rule and link with an independent float64 form of it. A rule without a row fails the
suite.

References are torch.optim where it has the algorithm, else NumPy written from the paper, in `judges`; nothing
there looks at our bodies. Every number is away from its default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from judges import elementwise, layerwise, links, matrix
from judges.judge import AverageJudge, EstimateJudge, Judge, NumpyJudge, TorchJudge, WholeJudge

from downslope.rules import LINKS, RULES, Chain, Part, chain

Shapes = tuple[tuple[int, ...], ...]

SHAPES: Shapes = ((3, 4), (5,), (), (2, 3, 2, 2), (0,), (1, 1))
MATRICES: Shapes = ((4, 4), (3, 5), (5, 2, 2))
FULL: Shapes = ((4, 4), (4, 5), (4, 2, 2))
"""Matrices without a null space of several dimensions, whose basis would be anybody's choice: here, and with
gradients centralised.
"""


@dataclass(frozen=True)
class Case:
    """A rule with numbers away from its defaults and its judge: how it is made, what it multiplies a small
    gradient by (None where it has no effective step), and what its evaluation weights are, from its state.

    `estimates`: every how many steps it takes in a gradient of another loss first; `steady`: gradients must
    keep their signs for something to happen.
    """

    name: str
    numbers: dict[str, Any]
    judge: Callable[..., Judge]
    make: Callable[..., Any]
    metric: Callable[[Any, Any], Any] | None = None
    lr: float = 0.1
    shapes: Shapes = SHAPES
    evaluation: Callable[[Any, Any, Any], Any] | None = None
    estimates: int = 0
    steady: bool = False

    @property
    def part(self) -> Part:
        return RULES[self.name](lr=self.lr, **self.numbers)

    def judged(self, weights: Sequence[Any]) -> Judge:
        return self.judge(weights, self.make, {"lr": self.lr, **self.numbers}, self.metric, self.evaluation)


def _asgd(ps: Any, *, decay: float, power: float, start: float, **numbers: Any) -> Any:
    return torch.optim.ASGD(ps, lambd=decay, alpha=power, t0=start, **numbers)


def _adafactor(ps: Any, *, eps: float, scale_eps: float, clip: float, **numbers: Any) -> Any:
    return torch.optim.Adafactor(ps, eps=(eps, scale_eps), d=clip, **numbers)


def _amsgrad(ps: Any, **numbers: Any) -> Any:
    return torch.optim.Adam(ps, amsgrad=True, **numbers)


def _nesterov(ps: Any, **numbers: Any) -> Any:
    return torch.optim.SGD(ps, nesterov=True, **numbers)


def _rmsprop_centered(ps: Any, **numbers: Any) -> Any:
    return torch.optim.RMSprop(ps, centered=True, **numbers)


def _lbfgs(ps: Any, **numbers: Any) -> Any:
    off = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    return torch.optim.LBFGS(ps, max_iter=1, history_size=5, **off, **numbers)


def _one(s: Any, n: Any) -> float:
    return 1.0


def _root(s: Any, n: Any) -> Any:
    return 1 / s["root"]


def _adam(squares: str) -> Callable[..., Any]:
    return lambda s, n: 1 / (np.sqrt(s[squares] / (1 - n["betas"][1] ** s["step"])) + n["eps"])


def _radam(s: Any, n: Any) -> Any:
    """Liu et al. 2020, algorithm 2: as Adam, rectified; plain momentum while the variance cannot be told."""
    t, beta2 = s["step"], n["betas"][1]
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return 1.0
    share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return np.sqrt(share * (1 - beta2**t)) / (np.sqrt(s["exp_avg_sq"]) + n["eps"])


def _adafactor_metric(s: Any, n: Any) -> Any:
    """Shazeer & Stern 2018, algorithm 6: a relative rate over the factored root, clipped."""
    squares = s.get("variance")
    if squares is None:
        mean = np.maximum(s["row_var"].mean(axis=-2, keepdims=True), n["eps"])
        squares = s["row_var"] @ s["col_var"] / mean
    root = np.sqrt(np.maximum(squares, n["eps"] ** 2))
    rate = max(n["scale_eps"], np.sqrt(np.mean(s["weight"] ** 2))) * min(n["lr"], s["step"] ** -0.5)
    return rate / n["lr"] / root / max(1.0, np.sqrt(np.mean((s["gradient"] / root) ** 2)) / n["clip"])


def _asgd_metric(s: Any, n: Any) -> Any:
    return s.get("last_eta", n["lr"]) / n["lr"]


_ADAM = {"betas": (0.8, 0.95), "eps": 1e-3}
_DECAYED = {**_ADAM, "weight_decay": 0.2}
_MUON = {"momentum": 0.8, "weight_decay": 0.3}
_OPTIM = torch.optim

ROWS = (
    Case("gd", {"shrink": 0.7, "slope": 1e-3}, NumpyJudge, elementwise.gd, _one),
    Case("sgd", {}, TorchJudge, _OPTIM.SGD, _one),
    Case(
        "momentum",
        {"momentum": 0.8, "dampening": 0.3},
        TorchJudge,
        _OPTIM.SGD,
        lambda s, n: (1 - n["dampening"]) / (1 - n["momentum"]),
    ),
    Case(
        "momentum_textbook",
        {"momentum": 0.8},
        NumpyJudge,
        elementwise.momentum_textbook,
        lambda s, n: 1 / (1 - n["momentum"]),
    ),
    Case("nesterov", {"momentum": 0.8}, TorchJudge, _nesterov, lambda s, n: 1 / (1 - n["momentum"])),
    Case(
        "asgd",
        {"decay": 0.02, "power": 0.6, "start": 5.0},
        AverageJudge,
        _asgd,
        _asgd_metric,
        evaluation=lambda p, s, n: s["ax"],
    ),
    Case("signsgd", {"weight_decay": 0.3}, NumpyJudge, elementwise.signsgd),
    Case("rprop", {"etas": (0.6, 1.3), "step_sizes": (0.03, 0.2)}, TorchJudge, _OPTIM.Rprop),
    Case(
        "adagrad",
        {"lr_decay": 0.1, "eps": 1e-3, "initial_accumulator_value": 0.2},
        TorchJudge,
        _OPTIM.Adagrad,
        lambda s, n: 1 / (1 + n["lr_decay"] * (s["step"] - 1)) / (np.sqrt(s["sum"]) + n["eps"]),
    ),
    Case(
        "rmsprop",
        {"alpha": 0.9, "eps": 1e-3},
        TorchJudge,
        _OPTIM.RMSprop,
        lambda s, n: 1 / (np.sqrt(s["square_avg"]) + n["eps"]),
    ),
    Case(
        "rmsprop_centered",
        {"alpha": 0.9, "eps": 1e-2},
        TorchJudge,
        _rmsprop_centered,
        lambda s, n: 1 / (np.sqrt(s["square_avg"] - s["grad_avg"] ** 2) + n["eps"]),
    ),
    Case(
        "adadelta",
        {"rho": 0.8, "eps": 1e-3},
        TorchJudge,
        _OPTIM.Adadelta,
        lambda s, n: np.sqrt((s.get("last_acc_delta", 0.0) + n["eps"]) / (s["square_avg"] + n["eps"])),
        lr=0.7,
    ),
    Case("adam", _ADAM, TorchJudge, _OPTIM.Adam, _adam("exp_avg_sq")),
    Case(
        "adam_uncorrected",
        _ADAM,
        NumpyJudge,
        elementwise.adam_uncorrected,
        lambda s, n: 1 / (np.sqrt(s["v"]) + n["eps"]),
    ),
    Case("adamw", _DECAYED, TorchJudge, _OPTIM.AdamW, _adam("exp_avg_sq")),
    Case(
        "adamax",
        {"betas": (0.8, 0.9), "eps": 1e-3},
        TorchJudge,
        _OPTIM.Adamax,
        lambda s, n: 1 / s["exp_inf"],
    ),
    Case("nadam", {**_ADAM, "momentum_decay": 0.02}, TorchJudge, _OPTIM.NAdam, _adam("exp_avg_sq")),
    Case("radam", _ADAM, TorchJudge, _OPTIM.RAdam, _radam),
    Case("amsgrad", {"betas": (0.8, 0.7), "eps": 1e-3}, TorchJudge, _amsgrad, _adam("max_exp_avg_sq")),
    Case("adabelief", {"betas": (0.8, 0.95), "eps": 1e-4}, NumpyJudge, elementwise.adabelief, _root),
    Case(
        "adan",
        {"betas": (0.9, 0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
        NumpyJudge,
        elementwise.adan,
        lambda s, n: 1 / s["root"] / (1 + n["lr"] * n["weight_decay"]),
    ),
    Case("adopt", {"betas": (0.8, 0.95), "eps": 0.3}, NumpyJudge, elementwise.adopt, _root),
    Case(
        "ademamix",
        {"betas": (0.8, 0.95, 0.99), "mix": 3.0, "horizon": 12, "eps": 1e-3, "weight_decay": 0.2},
        NumpyJudge,
        elementwise.ademamix,
        lambda s, n: (1 + s["mix"]) / s["root"],
    ),
    Case(
        "adafactor",
        {"beta2_decay": -0.7, "eps": 0.4, "scale_eps": 0.5, "clip": 1.2, "weight_decay": 0.1},
        TorchJudge,
        _adafactor,
        _adafactor_metric,
        lr=0.4,
    ),
    Case(
        "yogi",
        {"betas": (0.8, 0.95), "eps": 1e-4, "initial_accumulator_value": 0.3},
        NumpyJudge,
        elementwise.yogi,
        _root,
    ),
    Case("lion", {"betas": (0.8, 0.95), "weight_decay": 0.3}, NumpyJudge, elementwise.lion),
    Case("signum", {"momentum": 0.8, "weight_decay": 0.3}, NumpyJudge, elementwise.signum),
    Case("lars", {"momentum": 0.8, "weight_decay": 0.1, "trust": 0.3}, NumpyJudge, layerwise.lars, lr=0.5),
    Case("lamb", _DECAYED, NumpyJudge, layerwise.lamb),
    Case("muon", _MUON, NumpyJudge, matrix.muon, shapes=MATRICES),
    Case("muon_rms", _MUON, NumpyJudge, matrix.muon_rms, shapes=MATRICES),
    Case("muon_spectral", _MUON, NumpyJudge, matrix.muon_spectral, shapes=MATRICES),
    Case("shampoo", {"eps": 0.1, "every": 3}, NumpyJudge, matrix.shampoo, shapes=MATRICES),
    Case(
        "soap",
        {
            "betas": (0.8, 0.9),
            "shampoo_beta": 0.85,
            "eps": 1e-3,
            "weight_decay": 0.2,
            "every": 3,
        },
        NumpyJudge,
        matrix.soap,
        shapes=FULL,
    ),
    Case(
        "psgd",
        {"momentum": 0.8, "precond_lr": 0.3, "clip": 0.9, "weight_decay": 0.2},
        NumpyJudge,
        matrix.psgd,
        shapes=MATRICES,
    ),
    Case(
        "sophia",
        {"betas": (0.8, 0.9), "rho": 0.3, "eps": 0.05, "weight_decay": 0.2, "items": 1.7},
        EstimateJudge,
        elementwise.sophia,
        estimates=3,
    ),
    Case("lbfgs", {}, TorchJudge, _lbfgs, lr=0.2),
    Case(
        "schedule_free_sgd",
        {"momentum": 0.8, "weight_decay": 0.1},
        NumpyJudge,
        elementwise.schedule_free_sgd,
        evaluation=lambda p, s, n: elementwise.average_of_schedule_free(p, s, n["momentum"]),
    ),
    Case(
        "schedule_free_adamw",
        _DECAYED,
        NumpyJudge,
        elementwise.schedule_free_adamw,
        evaluation=lambda p, s, n: elementwise.average_of_schedule_free(p, s, n["betas"][0]),
    ),
    Case(
        "prodigy",
        {"betas": (0.8, 0.9), "d0": 1e-2, "eps": 1e-4, "weight_decay": 0.1},
        WholeJudge,
        layerwise.prodigy,
        lr=0.7,
        steady=True,
    ),
    Case("dog", {"initial": 1e-2, "eps": 0.5}, WholeJudge, layerwise.dog, lr=0.8),
    Case("ftrl", {"beta": 0.7, "l1": 0.4, "l2": 0.3}, NumpyJudge, elementwise.ftrl),
)

CASES = {case.name: case for case in ROWS}

UNIFORM = {"gd", "sgd", "momentum", "momentum_textbook", "nesterov", "asgd"}
"""Rules whose metric is one number a tensor."""


@dataclass(frozen=True)
class LinkCase:
    """A link with numbers away from its defaults, as what it does around an independent step: to gradients
    `before` it, to directions `between` it and the rate, to weights `after` it, or as the weights at which
    the gradient is taken again (`ascent`). Each is given the numbers and the `Moment`.

    `metric`: "any" and "number" want a rule with an effective step, the latter one number a tensor.
    """

    name: str
    numbers: dict[str, Any]
    before: Callable[..., Any] | None = None
    between: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None
    ascent: Callable[..., Any] | None = None
    metric: str = ""
    shapes: Shapes | None = None
    evaluation: Callable[[links.Moment], Any] | None = None

    def chain(self, case: Case) -> Chain:
        part = LINKS[self.name](**self.numbers)
        return chain(part, case.part) if self.before or self.ascent else chain(case.part, part)

    def refused_by(self, case: Case) -> bool:
        """Whether the two make no sense together: there is no effective step, or not one number a tensor."""
        return bool(self.metric) and (
            case.metric is None or (self.metric == "number" and case.name not in UNIFORM)
        )


LINK_ROWS = (
    LinkCase("clip_value", {"max_value": 0.5}, before=links.clip_value),
    LinkCase("clip_norm", {"max_norm": 2.0}, before=links.clip_norm),
    LinkCase("clip_tensor", {"max_norm": 1.5}, before=links.clip_tensor),
    LinkCase("clip_history", {"norm_decay": 0.8, "deviations": 0.7, "settle": 4}, before=links.clip_history),
    LinkCase("agc", {"clipping": 0.7, "eps": 0.5}, before=links.agc),
    LinkCase("l2", {"l2": 0.3}, before=links.l2),
    LinkCase("decay", {"weight_decay": 0.4}, between=links.decay),
    LinkCase("decay_independent", {"weight_decay": 0.05}, after=links.decay_independent),
    LinkCase("l1", {"l1": 0.2}, after=links.l1, metric="any"),
    LinkCase("elastic_net", {"l1": 0.2, "l2": 0.3}, after=links.elastic_net, metric="any"),
    LinkCase("group_lasso", {"group_lasso": 0.15}, after=links.group_lasso, metric="any"),
    LinkCase("nuclear", {"nuclear": 0.4}, after=links.nuclear, metric="number", shapes=MATRICES),
    LinkCase("centralize", {}, before=links.centralize),
    LinkCase("noise", {"scale": 0.2, "power": 0.7, "seed": 3}, before=links.noise),
    LinkCase("cautious", {"eps": 0.3}, between=links.cautious),
    LinkCase("cautious_decay", {"weight_decay": 0.4}, between=links.cautious_decay),
    LinkCase(
        "lookahead",
        {"every": 3, "blend": 0.4},
        after=links.lookahead,
        evaluation=lambda at: at.memory["slow"],
    ),
    LinkCase("stochastic_rounding", {"seed": 3}, after=links.stochastic_rounding),
    LinkCase("sam", {"rho": 0.3}, ascent=links.sam),
    LinkCase("asam", {"rho": 0.4, "eta": 0.2}, ascent=links.asam),
)

LINK_CASES = {case.name: case for case in LINK_ROWS}


def draw(
    steps: int, seed: int = 0, shapes: Shapes = SHAPES, steady: bool = False
) -> tuple[list[Any], list[list[Any]]]:
    """Weights, and gradients for every step, at least 0.05 away from zero, where signs and thresholds
    jump. `steady`: with the signs of the first.
    """
    rng = np.random.default_rng(seed)

    def arrays() -> list[np.ndarray]:
        found = [rng.standard_normal(shape) for shape in shapes]
        return [np.asarray(a + np.where(a >= 0, 0.05, -0.05)) for a in found]

    weights, gradients = arrays(), [arrays() for _ in range(steps)]
    if steady:
        gradients = [list(map(np.copysign, drawn, gradients[0])) for drawn in gradients]
    return weights, gradients


def bend(gradients: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
    """The gradients of the loss Σ g · (w + 0.1 w³): another at every point, and of one sign everywhere."""
    return [g * (1 + 0.3 * w**2) for g, w in zip(gradients, weights, strict=True)]


def judged(
    case: Case,
    link: LinkCase | None,
    weights: Sequence[Any],
    gradients: Sequence[Any],
    estimates: Sequence[Any] = (),
    rates: Sequence[float] = (),
) -> tuple[list[Any], list[Any]]:
    """The weights after all gradients, and those to evaluate, by the judge alone."""
    judge, memory = case.judged(weights), {}
    numbers = link.numbers if link else {}
    for step, drawn in enumerate(gradients, 1):
        if rates:
            judge.rate(rates[step - 1])
        if case.estimates and step % case.estimates == 1:
            judge.estimate(estimates[step - 1])
        at = links.Moment(step, judge.numbers["lr"], drawn, list(judge.weights), judge.metric, memory)
        if link and link.ascent:
            at.raw = bend(drawn, at.old)
            at.raw = bend(drawn, link.ascent(at.raw, at, **numbers))
        judge.step(link.before(list(at.raw), at, **numbers) if link and link.before else at.raw)
        now = list(judge.weights)
        if link and link.between:
            directions = [(old - new) / at.lr for old, new in zip(at.old, now, strict=True)]
            steps = link.between(directions, at, **numbers)
            now = [old - at.lr * u for old, u in zip(at.old, steps, strict=True)]
        if link and link.after:
            now = link.after(now, at, **numbers)
        if link and (link.between or link.after):
            for i, (found, held) in enumerate(zip(now, judge.weights, strict=True)):
                judge.add(i, found - held)
    evaluated = link.evaluation(at) if link and link.evaluation else judge.evaluation()
    return judge.weights, evaluated
