"""Tasks on real digits whose models have what strategies act on: residual branches, BatchNorm, dropout."""

from typing import Any

import torch
from torch import Tensor, nn

import downslope as ds

WIDTH, ITEMS = 16, 16


class Residual(nn.Module):
    """64 inputs, two residual branches with BatchNorm, dropout, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.blocks = nn.Sequential(Branch(), Branch())
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [items, 1, 8, 8] → logits [items, 10]."""
        return self.head(self.drop(self.blocks(self.stem(x.flatten(1)))))


class Branch(nn.Module):
    """x + branch(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.branch(x)


class Plain(nn.Module):
    """Nothing that looks at the rest of a batch, or draws."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(64, 12)
        self.high = nn.Linear(12, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [items, 1, 8, 8] → logits [items, 10]."""
        return self.high(torch.tanh(self.low(x.flatten(1))))


def recipe(*strategies: Any, steps: int = 24, **changes: Any) -> ds.Recipe:
    rate = ds.cosine(3e-3, steps="100 %", warmup="10 %")
    made = ds.Recipe(
        ds.chain(ds.clip_norm(1.0), ds.adamw(lr=rate)), steps, ITEMS, strategies=strategies, observe=4
    )
    return made.with_(**changes) if changes else made


def residual(seed: int = 0, **changes: Any) -> ds.Task:
    """On 200 of the digits."""
    whole = ds.task("digits-cnn", seed)
    parts = {part: tuple(x[:200] for x in getattr(whole, part)) for part in ("train", "valid", "test")}
    given = {"model": Residual, "loss": ds.cross_entropy, "metric": ds.accuracy, "recipe": recipe()}
    return ds.Task(**{**parts, **given, **changes})


def plain(seed: int = 0, **changes: Any) -> ds.Task:
    """The same in float64."""
    whole = residual(seed)
    parts = {
        part: (data[0].double(), data[1])
        for part in ("train", "valid", "test")
        if (data := vars(whole)[part])
    }
    return residual(seed, **{**parts, "model": Plain, **changes})
