"""What tests ask of a part of a task's data."""

from torch import Tensor

from downslope.tasks import Data


def columns(part: Data | None) -> tuple[Tensor, ...]:
    """The tensors of a part that is held in memory."""
    assert isinstance(part, tuple)
    return part


def rows(part: Data | None) -> set[bytes]:
    """The inputs of a part, bit by bit."""
    return {row.numpy().tobytes() for row in columns(part)[0]}
