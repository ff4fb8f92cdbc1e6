"""Splits: complete, disjoint, fair to every class, and scaled by the train part alone."""

import pytest
import torch
from tasks.parts import columns, rows
from torch import Tensor

from downslope.errors import BadInput
from downslope.tasks import Data, Task, size, task
from downslope.tasks.split import needs, shuffled, standardised

CLASSIFIED = {
    "digits-mlp": 1797,
    "digits-cnn": 1797,
    "digits-resnet": 1797,
    "digits-lstm": 1797,
    "cancer-logistic": 569,
}


@pytest.fixture(params=CLASSIFIED)
def classified(request: pytest.FixtureRequest) -> Task:
    return task(request.param)


def test_no_sample_is_in_two_parts(classified: Task) -> None:
    train, valid, test = rows(classified.train), rows(classified.valid), rows(classified.test)
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_the_parts_are_half_a_quarter_and_a_quarter_of_all_samples(classified: Task) -> None:
    assert classified.test is not None
    sizes = size(classified.train), size(classified.valid), size(classified.test)
    assert sum(sizes) == CLASSIFIED[classified.name]
    assert sizes[0] / sum(sizes) == pytest.approx(0.5, abs=0.002)
    assert sizes[1] / sum(sizes) == pytest.approx(0.25, abs=0.002)


def test_every_class_has_the_same_share_in_each_part(classified: Task) -> None:
    def shares(part: Data | None) -> Tensor:
        return torch.bincount(columns(part)[1]) / len(columns(part)[1])

    torch.testing.assert_close(shares(classified.train), shares(classified.valid), atol=0.005, rtol=0)
    torch.testing.assert_close(shares(classified.train), shares(classified.test), atol=0.005, rtol=0)


def test_the_train_part_alone_sets_the_scale(classified: Task) -> None:
    train, valid = columns(classified.train)[0], columns(classified.valid)[0]
    by = (0,) if classified.name == "cancer-logistic" else tuple(range(train.ndim))
    inputs = train.double()
    torch.testing.assert_close(inputs.mean(dim=by), torch.zeros_like(inputs.mean(dim=by)), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(dim=by), torch.ones_like(inputs.std(dim=by)), atol=1e-5, rtol=0)
    assert valid.mean(dim=by).abs().max() > 1e-4


@pytest.mark.parametrize("count", [4, 7, 1001])
def test_shuffling_deals_out_every_item_once_with_its_columns_together(count: int) -> None:
    items = torch.arange(count)
    parts = shuffled((items, items * 10), seed=3)
    assert [len(part[0]) for part in parts.values()] == [
        count // 2,
        count // 4,
        count - count // 2 - count // 4,
    ]
    firsts, seconds = (torch.cat([part[place] for part in parts.values()]) for place in (0, 1))
    assert torch.equal(firsts.sort().values, items)
    assert torch.equal(seconds, firsts * 10)
    assert not torch.equal(firsts, items)


def test_what_is_constant_in_training_is_not_blown_up() -> None:
    parts = shuffled((torch.tensor([[1.0, 2.0], [1.0, 4.0]]).repeat(4, 1), torch.zeros(8)), seed=0)
    scaled = standardised(parts, shape=(2,), by=(0,))
    assert torch.equal(scaled["train"][0][:, 0], torch.zeros(4))
    assert scaled["train"][1] is parts["train"][1]


def test_another_fault_than_a_missing_package_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), needs("scikit-learn"):
        _ = 1 / 0
    with pytest.raises(BadInput, match="need torchnado"), needs("torchnado"):
        raise ImportError("torchnado")
