"""Clicks: drawn with the chances that the known model gives, which nothing can beat in expectation."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder
from tasks.parts import columns
from torch import Tensor, nn

from downslope.tasks import task
from downslope.tasks.clicks import FIELDS, DeepFM, excess_log_loss, impressions, known_model, log_loss, pairs
from downslope.train import Training


class Told(nn.Module):
    """Says these logits, whatever it is asked."""

    def __init__(self, logit: Tensor) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, values: Tensor) -> Tensor:
        return self.logit


def test_the_sum_over_pairs_is_that_of_two_loops() -> None:
    factors = torch.randn(4, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = [sum(item[i] @ item[j] for i in range(7) for j in range(i + 1, 7)) for item in factors.numpy()]
    np.testing.assert_allclose(pairs(factors).numpy(), by_hand)


def test_clicks_come_with_the_chances_that_the_known_model_gives() -> None:
    """In each of ten classes of chances, clicks are within 4 standard errors of what is expected."""
    values, clicked, logit = (column.numpy() for column in impressions(200_000, seed=5))
    machine = known_model()
    by_hand = float(machine.bias) + machine.weights.numpy()[values].sum(axis=1)
    for i in range(len(FIELDS)):
        for j in range(i):
            by_hand = by_hand + (
                machine.factors.numpy()[values[:, i]] * machine.factors.numpy()[values[:, j]]
            ).sum(1)
    np.testing.assert_allclose(logit, by_hand, atol=1e-4)
    chance = 1 / (1 + np.exp(-logit.astype(np.float64)))
    for some in np.array_split(np.argsort(chance), 10):
        error = np.sqrt((chance[some] * (1 - chance[some])).sum())
        assert abs(clicked[some].sum() - chance[some].sum()) < 4 * error
    assert set(np.unique(clicked)) == {0.0, 1.0}


def test_every_field_has_values_of_its_own_the_first_the_most_frequent() -> None:
    values, _, _ = impressions(50_000, seed=1)
    first = 0
    for column, size in zip(values.unbind(dim=1), FIELDS.values(), strict=True):
        assert first <= int(column.min()) <= int(column.max()) < first + size
        share = 1 / (np.arange(size) + 3) / (1 / (np.arange(size) + 3)).sum()
        found = torch.bincount(column - first, minlength=size).numpy() / len(column)
        np.testing.assert_allclose(found, share, atol=4 * np.sqrt(share.max() / len(column)))
        first += size


def test_nothing_is_better_than_the_known_model_in_expectation() -> None:
    """The expectation over clicks, given the chances, is a Kullback-Leibler divergence."""
    one = task("clicks-deepfm")
    state = Training(one, threads=1)
    values, clicked, logit = columns(one.valid)
    chance = logit.double().sigmoid()

    def expected(told: Tensor) -> float:
        loss = nn.functional.binary_cross_entropy_with_logits
        return float(loss(told.double(), chance) - loss(logit.double(), chance))

    for steps in (0, 20, 200):
        state.advance(steps)
        with torch.no_grad():
            told = state.model(values)
        assert expected(told) > 0
        drawn = float(excess_log_loss(Told(told), (values, clicked, logit)))
        assert drawn == pytest.approx(expected(told), abs=0.01)
    for direction in (logit * 0.1, torch.ones_like(logit), -logit * 0.1):
        assert expected(logit + 0.05 * direction) > 0
    assert excess_log_loss(Told(logit), (values, clicked, logit)) == 0


def test_the_log_loss_is_that_of_the_clicks() -> None:
    logit, clicked = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    by_hand = -(np.log(1 / (1 + np.exp(-2.0))) + np.log(1 / (1 + np.exp(1.0)))) / 2
    batch = (torch.zeros(2, 1), clicked, torch.zeros(2))
    assert float(log_loss(Told(logit), batch)) == pytest.approx(by_hand, rel=1e-6)


def test_deepfm_adds_a_machine_and_a_perceptron_on_the_same_factors() -> None:
    model, values = DeepFM(), impressions(5, seed=0)[0]
    with torch.no_grad():
        told = model(values)
        for layer in model.perceptron[::2]:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        shallow = model.weights.weight[values].sum(dim=(1, 2)) + pairs(model.factors.weight[values])
        torch.testing.assert_close(model(values), shallow)
    assert not torch.allclose(told, shallow)


def test_only_the_rows_of_a_batch_move() -> None:
    state = Training(task("clicks-deepfm"), threads=1)
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    state.advance(1)
    assert isinstance(state.model, DeepFM)
    gradient = state.model.factors.weight.grad
    assert gradient is not None
    assert gradient.layout is torch.sparse_coo
    held = torch.zeros(sum(FIELDS.values()), dtype=torch.bool)
    held[gradient.coalesce().indices()[0]] = True
    assert 0 < held.sum() < len(held)
    for name in ("weights.weight", "factors.weight"):
        moved = (state.model.get_parameter(name) != before[name]).any(dim=1)
        assert torch.equal(moved, held)


def test_the_least_loss_and_a_logistic_regressions_are_as_the_page_of_tasks_says() -> None:
    least = []
    for seed in range(5):
        _, clicked, logit = columns(task("clicks-deepfm", seed).valid)
        least.append(nn.functional.binary_cross_entropy_with_logits(logit, clicked).item())
    assert np.mean(least) == pytest.approx(0.404, abs=1e-3)
    (values, clicked, _), held_out = (
        columns(part) for part in (task("clicks-deepfm").train, task("clicks-deepfm").valid)
    )
    ones = OneHotEncoder().fit(values.numpy())
    judge = LogisticRegression(max_iter=500).fit(ones.transform(values.numpy()), clicked.numpy())
    told = torch.tensor(judge.decision_function(ones.transform(held_out[0].numpy()))).float()
    assert excess_log_loss(Told(told), held_out).item() == pytest.approx(0.090, abs=2e-3)
