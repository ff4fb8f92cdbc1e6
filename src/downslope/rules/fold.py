"""Folding: what is scalar in a program, computed on the host in float64 while the elementwise code waits."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from downslope.rules.trace import Node
from downslope.rules.value import WORDS


def _choose(condition: Any, a: Any, b: Any) -> Any:
    return np.where(condition, a, b) if isinstance(condition, np.ndarray) else a if condition else b


_ONE = np.float64(1.0)
_FOLDED: Mapping[str, Any] = {
    **WORDS,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "abs": operator.abs,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "where": _choose,
    "sign": lambda a: _choose(a > 0, _ONE, _choose(a < 0, -_ONE, a)),
    "maximum": lambda a, b: _choose((a >= b) | (a != a), a, b),
    "minimum": lambda a, b: _choose((a <= b) | (a != a), a, b),
}
"""Words that do the same on arrays, and of one number take a tenth of the time. A power alone is rounded
another way.
"""


def fold(order: Iterable[Node], known: dict[Node, Any]) -> None:
    """Add the values of scalar nodes to `known`, which holds the leaves: float64, an array with an entry a
    parameter, or one number for all.
    """
    value = known.__getitem__
    with np.errstate(all="ignore"):
        for node in order:
            if node not in known:
                known[node] = _FOLDED[node.word_name](*map(value, node.operands))


def constants(nodes: Iterable[Node]) -> dict[Node, Any]:
    """The values of the numbers written in a rule."""
    return {node: np.float64(float.fromhex(node.payload)) for node in nodes if node.word_name == "constant"}
