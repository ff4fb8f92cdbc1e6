"""Networks on digits have the layers they claim; the factorisation ends at the truncated SVD."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tasks.parts import columns
from torch import nn

from downslope.tasks import task
from downslope.tasks.digits import RANK, Residual, RowReader, resnet
from downslope.train import Training


def test_the_residual_network_has_14_layers_and_a_norm_behind_every_convolution() -> None:
    model = resnet()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [m for m in convolutions if m.kernel_size == (1, 1)]
    assert len(convolutions) - len(shortcuts) + sum(isinstance(m, nn.Linear) for m in model.modules()) == 14
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [m.out_channels for m in convolutions]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_block_whose_body_is_silent_passes_its_input_on() -> None:
    block = Residual(4, 4, stride=1)
    last = block.body[-1]
    assert isinstance(last, nn.BatchNorm2d)
    nn.init.zeros_(last.weight)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.relu())
    assert Residual(4, 6, stride=2)(x).shape == (3, 6, 4, 4)


def test_the_rows_are_read_from_the_top_and_all_of_them() -> None:
    model = RowReader().double()
    rows = torch.randn(
        2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    logits = model(rows)
    (slope,) = torch.autograd.grad(logits.sum(), rows)
    assert (slope.abs().sum(dim=2) > 0).all()
    state = (torch.zeros(2, 64, dtype=torch.float64),) * 2
    cell = nn.LSTMCell(8, 64, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in model.lstm.state_dict().items()})
    for row in rows.unbind(dim=1):
        state = cell(row, state)
    torch.testing.assert_close(model.head(state[0]), logits)


def test_the_lstm_sees_the_pictures_that_the_others_see() -> None:
    assert torch.equal(
        columns(task("digits-lstm").train)[0], columns(task("digits-resnet").train)[0].squeeze(1)
    )


def test_the_factorisation_ends_at_the_truncated_svd() -> None:
    """The product is unique where the singular values differ, though its factors are not."""
    one = task("digits-factorisation")
    state = Training(one, seed=1, threads=1)
    state.advance()
    pixels = load_digits().data / 16
    left, values, right = np.linalg.svd(pixels, full_matrices=False)
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    with torch.no_grad():
        found = state.model(torch.arange(len(pixels))).numpy()
    np.testing.assert_allclose(found, best, atol=1e-3)
    objective, optimum = ((pixels - found) ** 2).mean(), ((pixels - best) ** 2).mean()
    assert state.evaluate().metric == pytest.approx(objective / optimum - 1, abs=1e-9)
    assert abs(objective / optimum - 1) < 1e-6
