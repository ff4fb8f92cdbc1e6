"""Switching rules: both halves against NumPy loops, the rate by its two definitions, and the way back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import problem
from strategies.test_laws import told, unequal
from torch import nn

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.train import Training

ITEMS, STEPS, AT = 40, 20, 8


def line() -> nn.Module:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 0.3], [0.1, 0.7, -0.4]]))
        model.bias.copy_(torch.tensor([0.2, -0.3]))
    return model


def squares() -> ds.Task:
    """Least squares on data of which every batch is all, so that NumPy can do the same."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((ITEMS, 3)) * [1.0, 3.0, 0.3]
    y = x @ rng.standard_normal((3, 2)) + 0.1 * rng.standard_normal((ITEMS, 2))
    part = (torch.from_numpy(x), torch.from_numpy(y))
    recipe = ds.Recipe(ds.chain(ds.adam(lr=0.05)), STEPS, ITEMS)
    return ds.Task(model=line, train=part, valid=part, loss=ds.squared_error, recipe=recipe)


def recipe(old: Any, to: Any, **more: Any) -> ds.Recipe:
    made = st.switch(**{"at": AT, "to": to, **more})
    return ds.Recipe(ds.chain(old), STEPS, ITEMS, strategies=[made], observe=2)


# In NumPy: rules as their papers print them, on [weight, bias] as one vector


class Judge:
    """Least squares by any of five rules; `slots` are those of the rule that is on."""

    def __init__(self) -> None:
        task, model = squares(), line()
        self.x, self.y = (part.numpy() for part in task.train)
        self.w = np.concatenate([model.weight.detach().numpy().ravel(), model.bias.detach().numpy()])
        self.slots: dict[str, Any] = {}

    def gradient(self) -> np.ndarray:
        weight, bias = self.w[:6].reshape(2, 3), self.w[6:]
        error = 2 * (self.x @ weight.T + bias - self.y) / self.y.size
        return np.concatenate([(error.T @ self.x).ravel(), error.sum(0)])

    def direction(self, rule: str) -> np.ndarray:
        g, s = self.gradient(), self.slots
        s["t"] = s.get("t", 0) + 1
        if rule == "sgd":
            return g
        if rule in ("momentum", "nesterov"):
            s["v"] = 0.8 * s.get("v", 0.0) + g
            return s["v"] if rule == "momentum" else g + 0.8 * s["v"]
        if rule == "lion":
            m = s.get("m", np.zeros_like(g))
            s["m"] = 0.99 * m + 0.01 * g
            return np.sign(0.9 * m + 0.1 * g)
        s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
        s["v"] = 0.999 * s.get("v", 0.0) + 0.001 * g**2
        step = s["m"] / (1 - 0.9 ** s["t"]) / (np.sqrt(s["v"] / (1 - 0.999 ** s["t"])) + 1e-8)
        return step + (0.1 * self.w if rule == "adamw" else 0.0)

    def step(self, rule: str, lr: float) -> np.ndarray:
        moved = -lr * self.direction(rule)
        self.w = self.w + moved
        return moved


PARTS = {
    "sgd": ds.sgd,
    "momentum": lambda lr: ds.momentum(lr=lr, momentum=0.8),
    "nesterov": lambda lr: ds.nesterov(lr=lr, momentum=0.8),
    "lion": ds.lion,
    "adam": ds.adam,
    "adamw": lambda lr: ds.adamw(lr=lr, weight_decay=0.1),
}


def handed_over(old: str, new: str, slots: dict[str, Any]) -> dict[str, Any]:
    """What the page on switching says goes over."""
    if {old, new} <= {"adam", "adamw"} or old == new:
        return slots
    means = {
        "sgd": None,
        "momentum": slots.get("v", 0.0) * 0.2,
        "nesterov": slots.get("v", 0.0) * 0.2,
        "lion": slots.get("m", 0.0) / (1 - 0.99**AT),
    }
    mean = means.get(old, slots.get("m", 0.0) / (1 - 0.9**AT))
    if mean is None or new in ("sgd", "adam", "adamw"):
        return {}
    return {"m": mean} if new == "lion" else {"v": mean / 0.2}


