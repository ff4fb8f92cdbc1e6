"""Pieces of a batch, mixing, smoothing: as a loop of one's own does them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as drawn
from strategies import problem
from torch import Tensor, nn

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.strategies.data import _Pieces
from downslope.train import Diverged, Training, order

STEPS, ITEMS = 12, problem.ITEMS


def after(task: ds.Task, *strategies: Any, **changes: Any) -> Training:
    state = Training(task, problem.recipe(*strategies, steps=STEPS, **changes), seed=1)
    state.advance()
    return state


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a weight."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def same_bits(one: Training, other: Training) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


# Pieces


@pytest.mark.parametrize("items", [1, 3, 7, 16, 100])
def test_pieces_add_up_to_the_batch_and_clip_decay_and_step_count_once(items: int) -> None:
    """Against torch's own loop on whole batches; 16 in pieces of 7 are 6, 5 and 5."""
    task = problem.plain()
    chain = ds.chain(ds.clip_norm(0.1), ds.adamw(lr=0.01, weight_decay=0.1))
    state = after(task, st.micro(items=items), chain=chain)

    begun = Training(task, problem.recipe(steps=STEPS), seed=1).model
    optimizer = torch.optim.AdamW(begun.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        epoch, place = divmod(step, len(task.train[0]) // ITEMS)
        chosen = order(len(task.train[0]), 1, epoch)[place * ITEMS : (place + 1) * ITEMS]
        optimizer.zero_grad()
        nn.functional.cross_entropy(begun(task.train[0][chosen]), task.train[1][chosen]).backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in begun.parameters()])
        assert norm > 0.1, "it must be clipped to tell"
        for weight in begun.parameters():
            weight.grad *= 0.1 / norm  # torch's own clipping adds 1e-6 to the norm
        optimizer.step()
    assert apart(state.model, begun) < 1e-10
    assert state.step == STEPS


def test_the_loss_that_is_told_is_that_of_the_whole_batch() -> None:
    seen: dict[int, list[float]] = {7: [], 16: []}
    for items, losses in seen.items():
        state = Training(problem.plain(), problem.recipe(st.micro(items=items)), seed=1)
        state.advance(6, lambda attempt, losses=losses: losses.append(float(attempt.loss)))  # type: ignore[misc]
    assert np.allclose(seen[7], seen[16], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chain", [ds.chain(ds.sam(), ds.sgd(lr=0.1)), ds.chain(ds.gd(lr=0.5))])
def test_rules_that_ask_for_the_gradient_again_get_it_in_pieces(chain: Any) -> None:
    task = problem.plain()
    whole, pieces = after(task, chain=chain), after(task, st.micro(items=7), chain=chain)
    assert apart(whole.model, pieces.model) < 1e-10


def test_a_piece_that_is_not_finite_skips_the_whole_update() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        bad = model.training and len(batch[0]) == 6  # the first piece of 16 in sevens
        return ds.cross_entropy(model, batch) * (torch.nan if bad else 1.0)

    state = Training(problem.plain(loss=loss, metric=ds.accuracy), problem.recipe(st.micro(items=7)), seed=1)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(Diverged):
        state.advance()
    assert (state.step, state.batches) == (0, 20)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())


@settings(max_examples=200, deadline=None)
@given(drawn.integers(1, 300), drawn.integers(1, 300))
def test_pieces_are_as_few_as_may_be_of_nearly_one_size_and_in_order(count: int, items: int) -> None:
    pieces = list(_Pieces(items).parts((torch.arange(count), torch.arange(count))))
    sizes = [len(piece[0]) for piece, _ in pieces]
    assert sizes == [len(part) for part in torch.arange(count).tensor_split(math.ceil(count / items))]
    assert max(sizes) <= items
    assert [share * count for _, share in pieces] == pytest.approx(sizes, rel=1e-12)
    assert torch.cat([piece[1] for piece, _ in pieces]).tolist() == list(range(count))


def test_a_piece_of_which_batchnorm_has_no_variance_is_refused_before_the_training() -> None:
    """17 items in pieces of 16 were 16 and 1; of 2 they leave 1 whatever is done."""
    seventeen = problem.recipe(st.micro(items=16), batch_size=17)
    state = Training(problem.residual(), seventeen, seed=1)
    state.advance(2)
    for items, size in ((1, 16), (2, 17)):
        with pytest.raises(BadInput, match=rf"^\[micro\] items = {items} leaves a piece of one item"):
            Training(problem.residual(), problem.recipe(st.micro(items=items), batch_size=size))
    group = [st.normalisation(to="group"), st.micro(items=1)]
    Training(problem.residual(), problem.recipe(*group)).advance(1)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).flatten(1))


def test_a_single_picture_has_a_variance_and_the_look_leaves_no_trace() -> None:
    task = problem.residual(model=Pixels)
    state, fresh = (Training(task, problem.recipe(*chosen), seed=1) for chosen in ([st.micro(items=1)], []))
    assert same_bits(state, fresh)
    assert state.fields()["generator torch"] == fresh.fields()["generator torch"]
    state.advance(2)


# Mixing and smoothing


@pytest.mark.parametrize(
    "mix",
    [
        ds.Mix(classes=10, mixup=0.4),
        ds.Mix(classes=10, mixup=0.0, cutmix=1.0, probability=0.5),
        ds.Mix(classes=10, mixup=0.2, cutmix=1.0, cutmix_share=0.3, per_item=True, smoothing=0.1),
    ],
)
def test_a_mixed_training_is_that_of_a_loss_that_mixes_by_itself(mix: ds.Mix) -> None:
    """Dropout draws from the same generator: the draws come in the same places too."""

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        return ds.cross_entropy(model, mix(*batch) if model.training else batch)

    strategy = st.mix(**{**vars(mix), "classes": None})
    declared = after(problem.residual(), strategy)
    assert same_bits(declared, after(problem.residual(loss=by_hand, metric=ds.accuracy)))
    assert not same_bits(declared, after(problem.residual()))


def test_a_smoothed_training_is_that_of_torchs_smoothed_loss() -> None:
    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        smoothing = 0.2 if model.training else 0.0
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    declared = after(problem.plain(), st.smoothing(share=0.2))
    assert apart(declared.model, after(problem.plain(loss=by_hand, metric=ds.accuracy)).model) < 1e-6
    assert apart(declared.model, after(problem.plain()).model) > 1e-3


def test_validations_are_neither_mixed_nor_smoothed() -> None:
    state, bare = (Training(problem.plain(), problem.recipe(*some), seed=1) for some in ([st.mix()], []))
    assert state.evaluate() == bare.evaluate()


def test_what_is_mixed_is_then_cut_into_pieces() -> None:
    """Each piece has partners from all over the batch: the whole is that of one piece."""
    one, many = (after(problem.plain(), st.mix(mixup=1.0), st.micro(items=items)) for items in (16, 3))
    assert apart(one.model, many.model) < 1e-10
