"""The order of samples: pure, complete, even, and the same for good."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downslope.errors import BadInput
from downslope.train import order, steps_per_epoch

seeds = st.integers(0, 2**32 - 1)


@given(st.integers(1, 300), seeds, st.integers(0, 10**6))
def test_an_epoch_holds_every_sample_once_and_is_a_pure_function(samples: int, seed: int, epoch: int) -> None:
    drawn = order(samples, seed, epoch)
    assert drawn.dtype == torch.int64
    assert sorted(drawn.tolist()) == list(range(samples))
    torch.manual_seed(epoch)  # whatever the generators hold
    assert torch.equal(order(samples, seed, epoch), drawn)


@given(seeds, st.integers(0, 10**6))
def test_another_seed_or_epoch_is_another_order(seed: int, epoch: int) -> None:
    drawn = order(100, seed, epoch)
    assert not torch.equal(order(100, seed, epoch + 1), drawn)
    assert not torch.equal(order(100, seed + 1, epoch), drawn)


def splitmix(x: int) -> int:
    """The generator of Steele, Lea and Flood (2014), in whole numbers of any size."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_order_never_changes_between_versions_or_machines() -> None:
    assert splitmix(1234567) == 6457827717110365317  # the published first number of that seed
    for samples, seed, epoch in ((8, 0, 0), (50, 1, 2), (9, 2**32 - 1, 10**6)):
        start = splitmix(splitmix(seed) ^ epoch)
        keys = [splitmix((start + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(samples)]
        assert order(samples, seed, epoch).tolist() == sorted(range(samples), key=keys.__getitem__)
    assert order(8, seed=0, epoch=0).tolist() == [6, 7, 1, 4, 3, 5, 2, 0]


def test_every_sample_is_as_likely_at_every_place() -> None:
    counts = torch.zeros(10, 10)
    for epoch in range(4000):
        counts[torch.arange(10), order(10, 7, epoch)] += 1
    chi_squared = float(((counts - 400) ** 2 / 400).sum())
    assert 40 < chi_squared < 140  # 81 degrees of freedom: 5e-5 lie outside


def test_orders_of_neighbouring_seeds_and_epochs_are_not_alike() -> None:
    tables = [[order(400, s, e).double() for e in range(12)] for s in range(12)]
    pairs = [(a, b) for row in tables for a, b in pairwise(row)]
    pairs += [(a, b) for one, two in pairwise(tables) for a, b in zip(one, two, strict=True)]
    correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    assert float(correlations.abs().max()) < 5 / 400**0.5
    assert abs(float(correlations.mean())) < 4 / (400 * len(pairs)) ** 0.5


@pytest.mark.parametrize(("samples", "batch", "steps"), [(898, 32, 28), (64, 32, 2), (20, 32, 1), (1, 1, 1)])
def test_an_epoch_has_full_batches_only(samples: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(samples, batch) == steps


def test_no_samples_make_no_batch() -> None:
    with pytest.raises(BadInput, match="at least 1 sample"):
        steps_per_epoch(0, 4)
