"""A model's weights and the data beside them: at rest, kept, on a device; and the classes of targets."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from downslope.tasks import Data


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module's mode and every buffer is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


class Buffers:
    """What a model keeps beside its weights, such as running statistics, as it was before an update that is
    then not made: a batch that is left out must leave nothing behind, least of all a NaN.

    Costs a copy of every buffer at each `keep`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(self) -> None:
        """Keep all buffers as they are."""
        self._kept = [
            (module, name, buffer, buffer.clone())
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        """Let them be the tensors that they were, with the values of then."""
        with torch.no_grad():
            for module, name, buffer, before in self._kept:
                module._buffers[name] = buffer.copy_(before)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, whatever they are nested in."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(item, device) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        items = [moved(item, device) for item in batch]
        return tuple(items) if isinstance(batch, tuple) else items
    return batch


def classes(data: Data) -> int | None:
    """How many classes whole-number targets name, where each item has one; None for other data."""
    if not isinstance(data, tuple) or len(data) != 2:
        return None
    targets = data[1]
    plain = targets.ndim == 1 and not targets.is_floating_point() and targets.dtype is not torch.bool
    return int(targets.max()) + 1 if plain else None
