"""Escaping: saddles whose curvature and minimum are known, dense Hessians, trainings that nothing moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategies import problem
from strategies.test_laws import told, unequal
from torch import Tensor, nn

import downslope as ds
from downslope import curvature as cv
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.strategies.escape import seed_at
from downslope.tasks import take
from downslope.train import Training, order

EVERYWHERE = {"gradient": 1e9, "curvature": 1e-6}
"""So that any negative curvature counts as a saddle's."""


def weights(state: Training) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()]).clone()


def moves(state: Training) -> list[dict[str, Any]]:
    return state.company.data().get("escape", {}).get("moves", [])


def trail(state: Training, until: int | None = None) -> list[Tensor]:
    found = [weights(state)]
    state.advance(until, lambda _: found.append(weights(state)))
    return found


# Known saddles


MATRIX = np.random.default_rng(0).normal(size=(5, 4))
LEFT, SINGULAR, RIGHT = np.linalg.svd(MATRIX, full_matrices=False)


class Factors(nn.Module):
    """x → V Uᵀ x, two columns each, from the best factors of a rank that is below two: a saddle."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        known = np.sqrt(SINGULAR[:2]) * (np.arange(2) < rank)
        self.u = nn.Parameter(torch.from_numpy(LEFT[:, :2] * known))
        self.v = nn.Parameter(torch.from_numpy(RIGHT[:2].T * known))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.u @ self.v.T


def factorisation(*chosen: st.Strategy, rank: int = 0, chain: Any = None) -> Training:
    """|A - U Vᵀ|² / 2 by gradient descent: every batch is all five rows."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum() / 2

    part = (torch.eye(5, dtype=torch.float64), torch.from_numpy(MATRIX))
    recipe = ds.Recipe(chain or ds.sgd(lr=0.1), 800, 5, strategies=chosen)
    made = {"model": lambda: Factors(rank), "loss": loss, "metric": None}
    return Training(ds.Task(train=part, valid=part, recipe=recipe, **made), seed=1)


def test_gradient_descent_stays_at_zero_for_ever() -> None:
    state = factorisation()
    state.advance()
    assert not weights(state).any()
    assert state.evaluate().loss == pytest.approx((SINGULAR**2).sum() / 2, rel=1e-14)


@pytest.mark.parametrize(
    ("rank", "chain", "more"),
    [
        (0, None, {}),
        (1, None, {}),
        (0, ds.adam(lr=0.01), {}),
        (0, None, {"by": "ball", "radius": 1e-3}),
        (1, None, {"by": "ball", "radius": 1e-3}),
    ],
    ids=["zero", "rank one", "adam", "ball", "rank one, ball"],
)
def test_with_escape_it_comes_down_to_the_minimum_of_eckart_and_young(
    rank: int, chain: Any, more: Any
) -> None:
    """The least eigenvalue at the saddle of a rank is minus the first singular value that it leaves."""
    state = factorisation(st.escape(every=20, **more), rank=rank, chain=chain)
    state.advance()
    assert state.evaluate().loss == pytest.approx((SINGULAR[2:] ** 2).sum() / 2, rel=1e-6)
    first, longest = moves(state)[0], more.get("radius", 0.1) * (1 + 1e-12)
    assert first["step"] == 20
    assert first["curvature"] == pytest.approx(-SINGULAR[rank], rel=1e-2)
    assert 0 < max(move["distance"] for move in moves(state)) <= longest


