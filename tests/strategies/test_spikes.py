"""Spikes: corrupt batches, NaNs and a rate that is too high, each answered as the ladder says."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.train import Attempt, Diverged, Training
from downslope.train.culprit import culprit
from downslope.train.order import order

WEIGHTS = torch.tensor([[1.0, -2.0, 0.5, 3.0]])


def data(seed: int, corrupt: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear truth with a little noise, without a bias; every 40th sample corrupt, if so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(320, 4, generator=generator)
    y = x @ WEIGHTS.T + 0.1 * torch.randn(320, 1, generator=generator)
    if corrupt is not None:
        x[::80] = corrupt
    return x, y


def task(corrupt: float | None = None) -> ds.Task:
    return ds.Task(
        model=lambda: nn.Linear(4, 1, bias=False),
        train=data(0, corrupt),
        valid=data(1),
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        metric=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        higher_is_better=False,
        target=0.1,
        recipe=recipe(),
    )


def recipe(*strategies: Any, lr: float = 0.05, steps: int = 200) -> ds.Recipe:
    return ds.Recipe(chain=ds.chain(ds.sgd(lr=lr)), steps=steps, batch_size=8, strategies=list(strategies))


def attempts(training: Training, until: int | None = None) -> list[Attempt]:
    seen: list[Attempt] = []
    training.advance(until, seen.append)
    return seen


@pytest.mark.parametrize("corrupt", [1e4, 1e30, float("nan"), float("inf")])
def test_corrupt_batches_are_left_out(corrupt: float) -> None:
    """With them the weights are lost; without them the training ends where one on clean data does."""
    guarded = Training(task(corrupt), recipe(st.spikes(ladder=("skip",), window=8)))
    seen = attempts(guarded)
    left_out = [attempt for attempt in seen if not attempt.applied]
    bad = {i for i, attempt in enumerate(seen) if not attempt.applied}
    assert len(left_out) >= 4
    assert all(attempt.told[0]["did"] == "skip" for attempt in left_out)
    assert guarded.evaluate().loss < 0.05
    assert guarded.step == 200
    assert len(bad) == guarded.batches - 200
    if corrupt == 1e4:  # the others are not finite, which the guard sees too
        plain = Training(task(corrupt), recipe())
        plain.advance()
        assert not plain.evaluate().loss < 1


@pytest.mark.parametrize("strategies", [[], [st.spikes(ladder=("skip",))]])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_left_out_leaves_no_trace_in_running_statistics(bad: float, strategies: Any) -> None:
    """torch's BatchNorm is never finite again after one such batch, and so is no validation."""
    normed = replace(task(), model=lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))
    x, _ = normed.train
    x[order(320, 0, 0)[5 * 8 + 3]] = bad  # in the sixth batch
    training = Training(normed, recipe(*strategies, steps=12))
    attempts(training)
    assert training.batches == 13
    means = [x[order(320, 0, 0)[8 * k : 8 * k + 8]].mean(dim=0) for k in range(13) if k != 5]
    expected = torch.zeros(4)
    for mean in means:
        expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(training.model[0].running_mean, expected)  # type: ignore[index]
    assert training.model[0].num_batches_tracked == 12  # type: ignore[index]
    assert math.isfinite(training.evaluate().loss)


def test_a_healthy_training_is_left_alone() -> None:
    alone, watched = Training(task(), recipe()), Training(task(), recipe(st.spikes()))
    assert [float(a.loss) for a in attempts(alone)] == [float(a.loss) for a in attempts(watched)]
    assert torch.equal(alone.model.weight, watched.model.weight)


def test_a_rate_that_is_too_high_is_cut_until_it_is_not() -> None:
    """Plain sgd at this rate ends in NaN."""
    lr = 0.9
    with pytest.raises(Diverged, match="gradients of"):
        Training(task(), recipe(lr=lr, steps=400)).advance()
    watched = Training(task(), recipe(st.spikes(window=16, keep=10, calm=10, most=20), lr=lr, steps=400))
    rungs = [note["did"] for attempt in attempts(watched) for note in attempt.told]
    assert "back" in rungs
    assert watched.evaluate().loss < 0.1
    assert watched.company.lives["spikes"].lasting < 1  # type: ignore[attr-defined]


