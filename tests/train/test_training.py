"""Training: it goes on to the bit, disturbs nobody, and says clearly what it cannot do."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train import problems

import downslope as ds
from downslope.errors import BadInput, UserCodeError
from downslope.train import Attempt, Damaged, Diverged, Training, order

RULES = sorted(ds.rules())


def unequal(one: Training, other: Training) -> list[str]:
    mine, theirs = one.fields(), other.fields()
    assert mine.keys() == theirs.keys()
    return [name for name in mine if mine[name] != theirs[name]]


def losses(state: Training, until: int) -> list[float]:
    seen: list[float] = []
    state.advance(until, lambda attempt: seen.append(float(attempt.loss)))
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_saved_and_loaded_it_goes_on_to_the_bit(rule: str, tmp_path: Path) -> None:
    lr = ds.cosine(1e-3, steps="100 %", warmup=4)
    chained = ds.chain(ds.clip_norm(1.0), ds.rules()[rule](lr=lr), ds.decay(0.01))
    rest = ds.chain(ds.clip_norm(1.0), ds.adamw(lr=lr))
    recipe = ds.Recipe(
        chained if ds.rules()[rule].takes == "any" else ds.route({"matrix": chained, "rest": rest}),
        steps=30,
        batch_size=16,
        roles={"norm": {"weight_decay": 0.0, "lr": 1e-4}},
    )
    straight, stopped = (Training(problems.rich(), recipe, seed=3) for _ in range(2))
    expected = losses(straight, 30)
    got = losses(stopped, 13)
    sha = stopped.save(tmp_path / "a")
    resumed = Training.load(tmp_path / "a", problems.rich(), recipe, sha)
    assert not unequal(stopped, resumed)
    got += losses(resumed, 21)
    resumed = Training.load(tmp_path / "b", problems.rich(), sha=resumed.save(tmp_path / "b"))
    got += losses(resumed, 30)
    assert got == expected
    assert not unequal(straight, resumed)
    assert (resumed.step, resumed.epoch, resumed.position) == (30, 7, 2)


def test_saving_twice_gives_the_same_bytes_and_changes_nothing(tmp_path: Path) -> None:
    state = Training(problems.rich())
    state.advance(5)
    before = state.fields()
    assert state.save(tmp_path / "a") == state.save(tmp_path / "b")
    assert state.fields() == before
    state.advance(9)
    assert state.save(tmp_path / "c") == state.save(tmp_path / "d")
    assert Training.load(tmp_path / "c", problems.rich()).fields() == state.fields()


def test_each_thing_that_is_saved_is_needed_and_compared() -> None:
    """`fields` sees a change of any one bit, so that equality of fields means equality."""
    state = Training(problems.rich())
    state.advance(3)
    before = state.fields()
    with torch.no_grad():
        for tensor in [*state.model.parameters(), *state.model.buffers()]:
            flat = tensor.view(-1).view(torch.uint8)
            flat[0] ^= 1
            assert sum(before[name] != text for name, text in state.fields().items()) in (1, 2)  # 2: tied
            flat[0] ^= 1
    assert state.fields() == before
    names = " ".join(before)
    for part in ("step", "batches", "generator python", "generator numpy", "generator torch", "model mean"):
        assert part in names
    for slot in ("m", "v", "t"):
        assert f"optimizer model.head.weight/{slot}" in before


def test_evaluation_leaves_no_trace() -> None:
    state, undisturbed = Training(problems.rich()), Training(problems.rich())
    state.advance(4)
    undisturbed.advance(4)
    state.model.norm.eval()  # type: ignore[union-attr]  # frozen on purpose: it must stay so
    before = state.fields()
    first = state.evaluate("valid")
    assert state.evaluate("valid") == first
    state.evaluate("test")
    assert state.fields() == before
    modes = [module.training for module in state.model.modules()]
    assert modes == [module is not state.model.norm for module in state.model.modules()]
    state.model.norm.train()  # type: ignore[union-attr]
    assert losses(state, 10) == losses(undisturbed, 10)


def test_evaluation_undoes_what_a_careless_model_does() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            random.random(), np.random.rand(), torch.rand(())
            return self.layer(x) + torch.rand(())

    state = Training(problems.task(model=Careless))
    before = state.fields()
    assert state.evaluate("valid") == state.evaluate("valid")
    assert state.fields() == before


def test_evaluation_is_the_mean_over_all_samples() -> None:
    data = (torch.randn(1300, 6), torch.randint(3, (1300,)))
    state = Training(problems.task(valid=data))
    seen = state.evaluate("valid")
    state.model.eval()
    with torch.no_grad():
        logits = state.model(data[0])
    assert seen.loss == pytest.approx(float(nn.functional.cross_entropy(logits, data[1])), rel=1e-6)
    assert seen.metric == pytest.approx(float((logits.argmax(1) == data[1]).float().mean()), rel=1e-6)


def test_trainings_take_turns_and_neither_notices() -> None:
    alone = [losses(Training(problems.rich(), seed=seed), 12) for seed in (1, 2)]
    states = [Training(problems.rich(), seed=seed) for seed in (1, 2)]
    together: list[list[float]] = [[], []]
    for until in (1, 2, 7, 12):
        for state, seen in zip(states, together, strict=True):
            random.seed(until)
            torch.manual_seed(until)
            seen += losses(state, until)
    assert together == alone


def test_a_training_leaves_the_generators_of_the_program_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    state = Training(problems.rich())
    state.advance(3)
    state.evaluate()
    assert torch.equal(torch.rand(3), expected)


def test_the_seed_decides_weights_and_order() -> None:
    assert losses(Training(problems.rich(), seed=5), 6) == losses(Training(problems.rich(), seed=5), 6)
    assert losses(Training(problems.rich(), seed=5), 1) != losses(Training(problems.rich(), seed=6), 1)


@pytest.mark.parametrize("kind", ["tensors", "dataset"])
def test_each_batch_is_the_slice_of_the_epochs_order(kind: str) -> None:
    inputs = torch.arange(20.0).unsqueeze(1)
    data: Any = (inputs, torch.zeros(20, 1))
    fed: list[list[float]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        fed.append(batch[0].flatten().tolist())
        return model(batch[0]).mean()

    train = data if kind == "tensors" else list(zip(*data, strict=True))
    task = ds.Task(model=lambda: nn.Linear(1, 1), train=train, valid=data, loss=loss)
    recipe = ds.Recipe(ds.chain(ds.sgd(lr=0.1)), steps=7, batch_size=6)
    Training(task, recipe, seed=8).advance(7)
    expected = [order(20, 8, epoch)[k : k + 6].tolist() for epoch in range(3) for k in (0, 6, 12)]
    assert fed == expected[:7]


def test_a_branch_leaves_the_trunk_and_the_trunk_goes_on(tmp_path: Path) -> None:
    trunk = problems.recipe(steps=30, lr=ds.constant(1e-3))
    straight, state = Training(problems.rich(), trunk), Training(problems.rich(), trunk)
    state.advance(10)
    state.save(tmp_path / "trunk")
    branches = []
    for number in range(2):
        branch = Training.load(tmp_path / "trunk", problems.rich(), trunk)
        branch.optimizer.follow("lr", ds.constant(1e-3).cooldown(10, 5))
        rates: list[float | None] = []
        branch.advance(13, lambda attempt, rates=rates: rates.append(attempt.lr))
        assert rates == pytest.approx([1e-3, 8e-4, 6e-4])
        branch.save(tmp_path / f"branch {number}".replace(" ", "-"))
        branch = Training.load(tmp_path / f"branch-{number}", problems.rich(), trunk)
        branch.advance(15, lambda attempt, rates=rates: rates.append(attempt.lr))
        assert rates[3:] == pytest.approx([4e-4, 2e-4])
        branches.append(branch)
    assert not unequal(*branches)
    state.advance(30)
    straight.advance(30)
    assert not unequal(state, straight)


def explode(when: set[int]) -> tuple[ds.Task, list[int]]:
    """A task whose loss is not finite at these batches, and how many it has seen."""
    calls, last = [0], [Tensor()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not torch.equal(batch[0], last[0]):  # the culprit of a batch is looked for in a second call
            calls[0], last[0] = calls[0] + 1, batch[0]
        value = problems.noisy(model, batch)
        return value * float("nan") if calls[0] - 1 in when else value

    return problems.task(loss=loss, metric=ds.accuracy), calls


def test_a_skipped_update_is_no_step_and_its_batch_is_used_up(tmp_path: Path) -> None:
    task, calls = explode({2, 3, 6})
    state = Training(task)
    seen: list[Attempt] = []
    state.advance(6, seen.append)
    assert [attempt.step for attempt in seen] == [0, 1, 2, 2, 2, 3, 4, 4, 5]
    assert [bool(attempt.skipped) for attempt in seen] == [i in {2, 3, 6} for i in range(9)]
    assert "head.weight" in seen[2].skipped
    assert (state.step, state.batches, calls[0]) == (6, 9, 9)
    again = Training.load(tmp_path / "c", task, sha=state.save(tmp_path / "c"))
    assert (again.step, again.batches) == (6, 9)


def test_too_many_skips_in_a_row_are_the_end() -> None:
    task, calls = explode(set(range(5, 10**6)))
    state = Training(task)
    state.advance(5)
    with pytest.raises(Diverged, match=r"20 updates in a row .* step 5, .* gradients of .*not finite"):
        state.advance(6)
    assert calls[0] == 25
    assert state.step == 5


def test_a_pause_comes_after_an_applied_update_only() -> None:
    task, _ = explode({0, 1, 2})
    state = Training(task)
    state.advance(10, lambda attempt: True)
    assert (state.step, state.batches) == (1, 4)


def test_a_loss_without_gradients_is_said_and_not_waited_for() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.zeros((), requires_grad=True) * 1.0

    with pytest.raises(BadInput, match="gave no parameter a gradient"):
        Training(problems.task(loss=loss, metric=ds.accuracy)).advance(1)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda model, batch: 1 / 0, "ZeroDivisionError"),
        (lambda model, batch: model(batch[0]), r"0-d\), got a tensor of shape \[16, 3\]"),
        (lambda model, batch: 0.5, r"0-d\), got 0\.5"),
        (lambda model, batch: model(batch[0]).detach().sum(), "does not require grad"),
    ],
)
def test_what_the_users_loss_does_wrong_is_the_users_error(loss: Any, said: str) -> None:
    with pytest.raises(UserCodeError, match=f"^The loss .*{said}") as caught:
        Training(problems.task(loss=loss, metric=ds.accuracy)).advance(1)
    assert caught.value.__cause__ is not None


def test_what_the_users_model_does_wrong_is_the_users_error() -> None:
    with pytest.raises(UserCodeError, match="The model raised ZeroDivisionError"):
        Training(problems.task(model=lambda: 1 / 0))
    with pytest.raises(BadInput, match=r"must return a torch\.nn\.Module, got int"):
        Training(problems.task(model=lambda: 3))


def test_a_wrong_part_or_seed_is_refused() -> None:
    with pytest.raises(BadInput, match="no part 'tset'"):
        Training(problems.rich()).evaluate("tset")
    with pytest.raises(BadInput, match="no part 'test'"):
        Training(problems.task(test=None)).evaluate("test")
    with pytest.raises(BadInput, match="a seed is"):
        Training(problems.rich(), seed=-1)


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    state = Training(problems.rich(), problems.recipe())
    state.save(tmp_path / "c")
    with pytest.raises(BadInput, match=r"another recipe: clip_norm\.max_norm: 1\.0 → 2\.0"):
        Training.load(tmp_path / "c", problems.rich(), problems.recipe(max_norm=2.0))


def test_another_model_is_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    def model(width: int, dtype: torch.dtype = torch.float32) -> ds.Task:
        return problems.task(
            model=lambda: nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3)).to(dtype),
            loss=lambda m, b: nn.functional.cross_entropy(m(b[0].to(dtype)), b[1]),
            metric=ds.accuracy,
        )

    Training(model(4)).save(tmp_path / "c")
    with pytest.raises(
        BadInput, match=r"does not fit: model: 0\.bias is \[4\] torch\.float32 in the checkpoint and \[5\]"
    ):
        Training.load(tmp_path / "c", model(5))
    with pytest.raises(
        BadInput, match=r"0\.bias is \[4\] torch\.float32 in the checkpoint and \[4\] torch\.float64 here"
    ):
        Training.load(tmp_path / "c", model(4, torch.float64))
    with pytest.raises(BadInput, match="model: the checkpoint lacks .*; model: the program lacks 0.bias"):
        Training.load(tmp_path / "c", problems.rich())


def test_data_of_another_length_are_refused(tmp_path: Path) -> None:
    Training(problems.rich()).save(tmp_path / "c")
    shorter = tuple(column[:-1] for column in problems.parts(0)["train"])
    with pytest.raises(BadInput, match="saw 70 samples, the task now has 69"):
        Training.load(tmp_path / "c", problems.task(train=shorter))


class _Extra(nn.Linear):
    """Counts its calls outside of the buffers, and says so."""

    calls: Any = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "seen": (torch.ones(2), 0.1)}

    def set_extra_state(self, state: Any) -> None:
        assert torch.equal(state["seen"][0], torch.ones(2))
        self.calls = state["calls"]


def test_extra_state_of_modules_is_kept(tmp_path: Path) -> None:
    task = problems.task(model=lambda: nn.Sequential(_Extra(6, 3)))
    state = Training(task)
    state.advance(5)
    state.save(tmp_path / "c")
    assert Training.load(tmp_path / "c", task).model[0].calls == state.model[0].calls >= 5  # type: ignore[index]


def test_extra_state_that_is_no_plain_data_is_refused_by_name(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": object()}

    with pytest.raises(BadInput, match=r"0\._extra_state of model cannot be saved: calls is a object"):
        Training(problems.task(model=lambda: nn.Sequential(Odd(6, 3)))).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_damaged_checkpoint_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    state = Training(problems.rich())
    state.advance(1)
    state.save(tmp_path / "c")
    path = tmp_path / "c" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Damaged, match=r"optimizer\.safetensors"):
        Training.load(tmp_path / "c", problems.task(model=lambda: 1 / 0))


def test_the_thread_count_is_saved_and_set_while_training(tmp_path: Path) -> None:
    counts: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        counts.append(torch.get_num_threads())
        return problems.noisy(model, batch)

    here = torch.get_num_threads()
    task = problems.task(loss=loss, metric=ds.accuracy)
    state = Training(task, threads=here + 1)
    state.advance(1)
    state.save(tmp_path / "c")
    state = Training.load(tmp_path / "c", task)
    state.advance(2)
    state.evaluate()
    assert set(counts) == {here + 1}
    assert state.threads == here + 1
    assert torch.get_num_threads() == here
