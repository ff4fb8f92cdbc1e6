"""Autocast, gradient scaling and compilation: what a loop by hand does, to the bit, also after a resume."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from train import problems
from train.problems import Plain

import downslope as ds
from downslope.errors import BadInput
from downslope.journal import read
from downslope.train import Diverged, Training, order
from downslope.train import precision as precision_module
from downslope.train.player import SKIPS
from downslope.train.precision import Arithmetic

S, loss, spiking, overflowing = ds.strategies, problems.entropy, problems.spiking, problems.overflowing
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch, of itself
BATCH = 16


def half_loss(model: nn.Module, batch: Any) -> Tensor:
    """A loss that comes out in half precision."""
    return model(batch[0]).square().mean()


def recipe(rule: Any = None, steps: int = 40, **changes: Any) -> ds.Recipe:
    rule = rule or ds.chain(ds.clip_norm(1.0), ds.adamw(lr=ds.cosine(3e-3, steps="100 %", warmup="10 %")))
    made = ds.Recipe(rule, steps=steps, batch_size=BATCH)
    return made.with_(**changes) if changes else made


def task(seed: int = 0, **changes: Any) -> ds.Task:
    given = {"model": Plain, "loss": loss, "metric": ds.accuracy, "recipe": recipe()}
    return ds.Task(**{**problems.parts(seed), **given, **changes})


def batches(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, targets = problems.parts(0)["train"]
    per_epoch = len(inputs) // BATCH
    for number in range(count):
        epoch, place = divmod(number, per_epoch)
        indices = order(len(inputs), seed, epoch)[place * BATCH : (place + 1) * BATCH]
        yield inputs[indices], targets[indices]


def by_hand(
    steps: int, start: nn.Module, dtype: torch.dtype, of: Any = loss, scaler: GradScaler | None = None
) -> tuple[nn.Module, list[float], list[int]]:
    """A loop as torch's notes on mixed precision write it, with torch's clip, and our rule behind it."""
    model, losses, skipped = start, [], []
    optimizer = recipe().build(model, steps=40, steps_per_epoch=4)
    for number, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            value = of(model, batch)
        losses.append(float(value.detach()))
        if scaler is None:
            value.backward()
            optimizer.step()
        else:
            scaler.scale(value).backward()
            before = optimizer.steps
            scaler.step(optimizer)
            scaler.update()
            skipped += [number] if optimizer.steps == before else []
    return model, losses, skipped


def weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def begun(state: Training) -> nn.Module:
    model = type(state.model)()
    model.load_state_dict(state.model.state_dict())
    return model


def attempts(state: Training, count: int) -> list[Any]:
    seen: list[Any] = []
    until = state.batches + count

    def told(attempt: Any) -> bool:
        seen.append(attempt)
        return state.batches >= until

    while state.batches < until:
        state.advance(None, told)
    return seen


@pytest.mark.parametrize("of", [loss, half_loss])
def test_bf16_is_the_loop_by_hand(of: Any) -> None:
    state = Training(task(loss=of), precision="bf16")
    model, losses, _ = by_hand(10, begun(state), torch.bfloat16, of)
    seen = attempts(state, 10)
    assert [float(attempt.loss) for attempt in seen] == losses
    assert_same(state.model, model)
    other = Training(task(loss=of))
    assert [float(attempt.loss) for attempt in attempts(other, 10)] != losses


@pytest.mark.parametrize("of", [loss, half_loss])
def test_bf16_keeps_weights_gradients_and_state_in_float32(of: Any) -> None:
    state = Training(task(loss=of), precision="bf16")
    attempts(state, 3)
    held = list(state.model.parameters()) + [p.grad for p in state.model.parameters()]
    held += [v for slots in state.optimizer.state.values() for n, v in slots.items() if n != "t"]
    assert {tensor.dtype for tensor in held} == {torch.float32}


def test_bf16_judges_in_bf16_too() -> None:
    state = Training(task(), precision="bf16")
    attempts(state, 5)
    inputs, targets = problems.parts(0)["valid"]
    state.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = state.model(inputs)
        value = nn.functional.cross_entropy(scores, targets)
    seen = state.evaluate("valid")
    assert seen.loss == float(value)
    with torch.no_grad():
        assert seen.loss != float(nn.functional.cross_entropy(state.model(inputs), targets))


def test_fp16_is_the_loop_by_hand_with_overflows_first_and_in_the_middle() -> None:
    """Losses, weights, scale, growth and what is skipped, over 20 batches."""
    state = Training(overflowing(), precision="fp16")
    scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    state.sides[0].scaler.load_state_dict(scaler.state_dict())  # type: ignore[union-attr]
    model, losses, skipped = by_hand(20, begun(state), torch.float16, spiking, scaler)
    assert skipped[0] == 0
    assert any(3 < number < 19 for number in skipped)
    assert any(number not in skipped for number in range(skipped[0], skipped[-1]))
    seen = attempts(state, 20)
    assert [float(attempt.loss) for attempt in seen] == losses
    assert [number for number, attempt in enumerate(seen) if attempt.skipped] == skipped
    assert state.step == 20 - len(skipped)
    assert state.sides[0].scaler.state_dict() == scaler.state_dict()  # type: ignore[union-attr]
    assert_same(state.model, model)


def test_fp16_pieces_are_unscaled_once() -> None:
    """A batch in pieces is the sum of their scaled gradients, to rounding: one update, one look at them."""
    one, other = (
        Training(task(), recipe(strategies=strategies), precision="fp16")
        for strategies in ({}, {"micro": S.micro(items=5)})
    )
    first, second = (attempts(state, 8) for state in (one, other))
    torch.testing.assert_close(
        *(torch.stack([attempt.loss for attempt in seen]) for seen in (first, second)), rtol=2e-3, atol=0
    )
    assert other.step == 8


def test_a_scale_that_is_too_high_is_no_divergence_and_no_spike() -> None:
    """The scaler may skip more often in a row than a training that diverges, and nobody calls it a spike."""
    state = Training(task(), recipe(strategies={"spikes": S.spikes(window=8)}), precision="fp16")
    scaler = state.sides[0].scaler
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    seen = attempts(state, 60)
    skipped = [attempt for attempt in seen if attempt.skipped]
    assert len(skipped) > SKIPS
    assert [attempt.scale for attempt in skipped] == [2.0 ** (60 - k) for k in range(len(skipped))]
    assert not any(attempt.told or attempt.culprit for attempt in seen)
    assert state.step == 60 - len(skipped)


def test_gradients_that_overflow_under_no_scale_diverge() -> None:
    def steep(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * 3e38

    state = Training(task(loss=steep), precision="fp16")
    scaler = state.sides[0].scaler
    assert scaler is not None
    with pytest.raises(Diverged, match="20 updates in a row"):
        state.advance()
    assert scaler.get_scale() == 2.0**-SKIPS  # 16 skips down to 1, and 20 from there on


def test_a_loss_that_is_not_finite_diverges_as_soon_as_ever() -> None:
    """An activation may overflow in fp16, for which no scale is to blame; the culprit is named."""

    def wide(model: nn.Module, batch: Any) -> Tensor:
        scores = model.head(model.first(batch[0]) * 1e6)  # type: ignore[operator]
        return nn.functional.cross_entropy(scores, batch[1])

    state = Training(task(loss=wide), precision="fp16")
    seen: list[Any] = []
    with pytest.raises(Diverged):
        state.advance(None, lambda attempt: bool(seen.append(attempt)))
    assert len(seen) == SKIPS
    assert seen[0].culprit == "mul in the loss, forward"
    assert all(attempt.scale is None for attempt in seen)


def test_sam_takes_both_gradients_under_one_scale() -> None:
    """A power of two changes no bit: sam with a scale of 1 and of 1024 is one run, in float32 inside."""
    states = []
    for scale in (1.0, 1024.0):
        state = Training(task(), recipe(ds.chain(ds.sam(0.05), ds.sgd(lr=0.1))), precision="fp16")
        scaler = state.sides[0].scaler
        assert scaler is not None
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
        state.arithmetic = Arithmetic()
        state.sides[0].loss = loss
        attempts(state, 6)
        states.append(state)
    assert states[0].step == 6
    assert_same(states[0].model, states[1].model)


def test_a_second_gradient_that_overflows_lowers_the_scale() -> None:
    """torch's scaler looks at the first one only, and would try the same scale for ever."""
    calls = []

    def second(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        if model.training:
            calls.append(1)
            value = value + (value - value.detach()) * (1e38 if len(calls) == 2 else 0.0)
        return value

    chain = ds.chain(ds.sam(0.05), ds.sgd(lr=0.1))
    state = Training(task(loss=second), recipe(chain), precision="fp16")
    attempt, *_ = attempts(state, 1)
    assert attempt.skipped
    assert state.sides[0].scaler.get_scale() == 2.0**15  # type: ignore[union-attr]


class Duel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Plain(), Plain()


def of_side(name: str, times: float) -> Callable[[nn.Module, Any], Tensor]:
    def gap(model: nn.Module, batch: Any) -> Tensor:
        other = model.right if name == "left" else model.left
        mine = getattr(model, name)
        return times * (loss(mine, batch) + (mine(batch[0]) - other(batch[0])).square().mean())  # type: ignore[operator]

    return gap


def test_each_player_has_a_scale_of_its_own() -> None:
    """As a loop with a scaler for each."""
    players = {"left": ds.Player(of_side("left", 1.0)), "right": ds.Player(of_side("right", 40.0))}
    made = task(model=Duel, loss=None, metric=None, players=players)
    state = Training(made, precision="fp16")
    model = begun(state)
    scalers = {name: GradScaler("cpu") for name in players}
    optimizers = {
        name: recipe().build(model.get_submodule(name), steps=40, steps_per_epoch=4) for name in players
    }
    for batch in batches(8):
        for name, player in players.items():
            optimizers[name].zero_grad()
            model.get_submodule({"left": "right", "right": "left"}[name]).requires_grad_(False)
            with torch.autocast("cpu", torch.float16):
                value = player.loss(model, batch)
            scalers[name].scale(value).backward()
            scalers[name].step(optimizers[name])
            scalers[name].update()
            model.requires_grad_(True)
    attempts(state, 8)
    for side in state.sides:
        assert side.scaler.state_dict() == scalers[side.name].state_dict()  # type: ignore[union-attr]
    assert state.sides[0].scaler.get_scale() != state.sides[1].scaler.get_scale()  # type: ignore[union-attr]
    assert_same(state.model, model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("at", [1, 5, 11, 13])
def test_saved_and_loaded_it_goes_on_to_the_bit(precision: str, at: int, tmp_path: Path) -> None:
    """Also between two overflows, in the middle of the scale's growth."""
    straight, stopped = (Training(overflowing(), precision=precision) for _ in range(2))
    for state in (straight, stopped):
        if (scaler := state.sides[0].scaler) is not None:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**18, "growth_interval": 3})
    expected = [float(one.loss) for one in attempts(straight, 20)]
    got = [float(one.loss) for one in attempts(stopped, at)]
    sha = stopped.save(tmp_path / "half")
    resumed = Training.load(tmp_path / "half", overflowing(), sha=sha)
    assert resumed.fields() == stopped.fields()
    assert got + [float(one.loss) for one in attempts(resumed, 20 - len(got))] == expected
    assert resumed.fields() == straight.fields()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_fresh_process_goes_on_to_the_bit(precision: str) -> None:
    proof = ds.verify_resume(f"{problems.__file__}:overflowing", steps=14, precision=precision)
    assert proof, str(proof)


