"""TrainState: every part of anybody's loop goes on to the bit, in any order, or is told by name."""

import random
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

import downslope as ds
from downslope.errors import BadInput
from downslope.train.checkpoint import Damaged
from downslope.train.plain import Packed, pack, unpack

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lrs.StepLR(o, 3, 0.5),
    "multistep": lambda o: lrs.MultiStepLR(o, [3, 8], 0.1),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 12),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4, 2),
    "cycle": lambda o: lrs.CyclicLR(o, 0.001, 0.1, 3, cycle_momentum=False),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=True),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 1 / (step + 1)),
    "product": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.95),
    "polynomial": lambda o: lrs.PolynomialLR(o, 20),
    "sequence": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1), lrs.StepLR(o, 2)], [4]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 4), lrs.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.005, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.01, amsgrad=True),
    "adamw": lambda m: torch.optim.AdamW(m.named_parameters(), 0.01, fused=True),
    "capturable": lambda m: torch.optim.NAdam(m.parameters(), torch.tensor(0.01), foreach=False),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.05),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), 0.01, centered=True),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=2, history_size=3),
    "groups": lambda m: torch.optim.AdamW([{"params": [p], "lr": 0.01} for p in m.parameters()], 0.1),
    "ours": lambda m: ds.Optimizer(m, ds.chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(0.01, steps=20)))),
    "drop-in": lambda m: ds.Lion(m.parameters(), lr=0.001),
}


class Net(nn.Module):
    def __init__(self, last: str = "head") -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = nn.Parameter(torch.randn(8, 8))
        self.add_module(last, nn.Linear(8, 1))
        self.last = last
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = nn.functional.dropout(self.norm(self.body(x)).relu(), 0.2, self.training)
        return self.get_submodule(self.last)(hidden + self.tied(hidden))  # type: ignore[no-any-return]


