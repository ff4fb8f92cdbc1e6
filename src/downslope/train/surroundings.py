"""What a training takes from its process and must find again: generators, threads, torch switches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from downslope.train.random import Generators, seed_all


@dataclass(frozen=True)
class Surroundings:
    """The generators and switches of torch on which the bits of a training depend.

    The thread count is among them: sums are split by it, so numbers are equal only at the same count.
    """

    generators: Generators
    threads: int
    deterministic: bool = True
    warn_only: bool = True
    fill: bool = False
    benchmark: bool = False

    @classmethod
    def now(cls) -> "Surroundings":
        """Those of the process at this moment."""
        return cls(
            Generators.now(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark,
        )

    @classmethod
    def seeded(cls, seed: int, threads: int | None = None) -> "Surroundings":
        """Fresh ones: generators from `seed`, `threads` (default: the process's), deterministic operations.

        An operation that has no deterministic form warns, and is used. BadInput unless 0 <= seed < 2^32.
        """
        with kept():
            seed_all(seed)
            return cls(Generators.now(), threads or torch.get_num_threads())

    def restore(self) -> None:
        """Make them those of the process."""
        self.generators.restore()
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = self.benchmark


@contextmanager
def kept() -> Iterator[None]:
    """Whatever is changed or drawn inside, outside it was not."""
    before = Surroundings.now()
    try:
        yield
    finally:
        before.restore()
