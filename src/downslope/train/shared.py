"""What several ranks make of one training: parts of a batch, draws, and what cannot be shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b

from downslope.errors import BadInput
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
