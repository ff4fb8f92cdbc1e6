"""What probes of a model stand on: they leave no trace, and see in which order layers are called."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

Call = Callable[[nn.Module, Any], Any]
"""How a model is called on a batch."""


@contextmanager
def untouched(*of: nn.Module | Tensor) -> Iterator[None]:
    """Whatever runs inside leaves no trace on the models but in their weights, also if it raises.

    Modes and buffers are put back, and the global generators of python, numpy and torch (on the CPU and on
    the devices of the models, or of tensors given beside them). Inside, the models work on copies of their
    buffers: a graph that is alive stays valid, and no averaged or shared buffer is written. Not for what
    forward keeps in plain attributes.

    >>> norm = nn.BatchNorm1d(2)
    >>> with untouched(norm): _ = norm(torch.randn(8, 2))
    >>> norm.running_mean.tolist(), int(norm.num_batches_tracked)
    ([0.0, 0.0], 0)
    """
    models = [each for each in of if isinstance(each, nn.Module)]
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    before = [(module, module.training, dict(module._buffers)) for module in modules]
    tensors = [each for each in of if isinstance(each, Tensor)]
    tensors += [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    indices: dict[str, set[int]] = {}
    for device in {tensor.device for tensor in tensors} - {torch.device("cpu"), torch.device("meta")}:
        indices.setdefault(device.type, set()).add(device.index or 0)
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        for kind, found in (indices or {"cuda": set()}).items():
            stack.enter_context(torch.random.fork_rng(sorted(found), device_type=kind))
        try:
            copies: dict[int, Tensor] = {}
            for module, _, buffers in before:
                for name, buffer in buffers.items():
                    if buffer is not None:
                        module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            yield
        finally:
            for module, mode, buffers in before:
                module.training = mode
                module._buffers.clear()
                module._buffers.update(buffers)
            random.setstate(python)
            np.random.set_state(numpy)


def feed(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: on the batch itself, or on the first part of a tuple or list.

    What else a model needs is said by a function of your own, `call(model, batch)`.
    """
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or super().is_leaf_module(m, module_qualified_name)


def graphs(model: nn.Module) -> dict[str, fx.Graph]:
    """The graphs of a model's calls by torch.fx: one, under "", where all of it can be traced.

    Where a module's own forward cannot (it branches on values), it is a leaf to what is around it, and the
    largest modules inside that can be traced have graphs of their own, by name; targets in a graph are
    relative to that name. Forward runs on symbols, in the modes that the modules are in.
    """
    opaque: set[nn.Module] = set()
    with untouched(model):
        inner, apart = _graphs(model, "", opaque)
    return inner | apart


def _graphs(
    module: nn.Module, name: str, opaque: set[nn.Module]
) -> tuple[dict[str, fx.Graph], dict[str, fx.Graph]]:
    """The graphs that a trace of what is around this module would swallow, and those that stay apart."""
    inner: dict[str, fx.Graph] = {}
    apart: dict[str, fx.Graph] = {}
    for key, child in module.named_children():
        swallowed, others = _graphs(child, f"{name}.{key}" if name else key, opaque)
        inner, apart = inner | swallowed, apart | others
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # their children are called by what is around them
        return inner, apart
    tracer = _Tracer(opaque)
    if tracer.is_leaf_module(module, name):
        return {}, apart | inner
    try:
        return {name: tracer.trace(module)}, apart
    except Exception:  # whatever a user's forward raises on symbols
        opaque.add(module)
        return {}, apart | inner
