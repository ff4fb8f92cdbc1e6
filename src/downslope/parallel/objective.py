"""What DDP and FSDP2 wrap: not a model but a function of it, so that a loss may use the model as it likes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from downslope.errors import BadInput
from downslope.kernels.collective import reshard
from downslope.parallel.ranks import Ranks, lost

Function = Callable[[nn.Module, Any], Any]

_ALONE = nullcontext()


class Objective(nn.Module):
    """A loss or metric of `model` as a forward pass; trained by it are the parameters of `part`.

    Under DDP and FSDP2 gradients are means over the ranks. A loss that a rank took of its part of a batch
    must count by `items of the part / items of the batch * world`, that they are those of the whole batch.
    """

    def __init__(self, model: nn.Module, part: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.part = part
        self.ranks = ranks
        self._whole = (model,)  # in a tuple, where no module looks for parameters
        self._wrapped: tuple[DistributedDataParallel, ...] = ()
        self._trained: tuple[bool, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._whole[0]

    def forward(self, function: Function, batch: Any) -> Any:
        """The function's value."""
        return function(self.model, batch)

    def of(self, function: Function, batch: Any) -> Any:
        """The value; a backward pass from it, where gradients are on, gives the mean over all ranks."""
        if not self.ranks.together:
            return function(self.model, batch)
        if self.ranks.shard:
            value = self(function, batch)
            if not torch.is_grad_enabled():
                reshard(self)  # the root keeps what it gathered, and would miss what is written to the parts
            return value
        wrapped = self._ddp() if torch.is_grad_enabled() else None
        return function(self.model, batch) if wrapped is None else wrapped(function, batch)

    def piece(self, last: bool) -> AbstractContextManager[None]:
        """Within it, one piece of a batch: gradients of all but the last stay on this rank and add up."""
        return self._piece(last) if self.ranks.together else _ALONE

    @contextmanager
    def _piece(self, last: bool) -> Iterator[None]:
        wrapped = None if self.ranks.shard else self._ddp()
        with lost():
            if self.ranks.shard:
                self.set_requires_gradient_sync(last)  # type: ignore[operator]  # fully_shard adds it
                yield
            elif wrapped is None or last:
                yield
            else:
                with wrapped.no_sync():
                    yield

    def _ddp(self) -> DistributedDataParallel | None:
        """The wrapper around those parameters that are trained at present; None if there are none."""
        trained = tuple(parameter.requires_grad for parameter in self.part.parameters())
        if trained != self._trained:
            # It looks for parameters without a gradient every time, which also lets it keep the buckets that
            # it begins with: others add up in another order, and a resumed training would differ in bits.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers
                made = any(trained) and DistributedDataParallel(
                    self, find_unused_parameters=True, broadcast_buffers=False, init_sync=False
                )
            self._wrapped, self._trained = (made,) if made else (), trained
        return self._wrapped[0] if self._wrapped else None


def sharded(model: nn.Module, ranks: Ranks) -> Objective:
    """The objective of a model whose weights now lie in parts on all ranks, by FSDP2: the members of its
    ModuleLists, as blocks, are gathered one at a time; the rest is gathered together. BadInput for a model
    that has weights FSDP2 cannot cut.
    """
    from torch.distributed.fsdp import fully_shard

    objective = Objective(model, model, ranks)
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise BadInput(f"{scalars[0]} of the model has no dimension along which --shard could cut it.")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise BadInput(
                f"{name or 'the model'} has row-sparse gradients, which FSDP2 cannot cut: leave out --shard, "
                "or make it with sparse=False."
            )
    owners: dict[int, int] = {}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for found in reversed(lists) for block in found if any(True for _ in block.parameters())]
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for block in blocks:
        # a tied weight stays with the rest
        if all(owners[id(parameter)] == 1 for parameter in block.parameters()):
            fully_shard(block, mesh=ranks.mesh)
    fully_shard(objective, mesh=ranks.mesh)
    return objective
