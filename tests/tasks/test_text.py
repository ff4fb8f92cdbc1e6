"""Characters: nothing of the held-out text is learnt, and no place sees what comes after it."""

import math
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tasks.parts import columns, rows
from torch import nn

from downslope.errors import BadInput
from downslope.tasks import size, task
from downslope.tasks.text import CONTEXT, Attention, Transformer, next_character, unique_paragraphs, windows


@pytest.fixture
def model() -> Transformer:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Transformer(alphabet=11, context=12, width=16, heads=2, blocks=2).eval()


@pytest.mark.parametrize("changed", range(12))
def test_a_later_character_changes_no_earlier_logit(model: Transformer, changed: int) -> None:
    one = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(1))
    other = one.clone()
    other[:, changed] = (one[:, changed] + 1) % 11
    before, after = model(one), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(dim=2).all(), "and every later one sees it"


def test_attention_is_the_formula_of_its_paper() -> None:
    layer = Attention(width=6, heads=2).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value = np.split(layer.asked(x)[0].detach().numpy(), 3, axis=1)
    seen = np.zeros((5, 6))
    for head in (slice(0, 3), slice(3, 6)):
        for place in range(5):
            scores = np.exp(query[place, head] @ key[: place + 1, head].T / math.sqrt(3))
            seen[place, head] = scores / scores.sum() @ value[: place + 1, head]
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), layer.told(torch.tensor(seen)).detach().numpy())


def test_a_text_shorter_than_the_context_is_read_too(model: Transformer) -> None:
    characters = torch.arange(5)[None]
    assert model(characters).shape == (1, 5, 11)
    longer = torch.cat([characters, torch.zeros(1, 7, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(characters), model(longer)[:, :5])


def test_the_loss_of_a_model_that_knows_nothing_is_the_log_of_the_alphabet(model: Transformer) -> None:
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    batch = (torch.zeros(2, 12, dtype=torch.int64), torch.arange(12).remainder(11).repeat(2, 1))
    assert next_character(model, batch).item() == pytest.approx(math.log(11))


def test_windows_lie_side_by_side_and_every_target_follows_its_input() -> None:
    symbols = torch.arange(16 * 5 * 40 + 9)
    parts = windows(symbols, context=5, seed=2)
    assert [len(part[0]) for part in parts.values()] == [16 * 36, 16 * 2, 16 * 2]
    for inputs, targets in parts.values():
        assert torch.equal(targets, inputs + 1)
    every = torch.cat([part[0].flatten() for part in parts.values()])
    assert torch.equal(every.sort().values, torch.arange(16 * 5 * 40))
    with pytest.raises(BadInput, match="runs of 80 symbols, at least 3 of them, got 240"):
        windows(symbols[:240], context=5, seed=2)


def test_no_paragraph_stands_twice_and_all_of_them_are_there() -> None:
    paragraphs = unique_paragraphs(topics.values()).split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    every = {part.strip("\n") for topic in topics.values() for part in topic.split("\n\n")}
    assert set(paragraphs) == every - {""}


def test_nothing_but_a_border_of_a_table_is_both_learnt_and_asked_for() -> None:
    one = task("chars-transformer")
    assert one.test is not None
    for part in (one.valid, one.test):
        assert len(rows(part) & rows(one.train)) <= 0.01 * size(part)
    text = unique_paragraphs(topics.values())
    assert 0.99 < (size(one.train) + size(one.valid) + size(one.test)) * CONTEXT / len(text) <= 1


def counted(given: NDArray[np.int64], following: NDArray[np.int64]) -> NDArray[np.float64]:
    """The chance of each symbol after each other, from how often it followed."""
    counts = np.full((1 + given.max(), 1 + following.max()), 0.1)
    np.add.at(counts, (given.ravel(), following.ravel()), 1)
    chances: NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
    return chances


def test_counting_is_as_good_as_the_page_of_tasks_says() -> None:
    """To a tenth of a nat: the text of another Python is another one."""
    singles, pairs = [], []
    for seed in range(5):
        one = task("chars-transformer", seed)
        (inputs, targets), (asked, true) = (
            tuple(column.numpy() for column in columns(part)) for part in (one.train, one.valid)
        )
        singles.append(-np.log(counted(np.zeros_like(inputs), targets)[0, true]).mean())
        pairs.append(-np.log(counted(inputs, targets)[asked, true]).mean())
    assert np.mean(singles) == pytest.approx(3.24, abs=0.1)
    assert np.mean(pairs) == pytest.approx(2.43, abs=0.1)
