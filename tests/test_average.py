"""Averages: against float64 sums written from the papers, against torch where it is right, on real ranks.

`python test_average.py FOLDER` is what the ranks run.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from downslope.average import KINDS, Average, Averaging, ema, polynomial_average, swa, tail
from downslope.errors import BadInput

COUNT = 25
SAMPLES = np.random.default_rng(0).normal(size=(COUNT, 3, 2))

# --- the recurrences, against explicit sums


def weighted(weights: Any, count: int) -> Any:
    """Σ wᵢ xᵢ / Σ wᵢ over the first samples."""
    weights = np.asarray(weights, np.float64)
    return np.tensordot(weights / weights.sum(), SAMPLES[:count], 1)


def chained(decay: Callable[[int], float], count: int) -> Any:
    """shadow = d·shadow + (1 − d)·x as TensorFlow, diffusers and timm keep it, from the first sample."""
    shadow = SAMPLES[0]
    for n in range(1, count):
        shadow = decay(n) * shadow + (1 - decay(n)) * SAMPLES[n]
    return shadow


def plain_ema(count: int, d: float = 0.9) -> Any:
    first = d ** (count - 1)
    return weighted([first, *((1 - d) * d ** (count - 1 - i) for i in range(1, count))], count)


def polynomial(eta: float, count: int) -> Any:
    """arXiv:1212.1824: w̄_t = (1 − (η+1)/(t+η)) w̄_{t−1} + (η+1)/(t+η) w_t, t from 1, as one sum."""
    held = [
        (eta + 1) / (i + eta) * np.prod([1 - (eta + 1) / (t + eta) for t in range(i + 1, count + 1)])
        for i in range(1, count + 1)
    ]
    assert np.isclose(sum(held), 1.0)
    return weighted(held, count)


REFERENCES: dict[str, tuple[Averaging, Callable[[int], Any]]] = {
    "ema": (ema(0.9), plain_ema),
    "ema ratio": (ema(0.9, warmup="ratio"), lambda k: chained(lambda n: min(0.9, (1 + n) / (10 + n)), k)),
    "ema power": (
        ema(0.9, warmup="power", gamma=2.0, power=0.75),
        lambda k: chained(lambda n: min(0.9, 1 - (1 + n / 2.0) ** -0.75), k),
    ),
    "ema debiased": (
        ema(0.9, warmup="debiased"),
        lambda k: weighted([0.9 ** (k - 1 - i) for i in range(k)], k),
    ),
    "ema 0": (ema(0.0, warmup="debiased"), lambda k: SAMPLES[k - 1]),
    "swa": (swa(), lambda k: SAMPLES[:k].mean(0)),
    "polynomial 3": (polynomial_average(3), lambda k: polynomial(3, k)),
    "polynomial 0.5": (polynomial_average(0.5), lambda k: polynomial(0.5, k)),
    "polynomial 0": (polynomial_average(0), lambda k: SAMPLES[:k].mean(0)),
}


class Weight(nn.Module):
    """One weight that walks through samples."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2, dtype=dtype))

    def walk(self, place: int) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.tensor(SAMPLES[place]))


@pytest.mark.parametrize("name", REFERENCES)
def test_each_average_is_the_sum_that_its_paper_writes(name: str) -> None:
    averaging, expected = REFERENCES[name]
    model = Weight()
    average = Average(model, averaging)
    for count in range(1, COUNT + 1):
        model.walk(count - 1)
        assert average.update()
        with average.swapped():
            np.testing.assert_allclose(model.weight.detach(), expected(count), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 4), (7, 1), (7, 3), (20, 5)])
def test_swa_is_the_mean_of_the_weights_at_start_and_each_k_after(start: int, every: int) -> None:
    model = Weight()
    average = Average(model, swa(start=start, every=every))
    taken = [step for step in range(1, COUNT + 1) if step >= start and (step - start) % every == 0]
    for step in range(1, COUNT + 1):
        model.walk(step - 1)
        assert average.update() == (step in taken)
    assert (average.steps, average.samples) == (COUNT, len(taken))
    expected = np.mean([SAMPLES[step - 1] for step in taken], axis=0)
    with average.swapped():
        np.testing.assert_allclose(model.weight.detach(), expected, rtol=1e-13)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_a_tail_is_the_last_part_of_a_training(fraction: float, steps: int) -> None:
    averaging = tail(fraction, steps="100 %").resolve(run_steps=steps)
    taken = [step for step in range(1, steps + 1) if averaging.due(step, step - 1)]
    count = max(1, round(fraction * steps))
    assert taken == list(range(steps - count + 1, steps + 1))
    assert [averaging.weight(n) for n in range(count)] == [1 / (n + 1) for n in range(count)]