def weights(state: Training) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()]).numpy().copy()


def trail(state: Training) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    state.advance(on_step=lambda _: found.append(weights(state)))
    return found


RATES = {"sgd": 0.02, "momentum": 0.01, "nesterov": 0.01, "lion": 0.01, "adam": 0.05, "adamw": 0.05}


@pytest.mark.parametrize("rewarm", [0, 3])
@pytest.mark.parametrize("match", ["size", "none"])
@pytest.mark.parametrize("new", PARTS)
@pytest.mark.parametrize("old", PARTS)
def test_both_halves_are_what_numpy_makes_of_the_two_rules(
    old: str, new: str, match: str, rewarm: int
) -> None:
    """The second rule's rate falls over what remains, from the rate that makes the first update as long as
    the old rule's last one.
    """
    to = PARTS[new](lr=ds.linear(RATES[new], steps="100 %"))
    made = recipe(PARTS[old](lr=RATES[old]), to, match=match, rewarm=rewarm)
    found = trail(Training(squares(), made))
    judge, expected = Judge(), []
    for _ in range(AT):
        last = judge.step(old, RATES[old])
        expected.append(judge.w)
    judge.slots = handed_over(old, new, judge.slots)
    for k in range(STEPS - AT):
        rate = RATES[new] * (1 - k / (STEPS - AT)) * min(1, (k + 1) / (rewarm + 1))
        if not k:
            peak = {**judge.slots}
            factor = np.linalg.norm(last) / np.linalg.norm(RATES[new] * judge.direction(new))
            judge.slots = peak
        judge.step(new, rate * (factor if match == "size" else 1.0))
        expected.append(judge.w)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_the_first_new_update_is_as_long_as_the_last_old_one_for_any_rule() -> None:
    """Also where state and step are not linear in the rate; for muon's matrices and over several groups."""
    for name in ("schedule_free_sgd", "momentum_textbook", "adafactor", "lars", "dog"):
        made = problem.recipe(st.rates(decay=0.5), st.switch(at=AT, to=ds.rules()[name]()))
        state = Training(problem.plain(), made, seed=3)
        at = [weights(state)]
        state.advance(AT + 1, lambda _, at=at, state=state: at.append(weights(state)))
        old, new = (np.linalg.norm(at[i + 1] - at[i]) for i in (AT - 1, AT))
        assert new == pytest.approx(old, rel=2e-3), name


# SWATS


def test_swats_switches_when_and_to_what_its_algorithm_says() -> None:
    """Algorithm 1 of arXiv:1712.07628, in NumPy; μ of the new rule is 0.8, so that it runs at (1 - μ)Λ."""
    tolerance = 2e-4
    judge, mean = Judge(), 0.0
    for k in range(1, STEPS):
        g = judge.gradient()
        p = judge.step("adam", 0.05)
        gamma = p @ p / -(p @ g)
        mean = 0.999 * mean + 0.001 * gamma
        rate = mean / (1 - 0.999**k)
        if k > 1 and abs(rate - gamma) < tolerance:
            break
    assert 2 < k < STEPS - 3, "the case says something"
    made = recipe(ds.adam(lr=0.05), PARTS["momentum"](lr=0.7), at="swats", tolerance=tolerance)
    state = Training(squares(), made)
    state.advance()
    live = state.company.lives["switch"]
    assert live.data()["at"] == k
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * rate, rel=1e-10)
    judge.slots = {"v": judge.slots["m"] / (1 - 0.9**k) / 0.2}
    for _ in range(STEPS - k):
        judge.step("momentum", 0.2 * rate)
    np.testing.assert_allclose(weights(state), judge.w, rtol=0, atol=1e-10)


def test_with_the_papers_tolerance_it_waits() -> None:
    state = Training(squares(), recipe(ds.adam(lr=0.05), ds.sgd(lr=0.1), at="swats"))
    state.advance()
    assert state.company.lives["switch"].data()["at"] is None
    assert state.optimizer.chain.name == "rest: adam"


# Plateau


