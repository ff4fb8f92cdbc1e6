"""The laws that every rule keeps on every executor, multiplied over the table of cases."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, draw
from torch import nn

import downslope as ds
from downslope.kernels import compiled, cpu, threads
from downslope.kernels.cpu import CHUNK
from downslope.rules import LINKS, RULES, chain

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def made(name: str, parameters: list[Any], **numbers: Any) -> ds.Optimizer:
    return ds.Optimizer(parameters, chain(CASES[name].part), **numbers)


def parameters_of(weights: list[Any], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(np.asarray(w), dtype=dtype)) for w in weights]


def give(parameters: list[Any], gradients: list[Any]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(np.asarray(gradient), dtype=parameter.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_only_read(name: str, dtype: torch.dtype) -> None:
    weights, steps = draw(3)
    parameters = parameters_of(weights, dtype)
    optimizer = ds.Optimizer(
        parameters, chain(ds.clip_norm(0.1), ds.clip_value(0.05), ds.l2(0.1), CASES[name].part)
    )
    for gradients in steps:
        give(parameters, gradients)
        kept = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
        optimizer.step()
        for parameter, (gradient, copy) in zip(parameters, kept, strict=True):
            assert parameter.grad is gradient
            assert torch.equal(gradient, copy)


@pytest.mark.parametrize("name", CASES)
def test_without_a_gradient_weight_and_state_stay_bit_for_bit(name: str) -> None:
    weights, steps = draw(4)
    parameters = parameters_of(weights)
    optimizer = made(name, parameters)
    give(parameters, steps[0])
    optimizer.step()
    weight, state = (
        parameters[0].detach().clone(),
        {k: v.clone() for k, v in optimizer.state[parameters[0]].items()},
    )
    for gradients in steps[1:]:
        give(parameters, gradients)
        parameters[0].grad = None
        optimizer.step()
    assert torch.equal(parameters[0], weight)
    assert all(torch.equal(optimizer.state[parameters[0]][k], v) for k, v in state.items())
    assert int(optimizer.state[parameters[1]]["t"]) == optimizer.steps == 4


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_that_comes_late_starts_at_t_1(name: str) -> None:
    """As in torch: unfrozen at step 3, it steps as if it were new, whatever the run's step is."""
    weights, steps = draw(6)
    late, new = parameters_of(weights, torch.float64), parameters_of(weights, torch.float64)
    optimizer, fresh = made(name, late), made(name, new)
    for k, gradients in enumerate(steps):
        give(late, gradients)
        if k < 3:
            late[0].grad = None
        else:
            give(new, gradients)
            fresh.step()
        optimizer.step()
    assert torch.equal(late[0], new[0])


