"""The torch face: a real torch.optim.Optimizer, state by name, live numbers, schedules, the guard,
refusals.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import downslope as ds

PAIRS: list[tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = [
    (ds.SGD, torch.optim.SGD, {"lr": 0.1}),
    (ds.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    (ds.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (
        ds.Adagrad,
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3},
    ),
    (ds.RMSprop, torch.optim.RMSprop, {"momentum": 0.5, "weight_decay": 0.1}),
    (ds.RMSprop, torch.optim.RMSprop, {"centered": True, "alpha": 0.9, "eps": 1e-3}),
    (ds.Adam, torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    (ds.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
]


def model_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1, scheduler: Any = None) -> None:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator, dtype=dtype)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def close(one: nn.Module, two: nn.Module) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs", "numbers"), PAIRS)
def test_a_drop_in_trains_as_torchs_class_does(ours: Any, theirs: Any, numbers: dict[str, Any]) -> None:
    one, two = model_of(), model_of()
    train(one, ours(one.parameters(), **numbers), 30)
    train(two, theirs(two.parameters(), **numbers), 30)
    close(one, two)


def test_it_is_an_optimizer_of_torch_with_hooks_and_closures() -> None:
    model, calls = model_of(), []
    optimizer = ds.Adam(model.parameters(), lr=0.05)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    x = torch.ones(8, 4, dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = (model(x) - 3).square().mean()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert calls == ["before", "after"] * 2
    assert second < first


SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
]


@pytest.mark.parametrize("attach", SCHEDULERS)
def test_torchs_own_schedulers_drive_it(attach: Callable[[Any], Any]) -> None:
    one, two = model_of(), model_of()
    ours, theirs = ds.Adam(one.parameters(), lr=0.05), torch.optim.Adam(two.parameters(), lr=0.05)
    train(one, ours, 20, scheduler=attach(ours))
    train(two, theirs, 20, scheduler=attach(theirs))
    close(one, two)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_a_scheduler_of_torch_on_a_rate_that_follows_ours_is_refused() -> None:
    model = model_of()
    optimizer = ds.Adam(model.parameters(), lr=ds.cosine(0.1, steps=10))
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ds.BadInput, match="keep one"):
        train(model, optimizer, 1)


def test_any_number_may_follow_a_schedule() -> None:
    model = model_of()
    optimizer = ds.Optimizer(
        model,
        ds.chain(
            ds.clip_norm(ds.linear(2.0, steps=10, end=1.0)),
            ds.adamw(lr=ds.cosine(0.1, steps=10, warmup=2), betas=(ds.linear(0.8, steps=10, end=0.9), 0.99)),
        ),
    )
    group = optimizer.param_groups[0]
    for k in range(12):
        assert group["lr"] == ds.cosine(0.1, steps=10, warmup=2)(k)
        assert group["betas"] == (ds.linear(0.8, steps=10, end=0.9)(k), 0.99)
        assert group["max_norm"] == ds.linear(2.0, steps=10, end=1.0)(k)
        train(model, optimizer, 1)


def test_a_schedule_equals_writing_the_rate_by_hand() -> None:
    one, two, plan = model_of(), model_of(), ds.cosine(0.1, steps=12, warmup=3)
    train(one, ds.AdamW(one.parameters(), lr=plan), 12)
    by_hand = ds.AdamW(two.parameters(), lr=1.0)
    for k in range(12):
        by_hand.param_groups[0]["lr"] = plan(k)
        optimizer_step(two, by_hand, k)
    again = model_of()
    optimizer = ds.AdamW(again.parameters(), lr=plan)
    for k in range(12):
        optimizer_step(again, optimizer, k)
    assert same(two, again)


def optimizer_step(model: nn.Module, optimizer: Any, seed: int) -> None:
    train(model, optimizer, 1, seed=seed)


def test_what_is_written_into_a_group_counts() -> None:
    model = model_of()
    optimizer = ds.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ds.BadInput, match="not finite"):
        train(model, optimizer, 1)


def test_follow_replaces_a_plan_at_the_runs_step() -> None:
    model = model_of()
    optimizer = ds.AdamW(model.parameters(), lr=ds.constant(0.1, warmup=2))
    train(model, optimizer, 5)
    optimizer.follow("lr", ds.constant(0.1, warmup=2).cooldown(5, 5))
    assert optimizer.param_groups[0]["lr"] == ds.constant(0.1, warmup=2).cooldown(5, 5)(5)
    train(model, optimizer, 5)
    assert optimizer.param_groups[0]["lr"] == 0.0
    with pytest.raises(ds.BadInput, match=r"has no number 'lrr'. Did you mean 'lr'\?"):
        optimizer.follow("lrr", 0.1)


def test_groups_have_numbers_of_their_own() -> None:
    one, two = model_of(), model_of()
    for model, kind in ((one, ds.SGD), (two, torch.optim.SGD)):
        optimizer: Any = kind(
            [{"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.5}], lr=0.1, momentum=0.9
        )
        train(model, optimizer, 3)
        optimizer.add_param_group({"params": model[3].parameters(), "weight_decay": 0.1})
        train(model, optimizer, 5)
    close(one, two)


def test_a_group_added_late_stands_where_the_run_stands() -> None:
    model = model_of()
    optimizer = ds.SGD(model[0].parameters(), lr=ds.cosine(0.1, steps=10, warmup=2))
    train(model, optimizer, 6)
    optimizer.add_param_group({"params": model[3].parameters()})
    first, second = optimizer.param_groups
    assert (
        (first["lr"], first["step"])
        == (second["lr"], second["step"])
        == (ds.cosine(0.1, steps=10, warmup=2)(6), 6)
    )


# --- state


def chained() -> ds.Chain:
    return ds.chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(0.1, steps=40, warmup=4)), ds.l1(1e-4))


def test_saved_and_loaded_it_goes_on_bit_for_bit() -> None:
    one = model_of()
    optimizer = ds.Optimizer(one, chained())
    train(one, optimizer, 7)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    two = copy.deepcopy(one)
    fresh = ds.Optimizer(two, chained())
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    train(one, optimizer, 9, seed=5)
    train(two, fresh, 9, seed=5)
    assert same(one, two)
    assert fresh.steps == 16
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_parameters_in_another_order_and_grouping_are_matched_by_name() -> None:
    one = model_of()
    optimizer = ds.Optimizer(one, chained())
    train(one, optimizer, 7)
    two = copy.deepcopy(one)
    named = list(two.named_parameters())
    fresh = ds.Optimizer([{"params": named[3:]}, {"params": named[:3]}], chained())
    fresh.load_state_dict(optimizer.state_dict())
    turned = ds.Optimizer(reversed(list(copy.deepcopy(one).named_parameters())), chained())
    turned.load_state_dict(optimizer.state_dict())
    train(one, optimizer, 9, seed=5)
    train(two, fresh, 9, seed=5)
    assert same(one, two)


def test_compile_and_ddp_prefixes_do_not_change_names() -> None:
    model = model_of()
    renamed = [(f"_orig_mod.module.{name}", p) for name, p in model.named_parameters()]
    assert ds.Optimizer(renamed, chained()).param_groups[0]["param_names"] == [
        n for n, _ in model.named_parameters()
    ]


def test_state_fits_a_file_of_safetensors() -> None:
    model = model_of()
    optimizer = ds.Optimizer(model, chained())
    train(model, optimizer, 2)
    flat = {f"{i}.{k}": v for i, slots in optimizer.state_dict()["state"].items() for k, v in slots.items()}
    assert save(flat)


def test_loading_shares_no_memory() -> None:
    one, two = model_of(), model_of()
    optimizer, other = ds.Optimizer(one, chained()), ds.Optimizer(two, chained())
    train(one, optimizer, 3)
    other.load_state_dict(optimizer.state_dict())
    before = {k: v.clone() for k, v in optimizer.state[one[0].weight].items()}
    train(two, other, 3)
    assert all(torch.equal(optimizer.state[one[0].weight][k], v) for k, v in before.items())


def test_missing_extra_and_misshapen_parameters_are_named_and_nothing_changes() -> None:
    model = model_of()
    optimizer = ds.Optimizer(model, chained())
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    part = ds.Optimizer(list(model.named_parameters())[1:], chained())
    with pytest.raises(ds.BadInput, match=r"the program lacks 0.weight"):
        part.load_state_dict(saved)
    assert not part.state
    with pytest.raises(ds.BadInput, match=r"the checkpoint lacks 0.weight"):
        optimizer.load_state_dict(part.state_dict())
    other = nn.Sequential(nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1))
    with pytest.raises(ds.BadInput, match=r"m of parameter 0 has shape \(6, 4\), the parameter \(7, 4\)"):
        ds.Optimizer(other, chained()).load_state_dict(saved)
    with pytest.raises(ds.BadInput, match=r"the checkpoint has m, t, v for parameter 0; momentum: v, t"):
        ds.Optimizer(model, ds.chain(ds.momentum())).load_state_dict(saved)
    with pytest.raises(ds.BadInput, match=r"'state' and 'param_groups'"):
        ds.Optimizer(model, chained()).load_state_dict({"model": 1})


def test_without_names_the_order_counts_and_a_warning_says_so() -> None:
    one = model_of()
    optimizer = ds.AdamW(one.parameters(), lr=0.1)
    train(one, optimizer, 3)
    two = copy.deepcopy(one)
    fresh = ds.AdamW(two.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="matched by order"):
        fresh.load_state_dict(optimizer.state_dict())
    train(one, optimizer, 3, seed=5)
    train(two, fresh, 3, seed=5)
    assert same(one, two)


def test_numbers_and_schedules_of_the_checkpoint_win_and_the_difference_is_told() -> None:
    model = model_of()
    optimizer = ds.Optimizer(model, chained())
    train(model, optimizer, 3)
    other = ds.Optimizer(model, ds.chain(ds.clip_norm(9.0), ds.adamw(lr=ds.constant(0.7)), ds.l1(1e-4)))
    with pytest.warns(UserWarning, match=r"lr follows constant.*here, cosine.*max_norm 9.0 here, 1.0 in the"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_norm"] == 1.0
    train(model, other, 1)
    assert other.param_groups[0]["lr"] == ds.cosine(0.1, steps=40, warmup=4)(4)


def test_loading_before_or_after_a_torch_scheduler_gives_one_rate() -> None:
    rates = []
    for early in (True, False):
        model = model_of()
        optimizer = ds.AdamW(model.named_parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        train(model, optimizer, 2, scheduler=scheduler)
        saved, plan = optimizer.state_dict(), scheduler.state_dict()
        fresh = ds.AdamW(model.named_parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if early:
                fresh.load_state_dict(saved)
            attached = torch.optim.lr_scheduler.ExponentialLR(fresh, 0.9)
            if not early:
                fresh.load_state_dict(saved)
            attached.load_state_dict(plan)
            fresh.load_state_dict(saved)
        rates.append(fresh.param_groups[0]["lr"])
    assert rates == [pytest.approx(0.081)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_keeps_its_precision_on_load(dtype: torch.dtype) -> None:
    """float32 state of a bf16 parameter stays float32, and bf16 state of a float32 parameter stays bf16."""
    model = model_of(dtype=dtype)
    optimizer = ds.Optimizer(model, ds.chain(ds.adam()))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    if dtype is torch.float32:
        for slots in saved["state"].values():
            slots["m"] = slots["m"].bfloat16()
    fresh = ds.Optimizer(model, ds.chain(ds.adam()))
    fresh.load_state_dict(saved)
    kinds = {slots["m"].dtype for slots in fresh.state.values()}
    assert kinds == {torch.float32 if dtype is torch.bfloat16 else torch.bfloat16}
    train(model, fresh, 2)
    assert {slots["m"].dtype for slots in fresh.state.values()} == kinds


def test_a_deep_copy_goes_its_own_way() -> None:
    model = model_of()
    optimizer = ds.Optimizer(model, chained())
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, seed=3)
    train(twin, other, 3, seed=3)
    assert same(model, twin)
    assert twin[0].weight is not model[0].weight


@pytest.mark.parametrize("make", [ds.AdamW, ds.Momentum, ds.Adagrad, ds.Lion, ds.RMSprop])
def test_dcp_leaves_weights_counters_and_rate_as_they_were(make: Any) -> None:
    """torch's DCP takes a step with rate 0 and zero gradients only to make the state appear."""
    one, two = model_of(), model_of()
    touched = make(one.named_parameters(), lr=ds.cosine(0.05, steps=30, warmup=3), weight_decay=0.1)
    plain = make(two.named_parameters(), lr=ds.cosine(0.05, steps=30, warmup=3), weight_decay=0.1)
    get_optimizer_state_dict(one, touched)
    assert touched.steps == 0
    assert {int(slots["t"]) for slots in touched.state.values()} == {0}
    assert touched.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    train(one, touched, 4)
    train(two, plain, 4)
    assert same(one, two)
    saved = get_optimizer_state_dict(one, touched)
    three = copy.deepcopy(one)
    fresh = make(three.named_parameters(), lr=ds.cosine(0.05, steps=30, warmup=3), weight_decay=0.1)
    set_optimizer_state_dict(three, fresh, saved)
    train(one, touched, 4, seed=7)
    train(three, fresh, 4, seed=7)
    assert same(one, three)