@given(st.integers(0, 50), st.integers(1, 20), st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_counts_that_jump_or_stand_still_take_what_was_due_once(
    start: int, every: int, jumps: list[int]
) -> None:
    averaging, last = swa(start=start, every=every), 0
    for jump in jumps:
        now = last + jump
        between = [s for s in range(last + 1, now + 1) if s >= start and (s - start) % every == 0]
        assert averaging.due(now, last) == bool(between)
        last = now


def test_power_and_ratio_reach_what_their_authors_say() -> None:
    """The inverse gamma form passes 0.999 at 31.6 thousand samples for power 2/3, at 10 thousand for 3/4."""
    two_thirds, three_quarters = ema(0.9999, warmup="power"), ema(0.9999, warmup="power", power=0.75)
    assert 1 - two_thirds.weight(31_500) < 0.999 < 1 - two_thirds.weight(31_700)
    assert 1 - three_quarters.weight(9_900) < 0.999 < 1 - three_quarters.weight(10_100)
    assert ema(0.9, warmup="ratio").weight(1) == pytest.approx(9 / 11, rel=1e-15)
    assert ema(0.9, warmup="ratio").weight(1000) == pytest.approx(0.1, rel=1e-15)


# --- torch.optim.swa_utils


class Net(nn.Module):
    """Embedding and output tied, a layer that is frozen, BatchNorm, a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0]))

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.norm(self.frozen(self.inner(self.table(rows))))) + self.mask.clamp(min=-9)


def trained(model: nn.Module, steps: int, seed: int = 0, after: Callable[[], object] = lambda: None) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randint(0, 5, (16,))), torch.randint(0, 5, (16,))).backward()
        optimizer.step()
        after()


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_ema_and_swa_are_torchs_to_the_bit(kind: str) -> None:
    model = net()
    theirs = get_ema_multi_avg_fn(0.95) if kind == "ema" else get_swa_multi_avg_fn()
    known = AveragedModel(model, multi_avg_fn=theirs)
    average = Average(model, ema(0.95) if kind == "ema" else swa())
    trained(model, 20, after=lambda: (known.update_parameters(model), average.update()))
    with average.swapped(model):
        want = dict(known.module.named_parameters())
        got = dict(model.named_parameters())
        assert {*average.state()["tensors"]} == {*want} - {"frozen.weight", "frozen.bias"}
        for name, value in want.items():
            assert torch.equal(got[name], value), name


def test_buffers_that_are_averaged_are_torchs_where_torch_is_right() -> None:
    """torch averages the count of batches too, and makes NaN of a mask of −inf."""
    model = net()
    known = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average = Average(model, ema(0.9), buffers="average")
    trained(model, 10, after=lambda: (known.update_parameters(model), average.update()))
    with average.swapped():
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(model.norm, name), getattr(known.module.norm, name))
        assert int(model.norm.num_batches_tracked) == 10
        assert torch.equal(model.mask, net().mask)
    assert int(known.module.norm.num_batches_tracked) < 10
    assert known.module.mask.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_averaged_in_float32_where_torch_stalls(dtype: torch.dtype) -> None:
    model = Weight(dtype)
    average, known = (
        Average(model, ema(0.999)),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
    )
    with torch.no_grad():
        for count in range(101):
            model.weight.fill_(1.0 if count == 0 else 1.0625)
            average.update()
            known.update_parameters(model)
    held = average.state()["tensors"]["weight"]
    exact = 1.0625 - 0.0625 * 0.999**100
    assert held.dtype is torch.float32
    np.testing.assert_allclose(held, np.full((3, 2), exact), rtol=1e-6)
    assert torch.equal(known.module.weight, torch.ones_like(model.weight))
    with average.swapped():
        assert torch.equal(model.weight, torch.full_like(model.weight, exact))
    assert torch.equal(model.weight, torch.full_like(model.weight, 1.0625))


def test_many_numbers_of_low_precision_and_of_several_kinds_are_all_reached() -> None:
    model = nn.ParameterDict(
        {
            "b16": torch.ones(3, dtype=torch.bfloat16),
            "f32": torch.ones(2, 2),
            "f64": torch.ones((), dtype=torch.float64),
            "c64": torch.ones(2, dtype=torch.complex64),
            "empty": torch.ones(0),
            "strided": torch.ones(4, 3).T,
        }
    )
    average = Average(model, swa())
    average.update()
    with torch.no_grad():
        for parameter in model.values():
            parameter.fill_(2)
    average.update()
    kinds = {name: value.dtype for name, value in average.state()["tensors"].items()}
    assert kinds == {name: p.dtype for name, p in model.items()} | {"b16": torch.float32}
    with average.swapped():
        assert all(torch.equal(p, torch.full_like(p, 1.5)) for p in model.values())
    finer = Average(model, swa(), dtype="float64")
    finer.update()
    assert finer.state()["tensors"]["b16"].dtype is torch.float64
    assert finer.state()["tensors"]["c64"].dtype is torch.complex128


def test_whole_numbers_and_float8_are_taken_right() -> None:
    model = nn.ParameterDict()
    model["small"] = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    model["whole"] = nn.Parameter(torch.arange(3), requires_grad=False)
    average = Average(model, swa())
    average.update()
    assert average.state()["tensors"]["small"].dtype is torch.float32
    with average.swapped():
        assert torch.equal(model["whole"], torch.arange(3))


# --- in place and back


class OddError(Exception):
    pass


@pytest.mark.parametrize("fault", [None, OddError, KeyboardInterrupt])
@pytest.mark.parametrize("buffers", ["copy", "average", "recompute"])
def test_trap_44_46_live_weights_and_buffers_come_back_bit_for_bit(
    buffers: str, fault: type[BaseException] | None
) -> None:
    model = net()
    average = Average(model, ema(0.5), buffers=buffers)
    trained(model, 5, after=average.update)
    before, held = bits(model), {k: v.clone() for k, v in average.state()["tensors"].items()}

    def passes(given: nn.Module) -> None:
        given.train()(torch.randint(0, 5, (16,)))

    extra = {"recalibrate": passes} if buffers == "recompute" else {}
    try:
        with average.swapped(model, **extra) as inside:
            assert inside is model
            assert torch.equal(model.inner.weight, average.state()["tensors"]["inner.weight"])
            assert not torch.equal(model.inner.weight, before["inner.weight"])
            passes(model)
            if fault is not None:
                raise fault
    except (OddError, KeyboardInterrupt):
        pass
    assert_same_bits(bits(model), before)
    assert_same_bits(average.state()["tensors"], held)
    assert average.update()


def test_trap_44_a_fault_while_weights_are_put_in_leaves_the_live_ones() -> None:
    model = net()
    average = Average(model, ema(0.5))
    trained(model, 5, after=average.update)
    before = bits(model)
    name = list(average._averages)[-1]
    average._averages[name] = average._averages[name].to("meta")  # nothing can be read there
    with pytest.raises(NotImplementedError), average.swapped():
        raise AssertionError("never inside")
    assert_same_bits(bits(model), before)


def test_a_fault_while_statistics_are_measured_leaves_the_live_ones() -> None:
    model = net()
    average = Average(model, ema(0.5), buffers="recompute")
    trained(model, 5, after=average.update)
    before = bits(model)

    def fails(given: nn.Module) -> None:
        given.norm.reset_running_stats()
        raise OddError

    with pytest.raises(OddError), average.swapped(recalibrate=fails):
        raise AssertionError("never inside")
    assert_same_bits(bits(model), before)


def test_nested_use_of_one_average_and_of_two() -> None:
    model = net()
    slow, fast = Average(model, ema(0.99)), Average(model, ema(0.1))
    trained(model, 5, after=lambda: (slow.update(), fast.update()))
    before = bits(model)
    with slow.swapped():
        outer = bits(model)
        with slow.swapped():
            assert_same_bits(bits(model), outer)
        assert_same_bits(bits(model), outer)
        with pytest.raises(BadInput, match="in place"):
            slow.update()
        with fast.swapped():
            assert torch.equal(model.inner.weight, fast.state()["tensors"]["inner.weight"])
        assert_same_bits(bits(model), outer)
    assert_same_bits(bits(model), before)


def test_nothing_is_sampled_while_averaged_weights_are_in_place() -> None:
    model = net()
    average = Average(model, ema(0.5))
    average.update()
    with average.swapped(nn.Sequential(model)[0]):
        with pytest.raises(BadInput, match=r"in place; leave swapped\(\) before the next update"):
            average.update()
        with pytest.raises(BadInput, match=r"leave swapped\(\) before copy_to"):
            average.copy_to()
    assert average.steps == average.samples == 1


def test_a_step_between_forward_and_backward_still_raises_and_updates_touch_no_version() -> None:
    model = net()
    average = Average(model, ema(0.5), buffers="average")
    average.update()
    loss = model(torch.arange(5)).sum()
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    average.update()
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    loss.backward()
    loss = model(torch.arange(5)).sum()
    with average.swapped():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_outside_leaves_a_model_that_trains() -> None:
    model = net()
    average = Average(model, ema(0.5), buffers="average")
    with torch.inference_mode():
        average.update()
    trained(model, 2, after=average.update)
    before = bits(model)
    with torch.inference_mode(), average.swapped():
        model(torch.arange(5))
    assert_same_bits(bits(model), before)
    trained(model, 2, after=average.update)
    assert average.samples == 5


def test_one_copy_of_the_weights_is_made_and_no_more() -> None:
    model = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(4)))
    average = Average(model, ema(0.5))
    average.update()
    whole = 4 * 300 * 300 * 4
    with torch.profiler.profile(profile_memory=True) as seen, average.swapped():
        pass
    allocated = sum(
        event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
        and event.nbytes() > 0
    )  # fmt: skip
    assert whole <= allocated < whole + 1e4


def test_nothing_shares_memory_with_the_model() -> None:
    model = net()
    average = Average(model, swa(), buffers="average")
    average.update()
    saved = average.state()["tensors"]
    live = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not live & {t.data_ptr() for t in saved.values()}
    assert not any(t.requires_grad for t in saved.values())
    other = Average(copy.deepcopy(model), swa(), buffers="average")
    other.load(average.state())
    pointers = {t.data_ptr() for t in other.state()["tensors"].values()}
    assert not pointers & (live | {t.data_ptr() for t in saved.values()})


# --- BatchNorm


def test_trap_43_each_policy_for_running_statistics() -> None:
    """copy: the live ones; average: their mean; recompute: what the caller's function measures."""
    rows = torch.arange(5)
    found = {}
    for policy in ("copy", "average", "recompute"):
        model = net()
        average = Average(model, swa(), buffers=policy)
        seen: list[Tensor] = []
        trained(
            model,
            6,
            after=lambda model=model, average=average, seen=seen: (
                average.update(),
                seen.append(model.norm.running_mean.clone()),
            ),
        )

        def measure(given: nn.Module) -> None:
            given.norm.reset_running_stats()
            given.norm.momentum = None
            given.train()(rows)

        with average.swapped(recalibrate=measure if policy == "recompute" else None):
            found[policy] = model.norm.running_mean.clone()
            if policy == "recompute":
                inner = model.frozen(model.inner(model.table(rows)))
                torch.testing.assert_close(found[policy], inner.mean(0))
        if policy == "copy":
            assert torch.equal(found[policy], seen[-1])
        if policy == "average":
            torch.testing.assert_close(found[policy], torch.stack(seen).mean(0))
        assert torch.equal(model.norm.running_mean, seen[-1])
    assert len({tuple(mean.tolist()) for mean in found.values()}) == 3


def test_recompute_needs_a_function_only_where_there_are_statistics() -> None:
    average = Average(net(), swa(), buffers="recompute")
    average.update()
    with pytest.raises(BadInput, match="needs recalibrate"), average.swapped():
        pass
    with pytest.raises(BadInput, match='belongs to buffers="recompute"'):
        Average(net(), swa()).copy_to(recalibrate=print)
    without = Average(nn.Linear(2, 1), swa(), buffers="recompute")
    without.update()
    with without.swapped():
        pass


def test_before_the_first_sample_the_live_weights_are_evaluated() -> None:
    model = net()
    average = Average(model, swa(start=100), buffers="recompute")
    trained(model, 3, after=average.update)
    before = bits(model)
    measured: list[nn.Module] = []
    with average.swapped(recalibrate=measured.append):
        assert_same_bits(bits(model), before)
        model(torch.arange(5))
    assert not measured
    assert_same_bits(bits(model), before)


# --- another model, other parameters


def test_another_model_of_the_same_names_gets_weights_buffers_and_what_is_frozen() -> None:
    model, other = net(), net(1)
    average = Average(model, ema(0.5))
    trained(model, 4, after=average.update)
    before = bits(other)
    with average.swapped(other):
        inside, live = bits(other), bits(model)
        for name, value in average.state()["tensors"].items():
            assert torch.equal(inside[name], value)
        for name in ("frozen.weight", "norm.running_mean", "norm.num_batches_tracked"):
            assert torch.equal(inside[name], live[name])
        assert average.update()  # the model's own weights are live
    assert_same_bits(bits(other), before)
    average.copy_to(other)
    with average.swapped(model):
        assert_same_bits(bits(other), bits(model))
    with pytest.raises(BadInput, match=r"there|average is of"):
        average.copy_to(nn.Sequential(nn.Linear(2, 2)))


def test_what_is_unfrozen_added_and_frozen_later_is_averaged_over_its_own_samples() -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model.second = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
    average = Average(model, swa())
    for step in range(1, 9):
        if step == 4:
            model.second.requires_grad_(True)
        if step == 6:
            model.third = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            model.first.requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(step)
        average.update()
    saved = average.state()
    held = {name: value[0].item() for name, value in saved["tensors"].items()}
    expected = {
        "first": np.mean([1, 2, 3, 4, 5, 5, 5, 5]),
        "second": np.mean([4, 5, 6, 7, 8]),
        "third": np.mean([6, 7, 8]),
    }
    assert held == pytest.approx(expected, rel=1e-14)
    assert saved["numbers"]["since"] == {"second": 3, "third": 5}


def test_what_vanished_or_changed_its_shape_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = Average(model, swa())
    average.update()
    kept = model[1]
    del model[1]
    with pytest.raises(BadInput, match=r"average of 1\.weight, 1\.bias, which the model does not have"):
        average.update()
    assert (average.steps, average.samples) == (1, 1)
    model.append(nn.Linear(2, 3))
    with pytest.raises(BadInput, match=r"1\.weight of shape \(2, 2\); in the model its shape is \(3, 2\)"):
        average.update()
    model[1] = kept
    assert average.update()


def test_memory_that_is_not_there_yet_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"0\.weight has no memory yet"):
        Average(nn.Sequential(nn.LazyLinear(2)), swa())
    with pytest.raises(BadInput, match=r"weight has no memory yet"):
        Average(nn.Linear(2, 2, device="meta"), swa())


