"""Faults that keep coming back in schedules, accumulation and averages, each a test that says what must hold.

Those that tests of a room hold by themselves: 17 ratios of groups (test_groups.py), 21 steps that were
skipped (test_optimizer.py), 22 and 41 pieces on several ranks (parallel/test_shared.py), 23 no drift over a
million steps (schedule/test_laws.py), 38 and 40 micro-batches (strategies/), 42 a step inside a backward pass
(test_optimizer.py), 43 to 46 averages and BatchNorm (test_average.py, test_norm.py, test_curvature.py), 63
smoothing where all is ignored (test_augment.py), 64 teachers (distill/).
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

import downslope as ds
from downslope import strategies
from downslope.schedule import KINDS, duration
from downslope.tasks import task
from downslope.train.training import Training


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> list[float]:
    """The rate of each of so many updates."""
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return rates


def test_trap_16_a_schedule_changes_nothing_until_the_first_step() -> None:
    model = nn.Linear(3, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ds.AdamW(model.parameters(), lr=ds.one_cycle(0.1, steps=10), betas=(0.8, 0.99))
    optimizer.follow("lr", ds.one_cycle(0.2, steps=10))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert optimizer.param_groups[0]["lr"] == ds.one_cycle(0.2, steps=10)(0)
    assert optimizer.steps == 0
    assert not optimizer.state


@pytest.mark.parametrize(
    "schedule",
    [
        ds.cosine(0.1, steps=3),
        ds.linear(0.1, steps=3, warmup=1),
        ds.polynomial(0.1, steps=3),
        ds.wsd(0.1, steps=3, cooldown=1),
        ds.one_cycle(0.1, steps=3),
    ],
    ids=str,
)
def test_trap_18_past_the_end_a_rate_stays_where_it_is(schedule: ds.Schedule) -> None:
    model = nn.Linear(3, 1)
    rates = stepped(ds.SGD(model.parameters(), lr=schedule), model, 9)
    assert rates[3:] == [schedule(3)] * 6


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "wsd"])
def test_trap_19_the_edges_of_a_length_are_right_or_refused(kind: str) -> None:
    make = KINDS[kind]
    assert [make(0.1, steps=1)(i) for i in (0, 1, 2)] == [0.1, 0.0, 0.0]
    with pytest.raises(ds.BadInput, match="at least 1"):
        make(0.1, steps=0)
    with pytest.raises(ds.BadInput, match="warmup"):
        make(0.1, steps=5, warmup=5)
    rising = make(0.1, steps=10, end=0.5)
    assert [rising(i) for i in (0, 10, 11)] == [0.1, 0.5, 0.5]
    assert all(rising(i) <= rising(i + 1) for i in range(12))


def test_trap_20_a_group_that_joins_later_reads_its_schedule_at_the_runs_step() -> None:
    model, late = nn.Linear(3, 1), nn.Linear(3, 1)
    whole, own = ds.cosine(0.1, steps=20), ds.linear(0.01, steps=20)
    optimizer = ds.SGD(model.parameters(), lr=whole)
    stepped(optimizer, model, 7)
    optimizer.add_param_group({"params": list(late.parameters())})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": own})
    assert [group["lr"] for group in optimizer.param_groups] == [whole(7), whole(7), own(7)]
    stepped(optimizer, model, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [whole(8), whole(8), own(8)]


@pytest.mark.parametrize("items", [1, 5, 32])
def test_trap_22_the_rate_is_independent_of_accumulation(items: int) -> None:
    given = task("cancer-logistic")
    recipe = replace(given.recipe, steps=12, strategies=[strategies.micro(items=items)])
    plain, pieces, rates = Training(given, replace(given.recipe, steps=12)), Training(given, recipe), []
    for state in (plain, pieces):
        found: list[float | None] = []
        state.advance(on_step=lambda attempt, found=found: found.append(attempt.lr))  # type: ignore[misc]
        rates.append(found)
        assert state.step == 12
        assert state.batches == 12
    assert rates[0] == rates[1]


@pytest.mark.parametrize("text", ["500", "10", "3 epoch 2", "2 batches", "1e3"])
def test_trap_24_a_number_in_text_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ds.BadInput, match="500 steps"):
        duration(text)


def test_trap_39_the_last_piece_of_a_window_counts_by_its_items() -> None:
    given = task("cancer-logistic")
    state = Training(given, replace(given.recipe, strategies=[strategies.micro(items=5)]))
    batch = (torch.arange(32.0), torch.arange(32))
    pieces = list(state.company.parts(batch))
    assert [len(piece[0]) for piece, _ in pieces] == [5] * 4 + [4] * 3
    assert [share for _, share in pieces] == [5 / 32] * 4 + [4 / 32] * 3
    assert torch.equal(torch.cat([piece[1] for piece, _ in pieces]), batch[1])


def test_trap_47_evaluation_and_what_is_handed_over_see_the_evaluation_weights(tmp_path: object) -> None:
    given = task("cancer-logistic")
    recipe = replace(given.recipe, chain=ds.chain(ds.schedule_free_adamw(lr=0.03)), steps=60)
    state = Training(given, recipe, seed=1)
    state.advance()
    trained = {name: value.clone() for name, value in state.model.state_dict().items()}
    with state.optimizer.averaged():
        averaged = {name: value.clone() for name, value in state.model.state_dict().items()}
        wanted = float(ds.cross_entropy(state.model, given.valid))
    assert not torch.equal(trained["weight"], averaged["weight"])
    assert state.evaluate("valid").loss == pytest.approx(wanted, rel=1e-6)
    assert all(torch.equal(value, trained[name]) for name, value in state.model.state_dict().items())
    run = ds.train(given, recipe, out=str(tmp_path) + "/run", seed=1, quiet=True)
    assert all(torch.equal(value, averaged[name]) for name, value in run.model.state_dict().items())
    assert run.valid.loss == pytest.approx(wanted, rel=1e-6)
