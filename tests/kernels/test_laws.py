"""The laws that every rule keeps on every executor, multiplied over the table of cases."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, LINK_CASES, SHAPES, Shapes, draw
from executors import buckets_of, stepped_by
from torch import Tensor, nn

import downslope as ds
from downslope.kernels import compiled, cpu, sums, threads
from downslope.kernels.cpu import CHUNK
from downslope.rules import LINKS, RULES, Chain, Rule, chain, trace

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

CHAINS = {name: chain(case.part) for name, case in CASES.items()}
"""Every rule by itself."""

LINKED = {name: LINK_CASES[name].chain(CASES["momentum"]) for name in LINKS}
"""Every link around a rule whose metric is one number, which all of them take."""

SPANNING = {
    name
    for name, made in CHAINS.items()
    for stage in trace(made).stages
    if any(node.payload in ("all", "group") for node in stage.reductions)
}
"""Rules whose numbers span all tensors, so that what one receives moves the others too."""

LENDING = {name for name, made in CHAINS.items() if trace(made).lends}
"""Rules of which a library computes a part, whose sums may depend on its number of threads."""


def shapes_of(name: str) -> Shapes:
    return CASES[name].shapes if name in CASES else LINK_CASES[name].shapes or SHAPES


def parameters_of(weights: Sequence[Any], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(np.asarray(w), dtype=dtype)) for w in weights]


def give(parameters: Sequence[Any], gradients: Sequence[Any]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(np.asarray(gradient), dtype=parameter.dtype)


def drive(optimizer: ds.Optimizer, parameters: Sequence[Any], gradients: Sequence[Any]) -> None:
    """One step with these gradients, None where a parameter has none; by a closure where the chain takes it
    twice.
    """

    def closure() -> float:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None
            if gradient is not None:
                slope = torch.tensor(np.asarray(gradient), dtype=parameter.dtype, device=parameter.device)
                bend = 1 + 0.3 * parameter.detach() ** 2 if optimizer.passes > 1 else 1
                parameter.grad = slope * bend
        return 0.0

    if optimizer.passes > 1:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(one, two, strict=True))


def kept(optimizer: ds.Optimizer, parameter: Any) -> list[Tensor]:
    """A copy of a weight and all of its state."""
    return [parameter.detach().clone(), *(v.clone() for v in optimizer.state[parameter].values())]


@pytest.fixture(params=[*CHAINS, *LINKED])
def subject(request: pytest.FixtureRequest) -> Iterator[tuple[str, Chain]]:
    """Every rule, compiled, and every link, by eager, which compiles nothing."""
    name = request.param
    with stepped_by("cpu" if name in CHAINS else "eager"):
        yield name, {**LINKED, **CHAINS}[name]


def in_turn() -> Iterator[Any]:
    """Every rule in every dtype. Compiled half precision takes turns over the rules; all of it is for `make
    deep`.
    """
    for place, name in enumerate(CASES):
        for dtype in DTYPES:
            turn = dtype not in HALVES or (place % 3 == 0 and dtype is HALVES[place // 3 % 2])
            kind = str(dtype).removeprefix("torch.")
            yield pytest.param(name, dtype, "cpu" if turn else "eager", id=f"{name}-{kind}")
            if not turn:
                yield pytest.param(name, dtype, "cpu", marks=pytest.mark.deep, id=f"{name}-{kind}-compiled")


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.06, torch.float16: 0.01}


@pytest.mark.parametrize(("name", "dtype", "executor"), list(in_turn()))
def test_gradients_are_only_read_and_every_dtype_follows_eager_float64(
    name: str, dtype: torch.dtype, executor: str
) -> None:
    """Half-precision weights are stepped in float32 with float32 state; only the weight is rounded."""
    case = CASES[name]
    weights, steps = draw(5, shapes=case.shapes, steady=case.steady)
    parameters = parameters_of(weights, dtype)
    exact = parameters_of([p.detach().double().numpy() for p in parameters], torch.float64)
    optimizer, judge = (ds.Optimizer(held, CHAINS[name]) for held in (parameters, exact))
    for gradients in steps:
        give(parameters, gradients)
        held = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
        give(exact, [p.grad.double().numpy() for p in parameters if p.grad is not None])
        with stepped_by(executor):
            optimizer.step()
        with stepped_by("eager"):
            judge.step()
            assert buckets_of(judge) == {"EagerBucket"}
        for parameter, (gradient, copied) in zip(parameters, held, strict=True):
            assert parameter.grad is gradient
            assert torch.equal(gradient, copied)
    for parameter, want in zip(parameters, exact, strict=True):
        np.testing.assert_allclose(
            parameter.detach().double().numpy(),
            want.detach().numpy(),
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
        )
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for entry in optimizer.state.values():
        for slot, value in entry.items():
            single = slot != "t" and CHAINS[name].slots[slot][1].per == "tensor"
            assert value.dtype == (torch.int64 if slot == "t" else torch.float64 if single else wide)


@pytest.mark.parametrize(
    ("executor", "dtype"), [("cpu", torch.float32), *(("eager", dtype) for dtype in DTYPES)], ids=str
)
def test_links_only_read_gradients_too(executor: str, dtype: torch.dtype) -> None:
    weights, steps = draw(3)
    parameters = parameters_of(weights, dtype)
    parts = (ds.clip_norm(0.1), ds.clip_value(0.05), ds.l2(0.1), ds.adamw(), ds.cautious())
    optimizer = ds.Optimizer(parameters, chain(*parts, ds.l1(1e-3), ds.lookahead()))
    for gradients in steps:
        give(parameters, gradients)
        held = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
        with stepped_by(executor):
            optimizer.step()
        for parameter, (gradient, copied) in zip(parameters, held, strict=True):
            assert parameter.grad is gradient
            assert torch.equal(gradient, copied)


def test_without_a_gradient_weight_and_state_stay_bit_for_bit(subject: tuple[str, Chain]) -> None:
    name, made = subject
    weights, steps = draw(4, shapes=shapes_of(name))
    parameters = parameters_of(weights)
    optimizer = ds.Optimizer(parameters, made)
    drive(optimizer, parameters, steps[0])
    before = kept(optimizer, parameters[0])
    for gradients in steps[1:]:
        drive(optimizer, parameters, [None, *gradients[1:]])
    assert same(kept(optimizer, parameters[0]), before)
    assert int(optimizer.state[parameters[1]]["t"]) == optimizer.steps == 4


@pytest.mark.parametrize("name", CHAINS)
def test_a_parameter_that_comes_late_starts_at_t_1(name: str) -> None:
    """As in torch: unfrozen at step 3, it steps as if it were new, whatever the run's step is; unless the
    rule's numbers span all tensors.
    """
    weights, steps = draw(6, shapes=CASES[name].shapes)
    late, new = parameters_of(weights), parameters_of(weights)
    optimizer, fresh = ds.Optimizer(late, CHAINS[name]), ds.Optimizer(new, CHAINS[name])
    for k, gradients in enumerate(steps):
        drive(optimizer, late, [gradients[0] if k >= 3 else None, *gradients[1:]])
        if k >= 3:
            drive(fresh, new, gradients)
    assert int(optimizer.state[late[0]]["t"]) == 3
    assert int(optimizer.state[late[1]]["t"]) == 6
    if name not in SPANNING:
        assert torch.equal(late[0], new[0])


def idle(entry: Rule) -> dict[str, float]:
    """The numbers of a rule that pull at the weight whatever the gradient is, set to zero."""
    return dict.fromkeys({"weight_decay", "decay", "l1", "l2"} & set(entry.numbers), 0.0)


@pytest.mark.parametrize("name", CHAINS)
def test_a_zero_gradient_is_a_fixed_point_without_decay(name: str) -> None:
    case = CASES[name]
    made = chain(RULES[name](lr=case.lr, **{**case.numbers, **idle(RULES[name])}))
    weights, _ = draw(1, shapes=case.shapes)
    parameters = parameters_of(weights)
    optimizer = ds.Optimizer(parameters, made)
    for _ in range(5):
        drive(optimizer, parameters, [np.zeros(np.shape(w)) for w in weights])
    assert optimizer.steps == 5
    assert same(parameters, parameters_of(weights))


@pytest.mark.parametrize("name", ["l1", "elastic_net", "group_lasso", "decay", "decay_independent", "l2"])
def test_a_penalty_of_zero_is_none(name: str) -> None:
    weights, steps = draw(3)
    one, two = parameters_of(weights), parameters_of(weights)
    zero = LINKS[name](**dict.fromkeys(LINKS[name].numbers, 0.0))
    parts = (zero, ds.momentum(lr=0.1)) if name == "l2" else (ds.momentum(lr=0.1), zero)
    plain, penalised = ds.Optimizer(one, chain(ds.momentum(lr=0.1))), ds.Optimizer(two, chain(*parts))
    with stepped_by("eager"):
        for gradients in steps:
            drive(plain, one, gradients)
            drive(penalised, two, gradients)
    assert same(one, two)


def test_the_order_of_parameters_changes_nothing(subject: tuple[str, Chain]) -> None:
    name, made = subject
    weights, steps = draw(4, shapes=shapes_of(name), steady=name == "prodigy")
    found = []
    for order in (list(range(len(weights))), list(reversed(range(len(weights))))):
        parameters = parameters_of(weights)
        named = [(f"w{i}", parameters[i]) for i in order]
        optimizer = ds.Optimizer(named, made)
        for gradients in steps:
            drive(optimizer, [p for _, p in named], [gradients[i] for i in order])
        found.append(parameters)
    assert same(*found)


def test_the_default_device_of_torch_changes_nothing(
    subject: tuple[str, Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for the program's own tensors: steps, state, a load and evaluation weights go by the weights'."""
    name, made = subject
    weights, steps = draw(4, shapes=shapes_of(name), steady=name == "prodigy")
    monkeypatch.setattr(sums, "LEAST", 1)
    found = []
    for default in ("cpu", "meta"):
        parameters = parameters_of(weights)
        named = [(f"w{i}", parameter) for i, parameter in enumerate(parameters)]
        with torch.device(default):
            first, second = ds.Optimizer(named, made), ds.Optimizer(named, made)
            for gradients in steps[:2]:
                drive(first, parameters, gradients)
            second.load_state_dict(first.state_dict())
            for gradients in steps[2:]:
                drive(second, parameters, gradients)
            with second.averaged():
                evaluated = [parameter.detach().clone() for parameter in parameters]
            found.append([*evaluated, *(t for p in parameters for t in kept(second, p))])
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)  # an empty tensor has no mean


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (3, 0, 2)])
@pytest.mark.parametrize("executor", ["auto", "eager"])
def test_an_empty_tensor_keeps_lines_that_are_numbers(shape: tuple[int, ...], executor: str) -> None:
    empty, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(3, 2))
    optimizer = ds.Optimizer([empty, other], ds.adafactor(lr=0.1))
    with stepped_by(executor):
        for _ in range(2):
            empty.grad, other.grad = torch.zeros(shape), torch.ones(3, 2)
            optimizer.step()
    assert all(bool(slot.isfinite().all()) for p in (empty, other) for slot in optimizer.state[p].values())
    assert not torch.equal(other, torch.ones(3, 2))