def test_on_a_plateau_the_next_update_is_the_last_of_the_old_rule() -> None:
    """A rate of 0 makes every validation after the first no better: patience 3, every second update."""
    made = recipe(ds.adam(lr=0.0), ds.sgd(lr=0.01), at="plateau", patience=3, match="none")
    state = Training(squares(), made)
    found = trail(state)
    assert state.company.lives["switch"].data()["at"] == 2 * 4 + 1
    (said,) = told(Training(squares(), made))
    assert (said["step"], said["did"], said["why"]) == (9, "switch", "validations got no better")
    assert said["facts"] == {"to": "sgd"}
    assert (found[8] == found[0]).all()
    assert (found[9] != found[8]).all()


# The guard


@pytest.mark.parametrize(
    ("rate", "returned", "then"),
    [(3.0, AT + 4, "sgd"), (1e200, AT + 2, "rest: adam"), (1e308, AT + 1, "rest: adam")],
    ids=["a higher loss", "an infinite one", "a skipped update"],
)
def test_a_rate_that_is_too_high_goes_back_to_the_bit(rate: float, returned: int, then: str) -> None:
    """Weights and the whole state are those before the switch, whose rule goes on at the run's step."""
    plain = replace(recipe(ds.adam(lr=ds.linear(0.05, STEPS)), ds.sgd()), strategies={})
    before = Training(squares(), plain)
    before.advance(AT)
    bad = st.switch(at=AT, to=ds.sgd(lr=rate), match="none", guard=4)
    said = told(Training(squares(), replace(plain, strategies=[bad])))
    assert [(note["step"], note["did"]) for note in said] == [(AT, "switch"), (returned, "return")]
    state = Training(squares(), replace(plain, strategies=[bad]))
    state.advance(AT + 2)
    assert state.optimizer.chain.name == then
    state.advance(AT + 4)
    data = state.company.lives["switch"].data()
    assert data["returned"] == returned
    assert "kept" not in data
    assert state.optimizer.chain.name == "rest: adam"
    assert state.step == AT + 4
    if returned == state.step:
        assert (weights(state) == weights(before)).all()
        mine, theirs = ({p.shape: s for p, s in one.optimizer.state.items()} for one in (state, before))
        assert mine.keys() == theirs.keys()
        for shape, slots in mine.items():
            assert {k: v.tolist() for k, v in slots.items()} == {
                k: v.tolist() for k, v in theirs[shape].items()
            }
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 - state.step / STEPS))
    state.advance()
    assert state.step == STEPS
    assert np.isfinite(weights(state)).all()
    assert state.company.lives["switch"].data()["returned"] == data["returned"], "at most once"


def test_a_switch_that_goes_well_stays() -> None:
    state = Training(squares(), recipe(ds.adam(lr=0.05), ds.sgd(lr=0.05), guard=4))
    state.advance()
    assert state.optimizer.chain.name == "sgd"
    assert state.company.lives["switch"].data()["returned"] is None
    assert not state.company.tensors()


# Saved and resumed


@pytest.mark.parametrize(
    "more",
    [
        {"rewarm": 4, "guard": 5},
        {"to": ds.sgd(lr=5.0), "match": "none", "guard": 4},
        {"to": ds.sgd(lr=1e18), "match": "none", "guard": 4},
        {"to": ds.momentum(lr=ds.linear(0.1, "100 %")), "at": "swats", "tolerance": 0.5, "guard": 3},
        {"to": ds.sgd(lr=ds.plateau(0.05, patience=1)), "at": "plateau", "patience": 1, "match": "none"},
    ],
    ids=["size", "back", "back from no number", "swats", "plateau"],
)  # fmt: skip
def test_it_goes_on_to_the_bit_from_every_step(more: dict[str, Any], tmp_path: Path) -> None:
    given = {"at": AT, "to": ds.momentum(lr=0.01), **more}
    made = problem.recipe(st.micro(items=6), st.average(decay=0.8), st.switch(**given), steps=STEPS)
    made = replace(made.with_(lr=0.3 if given["at"] == "plateau" else 3e-3), observe=2)
    straight = Training(problem.residual(), made, seed=2)
    straight.advance()
    assert straight.company.lives["switch"].data()["at"] is not None
    stopped = Training(problem.residual(), made, seed=2)
    for step in range(1, STEPS):
        stopped.advance(step)
        sha = stopped.save(tmp_path / str(step))
        stopped = Training.load(tmp_path / str(step), problem.residual(), made, sha)
    stopped.advance()
    assert not unequal(straight, stopped)