def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path) -> None:
    Training(task(), precision="bf16").save(tmp_path / "a")
    asked = Arithmetic("fp16")
    with pytest.raises(BadInput, match=r"was computed in bf16, not in fp16\.$"):
        Training.load(tmp_path / "a", task(), arithmetic=asked)
    assert Training.load(tmp_path / "a", task()).arithmetic == Arithmetic("bf16")


def test_a_plain_training_says_nothing_of_it(tmp_path: Path) -> None:
    """So runs and checkpoints of before are read as they are."""
    Training(task()).save(tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "state.json").read_bytes())
    assert not {"precision", "compile"} & saved["counters"].keys()
    assert "scaler" not in saved["parts"]


def test_a_run_keeps_its_precision(tmp_path: Path) -> None:
    """In its plan, its journal and its report; resumed without being told, and not taken up in another."""
    run = ds.train(overflowing_task(), out=tmp_path / "run", precision="fp16", quiet=True)
    plan = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert plan["precision"] == "fp16"
    assert "compile" not in plan
    events = read(tmp_path / "run" / "journal.jsonl")
    assert events[0]["precision"] == "fp16"
    skips = [event for event in events if event["kind"] == "skip"]
    assert skips
    assert all(math.log2(event["scale"]).is_integer() and event["names"] for event in skips)
    page = ds.report(tmp_path / "run").read_text()
    assert "fp16" in page
    assert "while the loss scale of fp16 fell" in page
    assert ds.resume(tmp_path / "run", overflowing_task(), quiet=True).valid == run.valid
    with pytest.raises(BadInput, match="precision: 'fp16' → None"):
        ds.train(overflowing_task(), out=tmp_path / "run", quiet=True)