class Point(nn.Module):
    """w, in two dimensions, from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def bowl(model: nn.Module, _batch: Any) -> Tensor:
    """x² − y² + y⁴: a saddle of curvature −2 at 0, minima of −1/4."""
    x, y = model.w
    return x**2 - y**2 + y**4


def point(*chosen: st.Strategy, loss: Any = bowl, steps: int = 12, lr: float = 0.1) -> Training:
    part = (torch.zeros(4, 1), torch.zeros(4, 1))
    recipe = ds.Recipe(ds.sgd(lr=lr), steps, 2, strategies=chosen)
    return Training(
        ds.Task(model=Point, train=part, valid=part, loss=loss, metric=None, recipe=recipe), seed=1
    )


@pytest.mark.parametrize(("threshold", "moved"), [(1.9, True), (2.1, False)])
def test_the_curvature_must_lie_below_minus_the_threshold(threshold: float, moved: bool) -> None:
    state = point(st.escape(every=4, curvature=threshold))
    state.advance(4)
    assert bool(moves(state)) == moved == bool(weights(state).any())


@pytest.mark.parametrize(("limit", "moved"), [(0.51, True), (0.49, False)])
def test_the_gradient_must_lie_within_its_limit(limit: float, moved: bool) -> None:
    """A slope of 1/2 along x, where nothing moves at a rate of 0."""
    state = point(st.escape(every=4, gradient=limit), loss=lambda m, b: bowl(m, b) + m.w[0] / 2, lr=0)
    state.advance(4)
    assert bool(moves(state)) == moved


def test_it_looks_every_so_often_and_not_behind_the_last_update() -> None:
    state = point(st.escape(every=4, by="ball", radius=1e-9), lr=0.0)
    path = trail(state)
    assert [move["step"] for move in moves(state)] == [4, 8]
    assert [place for place in range(1, 13) if (path[place] != path[place - 1]).any()] == [5, 9]
    assert moves(point_at("25 %")) == moves(point_at(3))
    said = told(point(st.escape(every=4, by="ball", radius=1e-9), lr=0.0))
    assert [{"step": note["step"], **note["facts"]} for note in said] == moves(state)


def point_at(every: Any) -> Training:
    state = point(st.escape(every=every))
    state.advance()
    return state


def test_where_the_curvature_is_no_number_nothing_moves() -> None:
    """|w| has the gradient 0 at 0, says torch, and the curvature NaN."""
    state = point(st.escape(every=1), loss=lambda m, _: m.w.norm())
    state.advance()
    assert not moves(state)


# What is drawn


def test_the_vector_from_the_ball_depends_on_seed_and_step_alone() -> None:
    def moved(steps: list[int]) -> list[Tensor]:
        state = point(st.escape(every=4, by="ball", radius=0.5, **EVERYWHERE), lr=0.0)
        path = trail(state)
        return [path[step + 1] - path[step] for step in steps]

    found = moved([4, 8])
    for step, vector in zip([4, 8], found, strict=True):
        w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        cv.perturb([w], 0.5, seed=seed_at(1, step))
        assert torch.allclose(w.detach(), vector, rtol=0, atol=1e-15)
    assert not torch.equal(*found)
    assert len({seed_at(seed, step) for seed in range(50) for step in range(50)}) == 2500


# On networks


def dense(state: Training, count: int, smoothing: float) -> tuple[float, float]:
    """Gradient norm and least eigenvalue of the mean loss over the first batches, by dense float64."""
    chosen = order(state.samples, 1, 0)[: count * problem.ITEMS]
    inputs, targets = take(state.task.train, chosen)
    wanted = nn.functional.one_hot(targets, 10).double() * (1 - smoothing) + smoothing / 10
    shapes = {name: p.shape for name, p in state.model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        own = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = torch.func.functional_call(state.model, own, (inputs,))
        return -(wanted * logits.log_softmax(1)).sum(1).mean()

    at = weights(state)
    gradient = torch.autograd.functional.jacobian(loss, at)
    hessian = torch.autograd.functional.hessian(loss, at)
    return float(gradient.norm()), float(torch.linalg.eigvalsh(hessian)[0])


@pytest.mark.parametrize(
    ("others", "smoothing"),
    [([], 0.0), ([st.micro(items=5)], 0.0), ([st.smoothing(share=0.2)], 0.2)],
    ids=["whole", "pieces", "smoothed"],
)
def test_its_curvature_is_that_of_the_dense_hessian(others: list[st.Strategy], smoothing: float) -> None:
    """Of the fixed batches, as they are trained on, in whatever pieces."""
    looking = st.escape(every=7, batches=3, products=200, by="ball", radius=1e-12, **EVERYWHERE)
    state = Training(problem.plain(), problem.recipe(*others, looking), seed=1)
    state.advance(7)
    (move,) = moves(state)
    gradient, least = dense(state, 3, smoothing)
    assert least < -0.01, "the case says something"
    assert move["gradient"] == pytest.approx(gradient, rel=1e-7)  # soft targets are float32
    assert least - 1e-9 <= move["curvature"] <= 0.99 * least


def test_a_step_along_the_direction_lowers_the_loss_of_the_fixed_batches() -> None:
    looking = st.escape(every=7, batches=3, radius=0.3, **EVERYWHERE)
    state = Training(problem.plain(), problem.recipe(looking), seed=1)
    bare = Training(problem.plain(), problem.recipe(), seed=1)
    for one in (state, bare):
        one.advance(7)
    batch = take(state.task.train, order(state.samples, 1, 0)[: 3 * problem.ITEMS])
    after, before = (ds.cross_entropy(one.model, batch).item() for one in (state, bare))
    assert after < before
    moved = weights(state) - weights(bare)
    assert moved.norm().item() == pytest.approx(moves(state)[0]["distance"], rel=1e-9)
    assert 0 < moves(state)[0]["distance"] <= 0.3 + 1e-9


def test_a_convex_problem_is_never_moved() -> None:
    task = ds.task("cancer-logistic")
    state, bare = (
        Training(task, task.recipe.with_(strategies=chosen), seed=1)
        for chosen in ([st.escape(every=5, **EVERYWHERE)], [])
    )
    for one in (state, bare):
        one.advance(30)
    assert not unequal(state, bare)


@pytest.mark.parametrize("more", [{"gradient": 1e-12}, {"gradient": 1e9, "curvature": 1e9}])
def test_a_look_leaves_no_trace(more: dict[str, float]) -> None:
    """On BatchNorm's statistics, dropout's generator, the optimizer, or what comes of mixing."""
    mixed = [st.mix(mixup=0.4, cutmix=1.0), st.dropout(rate=0.3), st.micro(items=6)]
    state, bare = (
        Training(problem.residual(), problem.recipe(*mixed, *chosen), seed=1)
        for chosen in ([st.escape(every=2, batches=2, products=4, **more)], [])
    )
    for one in (state, bare):
        one.advance()
    assert not unequal(state, bare)


def test_with_dropout_and_mixing_it_looks_at_one_function() -> None:
    """Two looks at the same weights see the same gradient, whatever was drawn between them."""
    mixed = [st.mix(mixup=0.4), st.dropout(rate=0.5)]
    looking = st.escape(every=3, batches=2, products=60, by="ball", radius=1e-12, **EVERYWHERE)
    recipe = problem.recipe(*mixed, looking).with_(chain=ds.sgd(lr=0.0))
    state = Training(problem.residual(), recipe, seed=1)
    state.advance()
    gradients = [move["gradient"] for move in moves(state)]
    assert len(gradients) == 7
    assert gradients == pytest.approx([gradients[0]] * 7, rel=1e-5)


# What rules keep of the weights


@pytest.mark.parametrize(
    ("chain", "kept"),
    [
        (ds.schedule_free_sgd(lr=0.1), {"z"}),
        (ds.schedule_free_adamw(lr=1e-3), {"z"}),
        (ds.chain(ds.adamw(lr=1e-3), ds.lookahead(every=3)), {"slow"}),
        (ds.asgd(lr=0.01), {"average"}),
        (ds.prodigy(), {"start"}),
        (ds.adamw(lr=1e-3), set()),
        (ds.ftrl(lr=0.1), set()),
        (ds.rprop(lr=1e-3), set()),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_copies_of_the_weights_move_along_and_nothing_else_does(chain: Any, kept: set[str]) -> None:
    recipe = problem.recipe().with_(chain=chain)
    looking = st.escape(every=7, batches=2, by="ball", radius=0.2, **EVERYWHERE)
    state, bare = (
        Training(problem.plain(), recipe.with_(strategies=chosen), seed=1) for chosen in ([looking], [])
    )
    for one in (state, bare):
        one.advance(7)
    assert len(moves(state)) == 1
    pairs = zip(state.model.parameters(), bare.model.parameters(), strict=True)
    for mine, theirs in pairs:
        moved = (mine - theirs).detach()
        assert moved.any()
        now, then = state.optimizer.state[mine], bare.optimizer.state[theirs]
        assert {name for name in now if not torch.equal(now[name], then[name])} == kept
        for name in kept:
            assert torch.allclose(now[name] - then[name], moved, rtol=0, atol=1e-15)
    moved = weights(state) - weights(bare)
    with state.optimizer.averaged(), bare.optimizer.averaged():
        assert torch.allclose(weights(state) - weights(bare), moved, rtol=0, atol=1e-13)


# What cannot be


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "bal"}, r"by is one of direction, ball, got 'bal'\. Did you mean 'ball'\?"),
        ({"every": 0}, "every must be above 0, got 0"),
        ({"batches": 0}, "batches must be above 0, got 0"),
        ({"gradient": -1.0}, "gradient must be above 0, got -1"),
        ({"radius": 0}, "radius must be above 0, got 0"),
    ],
)
def test_what_makes_no_sense_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        st.escape.from_data(given)
    assert caught.value.key == tuple(given)


def test_what_it_does_not_combine_with_is_said_before_the_training_begins() -> None:
    paired = r"\[escape\] moves the weights between updates, which lbfgs would take for curvature"
    with pytest.raises(BadInput, match=paired):
        Training(problem.plain(), problem.recipe(st.escape()).with_(chain=ds.lbfgs()))
    with pytest.raises(BadInput, match=paired):
        problem.recipe(st.escape(), st.switch(at=5, to=ds.lbfgs(), match="none"))
    for name, said in [
        ("clicks-deepfm", r"\[escape\] takes second derivatives, and .* row-sparse gradients"),
        ("digits-gan", r"\[escape\] is about one loss and one optimizer"),
    ]:
        task = ds.task(name)
        with pytest.raises(BadInput, match=said):
            Training(task, task.recipe.with_(strategies=[st.escape()]))
