"""Every kind in a recipe and an optimizer: written, read, resumed in the middle, held by a skipped update."""

import copy

import pytest
import torch
from torch import nn

import downslope as ds
from downslope.recipe import Recipe
from downslope.schedule import KINDS, Schedule, constant, example, one_cycle

every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def recipe_of(rate: Schedule) -> Recipe:
    return Recipe(ds.chain(ds.clip_norm(1.0), ds.adamw(lr=rate)), steps=100, batch_size=8)


def train(model: nn.Module, optimizer: ds.Optimizer, first: int, last: int) -> list[float]:
    """Updates first … last - 1, each on two micro-batches; the rate before each."""
    rates = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for _ in range(2):
            x = torch.randn(4, 3, generator=generator)
            (model(x).square().mean() / 2).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
    return rates


@every_kind
def test_a_recipe_writes_reads_and_follows_it(kind: str) -> None:
    rate = example(kind).scaled(0.01)
    recipe = recipe_of(rate)
    assert Recipe.parse(recipe.text()) == recipe
    assert Recipe.parse(recipe.text()).hash == recipe.hash
    model = nn.Linear(3, 2)
    assert train(model, recipe.build(model), 0, 60) == [rate(i) for i in range(60)]


@every_kind
def test_resumed_in_the_middle_the_run_is_the_same_to_the_bit(kind: str) -> None:
    recipe = recipe_of(example(kind).scaled(0.01))
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = recipe.build(model)
    train(model, optimizer, 0, 23)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    rates = train(model, optimizer, 23, 60)

    torch.manual_seed(1)
    other = nn.Linear(3, 2)
    resumed = recipe.build(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert train(other, resumed, 23, 60) == rates
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@every_kind
def test_an_update_that_is_skipped_does_not_count(kind: str) -> None:
    rate = example(kind).scaled(0.01)
    model = nn.Linear(3, 2)
    optimizer = recipe_of(rate).build(model)
    train(model, optimizer, 0, 49)
    for _ in range(3):
        (model(torch.ones(1, 3)) * torch.nan).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == rate(49)
    assert train(model, optimizer, 49, 52) == [rate(i) for i in (49, 50, 51)]


def test_one_line_each_gives_rate_and_momentum() -> None:
    momentum = one_cycle(0.85, "100 %", base=0.95, end=0.95)
    chain = ds.chain(ds.nesterov(lr=one_cycle(0.1, "100 %"), momentum=momentum))
    model = nn.Linear(3, 2)
    optimizer = Recipe(chain, steps=20, batch_size=8).build(model)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    train(model, optimizer, 0, 6)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.85)


def test_a_group_that_comes_late_starts_on_the_runs_schedule() -> None:
    rate = (constant(0.01).then(example("cosine").scaled(0.01), at=5)).clamp(low=0.001)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = ds.Optimizer(model[0], ds.adamw(lr=rate))
    train(model, optimizer, 0, 10)
    optimizer.add_param_group({"params": list(model[1].named_parameters("1"))})
    assert [group["lr"] for group in optimizer.param_groups] == [rate(10), rate(10)]
    train(model, optimizer, 10, 12)
    assert [group["lr"] for group in optimizer.param_groups] == [rate(12), rate(12)]
