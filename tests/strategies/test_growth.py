"""Growing batches: several of the data's batches are one update, and an epoch stays a pass over the data."""

import copy
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import problem
from strategies.problem import ITEMS
from strategies.test_laws import resumes
from torch import Tensor, nn
from train.test_players import duel

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.journal import read
from downslope.race.candidates import brought
from downslope.schedule import Schedule, constant, linear, multistep
from downslope.strategies.pace import Growing
from downslope.train import Training, order

EPOCH = 200 // ITEMS  # batches of problem's tasks, of which each leaves 8 items over
SGD = ds.chain(ds.sgd(lr=0.1))


def trained(task: ds.Task, *strategies: Any, steps: int | str = 24, **changes: Any) -> Training:
    state = Training(task, problem.recipe(*strategies).with_(steps=steps, **changes), seed=1)
    state.advance()
    return state


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a weight."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def items(count: int) -> list[int]:
    """The samples of the first `count` batches of the training, epoch behind epoch."""
    epochs = range(-(-count // EPOCH))
    every = [order(200, 1, epoch)[: EPOCH * ITEMS].tolist() for epoch in epochs]
    return list(itertools.chain(*every))[: count * ITEMS]


# One update of k batches


@pytest.mark.parametrize("extra", [[], [st.micro(items=7)]])
def test_an_update_is_that_of_one_big_batch_and_clip_decay_and_average_count_once(extra: list[Any]) -> None:
    """Against torch's own loop; 1, 1, 5, 5, … batches, so that updates reach over the ends of epochs."""
    task, counts = problem.plain(), [1, 1, *[5] * 22]
    chain = ds.chain(ds.clip_norm(0.1), ds.adamw(lr=0.01, weight_decay=0.1))
    growth = st.growth(times=multistep(1, at=[2], factor=5))
    state = trained(task, growth, st.average(decay=0.9), *extra, chain=chain)

    begun = Training(task, problem.recipe(), seed=1).model
    optimizer = torch.optim.AdamW(begun.parameters(), lr=0.01, weight_decay=0.1)
    average = copy.deepcopy(begun)
    left = items(sum(counts))
    for step, count in enumerate(counts):
        chosen, left = left[: count * ITEMS], left[count * ITEMS :]
        optimizer.zero_grad()
        nn.functional.cross_entropy(begun(task.train[0][chosen]), task.train[1][chosen]).backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in begun.parameters()])
        assert norm > 0.1, "it must be clipped to tell"
        for weight in begun.parameters():
            weight.grad *= 0.1 / norm
        optimizer.step()
        for mean, weight in zip(average.parameters(), begun.parameters(), strict=True):
            mean.data.lerp_(weight.data, 0.1 if step else 1.0)
    assert apart(state.model, begun) < 1e-10
    assert (state.step, state.batches) == (24, 112)
    assert (state.epoch, state.position) == divmod(112, EPOCH)
    assert all(int(held["t"]) == 24 for held in state.optimizer.state.values())
    state.finish()
    assert apart(state.model, average) < 1e-10


RULES = [SGD, ds.chain(ds.sam(), ds.sgd(lr=0.1)), ds.chain(ds.gd(lr=0.5)), ds.chain(ds.adamw(lr=0.01))]


