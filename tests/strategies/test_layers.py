"""Choices by layer: rates, freezing, first weights, normalisation, dropout, depth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import problem
from torch import Tensor, nn

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.schedule import Schedule
from downslope.train import Attempt, Training, order

STEPS = 12
RATE = ds.cosine(0.1, steps="100 %", warmup="25 %")


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def after(task: ds.Task, *strategies: Any, on_step: Any = None, **changes: Any) -> Training:
    state = Training(task, problem.recipe(*strategies, steps=STEPS, **changes), seed=1)
    state.advance(on_step=on_step)
    return state


# Rates


MULTIPLIERS: list[tuple[st.rates, dict[str, float]]] = [
    (st.rates(decay=0.5), {"low": 0.5, "high": 1.0}),
    (st.rates(of={"low.*": 0.1, "*.bias": 3.0}), {"low": 0.1, "high": 1.0, "high.bias": 3.0}),
    (st.rates(decay=0.5, of={"low.*": 4.0}), {"low": 2.0, "high": 1.0}),
]


@pytest.mark.parametrize(("strategy", "expected"), MULTIPLIERS, ids=["decay", "of", "both"])
@pytest.mark.parametrize("branched", [False, True])
def test_updates_keep_their_ratio_under_a_schedule_and_in_a_branch(
    strategy: st.rates, expected: dict[str, float], branched: bool
) -> None:
    """Of plain gradient descent: the update is minus the rate, the multiplier and the gradient."""
    chain = ds.chain(ds.sgd(lr=RATE))
    state = Training(problem.plain(), problem.recipe(strategy, steps=STEPS, chain=chain), seed=1)
    schedule = RATE.resolve(run_steps=STEPS)
    if branched:
        schedule = ds.linear(0.3, STEPS, end=0.1)
        state.optimizer.follow("lr", schedule)
    before = copied(state.model)

    def look(attempt: Attempt) -> None:
        for name, weight in state.model.named_parameters():
            times = expected.get(name, expected[name.split(".")[0]])
            update = -schedule(attempt.step) * times * weight.grad
            assert torch.allclose(weight.detach() - before[name], update, rtol=1e-9, atol=1e-15), name
        before.update(copied(state.model))

    state.advance(on_step=look)
    assert state.step == STEPS


def test_a_rate_of_a_role_is_multiplied_too() -> None:
    recipe = problem.recipe(st.rates(of={"low.*": 0.5}), roles={"bias": {"lr": 0.02}})
    optimizer = recipe.build(problem.Plain())
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    peak = optimizer.param_groups[0]["lr"]
    assert rates == {
        "low.weight": pytest.approx(0.5 * peak),
        "low.bias": pytest.approx(0.01),
        "high.weight": peak,
        "high.bias": 0.02,
    }


# Freezing


@pytest.mark.parametrize(
    ("strategy", "dates"),
    [
        (st.freeze(every="4 steps"), {"low": 4, "high": 0}),
        (st.freeze(until={"high.bias": "never", "low.*": "50 %"}), {"low": 6, "high": 0, "high.bias": None}),
        (st.freeze(until={"bias": 5}), {"low.bias": 5, "high.bias": 5, "low": 0, "high": 0}),
    ],
    ids=["gradual", "patterns", "role"],
)
@pytest.mark.parametrize("pieces", [False, True])
def test_what_is_frozen_keeps_its_bits_and_starts_adam_anew(
    strategy: st.freeze, dates: dict[str, int | None], pieces: bool
) -> None:
    """Adam's first update, m = (1 − β₁)g/(1 − β₁) and v likewise, is lr·g/(|g| + ε)."""
    chain = ds.chain(ds.adam(lr=RATE, eps=1e-3))
    recipe = problem.recipe(strategy, *[st.micro(items=5)] * pieces, steps=STEPS, chain=chain)
    state, schedule = Training(problem.plain(), recipe, seed=1), RATE.resolve(run_steps=STEPS)
    begun = copied(state.model)
    first = {name: dates.get(name, dates[name.split(".")[0]]) for name in begun}

    def look(attempt: Attempt) -> None:
        for name, weight in state.model.named_parameters():
            begins = first[name]
            if begins is None or attempt.step < begins:
                assert torch.equal(weight, begun[name])
            elif attempt.step == begins:
                assert weight.grad is not None
                update = -schedule(attempt.step) * weight.grad / (weight.grad.abs() + 1e-3)
                assert torch.allclose(weight.detach() - begun[name], update, rtol=1e-9, atol=1e-15)
            else:
                assert not torch.equal(weight, begun[name])

    state.advance(on_step=look)
    assert state.step == STEPS


