"""What several ranks make of one training: parts of a batch, draws, and what cannot be shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b

import torch
from torch import Tensor, nn

from downslope.errors import BadInput, DownslopeError
from downslope.parallel import Ranks
from downslope.recipe import Recipe
from downslope.strategies.data import length, sliced
from downslope.tasks import Batch, Task


def shares(pieces: Iterable[tuple[Batch, float]], ranks: Ranks) -> Iterator[tuple[Batch, float]]:
    """Of each piece of a batch the part that is this rank's; what its loss counts, so that the mean over all
    ranks is the loss of the batch.

    >>> import torch
    >>> list(shares([(torch.arange(3), 1.0)], Ranks(rank=1, world=2)))
    [(tensor([1, 2]), 1.3333333333333333)]
    """
    for piece, share in pieces:
        if not ranks.together:
            yield piece, share
            continue
        count = length(piece)
        mine = ranks.part(count)
        items = mine.stop - mine.start
        # Without an item of its own a rank still takes part, with items that do not count.
        yield (sliced(piece, mine), share * (items * ranks.world / count)) if items else (piece, 0.0)


def key(seed: int, batches: int, stream: int) -> int:
    """A seed below 2^32 for one stream of random numbers of one batch: BLAKE2b of the three."""
    return int.from_bytes(blake2b(f"{seed} {batches} {stream}".encode(), digest_size=4).digest())


class Drifted(DownslopeError):  # noqa: N818  the sentence reads "drifted: …"
    """Ranks do not hold the same weights or state any more, though nothing was lost on the way."""


def check_one_state(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], ranks: Ranks) -> None:
    """Drifted, on every rank, unless each holds the same bits. A sum over them, which is faster than a hash.

    Not for sharded weights, of which no two ranks hold the same.
    """
    if not ranks.together or ranks.shard:
        return
    held = [*model.state_dict().values()]
    held += [v for one in optimizers for slots in one.state.values() for v in slots.values()]
    total = sum(int(_words(tensor).sum()) for tensor in held if isinstance(tensor, Tensor)) % 2**62
    largest, smallest = ranks.most(total, -total)
    if largest != -smallest:
        raise Drifted(
            "the ranks do not hold the same weights any more: model or loss write them beside the optimizer, "
            "or go by something that each rank has for itself."
        )


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as whole numbers."""
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()]
    return plain.reshape(-1).view(words)


def check_shared(task: Task, recipe: Recipe, ranks: Ranks) -> None:
    """BadInput, with the reason, for what does not go with several ranks."""
    if not ranks.together:
        return
    how = f"{ranks.world} ranks{' and --shard' * ranks.shard}"
    if ranks.shard and len(task.players) > 1:
        raise BadInput(f"the task has several players, which do not go with {how}: leave out --shard.")
    for name, strategy in recipe.strategies.items():
        if why := strategy.alone(ranks.shard):
            raise BadInput(f"[{name}] does not go with {how}: {why}.")
