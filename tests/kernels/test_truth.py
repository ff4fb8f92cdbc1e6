"""Every rule, alone and with every link, against an independent float64 form of it, on every executor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, LINK_CASES, Case, LinkCase, draw

from downslope.kernels.eager import initial
from downslope.kernels.reference import reference_step
from downslope.kernels.update import Update
from downslope.rules import LINKS, RULES, Chain, chain, trace

STEPS = 20
EXECUTORS = ("reference", "eager", "cpu")


def number(chained: Chain, key: tuple[str, int | None]) -> float:
    value: Any = chained.defaults[key[0]]
    return float(value if key[1] is None else value[key[1]])


def run(
    chained: Chain, executor: str, weights: list[np.ndarray], gradients: list[list[np.ndarray]]
) -> list[np.ndarray]:
    """The weights after every gradient, by one executor in float64."""
    parameters = [torch.tensor(w, dtype=torch.float64) for w in weights]
    program = trace(chained)
    keys = [chained.keys[chained.slots[name][0]] for name in program.slots]
    slots = [
        {
            name: initial(slot, p, {a: number(chained, k) for a, k in names.items()})
            for names, (name, slot) in zip(keys, program.slots.items(), strict=True)
        }
        for p in parameters
    ]
    if executor == "reference":
        now = [w.copy() for w in weights]
        state = {name: [slot[name].numpy().copy() for slot in slots] for name in program.slots}
        for k, drawn in enumerate(gradients, 1):
            now, state = reference_step(
                chained, now, drawn, state, lambda _, key: number(chained, key), t=[k] * len(now), step=k
            )
        return now
    update = Update(
        program, parameters, slots, [0] * len(parameters), "eager" if executor == "eager" else "auto"
    )
    assert {type(bucket).__name__ for bucket in update.buckets} == {
        "EagerBucket" if executor == "eager" else "CpuBucket"
    }
    table = np.array([[number(chained, key)] * len(parameters) for key in program.numbers]).reshape(
        -1, len(parameters)
    )
    for k, drawn in enumerate(gradients, 1):
        for parameter, gradient in zip(parameters, drawn, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        active = update.gather()
        assert active is not None
        update.run(table, np.full(len(parameters), k), k, active)
    return [parameter.numpy() for parameter in parameters]


def judged(
    case: Case, link: LinkCase | None, weights: list[np.ndarray], gradients: list[list[np.ndarray]]
) -> list[np.ndarray]:
    judge = case.judged(weights)
    for drawn in gradients:
        old = list(judge.weights)
        judge.step(link.before(drawn, old) if link and link.before else drawn)
        if link and link.after:
            for i, (before, after) in enumerate(zip(old, judge.weights, strict=True)):
                metric = judge.metric(i) if link.name == "l1" else None
                judge.add(i, link.after(before, after, case.lr, metric) - after)
    return judge.weights


def assert_close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_equals_its_reference(name: str, executor: str) -> None:
    weights, gradients = draw(STEPS)
    case = CASES[name]
    assert_close(run(chain(case.part), executor, weights, gradients), judged(case, None, weights, gradients))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("link", LINK_CASES)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_with_a_link_equals_its_reference(name: str, link: str, executor: str) -> None:
    case, added = CASES[name], LINK_CASES[link]
    if link == "l1" and case.metric is None:
        pytest.skip("refused by name; tests/rules/test_chain.py holds that")
    weights, gradients = draw(STEPS)
    assert_close(
        run(added.chain(case), executor, weights, gradients), judged(case, added, weights, gradients)
    )


def test_every_rule_and_link_has_a_row() -> None:
    assert set(CASES) == set(RULES)
    assert set(LINK_CASES) == set(LINKS)


def test_a_judge_tells_a_wrong_rule() -> None:
    """The comparison can fail: Nesterov's look-ahead is not heavy ball."""
    weights, gradients = draw(STEPS)
    wrong = chain(RULES["nesterov"](lr=0.1, momentum=0.8))
    with pytest.raises(AssertionError):
        assert_close(
            run(wrong, "cpu", weights, gradients), judged(CASES["momentum"], None, weights, gradients)
        )


@pytest.mark.parametrize("name", CASES)
def test_odd_gradients_step_alike_on_every_executor(name: str) -> None:
    """NaN, infinities, signed zeros, least and largest numbers: NaN where it is due, and there only."""
    odd = [np.nan, np.inf, -np.inf, -0.0, 0.0, 5e-324, 1e308, -1e308, 1.0, -1.0]
    weights = [np.array(odd), np.array(odd[::-1]), np.linspace(-1, 1, len(odd))]
    turns = [[np.roll(odd, k + i) for i in range(3)] for k in range(4)]
    parts = [
        LINKS["clip_norm"](3.0),
        LINKS["clip_value"](0.5),
        LINKS["l2"](0.1),
        CASES[name].part,
        LINKS["decay"](0.1),
    ]
    for chained in (chain(CASES[name].part), chain(*parts[1:]), chain(*parts)):
        want, *others = (run(chained, executor, weights, turns) for executor in EXECUTORS)
        for got in others:
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=0, equal_nan=True)
                assert np.array_equal(np.signbit(a[a == 0]), np.signbit(b[a == 0]))
