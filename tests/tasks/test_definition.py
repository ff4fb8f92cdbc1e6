"""A Task says what is wrong with it when it is made, and fills in what follows from the rest."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from downslope.errors import BadInput
from downslope.tasks import Task, accuracy, cross_entropy, size, squared_error, take

XY = (torch.arange(12.0).view(6, 2), torch.arange(6))


def make(**changes: Any) -> Task:
    given: dict[str, Any] = {
        "model": lambda: nn.Linear(2, 6),
        "train": XY,
        "valid": XY,
        "loss": cross_entropy,
    }
    return Task(**{**given, **changes})


class Squares(Dataset[tuple[int, int]]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index * index


def test_without_a_metric_the_loss_is_the_metric_and_lower_is_better() -> None:
    task = make(loss=squared_error)
    assert (task.metric, task.metric_name, task.higher_is_better) == (squared_error, "squared_error", False)


def test_accuracy_is_known_to_be_better_when_higher() -> None:
    assert make(metric=accuracy).higher_is_better is True


def test_a_metric_of_the_users_own_must_say_which_way_is_better() -> None:
    with pytest.raises(BadInput, match="higher_is_better=True or False"):
        make(metric=lambda model, batch: 0.0)
    assert (
        make(metric=lambda model, batch: 0.0, metric_name="score", higher_is_better=True).metric_name
        == "score"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train": XY[0]}, "'train' must be a tuple of tensors, .* got Tensor"),
        ({"valid": (XY[0].numpy(), XY[1])}, "'valid' must be a tuple of tensors"),
        ({"valid": (XY[0], XY[1][:5])}, r"equal first dimensions, got \[6, 5\]"),
        ({"test": (XY[0][:0], XY[1][:0])}, "'test' holds no samples"),
        ({"train": (torch.tensor(1.0),)}, "'train' must be a tuple of tensors, items first"),
        ({"train": "digits"}, "got str"),
        ({"model": nn.Linear(2, 6)}, "fresh model each time; try model=lambda"),
        ({"model": None}, "'model' of a task must be a function, got NoneType"),
        ({"loss": 3}, "'loss' of a task must be a function, got int"),
        ({"metric": "accuracy"}, "'metric' of a task must be a function, got str"),
        ({"name": "../elsewhere"}, "elsewhere"),
        ({"tokens": 0}, "'tokens' of a task is how many a sample has, a whole number from 1, got 0"),
        ({"tokens": True}, "from 1, got True"),
        ({"tokens": 64.0}, r"from 1, got 64\.0"),
        ({"recipe": {"lr": 1}}, "'recipe' of a task must be a downslope.Recipe, got dict"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        make(**change)


def test_tensors_are_taken_as_whole_batches_in_the_order_asked_for() -> None:
    inputs, targets = take(XY, torch.tensor([4, 0, 4]))
    assert inputs.tolist() == [[8.0, 9.0], [0.0, 1.0], [8.0, 9.0]]
    assert targets.tolist() == [4, 0, 4]


def test_a_dataset_is_collated_into_the_same_batches_as_its_tensors() -> None:
    index = torch.tensor([3, 1])
    assert [column.tolist() for column in take(Squares(), index)] == [[3, 1], [9, 1]]
    assert size(Squares()) == 5
    assert make(train=TensorDataset(*XY)).train is not None
    assert isinstance(make(train=TensorDataset(*XY)).train, tuple)


def test_the_means_are_what_they_say() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    inputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    assert accuracy(model, (inputs, torch.tensor([0, 1, 1]))).item() == pytest.approx(2 / 3)
    assert squared_error(model, (inputs, torch.zeros(3, 2))).item() == pytest.approx((4 + 1 + 9 + 1) / 6)
    by_hand = (
        sum(float(torch.logsumexp(row, 0) - row[t]) for row, t in zip(inputs, (0, 1, 1), strict=True)) / 3
    )
    assert cross_entropy(model, (inputs, torch.tensor([0, 1, 1]))).item() == pytest.approx(by_hand)


def test_squared_error_does_not_broadcast() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(BadInput, match=r"\[6, 1\] do not match targets of \[6\]"):
        squared_error(model, (XY[0], torch.zeros(6)))