# --- the guard


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bad_gradient_changes_nothing_at_all(bad: float, clipped: bool, dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype)
    parts = [ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(0.1, steps=9))]
    optimizer = ds.Optimizer(model, ds.chain(*parts[not clipped :]), guard=True)
    train(model, optimizer, 2)
    before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
    model[3].weight.grad[0, 2] = bad
    optimizer.step()
    assert optimizer.skipped is not None
    assert optimizer.skipped.names == ("3.weight",)
    after = (list(model.parameters()), optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1]["param_groups"] == after[1]["param_groups"]
    for index, slots in before[1]["state"].items():
        assert all(torch.equal(after[1]["state"][index][k], v) for k, v in slots.items())
    train(model, optimizer, 1)
    assert optimizer.skipped is None
    assert optimizer.steps == 3


def test_huge_but_finite_gradients_are_not_taken_for_broken() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ds.Optimizer([weight], ds.chain(ds.sgd(lr=1e-200)), guard=True)
    weight.grad = torch.full((2,), 1e200, dtype=torch.float64)  # their squares overflow float64
    optimizer.step()
    assert optimizer.skipped is None
    assert torch.equal(weight.detach(), torch.full((2,), -1.0, dtype=torch.float64))


def test_one_nan_does_not_spread_to_other_gradients_by_clipping() -> None:
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one.grad, two.grad = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    ds.Optimizer([one, two], ds.chain(ds.clip_norm(1.0), ds.sgd(lr=1.0))).step()
    assert torch.equal(two.detach(), -torch.ones(2))