class Jumping:
    """A loss that is a hundred thousand times as large in the attempts that are named."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.count = set(bad), -1

    def task(self) -> ds.Task:
        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            self.count += 1
            found = (model(batch[0]) - batch[1]).square().mean()
            return found * (1e5 if self.count in self.bad else 1.0)

        return replace(task(), loss=loss)


def test_the_ladder_is_climbed_and_left() -> None:
    jumping = Jumping(40, 42, 44, 100, 160, 162)
    watched = Training(jumping.task(), recipe(st.spikes(window=16, calm=20, keep=10, cut=0.25), steps=200))
    seen = attempts(watched)
    rungs = {place: attempt.told[0]["did"] for place, attempt in enumerate(seen) if attempt.told}
    assert rungs == {40: "skip", 42: "cut", 44: "back", 100: "skip", 160: "skip", 162: "cut"}
    rates = [attempt.lr for attempt in seen]
    assert rates[41:43] == [0.05, 0.05]
    assert rates[43:45] == [0.05 / 4] * 2
    assert rates[45] == 0.05 / 16  # cut for a while, and for good
    assert rates[99] == rates[110] == 0.05 / 4  # for good
    assert rates[163] == 0.05 / 16
    assert watched.optimizer.param_groups[0]["lr"] == 0.05  # the recipe's own


def test_going_back_restores_the_kept_state_and_not_the_batches() -> None:
    jumping = Jumping(40, 41, 42)  # kept at updates 0, 10, … 40
    watched = Training(
        jumping.task(), recipe(st.average(), st.spikes(window=16, keep=10, calm=30), steps=200)
    )
    at: dict[int, torch.Tensor] = {}
    gone: list[tuple[int, bool]] = []

    def note(attempt: Attempt) -> None:
        weight = watched.model.weight.detach().clone()
        if attempt.told and attempt.told[0]["did"] == "back":
            gone.append((watched.step, torch.equal(weight, at[watched.step])))
            assert watched.batches == 43
        else:
            at[watched.step] = weight

    watched.advance(None, note)
    assert gone == [(40, True)]  # 40 updates were made, two batches left out, the third led back
    assert watched.step == 200
    assert watched.batches == 203


def test_it_is_given_up_at_last() -> None:
    jumping = Jumping(*range(40, 400))
    watched = Training(jumping.task(), recipe(st.spikes(window=16, keep=10, most=2)))
    with pytest.raises(Diverged, match="went back 2 times, and its loss jumped again; a lower rate may help"):
        watched.advance()


@pytest.mark.parametrize("stop", [39, 41, 42, 43, 60])
def test_stopped_anywhere_on_the_ladder_it_goes_on_to_the_bit(tmp_path: Path, stop: int) -> None:
    def made() -> ds.Task:
        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            jumps = (batch[0][0, 0] > 1.2).item()
            return (model(batch[0]) - batch[1]).square().mean() * (1e5 if jumps else 1.0)

        return replace(task(), loss=loss)

    asked = recipe(st.spikes(window=8, keep=7, calm=12, most=50), steps=120)
    straight, first = Training(made(), asked), Training(made(), asked)
    rungs = {note["did"] for attempt in attempts(straight) for note in attempt.told}
    assert rungs == {"skip", "cut", "back"}
    first.advance(None, lambda _: first.batches >= stop)
    first.save(tmp_path / "c")
    resumed = Training.load(tmp_path / "c", made())
    assert resumed.fields() == first.fields()
    resumed.advance()
    assert resumed.fields() == straight.fields()


def test_a_run_journals_what_was_done_and_who_began_it(tmp_path: Path) -> None:
    run = ds.train(
        task(float("nan")), recipe(st.spikes(ladder=("skip", "cut"))), out=tmp_path / "r", quiet=True
    )
    told = [event for event in run.events if event["kind"] == "strategy"]
    assert {event["by"] for event in told} == {"spikes"}
    assert {event["why"] for event in told} == {"its loss was not finite"}
    assert {event["did"] for event in told} <= {"skip", "cut"}
    assert all(math.isnan(event["facts"]["loss"]) for event in told)
    assert len(told) >= 4


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


def test_the_layer_and_the_operation_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Root(), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = culprit(model, lambda: model(torch.randn(5, 3)).sum())
    assert found is not None
    assert (found.operation, found.layer, found.backward) == ("sqrt", "2", False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    flat = nn.Sequential(nn.Linear(3, 3), Root())
    nn.init.zeros_(flat[0].weight)
    nn.init.zeros_(flat[0].bias)
    found = culprit(flat, lambda: flat(torch.randn(5, 3)).sum())
    assert found is not None
    assert str(found) == "div in 1, backward"
    masked = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert culprit(masked, lambda: masked(torch.randn(2, 4, 8), src_mask=mask).sum()) is None


def test_a_skip_of_any_training_names_its_culprit(tmp_path: Path) -> None:
    made = replace(task(), model=lambda: nn.Sequential(Root(), nn.Linear(4, 1)))
    with pytest.raises(Diverged):
        ds.train(made, recipe(), out=tmp_path / "r", quiet=True)
    events = ds.train.__globals__["read"](tmp_path / "r" / "journal.jsonl")
    skips = [event for event in events if event["kind"] == "skip"]
    assert skips[0]["culprit"] == "sqrt in 0, forward"
    assert "culprit" not in skips[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ladder": ("jump",)}, "a rung is one of skip, cut, back, got 'jump'"),
        ({"ladder": ("cut", "skip")}, "in the order skip, cut, back"),
        ({"cut": 1.0}, "cut within 0 and 1"),
        ({"window": 2}, "window is a number of updates from 8, got 2"),
    ],
)
def test_wrong_numbers_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        st.spikes(**given)