def routed(named: Sequence[tuple[str, Any]], reverse: bool) -> ds.Optimizer:
    made = ds.route({"matrix": chain(ds.muon(lr=0.05), ds.lookahead()), "rest": ds.chain(ds.nadam(lr=0.01))})
    ways = {"matrix": lambda p: p.ndim == 2, "norm": lambda p: p.ndim == 1, "rest": lambda p: p.ndim != 1}
    roles = {"matrix": ways["matrix"], "bias": ways["norm"], "odd": lambda p: p.ndim not in (1, 2)}
    groups = [
        {"params": [(n, p) for n, p in named if inside(p)], "role": role} for role, inside in roles.items()
    ]
    return ds.Optimizer(groups[::-1] if reverse else groups, ds.chain(ds.clip_norm(0.5), made))


def test_a_route_saved_and_loaded_in_another_order_goes_on_bit_for_bit() -> None:
    """For every rule and link by itself: `test_trap_11` in test_state.py."""
    weights, steps = draw(6)
    names = [f"w{i}" for i in range(len(weights))]
    one = dict(zip(names, parameters_of(weights), strict=True))
    first = routed([*one.items()], reverse=False)
    for gradients in steps[:3]:
        drive(first, [*one.values()], gradients)
    two = {name: nn.Parameter(one[name].detach().clone()) for name in reversed(names)}
    second = routed([*two.items()], reverse=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradients in steps[3:]:
        drive(first, [*one.values()], gradients)
        drive(second, [*two.values()], gradients[::-1])
    assert same([*one.values()], [two[name] for name in names])
    assert first.steps == second.steps == 6


def shifted(value: Any, k: int) -> Any:
    return tuple(shifted(one, k) for one in value) if isinstance(value, tuple) else value * (1 - k / 100)


@pytest.mark.parametrize("name", CHAINS)
def test_a_new_rate_never_compiles_anew(name: str) -> None:
    weights, steps = draw(1, shapes=CASES[name].shapes)
    parameters = parameters_of(weights)
    optimizer = ds.Optimizer(parameters, CHAINS[name])
    optimizer.follow("lr", ds.cosine(0.1, steps=50))
    drive(optimizer, parameters, steps[0])
    before, group = compiled.load.cache_info(), optimizer.param_groups[0]
    for k in range(1, 4):
        group.update({key: shifted(CHAINS[name].defaults[key], k) for key in CHAINS[name].defaults})
        drive(optimizer, parameters, steps[0])
    assert compiled.load.cache_info() == before  # nothing was even looked up


def test_a_new_number_of_a_long_chain_never_compiles_anew() -> None:
    weights, steps = draw(1)
    parameters = parameters_of(weights)
    parts = (ds.sam(), ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(0.1, steps=50)), ds.decay(0.1), ds.l1(0.01))
    optimizer = ds.Optimizer(parameters, chain(*parts))
    drive(optimizer, parameters, steps[0])
    before = compiled.load.cache_info()
    for k in range(10):
        optimizer.param_groups[0].update(
            lr=0.1 / (k + 1), betas=(0.5 + k / 100, 0.9), weight_decay=k / 10, max_norm=1.0 + k, rho=0.1 * k
        )
        drive(optimizer, parameters, steps[0])
    assert compiled.load.cache_info() == before


