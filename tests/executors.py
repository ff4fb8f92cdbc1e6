"""Which executor steps an optimizer: for tests that compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from downslope.kernels import device


@contextmanager
def stepped_by(executor: str) -> Iterator[None]:
    """What makes its first step inside is stepped by "eager" or "gpu", or, for "cpu", by whatever fits."""
    with pytest.MonkeyPatch.context() as patch:
        asked = "auto" if executor == "cpu" else executor
        patch.setattr(device, "update", partial(device.update, executor=asked))
        yield


def buckets_by_kind(optimizer: Any) -> dict[str, set[str]]:
    """The executors of each program that this optimizer has run ("step", "ascent" …), by the names of their
    buckets: a long step may be left to eager where the short programs beside it are compiled.
    """
    updates = optimizer._machine.updates.items()
    return {kind: {type(bucket).__name__ for bucket in made.buckets} for kind, made in updates}


def buckets_of(optimizer: Any) -> set[str]:
    """The executors that have stepped this optimizer's parameters, by the names of their buckets."""
    return set().union(*buckets_by_kind(optimizer).values())
