"""What is done to a batch on its way into the training: mixing and smoothing, and pieces of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from downslope.augment import Mix, soft_targets
from downslope.errors import BadInput, under
from downslope.inspection import untouched
from downslope.strategies.strategy import Batch, Live, Setting, Strategy


@dataclass(frozen=True, kw_only=True)
class mix(Strategy):
    """Mix each item of a batch with another: `mixup`, `cutmix` are the alpha of Beta(alpha, alpha), 0 is off.

    Targets become probabilities, smoothed by `smoothing`; the task's loss must take them, as
    `ds.cross_entropy` does. `probability`: how often a batch is mixed; `cutmix_share`: of those, where both
    are on; `per_item`: every item draws for itself. Source: arXiv:1710.09412, arXiv:1905.04899. Not for:
    targets that are places in the input, nor token ids.
    """

    mixup: float = 0.2
    cutmix: float = 0.0
    probability: float = 1.0
    cutmix_share: float = 0.5
    per_item: bool = False
    smoothing: float = 0.0
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Mix(**self.data())
        _check_classes(self.classes)

    def begin(self, training: Setting) -> Live:
        """The mixing of every batch; draws come from the training's own generator."""
        known = {**self.data(), "classes": _counted(self, training)}
        return _Changed(Mix(**known))


@dataclass(frozen=True, kw_only=True)
class smoothing(Strategy):
    """Label smoothing: targets are `share` of uniform and the rest their class.

    The task's loss must take probabilities, as `ds.cross_entropy` does. Source: Szegedy et al.,
    arXiv:1512.00567, section 7. Not for: a teacher that is to be distilled from (arXiv:1906.02629); with
    [mix], which smooths by its own `smoothing`.
    """

    share: float = 0.1
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise BadInput(f"share must be from 0 to below 1, got {self.share!r}.")
        _check_classes(self.classes)

    def refuse(self, others: Any) -> None:
        """Mixing smooths by itself."""
        if "mix" in others:
            raise BadInput("[smoothing] beside [mix] would smooth twice: give [mix] its own smoothing.")

    def begin(self, training: Setting) -> Live:
        """The smoothing of every batch."""
        classes = _counted(self, training)
        if classes is None:
            raise BadInput("[smoothing] needs classes=…: the task's targets do not say how many there are.")

        def smooth(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return inputs, soft_targets(targets, classes, self.share)

        return _Changed(smooth)


def _check_classes(classes: int | None) -> None:
    if classes is not None and not 2 <= classes < 2**31:
        with under("classes"):
            raise BadInput(f"classes must be at least 2, got {classes}.")


def _counted(strategy: mix | smoothing, training: Setting) -> int | None:
    """The classes that are declared, else those that the targets name. BadInput if those are more."""
    named = training.classes or 0
    if strategy.classes is not None and strategy.classes < named:
        raise BadInput(
            f"[{strategy.name}] classes = {strategy.classes}, and the training targets name {named}.",
            key=(strategy.name, "classes"),
        )
    return strategy.classes or training.classes


class _Changed(Live):
    def __init__(self, change: Any) -> None:
        self.change = change

    def batch(self, batch: Batch) -> Batch:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise BadInput("to mix or smooth, a batch must be (inputs, targets).")
        return tuple(self.change(*batch))


@dataclass(frozen=True, kw_only=True)
class micro(Strategy):
    """Take the gradient of a batch in pieces of at most `items`, which add up to that of the whole batch.

    They are as few as may be, of nearly one size. Each counts by its share of the items, and clip, decay and
    step come once a batch: but for BatchNorm, which sees pieces, and random numbers, nothing changes except
    memory. Not for: losses that compare items of a batch with each other; means over tokens some of which do
    not count; pieces of one item where BatchNorm finds one value per channel, which is refused. Several ranks
    share each piece.
    """

    items: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items < 1:
            with under("items"):
                raise BadInput(f"items must be at least 1, got {self.items}.")

    def begin(self, training: Setting) -> Live:
        """The pieces of every batch."""
        pieces = _Pieces(self.items)
        if any(isinstance(module, _BatchNorm) for module in training.model.modules()):
            for batch in training.batches(1):
                *_, (least, _) = pieces.parts(batch)
                if length(least) < 2 * training.world:  # the least that a rank takes of it is one item
                    self._try(sliced(least, slice(0, 1)), training)
        return pieces

    def _try(self, piece: Batch, training: Setting) -> None:
        """BadInput where BatchNorm cannot do with a piece, as it says in training only."""
        with untouched(training.model), torch.no_grad():
            training.model.train()
            try:
                training.of(training.loss, piece)
            except Exception as error:  # whatever else it raises, it does in the training, as the task's own
                if "more than 1 value per channel" in str(error):
                    of = f"one of {training.world} ranks " * (training.world > 1)
                    raise BadInput(
                        f"[micro] items = {self.items} leaves {of}a piece of one item, of which the model's "
                        "BatchNorm cannot take a variance: take more items, or [normalisation]."
                    ) from None


class _Pieces(Live):
    def __init__(self, items: int) -> None:
        self.items = items

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        count = length(batch)
        number = -(-count // self.items)
        size, longer = divmod(count, number)
        start = 0
        for place in range(number):
            end = start + size + (place < longer)
            yield sliced(batch, slice(start, end)), (end - start) / count
            start = end


def length(batch: Batch) -> int:
    """How many items a batch has. BadInput unless it is made of tensors, items first."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, dict):
        return length(next(iter(batch.values())))
    if isinstance(batch, tuple | list) and batch:
        return length(batch[0])
    raise BadInput(
        f"a batch is taken apart only if it is made of tensors, items first; got {type(batch).__name__}."
    )


def sliced(batch: Batch, part: slice) -> Batch:
    """Those items of a batch, whatever it is nested in."""
    if isinstance(batch, Tensor):
        return batch[part]
    if isinstance(batch, dict):
        return {key: sliced(value, part) for key, value in batch.items()}
    return tuple(sliced(value, part) for value in batch)