def overflowing_task() -> ds.Task:
    return task(loss=spiking, name="overflowing")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"precision": "fp8"}, r"precision is bf16 or fp16, or left out for float32, got 'fp8'"),
        ({"precision": "bfloat16"}, "got 'bfloat16'.*'bf16'"),
        ({"precision": 16}, "got 16"),
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
    ],
)
def test_what_is_no_precision_is_refused(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        ds.train(task(), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_weights_that_autocast_leaves_alone_are_refused() -> None:
    with pytest.raises(BadInput, match=r"for models with float32 weights, and this one's are float64"):
        Training(task(model=lambda: Plain().double()), precision="bf16")


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        (recipe(ds.gd()), {"precision": "fp16"}, "gd compares losses"),
        (
            recipe(strategies={"switch": S.switch(at=10, to=ds.sgd(lr=0.1))}),
            {"precision": "fp16"},
            r"\[switch\] looks at gradients",
        ),
        (
            recipe(strategies={"teacher": S.teacher(run="x", layers=(("first", "first"),), method="hints")}),
            {"precision": "fp16"},
            r"\[teacher\] steps regressors",
        ),
        (recipe(strategies={"escape": S.escape()}), {"compile": True}, r"\[escape\] .* second derivatives"),
        (recipe(strategies={"teacher": S.teacher(run="x")}), {"compile": True}, r"\[teacher\] .* hooks"),
    ],
)
def test_what_does_not_combine_is_refused_with_the_reason(made: ds.Recipe, given: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Training(task(), made, **given)


def test_a_search_does_not_take_gradients_that_carry_a_scale() -> None:
    model, scaler = Plain(), GradScaler("cpu")
    optimizer = ds.Optimizer(model, ds.chain(ds.gd()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = scaler.scale(loss(model, next(batches(1))))
        value.backward()
        return value

    closure()
    with pytest.raises(BadInput, match="compares losses with gradients: do without a GradScaler"):
        scaler.step(optimizer, closure)


def test_switching_by_the_clock_goes_with_fp16() -> None:
    switch = S.switch(at=5, to=ds.sgd(lr=0.1), match="none")
    state = Training(task(), recipe(strategies={"switch": switch}), precision="fp16")
    state.advance(10)
    assert "sgd" in state.optimizer.chain.name


def test_no_precision_is_no_context() -> None:
    """The plain path calls the task's own functions."""
    state = Training(task())
    assert state.sides[0].loss is state.task.loss
    assert state.sides[0].scaler is None


# Compilation


def frames() -> int:
    """How many forms were compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@NEEDS_COMPILER
@contextmanager
def compiling() -> Iterator[Callable[[], int]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield frames
    torch._dynamo.reset()


def compared(made: ds.Task, of: ds.Recipe | None = None, count: int = 10, **given: Any) -> Training:
    """A compiled training beside one that is not; the compiled one."""
    plain, compiled = (Training(made, of, compile=how, **given) for how in (False, True))
    both = [torch.stack([one.loss for one in attempts(state, count)]) for state in (plain, compiled)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(compiled.model)[name], value, rtol=1e-4, atol=1e-5)
    for part in ("train", "valid"):
        assert compiled.evaluate(part) == pytest.approx(plain.evaluate(part), rel=1e-5)
    return compiled


@pytest.mark.slow
def test_compiled_it_does_the_same_with_the_same_draws() -> None:
    with compiling() as count:
        state = compared(problems.sequential())
        assert 3 <= count() <= 4  # training, and evaluation of two sizes
    assert all("_orig_mod" not in name for name in weights(state.model))


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "least"),
    [
        ({"dropout": S.dropout(rate=ds.multistep(0.3, at=[4], factor=0.5))}, 4),
        ({"freeze": S.freeze(until={"0.*": 4})}, 4),
        pytest.param({"normalisation": S.normalisation(to="group")}, 3, marks=pytest.mark.deep),
        ({"growth": S.growth(times=ds.multistep(1.0, at=[4], factor=2.0))}, 3),
        pytest.param({"average": S.average(kind="ema", decay=0.9)}, 3, marks=pytest.mark.deep),
        pytest.param({"micro": S.micro(items=6)}, 4, marks=pytest.mark.deep),
        pytest.param({"depth": S.depth(branches=("0",), rate=0.5)}, 3, marks=pytest.mark.deep),
        pytest.param({"mix": S.mix(mixup=0.4)}, 3, marks=pytest.mark.deep),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_on_the_way_is_compiled_anew_and_right(strategies: Any, least: int) -> None:
    model: Any = problems.sequence
    if "normalisation" in strategies:
        model = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    with compiling() as count:
        compared(task(model=model), recipe(ds.chain(ds.momentum(lr=0.05)), strategies=strategies), 8)
        assert count() >= least


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.deep), "fp16"])
def test_compiled_it_is_under_autocast_too(precision: str) -> None:
    """At a scale under which neither overflows: what is fused is not rounded to fp16 in between."""
    with compiling():
        plain, compiled = (
            Training(problems.sequential(), precision=precision, compile=how) for how in (False, True)
        )
        for state in (plain, compiled):
            if (scaler := state.sides[0].scaler) is not None:
                scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})
        both = [torch.stack([one.loss for one in attempts(state, 8)]) for state in (plain, compiled)]
        torch.testing.assert_close(*both, rtol=1e-3 if precision == "fp16" else 2e-2, atol=0)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param(None, marks=pytest.mark.deep), "fp16"])
def test_a_fresh_process_compiles_the_same(precision: str | None, monkeypatch: Any, tmp_path: Path) -> None:
    """Without anything of the first one's in a cache."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    proof = ds.verify_resume(f"{problems.__file__}:sequential", steps=10, precision=precision, compile=True)
    assert proof, str(proof)


@NEEDS_COMPILER
@pytest.mark.slow
def test_what_came_before_decides_nothing() -> None:
    """torch would go over to code for any size once it has seen two; here each size has its own."""
    straight, other = (Training(problems.sequential(), compile=True) for _ in range(2))
    with compiling():
        straight.advance(6)
    with compiling():
        other.evaluate("train")
        other.evaluate("test")
        other.advance(6)
    assert other.fields() == straight.fields()


@NEEDS_COMPILER
def test_a_model_that_takes_ever_new_forms_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "COMPILES", 2)
    rate = S.dropout(rate=ds.linear(0.5, steps="100 %", end=0.1))
    state = Training(problems.sequential(), recipe(strategies={"dropout": rate}), compile=True)
    with compiling(), pytest.raises(BadInput, match="took more than 2 forms, .* leave out compile"):
        state.advance(6)


@NEEDS_COMPILER
def test_a_model_that_cannot_be_compiled_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no such kernel\n  on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    with compiling(), pytest.raises(BadInput, match=r"cannot be compiled \(.*no such kernel") as told:
        Training(problems.sequential(), compile=True).advance(1)
    assert "\n" not in str(told.value)


@NEEDS_COMPILER
def test_what_the_model_itself_raises_stays_its_own() -> None:
    class Wrong(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :5])

    with compiling(), pytest.raises(ds.UserCodeError):
        Training(task(model=Wrong), compile=True).advance(1)


@NEEDS_COMPILER
def test_a_loss_that_never_calls_the_model_is_told() -> None:
    def parts(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model.head(model.first(batch[0])), batch[1])  # type: ignore[operator]

    with pytest.raises(BadInput, match="never calls it"):
        Training(task(loss=parts), compile=True).advance(1)


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_run_ends_in_a_model_that_is_as_it_was(tmp_path: Path) -> None:
    run = ds.train(problems.sequential(), out=tmp_path / "run", compile=True, quiet=True)
    assert run.model._compiled_call_impl is None
    assert run.model(torch.zeros(2, 6)).shape == (2, 3)
    assert ds.resume(tmp_path / "run", problems.sequential(), quiet=True).valid == run.valid


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "downslope", "train", "cancer-logistic", "--compile", "--out", str(out)]
    environment = {**os.environ, "CXX": str(tmp_path / "none")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("downslope: compile needs a C++ compiler")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_loop_of_ones_own_computes_as_it_likes() -> None:
    with pytest.raises(BadInput, match="its own matter"):
        ds.verify_resume(f"{Path(__file__).with_name('loops.py')}:plain", precision="bf16")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("given", "shard"),
    [
        ({"precision": "fp16"}, False),
        ({"precision": "fp16"}, True),
        ({"compile": True}, False),
        pytest.param({"compile": True}, True, marks=pytest.mark.deep),
        pytest.param({"precision": "bf16"}, False, marks=pytest.mark.deep),
        pytest.param({"precision": "bf16"}, True, marks=pytest.mark.deep),
    ],
    ids=str,
)
def test_several_ranks_go_on_to_the_bit(given: Any, shard: bool) -> None:
    function = "sequential" if "compile" in given else "overflowing"
    proof = ds.verify_resume(f"{problems.__file__}:{function}", steps=14, nproc=2, shard=shard, **given)
    assert proof, str(proof)
