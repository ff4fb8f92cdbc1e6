"""Several starts: known minima, every start against a NumPy loop, counts over validations by hand."""

from __future__ import annotations

import math
from pathlib import Path
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
from downslope.race.candidates import brought
from downslope.strategies.escape import seed_at
from downslope.strategies.restart import check_fresh, redraw
from downslope.train import Training

# A function with a bad local minimum


class Point(nn.Module):
    """w, one number: 1 at first, near the bad minimum, then even between -2 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.w, -2, 2)


BAD, GOOD = sorted(np.roots([4, 0, -4, 0.3]).real, key=lambda w: (w**2 - 1) ** 2 + 0.3 * w)[::-1][1:]
"""Where the slope of (w² - 1)² + 0.3 w is 0 and the curvature is not negative: 0.96 and -1.04."""


def wells(model: nn.Module, _batch: Any) -> Tensor:
    return (model.w**2 - 1) ** 2 + 0.3 * model.w


def slope(w: float) -> float:
    return 4 * w * (w * w - 1) + 0.3


def point(*chosen: st.Strategy, steps: int = 90, lr: Any = 0.05, seed: int = 0, observe: int = 5) -> Training:
    part = (torch.zeros(4, 1), torch.zeros(4, 1))
    recipe = ds.Recipe(ds.sgd(lr=lr), steps, 4, strategies=chosen, observe=observe)
    task = ds.Task(model=Point, train=part, valid=part, loss=wells, metric=None, recipe=recipe)
    return Training(task, seed=seed)


def path(state: Training) -> list[float]:
    """w after every update, behind the first one before it."""
    found = [float(state.model.w.detach())]
    state.advance(on_step=lambda _: found.append(float(state.model.w.detach())))
    return found


def starts(state: Training) -> list[int]:
    return [step for step, _ in state.company.data()["restart"]["begun"]]


def fresh(seed: int, step: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(seed, step))
        return float(torch.empty((), dtype=torch.float64).uniform_(-2, 2))


def moved(seed: int, step: int, radius: float) -> float:
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    cv.perturb([w], radius, seed=seed_at(seed, step))
    return float(w.detach())


def test_the_two_minima_are_what_the_page_says() -> None:
    assert (round(BAD, 2), round(GOOD, 2)) == (0.96, -1.04)
    assert path(point())[-1] == pytest.approx(BAD, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_every_start_is_a_training_of_its_own_and_the_best_ends_it(seed: int) -> None:
    """Starts at updates 30 and 60, each with the whole of a linear schedule, against a loop by hand."""
    state = point(st.restart(at="30 steps"), lr=ds.linear(0.1, steps="100 %"), seed=seed)
    found, expected, ends = path(state), [], []
    for begun in (0, 30, 60):
        w = fresh(seed, begun) if begun else 1.0
        seen = []
        for i in range(30):
            w -= 0.1 * (1 - i / 30) * slope(w)
            seen.append(w)
        expected += seen
        ends += [((v**2 - 1) ** 2 + 0.3 * v, v) for v in seen[4::5]]
    np.testing.assert_allclose(found[1:], expected, rtol=0, atol=1e-12)
    assert starts(state) == [0, 30, 60]
    assert state.finish()
    assert float(state.model.w.detach()) == pytest.approx(min(ends)[1], abs=1e-7)
    if min(fresh(seed, 30), fresh(seed, 60)) < 0.07:  # left of the hill between the two
        assert float(state.model.w.detach()) == pytest.approx(GOOD, abs=2e-3)


def test_the_seeds_of_that_test_hold_both_cases() -> None:
    left = [min(fresh(seed, 30), fresh(seed, 60)) < 0.07 for seed in range(6)]
    assert {*left} == {True, False}


@pytest.mark.parametrize("seed", range(3))
def test_from_the_ball_it_hops_from_the_best_weights_so_far(seed: int) -> None:
    """Weights are judged every fifth update; the next start is the best of those, moved."""
    state = point(st.restart(at="30 steps", starts=3, by="ball", radius=1.5), seed=seed)
    found, judged, expected, w = path(state), [], [], 1.0
    for begun in (0, 30, 60):
        if begun:
            w = min(judged)[1] + moved(seed, begun, 1.5)
        for i in range(30):
            w -= 0.05 * slope(w)
            expected.append(w)
            judged += [((w**2 - 1) ** 2 + 0.3 * w, w)] * (i % 5 == 4)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-12, atol=1e-12)


# When


def test_on_a_plateau_it_counts_the_validations_of_each_start() -> None:
    """At a rate of 0 nothing gets better: three waits of five updates behind the first validation."""
    state = point(st.restart(patience=3, starts=4), lr=0)
    found = path(state)
    assert starts(state) == [0, 20, 40, 60]
    said = told(point(st.restart(patience=3, starts=4), lr=0))
    assert [(note["step"], note["facts"]["start"]) for note in said] == [(20, 2), (40, 3), (60, 4)]
    best = [(found[step] ** 2 - 1) ** 2 + 0.3 * found[step] for step in (20, 40, 60)]
    assert [note["facts"]["best loss before"] for note in said] == pytest.approx(best, rel=1e-12)
    assert {note["why"] for note in said} == {"validations got no better"}
    assert [i for i in range(1, 91) if found[i] != found[i - 1]] == [21, 41, 61]


@pytest.mark.parametrize(("steps", "begun"), [(35, [0, 20]), (34, [0]), (56, [0, 20, 40])])
def test_no_start_begins_that_has_fewer_updates_than_were_waited(steps: int, begun: list[int]) -> None:
    state = point(st.restart(patience=3, starts=9), lr=0, steps=steps)
    state.advance()
    assert starts(state) == begun


def test_a_better_validation_by_min_delta_is_waited_for() -> None:
    """Down to the bad minimum: gains are counted by hand."""
    state = point(st.restart(patience=2, starts=2, min_delta=1e-3), lr=0.01)
    found = path(point(lr=0.01))
    best, wait, due = math.inf, 0, 0
    for step in range(5, 91, 5):
        value = (found[step] ** 2 - 1) ** 2 + 0.3 * found[step]
        best, wait = (value, 0) if value < best - 1e-3 else (best, wait + 1)
        if wait == 2:
            due = step
            break
    assert 0 < due < 60
    state.advance()
    assert starts(state) == [0, due]


# What begins anew


def squares() -> ds.Task:
    """Least squares of which every batch is all, so that a start can be trained alone."""
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((32, 3)) * [1.0, 3.0, 0.3])
    part = (x, x @ torch.from_numpy(rng.standard_normal((3, 2))))
    recipe = ds.Recipe(ds.sgd(lr=0.01), 60, 32, observe=10)
    made = {"model": lambda: nn.Linear(3, 2).double(), "loss": ds.squared_error}
    return ds.Task(train=part, valid=part, recipe=recipe, **made)


CHAINS = {
    "adam": ds.adam(lr=ds.cosine(0.05, steps="100 %", warmup="10 %")),
    "links": ds.chain(
        ds.clip_norm(ds.linear(2.0, "50 %", end=0.5)), ds.momentum(lr=ds.one_cycle(0.02, steps="100 %"))
    ),
    "sum": ds.lion(lr=ds.step(1e-3, every="20 %") + ds.linear(1e-3, "3 epochs")),
    "averaging": ds.schedule_free_adamw(lr=ds.constant(0.05, warmup=6)),
    "pieces": ds.sgd(lr=ds.constant(0.01).then(ds.linear(0.02, "50 %"), at="50 %")),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_start_is_what_a_training_of_its_length_is_from_its_weights(name: str) -> None:
    """State, counts and schedules, all that one does; durations in updates are shorter in proportion."""
    task = squares()
    recipe = task.recipe.with_(chain=ds.chain(CHAINS[name]), roles={"bias": {"lr": 0.004}})
    short = {"steps": 20, "chain": ds.chain(CHAINS[name])}
    if name == "sum":
        short["chain"] = ds.chain(ds.lion(lr=ds.step(1e-3, every="20 %") + ds.linear(1e-3, "1 epoch")))
    if name == "averaging":
        short["chain"] = ds.chain(ds.schedule_free_adamw(lr=ds.constant(0.05, warmup=2)))
    state = Training(task, recipe.with_(strategies=[st.restart(at=20)]), seed=3)
    for begun in (0, 20, 40):
        alone = Training(task, recipe.with_(**short), seed=3)
        state.advance(begun)
        if begun:
            redrawn(state, alone, seed_at(3, begun))
        for k in range(1, 21):
            alone.advance(k)
            state.advance(begun + k)
            for mine, theirs in zip(state.model.parameters(), alone.model.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        rates = [[group["lr"] for group in one.optimizer.param_groups] for one in (state, alone)]
        assert rates[1] == pytest.approx(rates[0], rel=1e-12)


def redrawn(state: Training, alone: Training, seed: int) -> None:
    """Torch's own first weights, from that seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alone.model.reset_parameters()


