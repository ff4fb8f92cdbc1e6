"""Tracing: a chain is called once on symbols, and what it did becomes a program that every executor can run.

Scalars are of three classes. `host` scalars follow from numbers and counters and are known before the step;
`device` scalars follow a reduction over a group or over all tensors, `row` scalars one over a tensor, and are
known between two passes. What is scalar is folded: executors compute it in float64, once per parameter, and
hand the elementwise code a table of columns. Reductions cut the program into stages. Every stage but the last
only reads; the last writes weight and state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from downslope.errors import BadInput
from downslope.rules.chain import Chain, Key
from downslope.rules.slot import Slot
from downslope.rules.value import REDUCTIONS, SCOPES, WORDS, Number, Operand, Value


class Class(IntEnum):
    """How often a value is there: once before the step, once after a reduction, once a tensor, a line, an
    element.
    """

    HOST = 0
    DEVICE = 1
    ROW = 2
    LINE = 3
    ELEMENT = 4


_AFTER = {
    "all": Class.DEVICE,
    "group": Class.DEVICE,
    "tensor": Class.ROW,
    "row": Class.LINE,
    "column": Class.LINE,
}


@dataclass(frozen=True, eq=False)
class Node(Value):
    """One operation of a trace; equal operations are one node. `depth` counts the reductions that it must
    wait for.
    """

    trace: Trace = field(repr=False)
    word_name: str
    operands: tuple[Node, ...]
    kind: Class
    depth: int
    payload: Any = None

    def word(self, name: str, *operands: Operand) -> Node:
        """The node of this word over these operands."""
        return self.trace.word(name, *operands)

    def reduce(self, name: str, over: str) -> Node:
        """The node of this reduction; scalars are broadcast over the tensor first, as in NumPy."""
        if over not in SCOPES:
            raise BadInput(f"a reduction goes over one of {', '.join(SCOPES)}; {over!r} was given.")
        return self.trace.node(name, (self,), _AFTER[over], self.depth + 1, over)

    def count(self, over: str) -> Node:
        """The node of the number of elements."""
        return self.trace.node("count", (), Class.HOST, 0, over)

    def matrix(self, name: str, **numbers: Number) -> Node:
        """A matrix operation: it needs its operand whole, so it cuts the program as a reduction does."""
        return self.trace.node(
            f"matrix:{name}", (self,), Class.ELEMENT, self.depth + 1, tuple(sorted(numbers.items()))
        )

    def noise(self, name: str) -> Node:
        """Counter-based random numbers of this shape; each call is a stream of its own."""
        return self.trace.node(f"noise:{name}", (), Class.ELEMENT, 0, len(self.trace.nodes))


class Trace:
    """The nodes of one trace, each once."""

    def __init__(self) -> None:
        self.nodes: dict[Any, Node] = {}

    def node(
        self, name: str, operands: tuple[Node, ...], kind: Class, depth: int, payload: Any = None
    ) -> Node:
        """The one node with these properties."""
        key = (name, tuple(id(operand) for operand in operands), payload)
        if key not in self.nodes:
            self.nodes[key] = Node(self, name, operands, kind, depth, payload)
        return self.nodes[key]

    def input(self, name: str, kind: Class, payload: Any = None) -> Node:
        """A node without operands: gradient, weight, slot, number or counter."""
        return self.node(name, (), kind, 0, payload)

    def constant(self, value: Number) -> Node:
        """A number written in a rule. -0.0 and 0.0 are two numbers."""
        return self.node("constant", (), Class.HOST, 0, float(value).hex())

    def word(self, name: str, *operands: Operand) -> Node:
        """An elementwise word; a power with a small whole exponent becomes products."""
        if (
            name == "pow"
            and isinstance(operands[0], Node)
            and operands[0].kind > Class.HOST
            and operands[1] == 2
        ):
            return self.word("mul", operands[0], operands[0])
        nodes = tuple(x if isinstance(x, Node) else self.constant(x) for x in operands)  # type: ignore[arg-type]
        return self.node(name, nodes, max(node.kind for node in nodes), max(node.depth for node in nodes))


@dataclass(frozen=True)
class Stage:
    """One pass over memory: the scalars that its elementwise code reads, and what it reduces or, in the last,
    stores.
    """

    scalars: tuple[Node, ...]
    elements: tuple[Node, ...]
    reductions: tuple[Node, ...]
    stores: Mapping[str, Node]

    @cached_property
    def loads(self) -> tuple[str, ...]:
        """The arrays read, "g" and "p" and slots by name, in a fixed order."""
        return tuple(sorted({node.payload for node in self.elements if node.word_name == "input"}))


@dataclass(frozen=True)
class Program:
    """A traced chain: its numbers, its slots and its stages. `variant` tells apart programs that the host
    picks by step.
    """

    name: str
    numbers: tuple[Key, ...]
    slots: Mapping[str, Slot]
    stages: tuple[Stage, ...]
    gradient_norm: Node | None
    variant: tuple[int, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """Bytes that one step must move per element, for four-byte numbers everywhere: what a perfect kernel
        would need.
        """
        return 4 * sum(len(stage.loads) + len(stage.stores) for stage in self.stages)

    @property
    def nodes(self) -> list[Node]:
        """Every node that the results need, operands first."""
        return _reach(
            [*self.stages[-1].stores.values(), *(node for s in self.stages for node in s.reductions)]
        )


def trace(chain: Chain, guard: bool = False) -> Program:
    """The program of a chain. With `guard`, its first stage also takes the norm of the raw gradients, so that
    one read tells whether any is NaN or infinite; a chain that needs that norm anyway pays nothing."""
    tape = Trace()
    g, p = tape.input("input", Class.ELEMENT, "g"), tape.input("input", Class.ELEMENT, "p")
    slots = {name: tape.input("input", _slot_class(slot), name) for name, (_, slot) in chain.slots.items()}
    weight, after = chain.apply(
        g,
        p,
        slots,
        lambda key: tape.input("number", Class.HOST, key),
        t=tape.input("t", Class.HOST),
        step=tape.input("step", Class.HOST),
    )
    stores = {"p": weight} | {name: value for name, value in after.items() if value is not slots[name]}
    stores = {
        name: value if isinstance(value, Node) else tape.constant(value) for name, value in stores.items()
    }
    watched = g.reduce("squares", "all") if guard else None
    stages = _cut(stores, [watched] if watched is not None else [])
    numbers = sorted({n.payload for n in tape.nodes.values() if n.word_name == "number"}, key=str)
    return Program(chain.name, tuple(numbers), {n: s for n, (_, s) in chain.slots.items()}, stages, watched)


def _slot_class(slot: Slot) -> Class:
    per = {
        "element": Class.ELEMENT,
        "row": Class.LINE,
        "column": Class.LINE,
        "tensor": Class.ROW,
        "group": Class.DEVICE,
    }
    return per[slot.per]


def _cut(stores: Mapping[str, Node], watched: list[Node]) -> tuple[Stage, ...]:
    """Stages by depth: a reduction of depth d is taken in stage d - 1; every store happens in the last
    stage.
    """
    reached = _reach([*stores.values(), *watched])
    last = max(node.depth for node in reached)
    reductions: list[list[Node]] = [[] for _ in range(last)]
    for node in reached:
        if node.word_name in REDUCTIONS or node.word_name.startswith("matrix:"):
            reductions[node.depth - 1].append(node)
    stages = []
    for depth in range(last + 1):
        wanted = reductions[depth] if depth < last else []
        results = list(stores.values()) if depth == last else [node.operands[0] for node in wanted]
        elements = _reach(results, lambda node: node.kind >= Class.LINE)
        scalars = dict.fromkeys(
            node
            for node in [*results, *(operand for element in elements for operand in element.operands)]
            if node.kind < Class.LINE and node.word_name != "constant"
        )
        stages.append(Stage(tuple(scalars), tuple(elements), tuple(wanted), stores if depth == last else {}))
    return tuple(stages)


def _reach(roots: Iterable[Node], inside: Any = lambda node: True) -> list[Node]:
    """Every node that the roots need and that is `inside`, operands first."""
    seen: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in seen or not inside(node):
            return
        for operand in node.operands:
            visit(operand)
        seen[node] = None

    for root in roots:
        visit(root)
    return list(seen)


def scalars(nodes: Iterable[Node]) -> list[Node]:
    """The scalar nodes that `nodes` need, operands first, down to inputs, constants and reductions."""
    return _reach(nodes, lambda node: node.kind < Class.LINE and node.word_name not in REDUCTIONS)


def fold(order: Iterable[Node], known: dict[Node, Any]) -> None:
    """Add the values of scalar nodes to `known`, which holds the leaves: float64, one entry a parameter."""
    with np.errstate(all="ignore"):
        for node in order:
            if node not in known:
                known[node] = WORDS[node.word_name](*[known[operand] for operand in node.operands])


def constants(nodes: Iterable[Node]) -> dict[Node, Any]:
    """The values of the numbers written in a rule."""
    return {node: np.float64(float.fromhex(node.payload)) for node in nodes if node.word_name == "constant"}
