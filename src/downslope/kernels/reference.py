"""The reference executor: the very source of a chain, called on NumPy float64 arrays. Slow, plain, and the
judge of the others.

It never sees a trace, so a fault of tracing, folding or code generation shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from downslope.rules.chain import Chain, Key
from downslope.rules.value import WORDS, Operand, Value

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Arrays(Value):
    """One array (or number) per parameter, so that a body called once steps them all and reductions may span
    them.
    """

    values: tuple[Any, ...]
    sizes: tuple[int, ...]
    groups: tuple[int, ...]
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def _of(self, values: Sequence[Any]) -> Arrays:
        return Arrays(tuple(values), self.sizes, self.groups)

    def word(self, name: str, *operands: Operand) -> Arrays:
        """The NumPy function of the word, parameter by parameter."""
        columns = [x.values if isinstance(x, Arrays) else (x,) * len(self.values) for x in operands]
        with np.errstate(all="ignore"):
            return self._of([WORDS[name](*map(np.float64, row)) for row in zip(*columns, strict=True)])

    def reduce(self, name: str, over: str) -> Arrays:
        """Sums, sums of squares or largest magnitudes by tensor, group, or over all."""
        each = []
        with np.errstate(all="ignore"):
            for value, size in zip(self.values, self.sizes, strict=True):
                whole = np.broadcast_to(value, (size,)) if np.ndim(value) == 0 else value
                each.append(_reduce(name, np.asarray(whole)))
            join = np.max if name == "largest" else np.sum
            return self._of([join(np.array(each)[self._within(i, over)]) for i in range(len(each))])

    def count(self, over: str) -> Arrays:
        """The number of elements in the scope."""
        return self._of(
            [float(np.sum(np.array(self.sizes)[self._within(i, over)])) for i in range(len(self.sizes))]
        )

    def _within(self, index: int, over: str) -> Any:
        if over == "all":
            return np.ones(len(self.groups), dtype=bool)
        if over == "group":
            return np.array(self.groups) == self.groups[index]
        if over == "tensor":
            return np.arange(len(self.groups)) == index
        raise NotImplementedError(f"no executor reduces over a {over} yet")


def _reduce(name: str, values: Array) -> float:
    if name == "largest":
        return float(np.max(np.abs(values), initial=0))
    return float(np.sum(np.square(values) if name == "squares" else values))


def reference_step(
    chain: Chain,
    weights: Sequence[Array],
    gradients: Sequence[Array],
    slots: Mapping[str, Sequence[Array]],
    numbers: Callable[[int, Key], float],
    *,
    t: Sequence[int],
    step: int,
    groups: Sequence[int] | None = None,
) -> tuple[list[Array], dict[str, list[Array]]]:
    """One step of `chain` in float64: the new weights and slots, nothing changed in place.

    `numbers(group, key)` looks up a hyperparameter; `t` counts the updates of each parameter, this one
    included, and `step` those of the run. Slots are per element.
    """
    within = tuple(groups or [0] * len(weights))
    sizes = tuple(weight.size for weight in weights)

    def arrays(values: Sequence[Any]) -> Arrays:
        return Arrays(tuple(np.asarray(value, dtype=np.float64) for value in values), sizes, within)

    weight, after = chain.apply(
        arrays(gradients),
        arrays(weights),
        {name: arrays(values) for name, values in slots.items()},
        lambda key: arrays([numbers(group, key) for group in within]),
        t=arrays(list(t)),
        step=arrays([step] * len(sizes)),
    )

    def plain(value: Any) -> list[Array]:
        rows = value.values if isinstance(value, Arrays) else [value] * len(sizes)
        return [
            np.broadcast_to(row, w.shape).astype(np.float64) for row, w in zip(rows, weights, strict=True)
        ]

    return plain(weight), {name: plain(value) for name, value in after.items()}
