"""What evaluations see, and what goes by them: averages, early stopping, rates that react."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import problem
from torch import Tensor, nn

import downslope as ds
from downslope import strategies as st
from downslope.train import Attempt, Evaluation, Training, order

STEPS, OBSERVE, ITEMS = 40, 4, problem.ITEMS
Weights = dict[str, Tensor]


def copied(model: nn.Module, dtype: torch.dtype | None = None) -> Weights:
    return {name: value.detach().clone().to(dtype) for name, value in model.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Averages


def trail(state: Training, steps: int) -> list[Weights]:
    """Train, and the weights after each update, in float64."""
    found: list[Weights] = []
    state.advance(steps, lambda _: found.append(copied(state.model, torch.float64)))
    return found


def mean(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(weights)).mean(0)


def decayed(weights: Sequence[Tensor], decay: float) -> Tensor:
    average = weights[0]
    for weight in weights[1:]:
        average = decay * average + (1 - decay) * weight
    return average


def polynomial(weights: Sequence[Tensor], eta: int) -> Tensor:
    """Shamir and Zhang, section 4: (1 − (η + 1)/(t + η))·before + (η + 1)/(t + η)·now, t from 1."""
    average = weights[0]
    for t, weight in enumerate(weights[1:], 2):
        share = (eta + 1) / (t + eta)
        average = (1 - share) * average + share * weight
    return average


@pytest.mark.parametrize(
    ("strategy", "truth"),
    [
        (st.average(decay=0.9), lambda seen: decayed(seen, 0.9)),
        (st.average(decay=0.7, every=3, start=6), lambda seen: decayed(seen[5::3], 0.7)),
        (st.average(kind="swa", start="50 %", every="2 steps"), lambda seen: mean(seen[19::2])),
        (st.average(kind="tail", fraction=0.25), lambda seen: mean(seen[30:])),
        (st.average(kind="polynomial_average", eta=3), lambda seen: polynomial(seen, 3)),
    ],
    ids=["ema", "ema-every", "swa", "tail", "polynomial"],
)
def test_evaluation_sees_the_average_and_training_does_not(strategy: st.Strategy, truth: Any) -> None:
    state = Training(problem.plain(), problem.recipe(strategy, steps=STEPS), seed=1)
    bare = Training(problem.plain(), problem.recipe(steps=STEPS), seed=1)
    seen = trail(state, STEPS)
    bare.advance()
    live = copied(state.model)
    assert equal(live, copied(bare.model)), "the average only watches"

    expected = {name: truth([weights[name] for weights in seen]) for name in seen[0]}
    bare.model.load_state_dict(expected)
    by_hand, evaluated = bare.evaluate(), state.evaluate()
    assert evaluated.loss == pytest.approx(by_hand.loss, rel=1e-12)
    assert evaluated.metric == by_hand.metric
    assert equal(copied(state.model), live)

    assert not state.finish(), "its last weights are the ones that count"
    for name, value in state.model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-12)
    assert state.evaluate() == evaluated


def test_batchnorms_statistics_are_measured_anew_for_the_averaged_weights() -> None:
    """NumPy's forward pass of the averaged model over the first 64 batches, which are not all there are."""
    batch = 2
    state = Training(problem.residual(), problem.recipe(st.average(decay=0.8), batch_size=batch), seed=1)
    assert state.steps_per_epoch > 64
    seen = trail(state, 10)
    before = copied(state.model)
    with state._evaluating():
        found = {name: value.double().numpy() for name, value in copied(state.model).items()}
    assert equal(copied(state.model), before)

    w = {name: decayed([weights[name] for weights in seen], 0.8).numpy() for name in seen[0]}
    chosen = order(state.samples, 1, 0)[: 64 * batch]
    pictures = state.task.train[0][chosen].double().flatten(1).numpy().reshape(64, batch, 64)
    h = pictures @ w["stem.weight"].T + w["stem.bias"]
    for block in ("blocks.0.branch", "blocks.1.branch"):
        z = h @ w[f"{block}.0.weight"].T + w[f"{block}.0.bias"]
        assert np.allclose(found[f"{block}.1.running_mean"], z.mean((0, 1)), rtol=0, atol=1e-5)
        variance = z.var(1, ddof=1).mean(0)
        assert np.allclose(found[f"{block}.1.running_var"], variance, rtol=1e-4, atol=1e-6)
        scaled = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
        h = h + np.maximum(scaled * w[f"{block}.1.weight"] + w[f"{block}.1.bias"], 0)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_other_policies_take_the_statistics_that_there_are(buffers: str) -> None:
    state = Training(problem.residual(), problem.recipe(st.average(decay=0.8, buffers=buffers)), seed=1)
    seen = trail(state, 12)
    with state._evaluating():
        found = copied(state.model)
    name = "blocks.1.branch.1.running_var"
    series = [weights[name] for weights in seen]
    expected = series[-1] if buffers == "copy" else decayed(series, 0.8)
    assert torch.allclose(found[name].double(), expected, rtol=1e-5, atol=1e-8)