# Groups, and what cannot be


def test_groups_keep_their_share_of_the_rate_and_their_own_numbers() -> None:
    made = ds.Recipe(
        ds.adamw(lr=0.01, weight_decay=0.1),
        STEPS,
        16,
        roles={"bias": {"weight_decay": 0.0, "lr": 0.02}},
        strategies=[
            st.switch(at=AT, to=ds.lion(lr=ds.linear(0.004, "100 %"), weight_decay=0.3), match="none")
        ],
    )
    state = Training(problem.plain(), made)
    state.advance(AT)
    found = {group["role"]: (group["lr"], group["weight_decay"]) for group in state.optimizer.param_groups}
    assert found == {"rest": (0.004, 0.3), "bias": (0.008, 0.0)}
    assert state.optimizer.param_groups[0].keys() >= {"betas", "step", "params", "param_names"}
    assert "eps" not in state.optimizer.param_groups[0]
    state.advance()
    assert state.optimizer.param_groups[1]["lr"] == pytest.approx(2 * state.optimizer.param_groups[0]["lr"])


def test_an_averaging_rule_hands_over_the_weights_that_it_evaluates() -> None:
    old = ds.schedule_free_sgd(lr=0.1)
    alone = Training(squares(), replace(recipe(old, ds.sgd()), strategies={}))
    alone.advance(AT)
    state = Training(squares(), recipe(old, ds.sgd(lr=0.01), match="none"))
    state.advance(AT)
    with alone.optimizer.averaged():
        assert (weights(state) == weights(alone)).all()
    assert (weights(state) != weights(alone)).any()


def test_a_link_that_stands_in_both_goes_on() -> None:
    from downslope.rules.links import clip_history

    made = recipe(
        ds.chain(clip_history(settle=3), ds.adam(lr=0.05)), ds.chain(clip_history(settle=3), ds.sgd(lr=0.01))
    )
    state = Training(squares(), made)
    state.advance()
    for slots in state.optimizer.state.values():
        assert slots["norms"] == STEPS
        assert slots["t"] == STEPS - AT


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"at": "plateu"}, r"Did you mean 'plateau'\?"),
        ({"at": 0}, "at must be at least 1, got 0"),
        ({"match": "sice"}, r"Did you mean 'size'\?"),
        ({"match": "swats"}, 'match = "swats" needs at = "swats"'),
        ({"at": "swats", "to": [{"part": "lion"}]}, 'match = "swats" needs at = "swats" and one of sgd'),
        ({"to": [{"part": "sdg"}]}, r"unknown part 'sdg'\. Did you mean 'sgd'\?"),
        ({"to": [{"part": "adam", "bettas": 1}]}, r"Did you mean 'betas'\?"),
        ({"to": []}, "to is a list of parts"),
        ({"to": [{"part": "sam"}, {"part": "sgd"}]}, 'takes several gradients a step: give match = "none"'),
    ],
)
def test_what_makes_no_sense_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        st.switch.from_data({"at": 5, "to": [{"part": "sgd", "lr": 0.1}], **given})


def test_what_the_training_cannot_do_is_said_before_it_begins() -> None:
    with pytest.raises(BadInput, match=r"\[switch\] at = 20 is update 20 of a training of 20"):
        Training(squares(), recipe(ds.adam(), ds.sgd(), at=STEPS))
    with pytest.raises(BadInput, match="muon takes matrices"):
        Training(squares(), recipe(ds.adam(), ds.muon()))
    with pytest.raises(BadInput, match=r"schedule_free_sgd has evaluation weights.*\[average\]"):
        problem.recipe(st.average(), st.switch(at=5, to=ds.schedule_free_sgd()))
    assert math.isfinite(Training(squares(), recipe(ds.adam(), ds.sgd())).evaluate().loss)