# --- refusals


class Wrapped(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (lambda: [("w", nn.Parameter(torch.ones(2, device="meta")))], r"w is a meta tensor"),
        (lambda: [("w", Wrapped(torch.ones(2)))], r"w is a Wrapped, a tensor subclass without plain memory"),
        (lambda: [torch.ones(2, dtype=torch.complex64, requires_grad=True)], r"parameter 0 is complex64"),
        (lambda: [torch.eye(2).to_sparse().requires_grad_()], r"parameter 0 is sparse_coo"),
        (lambda: {nn.Parameter(torch.ones(2))}, r"given as a set"),
        (lambda: nn.Parameter(torch.ones(2)), r"one tensor was given"),
        (list, r"given no parameters"),
        (lambda: [(name, p) for p in [nn.Parameter(torch.ones(2))] for name in "ab"], r"b was given twice"),
        (
            lambda: [{"params": [nn.Parameter(torch.ones(2))], "weight_dcay": 1}],
            r"Did you mean 'weight_decay'\?",
        ),
        (
            lambda: [{"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}],
            r"lr must be at least 0; -1 was given",
        ),
        (lambda: [("w", 3.0)], r"w must be a tensor; float was given"),
    ],
)
def test_what_cannot_be_stepped_is_refused_by_name(parameters: Any, message: str) -> None:
    with pytest.raises(ds.BadInput, match=message):
        ds.AdamW(parameters())


def test_a_sparse_gradient_is_refused_by_name() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = ds.AdamW(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ds.BadInput, match=r"weight has a sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable", "differentiable"])
def test_flags_that_pick_an_implementation_are_refused_by_name(flag: str) -> None:
    with pytest.raises(ds.BadInput, match=f"takes no '{flag}'"):
        ds.AdamW(model_of().parameters(), **{flag: True})