class Loop:
    """A loop as people write it, without a thought of ours, of `steps` steps at a time."""

    def __init__(self, optimizer: str = "adam", scheduler: str | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = Net()
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer) if scheduler else None

    def run(self, steps: int) -> list[float]:
        return [self._step() for _ in range(steps)]

    def state(self, **more: Any) -> ds.TrainState:
        more |= {"scheduler": self.scheduler} if self.scheduler else {}
        return ds.TrainState(self.model, self.optimizer, **more)

    def _step(self) -> float:
        x = torch.randn(16, 4) + float(np.random.rand()) + random.random()

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            found = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            found.backward()
            return found

        loss = float(self.optimizer.step(closure).detach())
        if isinstance(self.scheduler, lrs.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler:
            self.scheduler.step()
        return loss


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter in")
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
        yield


def goes_on(tmp_path: Path, make: Callable[[int], Loop], half: int = 7) -> None:
    first = make(0)
    first.run(half)
    first.state().save(tmp_path / "c")
    straight, end = first.run(half), first.state().fields()
    second = make(1)
    found = second.state()
    told = found.load(tmp_path / "c")
    assert not any((told.missing, told.waiting, told.changed)), str(told)
    assert second.run(half) == straight
    assert found.fields() == end


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    goes_on(tmp_path, lambda seed: Loop(optimizer, seed=seed))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_goes_on_to_the_bit(tmp_path: Path, scheduler: str) -> None:
    goes_on(tmp_path, lambda seed: Loop("adam", scheduler, seed))


@pytest.mark.parametrize("scheduler", ["step", "one cycle", "lambda", "sequence", "plateau"])
def test_a_scheduler_attached_after_the_load_goes_on_at_the_same_rate(tmp_path: Path, scheduler: str) -> None:
    """Trap 3 and 4: in torch the rate is then that of the beginning."""
    first = Loop("adam", scheduler)
    first.run(6)
    first.state().save(tmp_path / "c")
    straight = first.run(6)
    second = Loop("adam", seed=1)
    state = second.state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody knows yet that it is a scheduler that moved the rate
        assert state.load(tmp_path / "c").waiting == ("scheduler",)
    second.scheduler = SCHEDULERS[scheduler](second.optimizer)
    state.add("scheduler", second.scheduler)
    assert second.run(6) == straight


def test_what_comes_after_an_update_does_not_take_it_back(tmp_path: Path) -> None:
    first = Loop("adam", "step")
    first.run(3)
    first.state().save(tmp_path / "c")
    second = Loop("adam", seed=1)
    state = second.state()
    state.load(tmp_path / "c")
    second.run(2)
    before = state.parts["optimizer"].state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(BadInput, match="scheduler is in the checkpoint, and comes after an update"):
        state.add("scheduler", SCHEDULERS["step"](second.optimizer))
    assert torch.equal(second.optimizer.state_dict()["state"][0]["exp_avg"], before)
    state.add("rng", torch.Generator())  # which it has not


def test_a_part_that_refuses_by_itself_does_so_before_weights_are_changed(tmp_path: Path) -> None:
    first = Loop("adam")
    first.state(sampler=ds.Sampler(20, 4)).save(tmp_path / "c")
    second = Loop("adam", seed=1)
    before = second.model.body.weight.clone()
    with pytest.raises(BadInput, match="samples 20 then and 30 now"):
        second.state(sampler=ds.Sampler(30, 4)).load(tmp_path / "c")
    assert torch.equal(second.model.body.weight, before)


def test_another_order_of_parameters_and_of_parts_changes_nothing(tmp_path: Path) -> None:
    """Trap 1: torch maps state by place."""
    first = Loop("adam")
    first.run(5)
    first.state().save(tmp_path / "c")
    straight = first.run(5)
    second = Loop("adam", seed=1)
    second.optimizer = torch.optim.Adam([*second.model.parameters()][::-1], 0.01, amsgrad=True)
    state = ds.TrainState()
    state.load(tmp_path / "c")
    state.add("model", second.model)
    state.add("optimizer", second.optimizer)
    torch.testing.assert_close(second.run(5), straight, rtol=1e-5, atol=0)  # a norm adds in another order


def test_names_are_without_what_wrappers_add(tmp_path: Path) -> None:
    """Trap 13."""
    first = Loop("adam")
    first.run(3)
    compiled = torch.compile(first.model, backend="eager")
    ds.TrainState(compiled, first.optimizer).save(tmp_path / "c")
    straight = first.run(3)
    second = Loop("adam", seed=1)
    second.state().load(tmp_path / "c")
    assert second.run(3) == straight


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_state_keeps_its_own_precision(tmp_path: Path, kept: torch.dtype) -> None:
    """Trap 6: torch casts it to the parameter's on load."""

    def make() -> tuple[nn.Module, torch.optim.Adam]:
        model = nn.Linear(3, 2).to(torch.bfloat16 if kept == torch.float32 else torch.float32)
        return model, torch.optim.Adam(model.parameters(), foreach=False)

    model, optimizer = make()
    model(torch.ones(1, 3, dtype=model.weight.dtype)).sum().backward()
    optimizer.step()
    for slots in optimizer.state.values():
        slots["exp_avg"] = slots["exp_avg"].to(kept) + 1e-3
    ds.TrainState(model, optimizer).save(tmp_path / "c")
    model2, optimizer2 = make()
    ds.TrainState(model2, optimizer2).load(tmp_path / "c")
    saved, found = (o.state[m.weight]["exp_avg"] for o, m in ((optimizer, model), (optimizer2, model2)))
    assert found.dtype == kept
    assert torch.equal(saved, found)


def test_nothing_is_shared_between_two_programs(tmp_path: Path) -> None:
    """Trap 5."""
    first, second = Loop("adam"), Loop("adam", seed=1)
    first.run(2)
    shot = first.state().snapshot()
    second.state().restore(shot)
    before = ds.TrainState(second.model, second.optimizer, generators=False).fields()
    first.run(3)
    assert ds.TrainState(second.model, second.optimizer, generators=False).fields() == before
    second.run(2)
    second.state().restore(shot)
    assert second.state().fields().items() >= before.items()


def test_numbers_of_the_checkpoint_win_and_the_difference_is_told(tmp_path: Path) -> None:
    """Trap 7."""
    first, second = Loop("adam"), Loop("adam", seed=1)
    first.run(2)
    first.state().save(tmp_path / "c")
    second.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.1)
    with pytest.warns(UserWarning, match="lr 0.5 here, 0.01 in the checkpoint"):
        told = second.state().load(tmp_path / "c")
    assert len(told.changed) == 2
    assert second.optimizer.param_groups[0]["lr"] == 0.01


