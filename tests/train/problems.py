"""Small tasks with everything that is easily lost on the way through a checkpoint; some lose it."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import downslope as ds

SAMPLES = 70
own = np.random.default_rng(0)


def parts(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 3, generator=generator)
    made = {}
    for part, count in (("train", SAMPLES), ("valid", 30), ("test", 25)):
        inputs = torch.randn(count, 6, generator=generator)
        made[part] = (inputs, (inputs @ weight).argmax(dim=1))
    return made


def recipe(*, steps: int = 40, **changes: Any) -> ds.Recipe:
    rate = ds.cosine(3e-3, steps="100 %", warmup="10 %")
    made = ds.Recipe(ds.chain(ds.clip_norm(1.0), ds.adamw(lr=rate)), steps=steps, batch_size=16)
    return made.with_(**changes)


class Rich(nn.Module):
    """BatchNorm, dropout, a tied weight, and a buffer that no state dict shows, but the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.head = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.register_buffer("updates", torch.zeros(2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
            self.updates += 1
        x = nn.functional.dropout(self.norm(self.first(x - self.mean)), 0.2, self.training)
        return self.head(self.again(x).relu())


def noisy(model: nn.Module, batch: Any) -> Tensor:
    """Draws from each global generator, while training."""
    inputs, targets = batch
    if model.training:
        shift = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1))
        inputs = inputs + shift + 0.1 * torch.randn_like(inputs)
    return nn.functional.cross_entropy(model(inputs), targets)


def task(seed: int = 0, **changes: Any) -> ds.Task:
    given = {"model": Rich, "loss": noisy, "metric": ds.accuracy, "recipe": recipe()}
    return ds.Task(**{**parts(seed), **given, **changes})


def rich(seed: int = 0) -> ds.Task:
    return task(seed)


class Augmented(torch.utils.data.Dataset[Any]):
    """A map-style dataset whose samples draw from the generator it is given."""

    def __init__(self, data: tuple[Tensor, Tensor], rng: Any) -> None:
        self.data, self.rng = data, rng

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[0][index] + 0.1 * self.rng.normal(), self.data[1][index]


def samples(seed: int = 0) -> ds.Task:
    """Sample by sample, and from numpy's global generator: that is saved."""
    return task(seed, train=Augmented(parts(seed)["train"], np.random))


def own_generator(seed: int = 0) -> ds.Task:
    """The dataset draws from a generator of its own, which nobody saves."""
    return task(seed, train=Augmented(parts(seed)["train"], np.random.default_rng(1)))


def global_generator(seed: int = 0) -> ds.Task:
    """The loss draws from a global of this file, which nobody saves."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return noisy(model, batch) * (1 + 0.1 * float(own.normal()))

    return task(seed, loss=loss, metric=ds.accuracy)


def failing(seed: int = 0) -> ds.Task:
    """The loss raises, for a batch in the middle."""
    bad = parts(seed)["train"][0][3]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        1 // int(not (model.training and (batch[0] == bad).all(dim=1).any()))
        return noisy(model, batch)

    return task(seed, loss=loss, metric=ds.accuracy)


class Counting(Rich):
    """Its output depends on how often it was called, which is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * (1 + 0.01 * self.calls)


def counting(seed: int = 0) -> ds.Task:
    return task(seed, model=Counting)


def other_data(seed: int = 0) -> ds.Task:
    """Its data are others in each process."""
    return task(int.from_bytes(random.SystemRandom().randbytes(4)))


def clock(seed: int = 0) -> ds.Task:
    """The loss depends on the time of day: nothing that could be found, but it shows."""
    import time

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return noisy(model, batch) * (1 + 1e-3 * (time.time() % 1))

    return task(seed, loss=loss, metric=ds.accuracy)


class Plain(nn.Module):
    """Weights used twice, a layer norm that autocast leaves in float32, and numbers that may overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.again, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.norm(self.first(x)).relu())
        return self.head(self.again(x).relu())


def entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def spiking(model: nn.Module, batch: Any) -> Tensor:
    """For the batch with sample 40, gradients overflow in fp16 under a scale, and not without one."""
    sample = parts(0)["train"][0][40]
    bad = model.training and bool((batch[0] == sample).all(dim=1).any())
    return entropy(model, batch) + (3e3 * model(batch[0]).float().mean() if bad else 0.0)


def overflowing(seed: int = 0) -> ds.Task:
    """Gradients of fp16 overflow in the middle."""
    return task(seed, model=Plain, loss=spiking)


def sequence() -> nn.Module:
    """A class of torch's own, which its `nn.Module.compile` leaves as it is."""
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.3), nn.LayerNorm(12), nn.Linear(12, 3))


def sequential(seed: int = 0) -> ds.Task:
    """Something to compile, with draws."""
    mild = ds.Recipe(ds.chain(ds.momentum(lr=0.05)), steps=40, batch_size=16)
    return task(seed, model=sequence, loss=entropy, recipe=mild)