@pytest.mark.parametrize("way", ["compiled", "eager", "rows", "half"])
def test_a_step_between_forward_and_backward_raises(way: str) -> None:
    table = nn.Embedding(4, 3, sparse=way == "rows")
    table.to(torch.bfloat16 if way == "half" else torch.float32)
    optimizer = ds.Optimizer(table, chain(ds.adam()))
    with stepped_by("eager" if way == "eager" else "cpu"):
        table(torch.tensor([1, 2])).sum().backward()
        loss = table.weight.square().sum()
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", [name for name in CHAINS if name not in LENDING])
def test_thread_count_changes_no_bit(name: str) -> None:
    weights, steps = draw(2, shapes=((5 * CHUNK + 11,), (70, 3)))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parameters = parameters_of(weights)
            optimizer = ds.Optimizer(parameters, CHAINS[name])
            for gradients in steps:
                give(parameters, gradients)
                optimizer.step()
            found.append(parameters)
    finally:
        torch.set_num_threads(before)
    assert same(*found)
    assert name == "lbfgs" or buckets_of(optimizer) == {"CpuBucket"}


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
def test_neither_way_of_threads_changes_a_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_word_that_changed_is_compiled_anew(tmp_path: Any) -> None:
    """The cache outlives an upgrade: code of the old version must not run under the new one."""
    package = shutil.copytree(Path(ds.__file__).parent, tmp_path / "downslope")
    words, found = package / "kernels" / "compiled.py", []
    program = (
        "import torch, downslope as ds; w = torch.nn.Parameter(torch.zeros(3)); w.grad = torch.ones(3); "
        "o = ds.Momentum([w], lr=0.5); o.step(); o.step(); print(w.tolist()[0])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DOWNSLOPE_CACHE": str(tmp_path / "cache")}
    for change in ("a * b + c", "a * b - c"):
        words.write_text(words.read_text("utf-8").replace("return a * b + c", f"return {change}"), "utf-8")
        run = [sys.executable, "-c", program]
        found.append(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found[0] != found[1]


def test_every_link_is_a_row_of_the_glossary() -> None:
    from downslope.rules.glossary import TERMS

    assert {number for entry in (*RULES.values(), *LINKS.values()) for number in entry.numbers} <= set(TERMS)
