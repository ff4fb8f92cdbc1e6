"""Probes leave no trace, and see what a model calls."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from downslope.inspection import graphs, untouched


class Branching(nn.Module):
    """A forward that no trace can follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("raises", [False, True])
def test_modes_buffers_and_generators_are_as_before(raises: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    try:
        with untouched(model):
            model.train()(torch.randn(8, 3))
            assert int(model[1].num_batches_tracked) == 1
            draws()
            model[1].running_mean = None
            if raises:
                raise KeyError
    except KeyError:
        assert raises
    assert draws() == expected
    assert [module.training for module in model.modules()] == [True, True, True, False]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_a_graph_that_is_alive_stays_valid() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.randn(8, 3)
    loss = model(x).square().sum()
    with untouched(model):
        model(x + 1)
    loss.backward()


def test_what_forward_draws_on_the_gpu_is_put_back() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = nn.Dropout(0.5)
    model.register_buffer("here", torch.zeros((), device="cuda"))
    before = torch.cuda.get_rng_state()
    with untouched(model):
        model(torch.ones(100, device="cuda"))
        assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_one_graph_where_all_can_be_traced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    found = graphs(model)
    assert list(found) == [""]
    assert [n.target for n in found[""].nodes if n.op == "call_module"] == ["0", "1.0", "1.1"]


def test_what_cannot_be_traced_is_a_leaf_and_what_is_inside_has_its_own_graph() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    found = graphs(nn.Sequential(nn.Linear(2, 2), Branching(inner), nn.Tanh()))
    calls = {k: [n.target for n in g.nodes if n.op == "call_module"] for k, g in found.items()}
    assert calls == {"": ["0", "1", "2"], "1.inner": ["0", "1"]}
    assert list(graphs(Branching(Branching(inner)))) == ["inner.inner"]


def test_what_a_list_holds_is_traced_with_what_calls_it() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    assert list(graphs(Stack())) == [""]
    assert sorted(graphs(Branching(Stack().blocks))) == ["inner.0", "inner.1"]