@pytest.mark.parametrize("name", CASES)
def test_a_zero_gradient_is_a_fixed_point_without_decay(name: str) -> None:
    numbers = {k: v for k, v in CASES[name].numbers.items() if k != "weight_decay"}
    zero = {"weight_decay": 0.0} if "weight_decay" in RULES[name].numbers else {}
    weights, _ = draw(1)
    parameters = parameters_of(weights)
    optimizer = ds.Optimizer(
        parameters, chain(RULES[name](lr=0.1, **numbers, **zero), *([ds.l1(0.0)] if name != "lion" else []))
    )
    for _ in range(5):
        give(parameters, [np.zeros(np.shape(w)) for w in weights])
        optimizer.step()
    assert all(
        torch.equal(p, torch.tensor(w, dtype=torch.float32)) for p, w in zip(parameters, weights, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_follows_float64(name: str, dtype: torch.dtype) -> None:
    """Half-precision weights are stepped in float32 with float32 state; only the weight is rounded."""
    weights, steps = draw(5)
    parameters, exact = parameters_of(weights, dtype), parameters_of(weights, torch.float64)
    optimizer, judge = made(name, parameters), made(name, exact)
    for gradients in steps:
        give(parameters, gradients)
        give(exact, [p.grad.double().numpy() for p in parameters if p.grad is not None])
        optimizer.step()
        judge.step()
    tolerance = {torch.float32: 2e-6, torch.float64: 0, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for parameter, want in zip(parameters, exact, strict=True):
        np.testing.assert_allclose(
            parameter.detach().double().numpy(), want.detach().numpy(), atol=tolerance, rtol=tolerance
        )
    held = {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "t"}
    assert held <= {torch.float64 if dtype is torch.float64 else torch.float32}


@pytest.mark.parametrize("size", [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, 9 * CHUNK])
def test_chunks_leave_no_seam(size: int) -> None:
    weights, steps = draw(2, shapes=((size,), (3,)))
    parameters, judge = (
        parameters_of(weights, torch.float64),
        [torch.tensor(w, requires_grad=True) for w in weights],
    )
    optimizer, reference = ds.AdamW(parameters), torch.optim.AdamW(judge)
    for gradients in steps:
        give(parameters, gradients)
        give(judge, gradients)
        optimizer.step()
        reference.step()
    for parameter, want in zip(parameters, judge, strict=True):
        torch.testing.assert_close(parameter.data, want.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", ["torch's threads", "ours"])
def test_thread_count_changes_no_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "ours":
        monkeypatch.setattr(threads, "openmp", lambda: None)
    else:
        assert threads.openmp() is not None, "this build of torch brings OpenMP; else ours do the work"
    weights, steps = draw(3, shapes=((5 * CHUNK + 11,), (70, 3), (4 * CHUNK,)))
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            parameters = parameters_of(weights)
            optimizer = ds.Optimizer(parameters, chain(ds.clip_norm(1.0), ds.adamw(lr=0.1)))
            for gradients in steps:
                give(parameters, gradients)
                optimizer.step()
            found.append([p.detach().clone() for p in parameters])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_eager_sums_do_not_depend_on_threads() -> None:
    weights, steps = draw(1, shapes=((9 * CHUNK + 5,),))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            parameters = parameters_of(weights, torch.bfloat16)
            give(parameters, steps[0])
            ds.Optimizer(parameters, chain(ds.clip_norm(1.0), ds.sgd(lr=1.0))).step()
            found.append(parameters[0].detach().clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_order_of_parameters_changes_nothing() -> None:
    weights, steps = draw(4)
    found = []
    for order in (list(range(len(weights))), list(reversed(range(len(weights))))):
        parameters = parameters_of(weights)
        optimizer = ds.Optimizer(
            [parameters[i] for i in order], chain(ds.clip_norm(0.5), ds.adam(lr=0.1), ds.l1(0.01))
        )
        for gradients in steps:
            give(parameters, gradients)
            optimizer.step()
        found.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "layout", ["transposed", "channels_last", "sliced", "expanded gradient", "strided gradient"]
)
def test_any_layout_steps_alike(layout: str) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 3, 6, 5), torch.randn(4, 3, 6, 5)
    shaped, grad = weight.clone(), gradient
    if layout == "transposed":
        shaped = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    elif layout == "channels_last":
        shaped = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        shaped = torch.zeros(4, 3, 6, 10)[..., ::2].copy_(weight)
    elif layout == "expanded gradient":
        grad = gradient = torch.randn(1, 3, 1, 5).expand(4, 3, 6, 5)
    else:
        grad = gradient.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    plain, odd = nn.Parameter(weight.clone()), nn.Parameter(shaped)
    one, two = (ds.Optimizer([p], chain(ds.clip_norm(1.0), ds.adamw(lr=0.1))) for p in (plain, odd))
    for _ in range(3):
        plain.grad, odd.grad = gradient.contiguous(), grad
        one.step()
        two.step()
    torch.testing.assert_close(odd.data, plain.data, rtol=1e-6, atol=1e-7)
    assert odd.stride() == shaped.stride()


def test_mixed_dtypes_share_one_global_norm() -> None:
    weights, steps = draw(1, shapes=((5,), (4,), (3,)))
    parameters = [nn.Parameter(torch.tensor(w, dtype=d)) for w, d in zip(weights, DTYPES, strict=False)]
    give(parameters, steps[0])
    norm = torch.cat([p.grad.double() for p in parameters if p.grad is not None]).norm()
    before = [p.detach().clone().double() for p in parameters]
    ds.Optimizer(parameters, chain(ds.clip_norm(0.5), ds.sgd(lr=1.0))).step()
    for parameter, old in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        want = old - parameter.grad.double() * (0.5 / norm)
        torch.testing.assert_close(
            parameter.detach().double(),
            want,
            atol=1e-2 if parameter.dtype == torch.bfloat16 else 1e-6,
            rtol=0,
        )


def test_a_new_rate_never_compiles_anew() -> None:
    weights, steps = draw(1)
    parameters = parameters_of(weights)
    optimizer = ds.Optimizer(
        parameters, chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(0.1, steps=50)), ds.decay(0.1))
    )
    give(parameters, steps[0])
    optimizer.step()
    before = compiled.load.cache_info()
    for k in range(10):
        optimizer.param_groups[0].update(
            lr=0.1 / (k + 1), betas=(0.5 + k / 100, 0.9), weight_decay=k / 10, max_norm=1.0 + k
        )
        optimizer.step()
    assert compiled.load.cache_info() == before  # nothing was even looked up


def test_a_step_between_forward_and_backward_raises() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = ds.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    loss = model(torch.ones(2, 3)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_steps_alone() -> None:
    """A DataLoader worker that steps must neither hang on threads that fork did not copy nor on a lock held
    elsewhere.
    """
    parameters = parameters_of([np.ones(cpu.SERIAL * 2)])
    give(parameters, [np.ones(cpu.SERIAL * 2)])
    optimizer = ds.AdamW(parameters, lr=0.1)
    optimizer.step()  # the threads exist now
    before = float(parameters[0].detach()[0])
    child = os.fork()
    if child == 0:
        optimizer.step()
        os._exit(0 if float(parameters[0].detach()[0]) < before else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("way", ["torch's threads", "ours"])
def test_optimizers_may_step_at_the_same_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "ours":
        monkeypatch.setattr(threads, "openmp", lambda: None)
    weights, steps = draw(1, shapes=((cpu.SERIAL * 2,),))
    single = parameters_of(weights)
    several = [parameters_of(weights) for _ in range(4)]
    for parameters in (single, *several):
        give(parameters, steps[0])

    def work(parameters: list[Any]) -> None:
        optimizer = ds.AdamW(parameters, lr=0.1)
        for _ in range(20):
            optimizer.step()

    work(single)
    running = [threading.Thread(target=work, args=(parameters,)) for parameters in several]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(torch.equal(parameters[0], single[0]) for parameters in several)


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOWNSLOPE_CACHE", str(tmp_path / "file" / "below"))
    assert compiled.cache_folder() is None
    compiled.load.cache_clear()
    parameters = parameters_of([np.ones(3)])
    give(parameters, [np.ones(3)])
    ds.Optimizer(parameters, chain(ds.sgd(lr=0.25))).step()
    assert torch.equal(parameters[0].detach(), torch.full((3,), 0.75))


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_may_write_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, mode: int
) -> None:
    """What is read back from there is run, so only its owner may write it."""
    monkeypatch.setenv("DOWNSLOPE_CACHE", str(tmp_path))
    tmp_path.chmod(mode)
    assert compiled.cache_folder() is None
    tmp_path.chmod(0o700)
    assert compiled.cache_folder() == tmp_path


def test_a_damaged_cache_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("DOWNSLOPE_CACHE", str(tmp_path))
    for damage in (False, True):
        if damage:
            for path in [*tmp_path.rglob("*.nbc"), *tmp_path.rglob("*.nbi"), *tmp_path.glob("*.py")]:
                path.write_bytes(b"damaged")
        compiled.load.cache_clear()
        parameters = parameters_of([np.ones(3)])
        give(parameters, [np.ones(3)])
        ds.Optimizer(parameters, chain(ds.momentum(lr=0.5))).step()
        assert torch.equal(parameters[0].detach(), torch.full((3,), 0.5))
    assert list(tmp_path.rglob("*.nbc"))


def test_every_link_is_a_row_of_the_glossary() -> None:
    from downslope.rules.glossary import TERMS

    assert {number for entry in (*RULES.values(), *LINKS.values()) for number in entry.numbers} <= set(TERMS)