def test_a_reacting_schedule_hears_of_its_own_start_only() -> None:
    rate = ds.plateau(0.05, factor=0.5, patience=1)
    state = point(st.restart(at=45, starts=2, by="ball", radius=1e-6), lr=rate, observe=5)
    rates: list[float | None] = []
    state.advance(on_step=lambda attempt: rates.append(attempt.lr))
    assert rates[0] == rates[45] == 0.05
    assert min(rates[:45]) < 0.05, "it must have been cut before"


# First weights


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU()),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GroupNorm(3, 3)),
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "embedding": lambda: nn.Embedding(5, 3, padding_idx=0),
}


def setting(model: nn.Module, **more: Any) -> st.Setting:
    given = {"rates": {}, "batches": lambda n: [], "classes": None, "better": False, "loss": ds.cross_entropy}
    return st.Setting(model=model, seed=0, teacher=lambda _: model, **given, **more)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_drawn_as_torchs_constructors_draw_them(name: str) -> None:
    """What two constructions make unlike is drawn, and as wide; what they make alike is put back."""
    torch.manual_seed(0)
    first, other, model = (LAYERS[name]() for _ in range(3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    generator = torch.get_rng_state()
    redraw(setting(model), 7)
    assert torch.equal(torch.get_rng_state(), generator)
    now = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in first.state_dict().items():
        if torch.equal(value, other.state_dict()[key]):
            assert torch.equal(now[key], before[key]), key
        else:
            assert not torch.equal(now[key], before[key])
            assert 0.4 < now[key].abs().max() / value.abs().max() < 2.5
    redraw(setting(model), 7)
    assert all(torch.equal(value, now[key]) for key, value in model.state_dict().items())
    redraw(setting(model), 8)
    assert any(not torch.equal(value, now[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ds.tasks())
def test_every_task_of_the_catalogue_can_begin_anew(name: str) -> None:
    check_fresh(ds.task(name).model())


def test_what_is_frozen_keeps_its_bits() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    for layer in model[:2]:
        layer.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model(torch.randn(8, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    redraw(setting(model), 1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.weight"}


def test_start_is_heard_again_and_batchnorm_begins_anew() -> None:
    chosen = [st.start(method="orthogonal", zero_residual=True), st.restart(at=12, starts=2)]
    state = Training(problem.residual(), problem.recipe(*chosen).with_(lr=0.0), seed=1)
    first = state.model.stem.weight.detach().clone()
    state.advance(12)
    assert torch.equal(state.model.stem.weight, first)
    assert int(state.model.blocks[0].branch[1].num_batches_tracked) == 12
    state.advance(13)
    again = state.model.stem.weight.detach()
    assert not torch.allclose(again, first)
    assert torch.allclose(again @ again.T, torch.eye(16) * (again @ again.T)[0, 0], atol=1e-5)
    assert not state.model.blocks[0].branch[1].weight.any(), "the last layer of a branch is at zero"
    assert int(state.model.blocks[0].branch[1].num_batches_tracked) == 1


# Saved and resumed


@pytest.mark.parametrize(
    "more",
    [
        {"at": 6},
        {"patience": 1, "min_delta": 1.0, "starts": 5},
        {"patience": 1, "min_delta": 1.0, "by": "ball", "on": "metric"},
    ],
    ids=["at", "plateau", "ball"],
)
def test_it_goes_on_to_the_bit_from_every_step(more: dict[str, Any], tmp_path: Path) -> None:
    chosen = [st.start(lsuv=True), st.micro(items=6), st.restart(**more)]
    recipe = problem.recipe(*chosen, steps=20).with_(observe=2)
    straight = Training(problem.residual(), recipe, seed=2)
    straight.advance()
    assert len(starts(straight)) >= 3
    stopped = Training(problem.residual(), recipe, seed=2)
    for step in range(1, 20):
        stopped.advance(step)
        sha = stopped.save(tmp_path / str(step))
        stopped = Training.load(tmp_path / str(step), problem.residual(), recipe, sha)
    stopped.advance()
    assert not unequal(straight, stopped)
    assert stopped.finish()
    straight.finish()
    assert not unequal(straight, stopped)


# What cannot be


class Bare(nn.Module):
    """A parameter that nothing draws anew."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.scale


@pytest.mark.parametrize(
    ("others", "given", "said"),
    [
        ([st.stop()], {}, r"does not go with \[stop\], which would end the training at a new start"),
        ([st.average()], {}, r"does not go with \[average\], which would mix the weights of one start with"),
        ([st.switch(at=5)], {}, r"does not go with \[switch\], which counts one training"),
        ([st.freeze(every=3)], {}, r"does not go with \[freeze\], which is for weights that were trained"),
        ([st.normalisation(to="frozen")], {}, r"\[normalisation\], whose frozen statistics are those of a"),
    ],
)
def test_what_it_does_not_combine_with_is_said(
    others: list[st.Strategy], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        problem.recipe(*others, st.restart(**given))
    if others[0].name in ("freeze", "normalisation"):
        Training(problem.residual(), problem.recipe(*others, st.restart(by="ball"))).advance(2)


def test_starts_that_begin_from_the_best_leave_what_is_trained_alone() -> None:
    problem.recipe(st.normalisation(to="group", groups=4), st.restart())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "fersh"}, r"by is one of fresh, ball, got 'fersh'\. Did you mean 'fresh'\?"),
        ({"on": "los"}, "on is one of loss, metric, got 'los'"),
        ({"at": "platau"}, r'got \'platau\'\. .*Or "plateau"\. Did you mean \'plateau\'\?'),
        ({"starts": 1}, "starts are at least 2, the first one included, got 1"),
        ({"radius": 0}, "radius must be above 0, got 0"),
        ({"patience": 0}, "patience is a number of validations, at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        st.restart.from_data(given)
    assert caught.value.key == tuple(given)


def test_what_the_training_cannot_do_is_said_before_it_begins() -> None:
    with pytest.raises(BadInput, match=r"at = '50 %' is 45 updates: 3 starts do not fit into the 90"):
        point(st.restart(at="50 %"))
    with pytest.raises(
        BadInput, match=r"the model \(Bare\) has none that would do: give it one, or take by ="
    ):
        Training(problem.residual(model=Bare), problem.recipe(st.restart()))
    Training(problem.residual(model=Bare), problem.recipe(st.restart(by="ball"))).advance(1)

    def normed() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))

    with pytest.raises(BadInput, match=r"1 \(ParametrizedLinear\) has none that would do"):
        Training(problem.residual(model=normed), problem.recipe(st.restart()))
    task = ds.task("digits-gan")
    with pytest.raises(BadInput, match=r"\[restart\] is about one loss and one optimizer"):
        Training(task, task.recipe.with_(strategies=[st.restart()]))


def test_a_race_refuses_it() -> None:
    with pytest.raises(
        BadInput, match=r"\[restart\], which a race cannot judge: its starts are chosen by the"
    ):
        brought({"mine": problem.recipe(st.restart())})
