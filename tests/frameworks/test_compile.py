"""A model behind torch.compile is trained as without it: same names, same weights, no recompilation."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks.trajectory import PAIRS, Make, Trajectory, assert_equal, assert_near, weights
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor

import downslope as ds

# dynamo looks for a gradient in whatever comes into a part that is compiled by itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

STEPS = 8
NAMES = ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"]
BACKEND = "aot_eager"  # traces forward and backward as the default does, and needs no C++ compiler


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """torch.compile remembers every function of the process, and gives up on those with too many versions."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Sequential):
    """A module of one's own; `compile` on one of torch's own classes compiles nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def plain() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(4, 6, bias=False)  # behind BatchNorm a bias has only noise for a gradient
    return Net(first, nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


def wrapped(backend: Any) -> nn.Module:
    model: Any = torch.compile(plain(), backend=backend)
    return model


def in_place(backend: Any) -> nn.Module:
    model = plain()
    model.compile(backend=backend)
    return model


def by_part(backend: Any) -> nn.Module:
    model: Any = plain()
    for i in (0, 3):
        model[i] = torch.compile(model[i], backend=backend)
    return model


WAYS = pytest.mark.parametrize("compiled", [wrapped, in_place, by_part])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS, seed: int = 1
) -> Trajectory:
    draw, trajectory = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
        nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()).backward()
        optimizer.step()
        trajectory.append(weights(model))
    return trajectory


def trained(model: nn.Module, make: Make, **numbers: Any) -> Trajectory:
    return train(model, make(model.named_parameters(), **numbers))


@WAYS
@pytest.mark.parametrize("name", PAIRS)
def test_drop_ins_train_as_torchs_classes_do(name: str, compiled: Callable[[Any], nn.Module]) -> None:
    ours, theirs, numbers = PAIRS[name]
    counter = CompileCounterWithBackend(BACKEND)
    found = trained(compiled(counter), ours, **numbers)
    assert counter.frame_count >= 1
    assert_near(found, trained(compiled(BACKEND), theirs, **numbers))
    assert_near(found, trained(plain(), ours, **numbers))


def chained(model: nn.Module) -> ds.Optimizer:
    return ds.Optimizer(model, ds.chain(ds.clip_norm(0.05), ds.adamw(lr=ds.cosine(0.02, steps=2 * STEPS))))


@WAYS
def test_names_have_no_prefix_so_state_moves_in_and_out(compiled: Callable[[Any], nn.Module]) -> None:
    """A run that goes on behind torch.compile is the run without it, and its state loads without it."""
    whole = plain()
    optimizer = chained(whole)
    train(whole, optimizer)
    halfway, state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    end = train(whole, optimizer, seed=2)

    model = compiled(BACKEND)
    for target, value in zip(model.state_dict().values(), halfway.values(), strict=True):
        target.copy_(value)
    goes_on = chained(model)
    goes_on.load_state_dict(state)
    assert goes_on.state_dict()["param_groups"][0]["param_names"] == NAMES
    assert_near(train(model, goes_on, seed=2), end)

    back = plain()
    back.load_state_dict(dict(zip(halfway, model.state_dict().values(), strict=True)))
    last = chained(back)
    last.load_state_dict(goes_on.state_dict())
    assert last.steps == 2 * STEPS
    assert_equal(weights(back), weights(model))


def test_no_rate_and_no_step_compiles_anew() -> None:
    model = wrapped(BACKEND)
    optimizer = chained(model)
    train(model, optimizer, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer)
        optimizer.follow("lr", 0.5)
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        train(model, optimizer)
    assert optimizer.steps == 1 + 2 * STEPS


@pytest.mark.parametrize("what", ["the whole step", "the optimizer's step"])
def test_compiled_code_may_step(what: str) -> None:
    """torch.compile leaves out the optimizer, as it leaves out what it cannot trace."""

    def compiled(make: Make) -> Trajectory:
        model = plain()
        optimizer = make(model.named_parameters())
        if what == "the optimizer's step":
            optimizer.step = torch.compile(optimizer.step, backend=BACKEND)  # type: ignore[method-assign]
            return train(model, optimizer)

        @torch.compile(backend=BACKEND)
        def update(x: torch.Tensor) -> None:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()).backward()
            optimizer.step()

        draw, trajectory = torch.Generator().manual_seed(1), []
        for _ in range(STEPS):
            update(torch.randn(8, 4, generator=draw, dtype=torch.float64))
            trajectory.append(weights(model))
        return trajectory

    ours, theirs, numbers = PAIRS["AdamW"]
    assert_near(compiled(lambda parameters: ours(parameters, **numbers)), trained(plain(), theirs, **numbers))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler")
# torch's own, while it loads the backend.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_the_default_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ours, theirs, numbers = PAIRS["AdamW"]
    # No pool of processes for one kernel. (monkeypatch would leave the setting deleted.)
    with inductor.patch(compile_threads=1):
        model = wrapped("inductor")
        found = trained(model, ours, **numbers)
    assert list(tmp_path.rglob("*.cpp"))
    assert_near(found, trained(plain(), theirs, **numbers))