def test_another_function_of_a_scheduler_is_noticed(tmp_path: Path) -> None:
    """Trap 8: LambdaLR saves nothing of it."""
    first, second = Loop("sgd", "lambda"), Loop("sgd", seed=1)
    first.run(2)
    first.state().save(tmp_path / "c")
    second.scheduler = lrs.LambdaLR(second.optimizer, lambda step: 1 / (step + 2))
    before = second.model.body.weight.clone()
    with pytest.raises(BadInput, match=r"scheduler: the function lr_lambdas\[0\] is another"):
        second.state().load(tmp_path / "c")
    assert torch.equal(second.model.body.weight, before)
    with pytest.warns(UserWarning, match="another"):
        assert second.state().load(tmp_path / "c", strict=False).left


def test_what_only_one_side_has_is_told_by_name(tmp_path: Path) -> None:
    first = Loop("adam", "step")
    first.run(2)
    first.state(ema=ds.Average(first.model, ds.ema(0.9)), stopping=ds.EarlyStopping(3)).save(tmp_path / "c")
    second = Loop("adam", seed=1)
    state = second.state(rng=torch.Generator())
    with pytest.warns(UserWarning, match="Not in the checkpoint: rng"):
        told = state.load(tmp_path / "c")
    assert told.missing == ("rng",)
    assert set(told.waiting) == {"scheduler", "ema", "stopping"}
    with pytest.warns(UserWarning, match="had ema, stopping, scheduler, which this program never added"):
        state.save(tmp_path / "d")


def test_another_model_is_refused_by_name_and_nothing_is_changed(tmp_path: Path) -> None:
    first = Loop("adam")
    first.run(2)
    first.state().save(tmp_path / "c")
    other = Net("output")
    optimizer = torch.optim.Adam(other.parameters())
    state = ds.TrainState(other, optimizer)
    before = state.fields()
    with pytest.raises(BadInput, match=r"lacks output.weight, output.bias; .* lacks head.bias, head.weight"):
        state.load(tmp_path / "c")
    assert state.fields() == before
    with pytest.warns(UserWarning, match=r"Left as it was: model: the checkpoint lacks output"):
        state.load(tmp_path / "c", strict=False)
    assert torch.equal(other.body.weight, first.model.body.weight)
    held = optimizer.state[other.body.weight]["exp_avg"]
    assert torch.equal(held, first.optimizer.state[first.model.body.weight]["exp_avg"])


def test_averages_stopping_scaler_generators_and_counters_go_on(tmp_path: Path) -> None:
    """Trap 10."""

    def parts(model: nn.Module) -> dict[str, Any]:
        return {
            "average": ds.Average(model, ds.ema(0.9)),
            "swa": torch.optim.swa_utils.AveragedModel(model),
            "stopping": ds.EarlyStopping(3),
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2),
            "torch_rng": torch.Generator().manual_seed(1),
            "numpy_rng": np.random.default_rng(1),
            "python_rng": random.Random(1),
        }

    def work(mine: dict[str, Any], loop: Loop) -> list[Any]:
        seen: list[Any] = loop.run(3)
        mine["average"].update()
        mine["swa"].update_parameters(loop.model)
        mine["stopping"].update(seen[-1], 1)
        scaler = mine["scaler"]
        scaler.scale(loop.model(torch.ones(4, 4)).sum()).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        draws = [torch.rand(2, generator=mine["torch_rng"]).tolist(), mine["python_rng"].random()]
        return [*seen, scaler.get_scale(), mine["stopping"].wait, *draws, float(mine["numpy_rng"].random())]

    first = Loop("adam")
    mine = parts(first.model)
    state = first.state(**mine)
    work(mine, first)
    state.step, state.counters = 3, {"epoch": 2, "best": (0.1, float("inf")), "shape": torch.ones(2)}
    state.save(tmp_path / "c")
    straight = work(mine, first)
    second = Loop("adam", seed=1)
    theirs = parts(second.model)
    work(theirs, second)
    resumed = second.state(**theirs)
    resumed.load(tmp_path / "c")
    assert resumed.step == 3
    assert resumed.counters["best"] == (0.1, float("inf"))
    assert work(theirs, second) == straight
    assert resumed.fields() == state.fields()


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_flipped_bit_is_found_before_anything_changes(tmp_path: Path, file: str) -> None:
    loop = Loop("adam")
    loop.run(2)
    sha = loop.state().save(tmp_path / "c")
    path = tmp_path / "c" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    before = loop.state().fields()
    with pytest.raises(Damaged, match=file.replace(".", r"\.")):
        loop.state().load(tmp_path / "c", sha=sha)
    assert loop.state().fields() == before