def thaws(state: Training, until: int | None = None) -> list[tuple[int, str, str]]:
    """What is told, by step, up to an update."""
    told: list[Any] = []
    state.advance(until, lambda attempt: told.extend(attempt.told))  # type: ignore[func-returns-value]
    assert all((note["by"], note["did"]) == ("freeze", "thaw") for note in told)
    return [(note["step"], note["why"], note["facts"]["parameters"]) for note in told]


LOW = "low.weight, low.bias"


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (st.freeze(every="4 steps"), [(4, "every = 4", LOW)]),
        (
            st.freeze(until={"low.bias": 3, "low.*": "50 %", "high.bias": "never"}),
            [(3, "its date", "low.bias"), (6, "its date", "low.weight")],
        ),
        (st.freeze(until={"bias": 2}), [(2, "its date", "low.bias, high.bias")]),
        (st.freeze(until={"low.*": 0, "high.bias": "100 %"}), []),  # from the start, and when all is over
    ],
    ids=["gradual", "dates", "role", "neither"],
)
def test_a_thaw_is_told_once_whether_updates_were_skipped_or_the_run_went_on_there(
    strategy: st.freeze, told: list[tuple[int, str, str]], tmp_path: Path
) -> None:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Not finite just behind the dates 3 and 4."""
        calls[0] += model.training
        return ds.cross_entropy(model, batch) * (torch.nan if calls[0] in (4, 5, 7, 8) else 1.0)

    recipe = problem.recipe(strategy, steps=STEPS)
    assert thaws(Training(problem.plain(loss=loss, metric=ds.accuracy), recipe)) == told
    for at in range(1, STEPS) if strategy.every else ():
        stopped = Training(problem.plain(), recipe)
        before = thaws(stopped, at)
        stopped.save(tmp_path / f"{at}")
        assert before + thaws(Training.load(tmp_path / f"{at}", problem.plain(), recipe)) == told


def test_a_thaw_is_in_the_journal_and_on_the_page(tmp_path: Path) -> None:
    recipe = problem.recipe(st.freeze(every="4 steps", blocks=("stem", "blocks", "head")), steps=STEPS)
    run = ds.train(problem.residual(), recipe, out=tmp_path, quiet=True)
    told = [event for event in run.events if event["kind"] == "strategy"]
    assert [(event["step"], event["facts"]["parameters"].split(",")[0]) for event in told] == [
        (4, "blocks.0.branch.0.weight"),
        (8, "stem.weight"),
    ]
    assert told[0]["facts"]["parameters"].endswith("blocks.1.branch.0.weight and 3 more")
    page = ds.report(tmp_path).read_text("utf-8")
    assert "[freeze] began to train, 2 times" in page  # the mark
    assert "every = 4: parameters blocks.0.branch.0.weight, " in page  # the row
    assert "stem.weight, stem.bias" in page


# First weights


def by_hand(write: Callable[[nn.Module], object]) -> ds.Task:
    """The task whose model comes with these weights."""

    def model() -> nn.Module:
        made = problem.Residual()
        write(made)
        return made

    return problem.residual(model=model)


def first_batch() -> Tensor:
    task = problem.residual()
    inputs: Tensor = task.train[0][order(len(task.train[0]), 1, 0)[: problem.ITEMS]]
    return inputs


def everything(model: nn.Module) -> None:
    ds.initialise(model, "kaiming_normal")
    ds.lsuv(model, first_batch(), start=None)
    ds.zero_residual(model)


@pytest.mark.parametrize(
    ("strategy", "write"),
    [
        (st.start(method="xavier_uniform"), lambda model: ds.initialise(model, "xavier_uniform")),
        (st.start(lsuv=True), lambda model: ds.lsuv(model, first_batch())),
        (st.start(zero_residual=True), ds.zero_residual),
        (st.start(method="kaiming_normal", lsuv=True, zero_residual=True), everything),
    ],
    ids=["method", "lsuv", "zero", "all"],
)
def test_first_weights_are_those_of_the_functions(strategy: st.start, write: Any) -> None:
    """The draws come from the training's generator, where the model's own came from."""
    state = Training(problem.residual(), problem.recipe(strategy), seed=1)
    assert equal(state.model, Training(by_hand(write), problem.recipe(), seed=1).model)
    assert not equal(state.model, Training(problem.residual(), problem.recipe(), seed=1).model)


def test_lsuv_keeps_the_method_that_it_scales() -> None:
    """Orthogonal rows stay orthogonal when they are scaled; those of a normal draw are not."""

    def spread(method: str) -> float:
        recipe = problem.recipe(st.start(method=method, lsuv=True))
        weight = Training(problem.residual(), recipe, seed=1).model.stem.weight.detach()
        values = torch.linalg.svdvals(weight)
        return float(values.max() / values.min())

    assert spread("orthogonal") == pytest.approx(1, abs=1e-4)
    assert spread("kaiming_normal") > 1.5


# Normalisation


@pytest.mark.parametrize(
    ("strategy", "convert"),
    [
        (st.normalisation(to="ghost", size=4), lambda model: ds.norm.to_ghost(model, 4)),
        (st.normalisation(to="group", groups=4), lambda model: ds.norm.to_group(model, 4)),
        (st.normalisation(to="group"), lambda model: ds.norm.to_group(model)),
    ],
    ids=["ghost", "group", "groups left open"],
)
def test_another_normalisation_is_that_of_the_function(strategy: st.normalisation, convert: Any) -> None:
    state = after(problem.residual(), strategy)
    assert not [module for module in state.model.modules() if type(module) is nn.BatchNorm1d]
    names = [name for name, _ in state.model.named_parameters()]
    assert names == [name for name, _ in problem.Residual().named_parameters()]
    converted = problem.residual(model=lambda: convert(problem.Residual()))
    assert equal(state.model, after(converted).model)


def test_frozen_statistics_stay_and_are_used() -> None:
    state = Training(problem.residual(), problem.recipe(st.normalisation(to="frozen")), seed=1)
    before = copied(state.model)
    state.advance()
    for name, value in state.model.state_dict().items():
        kept = "running" in name or "tracked" in name
        assert torch.equal(value, before[name]) == kept, name
    layer = state.model.blocks[0].branch[1]
    one = torch.randn(1, problem.WIDTH)  # of one item there are no statistics
    expected = (one - layer.running_mean) / (layer.running_var + layer.eps).sqrt() * layer.weight + layer.bias
    assert torch.allclose(state.model.train().blocks[0].branch[1](one), expected, atol=1e-6)


# Dropout and depth


FALLING = ds.linear(0.5, "50 %", warmup=2)


@pytest.mark.parametrize(
    "rate", [0.25, FALLING, ds.cyclic(0.4, 0.1, up=2)], ids=["number", "falling", "cyclic"]
)
def test_dropout_is_at_each_update_what_its_schedule_says(rate: float | Schedule) -> None:
    held: list[set[float]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        held.append({module.p for module in model.modules() if isinstance(module, nn.Dropout)})
        return ds.cross_entropy(model, batch)

    state = Training(
        problem.residual(loss=loss, metric=ds.accuracy),
        problem.recipe(st.dropout(rate=rate), steps=STEPS),
        seed=1,
    )
    state.advance()
    resolved = rate.resolve(run_steps=STEPS) if isinstance(rate, Schedule) else None
    assert held == [{resolved(step) if resolved else rate} for step in range(STEPS)]


@pytest.mark.parametrize("rate", [0.5, FALLING], ids=["number", "schedule"])
def test_depth_is_that_of_the_tool_set_before_every_update(rate: float | Schedule) -> None:
    branches = ("blocks.0.branch", "blocks.1.branch")
    declared = after(problem.residual(), st.depth(branches=branches, rate=rate))
    resolved = rate.resolve(run_steps=STEPS) if isinstance(rate, Schedule) else ds.constant(rate)
    dropping: list[Any] = []

    def model() -> nn.Module:
        made = problem.Residual()
        dropping[:] = [ds.stochastic_depth(made, branches, resolved(0))]
        return made

    def next_rate(attempt: Attempt) -> None:
        dropping[0].set(resolved(attempt.step + 1))

    by_hand = after(problem.residual(model=model), on_step=next_rate)
    assert equal(declared.model, by_hand.model)
    assert not equal(declared.model, after(problem.residual()).model)


def test_a_branch_that_is_always_left_out_leaves_the_trunk() -> None:
    """With rates 1/2 and 1: in training the second branch is gone for good, and learns nothing."""
    strategy = st.depth(branches=("blocks.0.branch", "blocks.1.branch"), rate=1.0)
    chain = ds.chain(ds.sgd(lr=0.1))
    state = Training(problem.residual(), problem.recipe(strategy, steps=STEPS, chain=chain), seed=1)
    before = copied(state.model)
    state.advance()
    now = state.model.state_dict()
    assert torch.equal(now["blocks.1.branch.0.weight"], before["blocks.1.branch.0.weight"])
    assert not torch.equal(now["blocks.0.branch.0.weight"], before["blocks.0.branch.0.weight"])
    x = torch.randn(8, problem.WIDTH)
    assert torch.equal(state.model.train().blocks[1](x), x)
    assert not torch.equal(state.model.eval().blocks[1](x), x)


def test_rates_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(BadInput, match="rate is the share that is left out, from 0 to 1, got 1.5"):
        st.depth(branches=("a",), rate=ds.linear(1.5, 10))
    with pytest.raises(BadInput, match="cannot follow a schedule that goes by validations, as plateau does"):
        st.dropout(rate=ds.plateau(0.5))
