"""Who began it: the first operation whose result was not finite though all that it was given was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from downslope.train.weights import at_rest


class Culprit(NamedTuple):
    """The operation as torch calls it, the module it ran in ("" is the loss), and the pass."""

    operation: str
    layer: str
    backward: bool

    def __str__(self) -> str:
        where = f"in {self.layer}" if self.layer else "in the loss"
        return f"{self.operation} {where}, {'backward' if self.backward else 'forward'}"


def culprit(model: nn.Module, loss: Callable[[], Tensor]) -> Culprit | None:
    """Compute a loss of the model and its gradient again, and look at every operation; None if all is finite.

    Only gradients are written; buffers, modes and numbers are as before. Random numbers are drawn anew. Slow:
    for the one batch that went wrong. What a program puts in by itself, such as a mask of -inf, is nobody's
    fault, nor are numbers that were not finite before.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> str(culprit(model, lambda: (model(torch.zeros(1, 2)) - 100).log().sum()))
    'log in the loss, forward'
    """
    watch = _Watch()
    modes = [(module, module.training) for module in model.modules()]
    with at_rest(model), _following(model, watch):
        for module, mode in modes:
            module.training = mode
        with torch.enable_grad(), watch:
            found = loss()
            watch.backward, watch.inside = True, []
            if watch.found is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of hooks where inputs need no gradient
                    found.backward()  # type: ignore[no-untyped-call]
    return watch.found


def began(model: nn.Module, losses: Sequence[Callable[..., Tensor]], batches: Sequence[Any]) -> str:
    """The culprit of the first of these losses, of the model and a batch, that is not finite; "" if none is,
    or it cannot be computed again.
    """
    for loss in losses:
        for batch in batches:
            with suppress(Exception):
                if found := culprit(model, partial(loss, model, batch)):
                    return str(found)
    return ""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Culprit | None = None
        self.inside: list[str] = []
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        name = func.overloadpacket.__name__
        looks = self.found is None and not name.startswith(("empty", "new_empty", "resize"))
        before = looks and all(map(_finite, given))
        made = func(*args, **(kwargs or {}))
        if before and not all(map(_finite, tree_leaves(made))):
            self.found = Culprit(name, self.inside[-1] if self.inside else "", self.backward)
        return made


@contextmanager
def _following(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """The watch knows which module runs, forward and backward."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            name = path or type(module).__name__

            def enter(*_: Any, name: str = name) -> None:
                watch.inside.append(name)

            def leave(*_: Any) -> None:
                if watch.inside:
                    watch.inside.pop()

            handles = [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
                module.register_full_backward_pre_hook(enter),
            ]
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return value - value == 0.0
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return bool(torch.isfinite(value).all()) if value.layout is torch.strided else True
    return True