def test_what_has_no_state_is_refused_by_name() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(BadInput, match="tokenizer is a dict, which has no state_dict"):
        ds.TrainState(model, tokenizer={})
    with pytest.raises(BadInput, match="loader is a DataLoader, which does not know its place"):
        ds.TrainState(model, loader=torch.utils.data.DataLoader([1]))
    with pytest.raises(BadInput, match="the name 'step' is taken"):
        ds.TrainState(model, step=nn.Linear(1, 1))
    with pytest.raises(BadInput, match=r"optimizer has a parameter of shape \[1, 2\] that no model"):
        ds.TrainState(optimizer=torch.optim.SGD(model.parameters(), 0.1)).fields()


def test_two_models_and_two_optimizers_are_told_apart(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[ds.TrainState, nn.Module, nn.Module]:
        torch.manual_seed(seed)
        g, d = nn.Linear(2, 2), nn.Linear(2, 2)
        parts = {"d": d, "d_optimizer": torch.optim.Adam(d.parameters(), 0.1)}
        return ds.TrainState(g, torch.optim.Adam(g.parameters(), 0.2), **parts), g, d

    state, g, d = make(0)
    for model, name in ((g, "optimizer"), (d, "d_optimizer")):
        model(torch.ones(1, 2)).square().sum().backward()
        state.parts[name].step()
    state.save(tmp_path / "c")
    resumed, g2, d2 = make(1)
    resumed.load(tmp_path / "c")
    assert resumed.fields() == state.fields()
    assert torch.equal(g.weight, g2.weight)
    assert torch.equal(d.weight, d2.weight)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.sampled_from(["~", "of"]), inner)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    import json

    packed = pack(value)
    back = unpack(Packed(json.loads(json.dumps(packed.data, allow_nan=False)), packed.tensors))
    assert back == value
    assert repr(back) == repr(value)


def test_what_json_has_not_comes_back_too() -> None:
    value = {
        "milestones": Counter({3: 1, 8: 2}),
        "queue": deque([1, 2]),
        "set": {3, 1},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "array": np.arange(3, dtype=np.int16),
        "number": np.float32(0.1),
        "nan": float("nan"),
    }
    back = unpack(pack(value))
    assert back["milestones"] == value["milestones"]
    assert type(back["milestones"]) is Counter
    assert back["queue"] == value["queue"]
    assert back["set"] == {1, 3}
    assert back["dtype"] is torch.bfloat16
    assert back["device"] == torch.device("cpu")
    assert back["array"].dtype == np.int16
    assert back["array"].tolist() == [0, 1, 2]
    assert back["number"] == np.float32(0.1)
    assert back["number"].dtype == np.float32
    assert back["nan"] != back["nan"]


def test_an_object_is_refused_with_the_way_to_it() -> None:
    with pytest.raises(BadInput, match=r"opt cannot be saved: a\.1\.b is a object"):
        pack({"a": [1, {"b": object()}]}, "opt")