@pytest.mark.parametrize("chain", RULES)
def test_three_batches_are_one_of_three_times_the_size_for_every_kind_of_rule(chain: Any) -> None:
    """192 of 200 samples make 12 batches of 16 and 4 of 48: the same samples in the same order."""
    losses: dict[int, list[float]] = {ITEMS: [], 3 * ITEMS: []}
    models = []
    for size, told in losses.items():
        growing = [st.growth(times=3)] if size == ITEMS else []
        state = Training(problem.plain(), problem.recipe(*growing, chain=chain, batch_size=size), seed=1)
        state.advance(10, lambda attempt, told=told: told.append(float(attempt.loss)))  # type: ignore[misc]
        models.append(state.model)
    assert apart(*models) < 1e-12
    assert losses[ITEMS] == pytest.approx(losses[3 * ITEMS], abs=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_every_player_moves_on_the_whole_of_it(every: int) -> None:
    """A rate in epochs shows that each player's own schedule knows how many updates an epoch has."""
    falling = ds.chain(ds.momentum(lr=linear(0.05, "5 epochs", end=0.01)))
    players = {"critic": falling, "maker": falling}
    made = []
    for size, growing in ((8, [st.growth(times=2)]), (16, [])):
        recipe = ds.Recipe(falling, "6 epochs", size, players=players, strategies=growing)
        state = Training(duel(every=every), recipe)
        state.advance()
        made.append(state)
    one, two = made
    assert one.step == two.step == 24
    assert one.batches == 48
    assert apart(one.model, two.model) < 1e-12
    assert [side.optimizer.param_groups[0]["lr"] for side in one.sides] == [
        side.optimizer.param_groups[0]["lr"] for side in two.sides
    ]


def test_an_update_that_is_not_finite_uses_all_its_batches_up_and_is_no_step() -> None:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += model.training
        return ds.cross_entropy(model, batch) * (torch.nan if calls[0] == 5 else 1.0)  # of 3, 3, …

    task = problem.plain(loss=loss, metric=ds.accuracy)
    state = trained(task, st.growth(times=3), steps=4)
    assert (state.step, state.batches) == (4, 15)


# Which batches, how many updates


def test_every_sample_counts_once_an_epoch_and_the_run_has_the_passes_that_it_says() -> None:
    seen: Counter[int] = Counter()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            seen.update(batch[0].flatten().long().tolist())
        return (model(batch[0]) - batch[0]).square().mean()

    data = (torch.arange(192.0)[:, None], torch.zeros(192))
    task = ds.Task(model=lambda: nn.Linear(1, 1), train=data, valid=data, loss=loss, metric=loss)
    growth = st.growth(times=multistep(1, at=["2 epochs", "4 epochs"], factor=3))
    state = trained(task, growth, steps="6 epochs")
    assert state.step == 24 + 8 + 2  # a third one of 9 batches does not fit into the 24 that are left
    assert state.batches == 24 + 24 + 18
    assert {*seen.values()} == {5, 6}
    assert sum(seen.values()) == 66 * 16


TIMES = [
    constant(3.2),
    linear(1, "100 %", end=7),
    linear(5, "3 epochs"),
    multistep(1, at=["25 %", "50 %"], factor=2),
    multistep(2, at=["1.5 epochs", "700 samples"], factor=1.6),
    multistep(1, at=[3, 9], factor=4),
    constant(1).then(constant(6), at="40 steps") + linear(1, "30 steps"),
    ds.cosine(8, "2 epochs", warmup="0.5 epochs", end=1),
]


@pytest.mark.parametrize("length", ["1 epoch", "7 epochs", "3333 samples", 57])
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_the_length_is_the_most_updates_that_fit_into_the_data(times: Schedule, length: int | str) -> None:
    """The batches of each update and their sum, walked one by one by what the units mean."""
    if times.bounds[0] < 1:
        times = times.clamp(low=1)
    growth = st.growth(times=times)
    batches = {"1 epoch": EPOCH, "7 epochs": 7 * EPOCH, "3333 samples": 208}.get(str(length))
    units = {"epoch": EPOCH, "sample": 1 / ITEMS}
    whole = batches or length
    text = repr(times)
    by_data = any(unit in text for unit in units) or ("%" in text and batches is not None)
    recipe = problem.recipe(growth).with_(steps=length)
    assert isinstance(whole, int)
    plan = times.resolve(whole, EPOCH, ITEMS)
    taken, counts = 0, []
    while taken <= (batches or math.inf) and len(counts) < (10**6 if batches else whole + 1):
        counts.append(max(1, math.floor(plan(taken if by_data else len(counts)) + 0.5)))
        taken += counts[-1]
    assert recipe.run_steps(EPOCH) == max(1, len(counts) - 1)
    pace = recipe.pace(EPOCH)
    assert [pace.count(step) for step in range(len(counts))] == counts
    assert pace.most(len(counts)) == max(counts)
    assert pace.taken(len(counts)) == taken


def test_the_walk_finds_the_updates_of_any_counts() -> None:
    draw = random.Random(0)
    counts = [draw.randint(1, 9) for _ in range(200)]
    sums = [0, *itertools.accumulate(counts)]
    for batches in range(sums[-1]):
        pace = Growing(lambda step: [*counts, 1000][step], by_data=False)
        assert pace.updates(batches) == max(n for n, total in enumerate(sums) if total <= batches)


def test_percentages_and_averages_count_the_updates_that_there_are() -> None:
    rate = linear(0.1, "100 %", end=0.0)
    growth = st.growth(times=multistep(1, at=["50 %"], factor=4))
    state = trained(problem.plain(), growth, steps="8 epochs", chain=ds.chain(ds.sgd(lr=rate)))
    assert state.step == 4 * EPOCH + EPOCH
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert state.optimizer.steps == state.step


def test_an_epoch_has_a_fixed_number_of_updates_where_the_number_is_one() -> None:
    rate = linear(0.1, "3 epochs", warmup="1 epoch")
    recipe = problem.recipe(st.growth(times=4), chain=ds.chain(ds.sgd(lr=rate))).with_(steps="6 epochs")
    rates = {"run_steps": 18, "steps_per_epoch": 3, "batch_size": 64, "tokens_per_step": None}
    assert recipe.rates(EPOCH) == rates
    state = Training(problem.plain(), recipe)
    told = []
    state.advance(on_step=lambda attempt: told.append(attempt.lr))  # type: ignore[func-returns-value]
    plan = linear(0.1, 9, warmup=3)
    assert told == [plan(step) for step in range(18)]


def test_validations_come_where_the_data_have_been_seen() -> None:
    growth = st.growth(times=multistep(1, at=["2 epochs"], factor=5))
    at: list[tuple[int, float, float]] = []
    state = Training(
        problem.plain(), problem.recipe(growth, st.stop(patience=99)).with_(observe="1 epoch", steps=40)
    )
    state.company.observed = lambda *told: at.append(told)  # type: ignore[method-assign]
    state.advance()
    taken = [0, *itertools.accumulate([1] * 24 + [5] * 16)]
    assert [step for step, _, _ in at] == [n for n in range(1, 41) if taken[n - 1] // 12 < taken[n] // 12]


# Saved, told, refused


def test_with_other_strategies_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    growth = st.growth(times=multistep(1, at=["0.5 epochs"], factor=2.5))
    others = [
        st.mix(mixup=0.4, cutmix=1.0),
        st.micro(items=6),
        st.dropout(rate=linear(0.3, "100 %")),
        st.switch(at="50 %", to=ds.momentum(lr=0.1), rewarm=3, guard=3),
        st.average(decay=0.8),
        st.stop(patience=9),
    ]
    recipe = problem.recipe(growth, *others).with_(observe="0.4 epochs", steps="3 epochs")
    chain = ds.chain(ds.sam(), ds.adamw(lr=1e-3))
    for made in (recipe, recipe.with_(chain=chain, strategies=[growth, *others[:3], *others[4:]])):
        (folder := tmp_path / made.hash[:6]).mkdir()
        state = resumes(problem.residual(), made, folder)
        assert state.step == 6 + 30 // 3
    proof = ds.verify_resume(f"{problem.__file__}:residual", recipe, steps=14, seed=1)
    assert proof, proof


def test_the_journal_tells_how_many_batches_an_update_took(tmp_path: Path) -> None:
    growth = st.growth(times=multistep(1, at=["1 epoch"], factor=4))
    run = ds.train(
        problem.plain(), problem.recipe(growth).with_(steps="2 epochs"), out=tmp_path / "run", quiet=True
    )
    assert run.steps == 15
    told = [
        event.get("batches", 1)
        for event in read(tmp_path / "run" / "journal.jsonl")
        if event["kind"] == "step"
    ]
    assert told == [1] * 12 + [4] * 3


HEAD = """steps = "20 epochs"
batch_size = 16

[[chain]]
part = "adamw"
lr = { schedule = "cosine", peak = 0.1, steps = "100 %", warmup = "1 epoch" }
"""
RISING = 'times = { schedule = "linear", peak = 1, end = 4, steps = "100 %" }'


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (f"[growth]\n{RISING}", 6, "chain.lr.warmup = '1 epoch' has no fixed number of updates beside"),
        (f'[freeze]\nuntil = {{ "low.*" = "3epochs" }}\n[growth]\n{RISING}', 6, "chain.lr.warmup"),
        ("[growth]\ntimes = 0.5", 8, "times is how many batches an update takes, from 1, got 0.5."),
        ('[growth]\ntimes = { schedule = "linear", peak = 4, steps = 9 }', 8, "from 1, got 0."),
        ('[growth]\ntimes = { schedule = "plateau", peak = 4 }', 8, "goes by validations, as plateau does"),
        (
            '[growth]\ntimes = { schedule = "multistep", peak = 1, at = ["5 epochs", 40], factor = 2 }',
            8,
            "times goes by data ('5 epochs') or by updates (40), not by both; a percentage is of steps = ",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_mean_is_refused_where_it_stands(text: str, line: int, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        ds.Recipe.parse(HEAD + text, "mine.toml")
    assert str(caught.value).startswith(f"mine.toml:{line}: "), caught.value
    assert said in str(caught.value)


def test_a_percentage_beside_epochs_is_of_data_and_beside_steps_of_updates() -> None:
    times = multistep(1, at=["25 %", "90 epochs"], factor=2)
    recipe = problem.recipe().with_(steps="100 epochs", strategies=[st.growth(times=times)])
    with pytest.raises(BadInput, match="a percentage is of steps = 100"):
        recipe.with_(steps=100)


def test_an_update_of_more_than_a_pass_is_refused() -> None:
    recipe = problem.recipe(st.growth(times=linear(1, 24, end=EPOCH + 1)))
    with pytest.raises(BadInput, match="would take 13 batches, and a pass over the data has 12") as caught:
        Training(problem.plain(), recipe)
    assert caught.value.key == ("growth", "times")


def test_a_race_refuses_it_since_its_updates_are_not_like_the_others() -> None:
    with pytest.raises(
        BadInput, match=r"has \[growth\], which a race cannot judge: its updates see more data"
    ):
        brought({"mine": problem.recipe(st.growth(times=2))})


# Growth instead of decay


class Place(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def distance(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model.w - batch[0]).square().sum(dim=1).mean()


def variance(rate: Any, times: Any, samples: int = 1200, size: int = 2) -> tuple[float, int]:
    """Of w after a pass of sgd over samples of variance 1 of ½(w - x)², and the updates that it took.

    With the i-th unit vector for the i-th sample, w is how much each of them counts in it: of independent
    samples the variance is the sum of its squares, to the last digit and without a draw.
    """
    data = (torch.eye(samples, dtype=torch.float64), torch.zeros(samples))
    task = ds.Task(model=lambda: Place(samples), train=data, valid=data, loss=distance, metric=distance)
    growing = [] if times is None else [st.growth(times=times)]
    recipe = ds.Recipe(ds.chain(ds.sgd(lr=rate)), "1 epoch", size, strategies=growing)
    state = Training(task, recipe)
    state.advance()
    return float(state.model.w.detach().square().sum()), state.step


def test_growing_by_five_is_as_quiet_as_decaying_by_five_in_fewer_updates() -> None:
    """Of w ← (1 - ε)w + εx̄, with B samples in x̄, the variance goes to ε/(B(2 - ε)): Smith et al. have ε/B."""

    def stationary(rate: float, batch: int) -> float:
        return rate / (batch * (2 - rate))

    lr, half = 0.1, 300
    before, _ = variance(lr, None)
    decayed, slow = variance(multistep(lr, at=[half], factor=0.2), None)
    grown, fast = variance(lr, multistep(1, at=["50 %"], factor=5))
    assert before == pytest.approx(stationary(lr, 2), rel=1e-4)
    assert decayed == pytest.approx(stationary(lr / 5, 2), rel=1e-4)
    assert grown == pytest.approx(stationary(lr, 10), rel=1e-4)
    assert grown / decayed == pytest.approx((2 - lr / 5) / (2 - lr), rel=1e-4)  # 1 to first order in the rate
    assert (slow, fast) == (2 * half, half + half // 5)
