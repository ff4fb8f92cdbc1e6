"""The generators of a process, taken and put back."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from downslope.errors import BadInput
from downslope.train.random import Generators, seed_all
from downslope.train.surroundings import Surroundings, kept


def draw() -> list[Any]:
    """From everything that has a memory: both gauss functions keep a second value for the next call."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        np.random.randint(1000),
        torch.randn(3).tolist(),
        torch.randperm(5).tolist(),
    ]


def test_what_comes_back_from_json_draws_the_same() -> None:
    seed_all(5)
    draw()
    taken = json.loads(json.dumps(Generators.now().data(), allow_nan=False))
    expected = [draw() for _ in range(300)]  # past the 624 words of the Mersenne twisters
    Generators.from_data(taken).restore()
    assert [draw() for _ in range(300)] == expected
    assert Generators.from_data(taken).data() == taken


def test_each_generator_is_really_put_back() -> None:
    seed_all(1)
    taken = Generators.now()
    first = draw()
    second = draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    taken.restore()
    assert draw() == first


def test_equal_seeds_equal_draws_other_seeds_others() -> None:
    seed_all(2**32 - 1)
    first = draw()
    seed_all(2**32 - 1)
    assert draw() == first
    seed_all(0)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", True, None])
def test_a_wrong_seed_is_refused(seed: Any) -> None:
    with pytest.raises(BadInput, match=r"whole number from 0 to 4294967295, got"):
        seed_all(seed)


def test_damaged_states_are_refused() -> None:
    good = Generators.now().data()
    for wrong in ({}, {**good, "torch": "xyz"}, {**good, "numpy": None}, {**good, "python": {"words": 3}}):
        with pytest.raises(BadInput, match="not the states"):
            Generators.from_data(wrong)


def test_what_happens_inside_is_not_seen_outside() -> None:
    seed_all(3)
    threads = torch.get_num_threads()
    before = Generators.now().data()
    with kept():
        draw()
        Surroundings.seeded(9, threads + 1).restore()
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
    assert Generators.now().data() == before
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
