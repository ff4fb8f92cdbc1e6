"""A training's batches by number: always those that its order names, however they are taken from memory."""

import sys

import pytest
import torch

import downslope as ds
from downslope.train.order import order
from downslope.train.reader import Reader
from tests.train.problems import task


def numbered(samples: int) -> ds.Task:
    """Each sample can be told from the others."""
    return task(train=(torch.arange(samples * 2.0).reshape(samples, 2), torch.arange(samples)))


@pytest.mark.parametrize(("samples", "batch_size"), [(7, 3), (3, 8), (64, 4), (1000, 10)])
def test_a_batch_is_what_the_order_of_its_pass_names(
    samples: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a few batches, and beyond the end of a pass."""
    monkeypatch.setattr(
        sys.modules[Reader.__module__], "_BLOCK", 3 * 16 * batch_size
    )  # bytes of three batches
    given = numbered(samples)
    reader = Reader(given, 5, batch_size, torch.device("cpu"))
    full = min(batch_size, samples)
    for number in [0, 1, 2, 3, 2, 7, 0, reader.per_epoch, 5 * reader.per_epoch - 1]:
        epoch, position = divmod(number, reader.per_epoch)
        places = order(samples, 5, epoch)[position * full : (position + 1) * full]
        for column, found in zip(given.train, reader.batch(number), strict=True):  # type: ignore[arg-type]
            assert torch.equal(found, column[places])
            assert found.is_contiguous()


def test_what_is_done_to_the_first_batches_is_not_seen_in_training() -> None:
    """A model that works in place would else train on what a strategy's look at the data left behind."""
    given = numbered(20)
    reader = Reader(given, 0, 4, torch.device("cpu"))
    before = [column.clone() for column in reader.batch(1)]
    for batch in reader.first(3):
        batch[0].zero_()
    for batch in reader.everything():
        batch[0].zero_()
    assert all(torch.equal(now, then) for now, then in zip(reader.batch(1), before, strict=True))
    assert torch.equal(given.train[1], torch.arange(20))  # type: ignore[index]
    assert given.train[0].any()  # type: ignore[index]


def test_where_a_batch_lies_does_not_depend_on_where_a_training_began() -> None:
    """Its alignment can show in the last bit of a product."""
    places = []
    for begun in (0, 3):
        reader = Reader(numbered(1000), 0, 7, torch.device("cpu"))
        for number in range(begun, 6):
            batch = reader.batch(number)
        places.append(batch[0].storage_offset())
    assert places[0] == places[1]