def test_a_submodule_called_module_keeps_its_name_where_two_would_be_one() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.module = nn.Linear(2, 2, bias=False)
    average = Average(model, swa())
    average.update()
    assert sorted(average.state()["tensors"]) == ["module.weight", "weight"]
    before = bits(model)
    with average.swapped():
        assert_same_bits(bits(model), before)


# --- counters and state


def test_a_counter_that_stands_still_takes_no_sample_and_one_that_falls_is_refused() -> None:
    """Trap 21 and 40: an update that was skipped does not count."""
    model = Weight()
    average = Average(model, swa())
    taken = [average.update(step) for step in (1, 2, 2, 2, 3)]
    assert taken == [True, True, False, False, True]
    assert average.samples == 3
    with pytest.raises(BadInput, match="never falls: 2 after 3"):
        average.update(2)


@pytest.mark.parametrize("averaging", [ema(0.9, warmup="ratio", every=2), swa(3, 2), polynomial_average()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_in_the_middle_and_loaded_it_goes_on_bit_for_bit(
    averaging: Averaging, dtype: torch.dtype
) -> None:
    def run(steps: range, model: Weight, average: Average) -> None:
        for step in steps:
            model.walk(step)
            average.update()

    one, two = Weight(dtype), Weight(dtype)
    whole, first = Average(one, averaging), Average(one, averaging)
    run(range(11), one, first)
    saved = first.state()
    file = save({name: value.contiguous() for name, value in saved["tensors"].items()})
    numbers = json.loads(json.dumps(saved["numbers"]))
    second = Average(two, averaging)
    run(range(3), two, second)  # what it had is forgotten
    assert second.load({"tensors": load(file), "numbers": numbers}) == ()
    run(range(11, COUNT), two, second)
    run(range(COUNT), one, whole)
    assert_same_bits(second.state()["tensors"], whole.state()["tensors"])
    assert second.state()["numbers"] == whole.state()["numbers"]


def test_what_is_loaded_is_checked_whole_and_says_what_it_lacks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    small = Average(model[:1], swa())
    small.update()
    saved = small.state()
    average = Average(model, swa())
    assert average.load(saved) == ("1.weight", "1.bias")
    average.update()
    assert average.state()["numbers"]["since"] == {"1.weight": 1, "1.bias": 1}
    whole_state = average.state()
    average.load(saved)
    assert [*average.state()["tensors"]] == ["0.weight", "0.bias"]
    average.load(whole_state)
    with pytest.raises(BadInput, match=r"the saved average has 1\.weight, 1\.bias, which the model does not"):
        small.load(average.state())
    assert small.state()["numbers"] == saved["numbers"]
    other = Average(model, ema(0.5))
    with pytest.warns(UserWarning, match=r"averaging is used: ema\(decay=0\.5.* here, swa\(.*\) there"):
        other.load(average.state())
    assert other.averaging == swa()


def test_a_finer_average_stays_as_fine_on_load() -> None:
    """Trap 6, for averages."""
    model = Weight(torch.float32)
    fine, coarse = Average(model, swa(), dtype="float64"), Average(model, swa())
    for place in range(4):
        model.walk(place)
        fine.update()
    coarse.load(fine.state())
    assert coarse.state()["tensors"]["weight"].dtype is torch.float64


# --- plain data


@pytest.mark.parametrize(
    "averaging",
    [
        ema(0.99, warmup="power", power=0.75, start="10 %", every="20 steps"),
        swa("75 %", "1 epoch"),
        tail(0.3),
        polynomial_average(1, "2 epochs"),
    ],
)
def test_an_averaging_is_data(averaging: Averaging) -> None:
    assert Averaging.from_data(json.loads(json.dumps(averaging.data()))) == averaging
    assert not averaging.resolved
    with pytest.raises(BadInput, match="call resolve"):
        Average(nn.Linear(1, 1), averaging)
    with pytest.raises(BadInput, match=r"steps_per_epoch|run_steps"):
        averaging.resolve()
    resolved = averaging.resolve(run_steps=1000, steps_per_epoch=50)
    assert resolved.resolved
    assert resolved.resolve() == resolved


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: ema(1.0), r"decay must be a number from 0 to below 1, got 1\.0"),
        (lambda: ema(float("nan")), "decay must be a number"),
        (lambda: ema(True), "decay must be a number"),
        (lambda: ema(warmup="ration"), r"got 'ration'\. Did you mean 'ratio'"),
        (lambda: ema(power=0.5), 'belong to warmup="power"'),
        (lambda: ema(warmup="power", gamma=0), "gamma must be a number above 0"),
        (lambda: swa(every=0), "every must be at least 1 update"),
        (lambda: swa(start=-1), "start must be a whole number of steps"),
        (lambda: tail(0.0), "fraction must be a number above 0, at most 1"),
        (lambda: polynomial_average(-1), "eta must be a number at least 0"),
        (lambda: Averaging.from_data({"average": "emma"}), "Did you mean 'ema'"),
        (lambda: Averaging.from_data({"average": "ema", "deca": 0.9}), "Did you mean 'decay'"),
        (lambda: Averaging.from_data(["ema"]), "an averaging is a table"),
        (lambda: Average(nn.Linear(1, 1), swa(), buffers="averages"), "Did you mean 'average'"),
        (lambda: Average(nn.Linear(1, 1), swa(), dtype="bfloat16"), "one of float32, float64"),
        (lambda: Average(nn.Linear(1, 1), 0.999), r"averaging must be ema\(\.\.\.\) or another"),
    ],
)
def test_what_is_wrong_is_said(made: Callable[[], object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        made()


def test_every_kind_has_a_reference() -> None:
    tried = {averaging.kind for averaging, _ in REFERENCES.values()} | {"tail"}
    assert tried == KINDS.keys()


# --- compiled, DDP, FSDP2


def test_trap_45_a_compiled_model_is_averaged_as_the_plain_one() -> None:
    plain, model = net(), net()
    compiled = torch.compile(model, backend="eager")
    one, two = Average(plain, ema(0.5), buffers="average"), Average(compiled, ema(0.5), buffers="average")
    trained(plain, 5, after=one.update)
    trained(compiled, 5, after=two.update)
    assert_same_bits(two.state()["tensors"], one.state()["tensors"])
    with one.swapped(plain), two.swapped(model):
        assert_same_bits(bits(model), bits(plain))
        torch.testing.assert_close(compiled(torch.arange(5)), plain(torch.arange(5)))


class Deep(nn.Module):
    """Rows that two ranks share evenly, unevenly, and so that one is left with nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5, dtype=torch.float64)
        self.last = nn.Linear(5, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def batch(step: int) -> Tensor:
    return torch.tensor(np.random.default_rng(step).normal(size=(8, 4)))


def steps_of(model: nn.Module, average: Average, count: range, cut: slice = slice(None)) -> Iterator[Tensor]:
    """Train, and yield what the averaged weights say of a batch between the steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in count:
        optimizer.zero_grad()
        model(batch(step)[cut]).square().mean().backward()
        optimizer.step()
        average.update()
        with torch.no_grad(), average.swapped(model):
            yield model(batch(99)).detach()


def laid_out(layout: str) -> nn.Module:
    model = Deep()
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.first)
        fully_shard(model)
    return model


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def on_ranks(layout: str, rank: int, size: int) -> dict[str, Tensor]:
    """What training, evaluating in between, saving whole and going on gives."""
    cut = slice(None) if size == 1 else slice(4 * rank, 4 * rank + 4)
    model = laid_out(layout)
    average = Average(model, ema(0.5))
    said = list(steps_of(model, average, range(3), cut))
    saved = average.state()
    kept = {name: whole(value) for name, value in saved["tensors"].items()}
    other = Average(model, ema(0.5))
    other.load({"tensors": kept, "numbers": saved["numbers"]})
    said += list(steps_of(model, other, range(3, 6), cut))
    found = {name: whole(value) for name, value in other.state()["tensors"].items()}
    found |= {f"live {name}": whole(p) for name, p in Deep.named_parameters(model)}
    return found | {"said": torch.stack(said)}


def main(folder: Path) -> None:
    """Two ranks, forked once torch is loaded."""
    import torch.distributed as dist
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    ranks = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            try:
                store = f"file://{folder / 'store'}"
                dist.init_process_group("gloo", store, timedelta(seconds=60), 2, rank)
                for layout in ("ddp", "fsdp"):
                    found = on_ranks(layout, rank, 2)
                    found = {name.replace("live module.", "live "): value for name, value in found.items()}
                    (folder / f"{layout}-{rank}").write_bytes(save(found))
                dist.barrier()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks))


@pytest.mark.xdist_group("ranks")
def test_trap_45_ddp_and_fsdp2_average_and_evaluate_as_one_process_does(tmp_path: Path) -> None:
    """Also that FSDP2 does not go on with averaged weights that it had gathered for the evaluation."""
    switches = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path)],
        env=os.environ | switches,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = on_ranks("plain", 0, 1)
    for layout in ("ddp", "fsdp"):
        for rank in range(2):
            found = load((tmp_path / f"{layout}-{rank}").read_bytes())
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-13, err_msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
