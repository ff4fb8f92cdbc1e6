"""What compiled code sees of weights and gradients is what Python sees, for every kind of gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import downslope as ds
from downslope.kernels import address
from downslope.kernels.address import PLAIN, SOME_MISSING, SOME_MOVED, SOME_ODD, Addresses, Trained

GRADIENTS: list[tuple[Any, int]] = [
    (lambda: torch.ones(4, 3), PLAIN),
    (lambda: None, SOME_MISSING),
    (lambda: torch.ones(3, 4).t(), SOME_ODD),
    (lambda: torch.ones(1, 3).expand(4, 3), SOME_ODD),
    (lambda: torch.ones(4, 3).to_sparse(), SOME_ODD),
    (lambda: torch.ones(8, 3)[::2], SOME_ODD),
]


@pytest.mark.parametrize("way", ["native", "python"])
@pytest.mark.parametrize(("make", "kind"), GRADIENTS)
def test_each_kind_of_gradient_is_told_apart(
    way: str, make: Any, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "native":
        assert address.native() is not None, (
            "this build of torch has every name; else the step is only slower"
        )
    else:
        monkeypatch.setattr(address, "native", lambda: None)
    parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.full((4, 3), 2.0)
    parameters[1].grad = make()
    seen = Addresses(parameters)
    assert seen.look() == kind
    assert seen.weights.tolist() == [p.data_ptr() for p in parameters]
    want = [p.grad.data_ptr() if p.grad is not None else 0 for p in (parameters[0], parameters[2])]
    assert [seen.gradients[0], seen.gradients[2]] == want
    if kind == PLAIN and parameters[1].grad is not None:
        assert seen.gradients[1] == parameters[1].grad.data_ptr()
    else:
        assert seen.gradients[1] == 0


def test_every_way_steps_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for way in ("native", "python"):
        if way == "python":
            monkeypatch.setattr(address, "native", lambda: None)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
        optimizer = ds.AdamW(model.parameters(), lr=0.1)
        for k in range(6):
            optimizer.zero_grad()
            model(torch.randn(3, 5)).sum().backward()
            if k % 2:
                model[0].bias.grad = None
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("way", ["native", "python"])
def test_versions_count_what_was_written(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "python":
        monkeypatch.setattr(address, "native", lambda: None)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    before = [p._version for p in parameters]
    Addresses(parameters).written()
    assert [p._version for p in parameters] == [version + 1 for version in before]


@pytest.mark.parametrize("way", ["native", "python"])
def test_who_asks_for_a_gradient(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "python":
        monkeypatch.setattr(address, "native", lambda: None)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    watch = Trained(parameters)
    first = watch.look()
    parameters[1].requires_grad_(False)
    assert np.frombuffer(first, np.int64).tolist() == [1, 1, 1]
    assert np.frombuffer(watch.look(), np.int64).tolist() == [1, 0, 1]


@pytest.mark.parametrize("way", ["native", "python"])
def test_memory_that_moved_is_noticed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "python":
        monkeypatch.setattr(address, "native", lambda: None)
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    seen = Addresses([weight])
    assert seen.look() == PLAIN
    weight.grad = None
    weight.data = weight.data[:2]  # the same address, another size
    assert seen.look() & SOME_MOVED
    weight.data = torch.zeros(4)
    assert seen.look() & SOME_MOVED


@pytest.mark.parametrize("odd", [0, 31, 32, 198, 199])
def test_many_parameters_are_looked_at_by_several_threads(odd: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        parameters = [nn.Parameter(torch.zeros(5)) for _ in range(200)]
        for parameter in parameters:
            parameter.grad = torch.ones(5)
        seen = Addresses(parameters)
        for _ in range(20):
            seen.gradients[:] = 0
            assert seen.look() == PLAIN
            assert seen.gradients.tolist() == [p.grad.data_ptr() for p in parameters if p.grad is not None]
        parameters[odd].grad = None
        parameters[(odd + 50) % 200].grad = torch.ones(10)[::2]
        assert seen.look() == SOME_MISSING | SOME_ODD
        assert np.flatnonzero(seen.gradients == 0).tolist() == sorted([odd, (odd + 50) % 200])
    finally:
        torch.set_num_threads(threads)


def test_handles_keep_nothing_alive_for_ever() -> None:
    import gc
    import weakref

    parameter = nn.Parameter(torch.zeros(2))
    seen = Addresses([parameter])
    seen.look()
    gone = weakref.ref(parameter)
    del seen, parameter
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("way", ["native", "python"])
def test_weights_that_are_swapped_are_followed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.utils.swap_tensors` refuses tensors that C++ counts twice; `module.to` may go through it."""
    if way == "python":
        monkeypatch.setattr(address, "native", lambda: None)
    weight, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    optimizer = ds.Momentum([weight], lr=0.5, momentum=0.5)
    weight.grad = torch.ones(4)
    optimizer.step()
    torch.utils.swap_tensors(weight, other)
    weight.grad = torch.ones(4)
    optimizer.step()
    assert weight.tolist() == [1 - 0.75] * 4  # its momentum stays that of the parameter
    assert other.tolist() == [-0.5] * 4
    del other
    weight.grad = torch.ones(4)
    optimizer.step()
    assert weight.tolist() == [0.25 - 0.875] * 4


def test_a_module_converted_by_swapping_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = nn.Linear(3, 2)
    optimizer = ds.SGD(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.double()
    before = model.weight.detach().clone()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert model.weight.dtype is torch.float64
    assert torch.equal(model.weight.detach(), before - 0.5)


def test_a_torch_that_answers_otherwise_is_asked_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_FUNCTIONS", ("no_such_function", *address._FUNCTIONS[1:]))
    address.native.cache_clear()
    try:
        assert address.native() is None
    finally:
        monkeypatch.undo()
        address.native.cache_clear()
    weight = nn.Parameter(torch.zeros(2))
    seen = Addresses([weight])
    assert seen.look() == SOME_MISSING
    weight.data = torch.zeros(2)
    assert seen.look() == SOME_MISSING | SOME_MOVED