def test_an_average_beside_pieces_is_that_of_updates_not_of_pieces() -> None:
    whole, pieces = (
        Training(problem.plain(), problem.recipe(st.average(decay=0.8), *more), seed=1)
        for more in ([], [st.micro(items=3)])
    )
    for state in (whole, pieces):
        state.advance()
    assert pieces.evaluate().loss == pytest.approx(whole.evaluate().loss, rel=1e-10)


# Early stopping


def turning(*strategies: Any, **changes: Any) -> ds.Recipe:
    """A training whose validations get worse again."""
    chain = ds.chain(ds.adamw(lr=0.05, weight_decay=0.0))
    given = {"steps": 400, "chain": chain, "observe": OBSERVE, **changes}
    return problem.recipe(*strategies, **given)


def validations(recipe: ds.Recipe, upto: int) -> tuple[list[Evaluation], list[Weights]]:
    """Of the same training without stop: what was seen at each validation, and the weights."""
    state = Training(problem.plain(), recipe.with_(strategies=()), seed=1)
    seen, weights = [], []
    for step in range(OBSERVE, upto + 1, OBSERVE):
        state.advance(step)
        seen.append(state.evaluate())
        weights.append(copied(state.model))
    return seen, weights


def counted(values: Sequence[float], patience: int, delta: float = 0.0, start: int = 0) -> tuple[int, int]:
    """The validations, from 1, after which it is over, and which of them was the best."""
    best, at, wait = float("inf"), 0, 0
    for place, value in enumerate(values, 1):
        if value < best - delta:
            best, at, wait = value, place, 0
        elif place * OBSERVE >= start:
            wait += 1
        if wait == patience:
            return place, at
    raise AssertionError("it was to stop")


@pytest.mark.parametrize(
    ("patience", "delta", "warmup", "on"),
    [
        (1, 0.0, 0, "loss"),
        (4, 0.0, 0, "loss"),
        (3, 0.02, 0, "loss"),
        (1, 0.0, 100, "loss"),
        (3, 0.0, 0, "metric"),
    ],
)
def test_it_stops_where_a_count_over_the_validations_says(
    patience: int, delta: float, warmup: int, on: str, tmp_path: Path
) -> None:
    strategy = st.stop(patience=patience, min_delta=delta, warmup=warmup, on=on)
    recipe = turning(strategy)
    run = ds.train(problem.plain(), recipe, out=tmp_path / "run", seed=1, quiet=True)
    seen, weights = validations(recipe, 240)
    values = [one.loss if on == "loss" else -one.metric for one in seen]
    end, best = counted(values, patience, delta, warmup)
    assert OBSERVE * end == max(run.losses) + 1 < 240
    assert best < end
    assert equal(copied(run.model), weights[best - 1])
    assert run.valid == seen[best - 1]
    (said,) = (event for event in run.events if event["kind"] == "strategy")
    assert (said["by"], said["did"], said["step"]) == ("stop", "stop", OBSERVE * end)
    value = seen[best - 1].loss if on == "loss" else seen[best - 1].metric
    assert said["facts"] == {f"best {on}": value, "at update": OBSERVE * best}


def test_it_is_done_where_it_stops_and_trains_no_further() -> None:
    state = Training(problem.plain(), turning(st.stop(patience=2)), seed=1)
    state.advance()
    assert state.done
    assert state.step < state.steps
    before = state.fields()
    state.advance()
    assert state.fields() == before
    assert state.finish()


