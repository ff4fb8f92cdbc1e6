"""Loops of people's own, as a fresh process finds them: right ones, and each with one fault."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import downslope as ds

Run = tuple[ds.TrainState, Callable[[], Tensor]]
counted = 0


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(60, 5, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def plain() -> Run:
    """A loop with an optimizer and a scheduler of torch, and a loader that knows its place."""
    model, data = _model(), _data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    batches = ds.Batches(DataLoader(data, batch_sampler=ds.Sampler(len(data), 16, seed=3)))
    state = ds.TrainState(model, optimizer, scheduler=scheduler, batches=batches)

    def forever() -> Any:
        while True:
            yield from batches

    samples = _Endless(forever())
    return state, lambda: _step(state, optimizer, scheduler, next(samples))


class _Endless:
    """An iterator that hides what it is: what it stands at is kept by `batches`."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __next__(self) -> Any:
        return next(self.iterator)


def _step(state: ds.TrainState, optimizer: Any, scheduler: Any, batch: Any) -> Tensor:
    model = state.parts["model"]
    x, y = batch
    optimizer.zero_grad()
    loss = (model(x + 0.1 * torch.randn(()) + random.random() + float(np.random.rand())) - y).square().mean()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    state.step += 1
    return loss.detach()


def ours() -> Run:
    """A loop with an optimizer of ours, an average and early stopping."""
    model, (x, y) = _model(), _data().tensors
    optimizer = ds.Optimizer(model, ds.chain(ds.clip_norm(1.0), ds.lion(lr=ds.cosine(0.01, steps=40))))
    average, stopping = ds.Average(model, ds.ema(0.9)), ds.EarlyStopping(5)
    state = ds.TrainState(model, optimizer, average=average, stopping=stopping)

    def step() -> Tensor:
        loss = _step(state, optimizer, None, (x, y))
        average.update(optimizer.steps)
        stopping.update(float(loss), state.step)
        return loss

    return state, step


def shuffled() -> Run:
    """Fault: a shuffling DataLoader, whose place nobody keeps."""
    model, data = _model(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = ds.TrainState(model, optimizer)
    samples = iter(DataLoader(data, 16, shuffle=True))

    def step() -> Tensor:
        nonlocal samples
        try:
            batch = next(samples)
        except StopIteration:
            samples = iter(DataLoader(data, 16, shuffle=True))
            batch = next(samples)
        return _step(state, optimizer, None, batch)

    return state, step


def forgotten_counter() -> Run:
    """Fault: a rate that falls by a counter of the loop's own."""
    model, (x, y) = _model(), _data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state, count = ds.TrainState(model, optimizer), 0

    def step() -> Tensor:
        nonlocal count
        count += 1
        return _step(state, optimizer, None, (x / count, y))

    return state, step


def forgotten_global() -> Run:
    """Fault: the same, in the file."""
    model, (x, y) = _model(), _data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = ds.TrainState(model, optimizer)

    def step() -> Tensor:
        global counted
        counted += 1
        return _step(state, optimizer, None, (x / counted, y))

    return state, step


def forgotten_scheduler() -> Run:
    """Fault: a scheduler that is not in the state."""
    model, (x, y) = _model(), _data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    state = ds.TrainState(model, optimizer)
    return state, lambda: _step(state, optimizer, scheduler, (x, y))


def own_generator() -> Run:
    """Fault: noise from a generator that is not in the state."""
    model, (x, y) = _model(), _data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state, rng = ds.TrainState(model, optimizer), np.random.default_rng(0)
    return state, lambda: _step(state, optimizer, None, (x * float(rng.random()), y))


def unseeded() -> Run:
    """Fault: noise that is another in every process."""
    model, (x, y) = _model(), _data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = ds.TrainState(model, optimizer)

    def step() -> Tensor:
        return _step(state, optimizer, None, (x + float(np.random.default_rng().random()), y))

    return state, step


def nothing() -> int:
    """Fault: no loop at all."""
    return 3


class Framework:
    """A loop with its own way to save, such as a framework's."""

    def __init__(self) -> None:
        self.state, self.step = ours()

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def save(self, folder: Any) -> None:
        self.state.save(folder)

    def load(self, folder: Any) -> None:
        assert Path(folder).is_dir()
        self.state.load(folder)

    def fields(self) -> dict[str, str]:
        return self.state.fields()