def test_a_misspelt_keyword_names_the_right_one() -> None:
    with pytest.raises(ds.BadInput, match=r"AdamW has no 'weigth_decay'. Did you mean 'weight_decay'\?"):
        ds.AdamW(model_of().parameters(), weigth_decay=0.1)


def test_memory_that_moved_is_followed() -> None:
    """`p.data = …` and `module.to(…)` give a parameter other memory; a stale pointer would write into freed
    memory.
    """
    one, two = model_of(), model_of()
    ours, theirs = ds.AdamW(one.parameters(), lr=0.1), torch.optim.AdamW(two.parameters(), lr=0.1)
    for model, optimizer in ((one, ours), (two, theirs)):
        train(model, optimizer, 2)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        train(model, optimizer, 2)
    close(one, two)


def test_state_put_in_by_hand_is_used() -> None:
    model = model_of()
    optimizer = ds.Momentum(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    weight = model[0].weight
    optimizer.state[weight]["v"] = torch.full_like(weight, 100.0)
    before = weight.detach().clone()
    train(model, optimizer, 1)
    assert float((before - weight.detach()).min()) > 5


def test_no_gradient_anywhere_is_no_step() -> None:
    optimizer = ds.AdamW(model_of().parameters())
    optimizer.step()
    assert optimizer.steps == 0


def test_a_frozen_parameter_may_be_given() -> None:
    model = model_of()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, ds.AdamW(model.parameters(), lr=0.1), 3)
    assert torch.equal(before, model[0].weight)