def test_without_restore_the_last_weights_stay() -> None:
    state = Training(problem.plain(), turning(st.stop(patience=2, restore=False)), seed=1)
    state.advance()
    last = copied(state.model)
    assert not state.finish()
    assert equal(copied(state.model), last)
    assert not state.company.tensors()


def test_it_goes_on_waiting_after_a_resume(tmp_path: Path) -> None:
    recipe = turning(st.stop(patience=4))
    straight = Training(problem.plain(), recipe, seed=1)
    straight.advance()
    state = Training(problem.plain(), recipe, seed=1)
    state.advance(straight.step - 2 * OBSERVE + 1)
    assert state.company.data()["stop"]["wait"] == 2
    resumed = Training.load(tmp_path / "x", problem.plain(), recipe, state.save(tmp_path / "x"))
    resumed.advance()
    assert resumed.done
    assert resumed.fields() == straight.fields()
    finished = Training.load(tmp_path / "y", problem.plain(), recipe, resumed.save(tmp_path / "y"))
    assert finished.done
    assert finished.finish()
    straight.finish()
    assert equal(copied(finished.model), copied(straight.model))


def test_the_best_of_an_averaged_training_are_averaged_weights() -> None:
    state = Training(problem.plain(), turning(st.average(decay=0.9), st.stop(patience=2)), seed=1)
    losses: list[tuple[float, Weights]] = []

    def look(_: Attempt) -> None:
        if state.step % OBSERVE == 0:
            with state._evaluating():
                losses.append((state.evaluate().loss, copied(state.model)))

    state.advance(on_step=look)
    assert state.finish()
    loss, weights = min(losses, key=lambda one: one[0])
    assert equal(copied(state.model), weights)
    assert state.evaluate().loss == pytest.approx(loss, rel=1e-12)


# A rate that reacts


def plateaued(**changes: Any) -> ds.Recipe:
    rate = ds.plateau(0.05, factor=0.5, patience=1, threshold=0.01, warmup=8)
    return turning(chain=ds.chain(ds.adamw(lr=rate)), steps=120, **changes)


def test_a_plateau_cuts_where_torchs_scheduler_would() -> None:
    state = Training(problem.plain(), plateaued(), seed=1)
    rates: list[float | None] = []
    seen: list[float] = []

    def look(attempt: Attempt) -> None:
        rates.append(attempt.lr)
        if state.step % OBSERVE == 0:
            seen.append(state.evaluate().loss)

    state.advance(on_step=look)
    assert [value for _, value in state.optimizer.seen] == seen

    weight = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.05)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs, factor=0.5, patience=1, threshold=0.01, eps=0
    )
    expected = []
    for step in range(120):
        expected.append(theirs.param_groups[0]["lr"])
        if (step + 1) % OBSERVE == 0 and step + 1 > 8:
            scheduler.step(seen[(step + 1) // OBSERVE - 1])
    assert rates[8:] == expected[8:]
    assert len(set(expected)) > 3, "it must cut to tell"


def test_a_plateau_goes_on_after_a_resume(tmp_path: Path) -> None:
    straight, state = (Training(problem.plain(), plateaued(), seed=1) for _ in range(2))
    straight.advance()
    state.advance(41)
    resumed = Training.load(tmp_path / "x", problem.plain(), sha=state.save(tmp_path / "x"))
    resumed.advance()
    assert resumed.fields() == straight.fields()


def test_observe_says_how_often_and_nobody_validates_where_nobody_asks() -> None:
    calls: list[bool] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(model.training)
        return ds.cross_entropy(model, batch)

    task = problem.plain(loss=loss, metric=ds.accuracy)
    for strategies, observe, expected in (
        ([], 4, 0),
        ([st.stop(patience=99)], 4, 6),
        ([st.stop(patience=99)], "1 epoch", 2),
    ):
        calls.clear()
        Training(task, problem.recipe(*strategies, observe=observe), seed=1).advance()
        assert calls.count(False) == expected, "24 updates, 12 an epoch; the validation part is one batch"
