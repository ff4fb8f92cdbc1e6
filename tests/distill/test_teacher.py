"""A teacher is only read: no bit, flag, mode or random number of anyone changes (trap 64)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from distill import papers
from torch import Tensor, nn

from downslope.distill import Teacher, Teachers, averaged
from downslope.errors import BadInput


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_call_evaluates_and_leaves_every_mode_flag_and_number_as_it_was() -> None:
    model, x = network(), torch.randn(16, 4)
    model[1].eval()  # a frozen BatchNorm among layers in training
    model[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before, generator = bits(model), torch.get_rng_state()
    found = Teacher(model)(x)
    assert modes == [module.training for module in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert same(bits(model), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not found.requires_grad
    assert torch.equal(found, copy.deepcopy(model).eval()(x))


def test_modes_are_put_back_when_the_teacher_fails() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        Teacher(model, batchnorm="train")(torch.randn(16, 5))
    assert all(module.training for module in model.modules())
    assert model[1].track_running_stats


def test_modes_are_set_without_calling_eval() -> None:
    """Some models do more in eval() than set a flag: they fold or merge weights."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train() was called")

    model = Merging(3, 2)
    assert Teacher(model)(torch.randn(2, 3)).shape == (2, 2)
    assert model.training


@pytest.mark.parametrize(("batchnorm", "follows"), [("eval", False), ("train", False), ("update", True)])
def test_batchnorm_does_what_its_mode_says(batchnorm: str, follows: bool) -> None:
    model, x = network(), 3 * torch.randn(16, 4) + 1
    before = bits(model)
    found = Teacher(model, batchnorm=batchnorm)(x)
    expected = copy.deepcopy(model)
    expected.load_state_dict(before)
    expected.eval()
    if batchnorm != "eval":
        expected[1].train()
    assert torch.equal(found, expected(x))
    assert same(bits(model), before) is not follows
    assert not follows or same(bits(model), bits(expected))
    assert model[1].track_running_stats


def test_a_teacher_is_in_neither_state_dict_nor_optimizer() -> None:
    student = network()
    names = set(student.state_dict())
    student.teacher = Teacher(network())  # type: ignore[assignment]
    assert set(student.state_dict()) == names
    assert len(list(student.parameters())) == 6
    assert len(list(student.modules())) == 6


def test_a_copy_is_frozen_apart_and_bare() -> None:
    model = network()
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)
    teacher = Teacher.copy_of(wrapped)
    before = bits(teacher.model)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert same(bits(teacher.model), before)
    assert before.keys() == model.state_dict().keys()


def test_following_is_an_exponential_average() -> None:
    model = network()
    teacher = Teacher.copy_of(model)
    expected = {name: tensor.double().numpy() for name, tensor in bits(model).items()}
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(16, 4))  # moves the running statistics
        teacher.follow(model, decay=0.9)
        for name, tensor in model.state_dict().items():
            now = tensor.double().numpy()
            whole = name.endswith("num_batches_tracked")
            expected[name] = now if whole else 0.9 * expected[name] + 0.1 * now
        assert int(teacher.model[1].num_batches_tracked) == step + 1  # type: ignore[index]
    for name, tensor in teacher.model.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=2e-5, atol=1e-6)


def test_following_needs_a_teacher_of_its_own() -> None:
    model = network()
    with pytest.raises(BadInput, match="Teacher.copy_of"):
        Teacher(model).follow(model)
    with pytest.raises(BadInput, match="own parameters"):
        Teacher(model).follow(nn.Linear(4, 3))
    with pytest.raises(BadInput, match="from 0 to 1, got 2"):
        Teacher.copy_of(model).follow(model, decay=2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_averaged_at_the_temperature(temperature: float) -> None:
    a, b = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    found = averaged({"a": a, "b": b}, {"a": 3, "b": 1}, temperature=temperature)
    for mine, one, two in zip(found, a, b, strict=True):
        expected = 0.75 * papers.softmax(one, temperature) + 0.25 * papers.softmax(two, temperature)
        np.testing.assert_allclose(papers.softmax(mine, temperature), expected, rtol=1e-12)


def test_averaged_logits_are_the_geometric_mean_of_probabilities() -> None:
    a, b = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    found = averaged({"a": a, "b": b}, average="logits", temperature=3.0)
    torch.testing.assert_close(found, (a + b) / 2)
    product = torch.sqrt(torch.softmax(a, 1) * torch.softmax(b, 1))
    torch.testing.assert_close(torch.softmax(found, 1), product / product.sum(1, keepdim=True))


def test_several_teachers_answer_as_one_and_follow_their_weights() -> None:
    models = {"a": network(), "b": network()}
    x = torch.randn(6, 4)
    teachers = Teachers(models)
    logits = {name: Teacher(model)(x) for name, model in models.items()}
    assert torch.equal(teachers.logits(x, 2.0), averaged(logits, temperature=2.0))
    teachers.weights["b"] = 0.0
    torch.testing.assert_close(
        torch.softmax(teachers.logits(x, 2.0) / 2, 1), torch.softmax(logits["a"] / 2, 1)
    )


def test_bad_input_is_named() -> None:
    models = {"large": network(), "small": network()}
    with pytest.raises(BadInput, match=r"one of eval, train, update, got 'evl'\. Did you mean 'eval'"):
        Teacher(network(), batchnorm="evl")
    with pytest.raises(BadInput, match="must be a torch.nn.Module, got function"):
        Teacher(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"no teacher 'larg'\. Did you mean 'large'"):
        Teachers(models, {"larg": 1.0})
    with pytest.raises(BadInput, match="'small' has no weight"):
        Teachers(models, {"large": 1.0})
    with pytest.raises(BadInput, match="numbers from 0, not all 0"):
        Teachers(models, {"large": 1.0, "small": -1.0})
    with pytest.raises(BadInput, match="not all 0"):
        Teachers(models, {"large": 0.0, "small": 0.0})
    with pytest.raises(BadInput, match="average is one of probabilities, logits, got 'logit'"):
        Teachers(models, average="logit")
    with pytest.raises(BadInput, match="there are none"):
        Teachers({})
    with pytest.raises(BadInput, match="one shape"):
        averaged({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)})