def test_counts_survive_many_parameters_of_other_age() -> None:
    model = model_of()
    optimizer = ds.Optimizer(model, ds.chain(ds.adam()))
    for k in range(4):
        train(model, optimizer, 1, seed=k)
        if k == 1:
            model[3].bias.requires_grad_(False)
            model[3].bias.grad = None
    ages = [int(optimizer.state[p]["t"]) for p in model.parameters()]
    assert ages == [4, 4, 4, 4, 2]
    assert np.isfinite([p.detach().numpy().sum() for p in model.parameters()]).all()


def test_asking_for_the_state_changes_nothing() -> None:
    """The counters handed out are copies, those kept go on counting."""
    model = model_of()
    optimizer = ds.Optimizer(model, chained())
    train(model, optimizer, 2)
    early = optimizer.state_dict()
    train(model, optimizer, 2)
    assert {int(slots["t"]) for slots in optimizer.state_dict()["state"].values()} == {4}
    assert {int(slots["t"]) for slots in early["state"].values()} == {2}
    assert [int(optimizer.state[p]["t"]) for p in model.parameters()] == [4] * 5


def test_a_profiler_sees_the_step() -> None:
    model = model_of()
    optimizer = ds.AdamW(model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1)
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("way", ["item", "update", "table"])
def test_however_state_is_replaced_the_step_uses_it(way: str) -> None:
    model = model_of()
    optimizer = ds.Momentum(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    weight = model[0].weight
    before, big = weight.detach().clone(), torch.full_like(weight, 100.0)
    if way == "item":
        optimizer.state[weight]["v"] = big
    elif way == "update":
        optimizer.state[weight].update(v=big)
    else:
        optimizer.state[weight] = {**optimizer.state[weight], "v": big}
    train(model, optimizer, 1)
    assert float((before - weight.detach()).min()) > 5
    twin = copy.deepcopy(optimizer)
    assert torch.equal(next(iter(twin.state.values()))["v"], optimizer.state[weight]["v"])


# In a backward pass


def stepped_in_backward(make: Any, steps: int, pieces: int = 1) -> nn.Module:
    """As torch's tutorial has it: an optimizer a parameter, stepped by a hook when its gradient is there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizers = {p: make([p]) for p in model.parameters()}

    def hook(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for _ in range(pieces):
            model(torch.randn(6, 4, dtype=torch.float64, generator=generator)).square().mean().backward()
    return model


def test_a_step_inside_a_backward_pass_is_torchs() -> None:
    ours = stepped_in_backward(lambda ps: ds.AdamW(ps, lr=0.1), 5)
    theirs = stepped_in_backward(lambda ps: torch.optim.AdamW(ps, lr=0.1), 5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda ps: ds.Optimizer(ps, ds.chain(ds.clip_norm(1.0), ds.sgd(lr=0.1))), "clip_norm > sgd looks"),
        (
            lambda ps: ds.Optimizer(ps, ds.chain(ds.clip_history(), ds.sgd(lr=0.1))),
            "clip_history > sgd looks",
        ),
        (lambda ps: ds.Optimizer(ps, ds.chain(ds.sgd(lr=0.1)), guard=True), "the guard looks"),
        (lambda ps: ds.Optimizer(ps, ds.chain(ds.prodigy())), "prodigy looks"),
    ],
    ids=["clip", "history", "guard", "prodigy"],
)
def test_trap_42_what_needs_all_gradients_is_refused_inside_a_backward_pass(make: Any, said: str) -> None:
    """An optimizer a tensor would clip each by its own norm, and skip each by itself."""
    with pytest.raises(
        ds.BadInput, match=f"^{said} at all gradients together, .*: call step.. after backward"
    ):
        stepped_in_backward(make, 1)


def test_trap_42_clipping_in_the_chain_after_a_backward_pass_is_allowed() -> None:
    model = nn.Linear(3, 2)
    optimizer = ds.Optimizer(model, ds.chain(ds.clip_norm(1.0), ds.sgd(lr=0.1)), guard=True)
    before = model.weight.detach().clone()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
