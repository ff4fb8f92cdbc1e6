"""Tracing: a chain is called once on symbols, and what it did becomes a program that every executor can run.

Scalars are of three classes. `host` scalars follow from numbers and counters and are known before the step;
`device` scalars follow a reduction over a group or over all tensors, `row` scalars one over a tensor, and are
known between two passes. What is scalar is folded: executors compute it in float64, once per parameter, and
hand the elementwise code a table of columns. Reductions cut the program into stages. Every stage but the last
only reads; the last writes weight and state.

What is not elementwise (lines of rows and columns, whole matrices) is `lent`: a library computes it between
two stages. A stage writes what is lent away to scratch memory ("work0", …) and reads what comes back
("lent0", …) like any other array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

from downslope.errors import BadInput
from downslope.rules.chain import Chain, Key
from downslope.rules.matrix_words import shape_of
from downslope.rules.slot import Slot
from downslope.rules.value import LINES, REDUCTIONS, SCOPES, Number, Operand, Value


class Class(IntEnum):
    """How often a value is there: once before the step, once after a reduction, once a tensor; lent to a
    library; once an element.
    """

    HOST = 0
    DEVICE = 1
    ROW = 2
    LENT = 3
    ELEMENT = 4


_AFTER = {"all": Class.DEVICE, "group": Class.DEVICE, "tensor": Class.ROW}


@dataclass(frozen=True, eq=False)
class Node(Value):
    """One operation of a trace; equal operations are one node. `depth` counts the passes that it must wait
    for; `shape` is "element", or what a lent value is: a line, a square matrix.
    """

    trace: Trace = field(repr=False)
    word_name: str
    operands: tuple[Node, ...]
    kind: Class
    depth: int
    payload: Any = None
    shape: str = "element"

    def word(self, name: str, *operands: Operand) -> Node:
        """The node of this word over these operands."""
        return self.trace.word(name, *operands)

    def reduce(self, name: str, over: str) -> Node:
        """The node of this reduction; scalars are broadcast over the tensor first, as in NumPy."""
        if over not in SCOPES:
            raise BadInput(f"a reduction goes over one of {', '.join(SCOPES)}; {over!r} was given.")
        if over in LINES:
            return self.trace.lent(f"{name} of {over}", (self,), over)
        if self.kind is Class.LENT and self.shape != "element":
            if over != "tensor":
                raise BadInput(f"a {self.shape} is reduced over its tensor only; {over!r} was given.")
            return self.trace.node(f"{name} of tensor", (self,), Class.ROW, self.depth)
        return self.trace.node(name, (self,), _AFTER[over], self.depth + 1, over)

    def count(self, over: str) -> Node:
        """The node of a number that the shape of the weight gives."""
        if over == "tensor" and self.kind is Class.LENT and self.shape != "element":
            over = f"tensor of {self.shape}"
        return self.trace.node("count", (), Class.HOST, 0, over)

    def lend(self, name: str, *operands: Operand) -> Node:
        """The node of an operation on whole matrices; it needs its operands whole, as a reduction does."""
        nodes = self.trace.nodes_of(operands)
        if name == "shrink_singular" and nodes[1].kind >= Class.LENT:
            raise BadInput("nuclear needs a rule whose rate is one number a tensor, such as sgd or momentum.")
        shape = shape_of(name, [node.shape for node in nodes])
        if shape == "tensor":
            return self.trace.node(name, nodes, Class.ROW, max(node.depth for node in nodes))
        return self.trace.lent(name, nodes, shape)

    def noise(self, name: str, seed: Operand) -> Node:
        """Counter-based random numbers of this shape; each call is a stream of its own."""
        stream = sum(node.word_name.startswith("noise:") for node in self.trace.nodes.values())
        return self.trace.node(
            f"noise:{name}", self.trace.nodes_of((seed,)), Class.ELEMENT, 0, stream, "element"
        )

    @cached_property
    def meaning(self) -> str:
        """A digest of what this node computes, the same in every trace of the same words."""
        said = repr((self.word_name, self.payload, [operand.meaning for operand in self.operands]))
        return hashlib.sha256(said.encode()).hexdigest()


class Trace:
    """The nodes of one trace, each once."""

    def __init__(self) -> None:
        self.nodes: dict[Any, Node] = {}

    def node(
        self,
        name: str,
        operands: tuple[Node, ...],
        kind: Class,
        depth: int,
        payload: Any = None,
        shape: str = "element",
    ) -> Node:
        """The one node with these properties."""
        key = (name, tuple(id(operand) for operand in operands), payload)
        if key not in self.nodes:
            self.nodes[key] = Node(self, name, operands, kind, depth, payload, shape)
        return self.nodes[key]

    def lent(self, name: str, operands: tuple[Node, ...], shape: str) -> Node:
        """A node that a library computes between two passes, once what is elementwise in it was written."""
        depth = max(node.depth + (node.kind is Class.ELEMENT) for node in operands)
        return self.node(name, operands, Class.LENT, depth, None, shape)

    def nodes_of(self, operands: Iterable[Operand]) -> tuple[Node, ...]:
        """The operands as nodes; plain numbers become constants."""
        return tuple(x if isinstance(x, Node) else self.constant(x) for x in operands)  # type: ignore[arg-type]

    def input(self, name: str, kind: Class, payload: Any = None, shape: str = "element") -> Node:
        """A node without operands: gradient, weight, slot, number or counter."""
        return self.node(name, (), kind, 0, payload, shape)

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
        nodes = self.nodes_of(operands)
        kind, depth = max(node.kind for node in nodes), max(node.depth for node in nodes)
        if name == "mod" and kind > Class.ROW:
            raise BadInput("mod is for counters and numbers, of which there is one a tensor.")
        shapes = {node.shape for node in nodes if node.kind is Class.LENT}
        if kind is Class.LENT and len(shapes) > 1:
            kind = Class.ELEMENT  # a row by a column: what spans the weight is not for a library
        shape = shapes.pop() if kind is Class.LENT else "element"
        return self.node(name, nodes, kind, depth, None, shape)


@dataclass(frozen=True)
class Stage:
    """One pass over memory: the scalars and arrays that its elementwise code reads, what it reduces and what
    it stores: scratch in every stage but the last, weight and state there.
    """

    scalars: tuple[Node, ...]
    elements: tuple[Node, ...]
    reductions: tuple[Node, ...]
    stores: Mapping[str, Node]
    lent: Mapping[Node, str]
    last: bool

    @cached_property
    def folded(self) -> tuple[Node, ...]:
        """The scalars that follow from others, operands first: from `leaves` and constants, in the end."""
        return tuple(_reach(self.scalars, lambda node: not _given(node)))

    @cached_property
    def leaves(self) -> tuple[Node, ...]:
        """What the scalars follow from: numbers, counters, reductions, what a library made of a tensor."""
        every = [*(operand for node in self.folded for operand in node.operands), *self.scalars]
        return tuple(dict.fromkeys(node for node in every if _given(node) and node.word_name != "constant"))

    @cached_property
    def loads(self) -> tuple[str, ...]:
        """The arrays read, "g" and "p", slots and what came back from a library by name, in a fixed order."""
        own = {node.payload for node in self.elements if node.word_name == "input"}
        return tuple(sorted({*own, *self.lent.values()}))

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """Those of `loads` that hold a number an element, and not a number a line."""
        lines = {name for node, name in self.lent.items() if node.shape in LINES}
        return tuple(name for name in self.loads if name not in lines)


@dataclass(frozen=True)
class Program:
    """A traced chain: its numbers, its slots, its stages, and what a library computes between them.

    `works` are arrays that stages write for the library, `after` the slots and tensor numbers that are not
    written by elementwise code. `dense` names a part that takes no row-sparse gradient; `idle` are numbers
    that must be 0 for one.
    """

    name: str
    numbers: tuple[Key, ...]
    slots: Mapping[str, Slot]
    stages: tuple[Stage, ...]
    gradient_norm: Node | None
    works: Mapping[str, Node]
    after: Mapping[str, Node]
    dense: str | None = None
    idle: Mapping[Key, str] = field(default_factory=dict)

    @property
    def bytes_moved(self) -> int:
        """Bytes that one step moves per element, for four-byte numbers everywhere: every array that a stage
        reads or writes, and those of `lending`. What a number a line takes is not counted.
        """
        passes = sum(len(stage.arrays) + len(stage.stores) for stage in self.stages)
        return 4 * (passes + sum(self.lending))

    @cached_property
    def lending(self) -> tuple[int, int]:
        """How many arrays a library reads between the stages, each time anew, and how many it returns."""
        lent = [node for node in self.nodes if node.kind is Class.LENT or _from_lent(node)]
        read = sum(operand.kind is Class.ELEMENT for node in lent for operand in node.operands)
        returned = {node for stage in self.stages for node in stage.lent if node.shape not in LINES}
        return read, len(returned)

    @cached_property
    def nodes(self) -> list[Node]:
        """Every node that the results need, operands first."""
        return _reach(
            [
                *(node for stage in self.stages for node in [*stage.reductions, *stage.stores.values()]),
                *self.after.values(),
            ]
        )

    @cached_property
    def lends(self) -> bool:
        """Whether a library computes anything between the stages."""
        return any(node.kind is Class.LENT or _from_lent(node) for node in self.nodes)

    @cached_property
    def crosses(self) -> bool:
        """Whether it looks at several tensors together, as norms over all of them do."""
        return any(node.kind is Class.DEVICE for stage in self.stages for node in stage.reductions)

    @cached_property
    def noises(self) -> tuple[Node, ...]:
        """The streams of random numbers that elementwise code draws."""
        return tuple(node for node in self.nodes if node.word_name.startswith("noise:"))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every array of the stages by name: gradient, weight, slots, scratch, and what a library returns."""
        own = [name for name, slot in self.slots.items() if slot.per == "element"]
        lent = dict.fromkeys(name for stage in self.stages for name in stage.lent.values())
        return ("g", "p", *own, *self.works, *lent)


def _given(node: Node) -> bool:
    """Whether a scalar is not folded from others."""
    lent = any(operand.kind >= Class.LENT for operand in node.operands)
    return lent or not node.operands or node.word_name in REDUCTIONS


def _from_lent(node: Node) -> bool:
    return node.kind is Class.ROW and any(operand.kind is Class.LENT for operand in node.operands)


class Tape:
    """The inputs of a chain as nodes of one new trace."""

    def __init__(self, chain: Chain, unscale: bool = False) -> None:
        self.trace, self.chain = Trace(), chain
        self.g: Any = self.trace.input("input", Class.ELEMENT, "g")
        self.raw = self.g
        if unscale:
            self.g = self.g * self.number(UNSCALE)
        self.p = self.trace.input("input", Class.ELEMENT, "p")
        self.slots = {name: self._slot(name, slot) for name, (_, slot) in chain.slots.items()}

    def _slot(self, name: str, slot: Slot) -> Node:
        if slot.per == "element":
            return self.trace.input("input", Class.ELEMENT, name)
        if slot.per == "tensor":
            return self.trace.input("slot", Class.ROW, name)
        return self.trace.input("slot", Class.LENT, name, slot.per)

    def number(self, key: Key) -> Node:
        """The node of a number of the param group."""
        return self.trace.input("number", Class.HOST, key)

    def program(self, weight: Operand | None, after: Mapping[str, Any], guard: bool = False) -> Program:
        """The program that stores this weight and these slots."""
        changed = {name: value for name, value in after.items() if value is not self.slots.get(name)}
        stores = changed if weight is None else {"p": weight} | changed
        nodes = dict(zip(stores, self.trace.nodes_of(stores.values()), strict=True))
        slots = {name: slot for name, (_, slot) in self.chain.slots.items()}
        apart = {name: node for name, node in nodes.items() if name != "p" and slots[name].per != "element"}
        watched = [self.raw.reduce("squares", "all")] if guard else []
        inside = {name: node for name, node in nodes.items() if name not in apart}
        stages, works = _cut(inside, apart, watched)
        numbers = sorted({n.payload for n in self.trace.nodes.values() if n.word_name == "number"}, key=str)
        norm = watched[0] if watched else None
        dense = self.chain.dense.name if self.chain.dense else None
        found = Program(self.chain.name, tuple(numbers), slots, stages, norm, works, apart, dense)
        return replace(found, idle=self.chain.idle)


UNSCALE: Key = ("1/scale", None)
"""The number that a GradScaler's scale becomes: gradients are multiplied by it on their way in."""


def trace(chain: Chain, guard: bool = False, unscale: bool = False) -> Program:
    """The program of a chain. With `guard`, its first stage also takes the norm of the raw gradients, so that
    one read tells whether any is NaN or infinite; a chain that needs that norm anyway pays nothing. With
    `unscale`, gradients come multiplied by a scale."""
    tape = Tape(chain, unscale)
    weight, after = chain.apply(
        tape.g,
        tape.p,
        tape.slots,
        tape.number,
        t=tape.trace.input("t", Class.HOST),
        step=tape.trace.input("step", Class.HOST),
    )
    return tape.program(weight, after, guard)


def trace_ascent(chain: Chain, unscale: bool = False) -> Program:
    """The program that moves the weights to where the gradient is taken a second time."""
    tape = Tape(chain, unscale)
    return tape.program(chain.second_point(tape.g, tape.p, tape.number), {})


def trace_evaluation(chain: Chain) -> Program:
    """The program that puts the weights to evaluate in place of those that are trained."""
    tape = Tape(chain)
    return tape.program(chain.evaluated(tape.p, tape.slots, tape.number), {})


def trace_estimate(chain: Chain) -> Program:
    """The program that takes a gradient of another loss into the state."""
    tape = Tape(chain)
    return tape.program(None, chain.estimated(tape.g, tape.p, tape.slots, tape.number))


def _cut(
    stores: Mapping[str, Node], apart: Mapping[str, Node], watched: list[Node]
) -> tuple[tuple[Stage, ...], dict[str, Node]]:
    """Stages by depth, and what they write for a library: a reduction of depth d is taken in stage d - 1;
    weight and state are stored in the last stage.
    """
    reached = _reach([*stores.values(), *apart.values(), *watched])
    last = max((node.depth for node in reached), default=0)
    reductions: list[list[Node]] = [[] for _ in range(last)]
    lending: dict[Node, int] = {}
    for node in reached:
        if node.word_name in REDUCTIONS:
            reductions[node.depth - 1].append(node)
        elif node.kind is Class.LENT or _from_lent(node):
            for operand in node.operands:
                if operand.kind is Class.ELEMENT:
                    lending.setdefault(operand, operand.depth)
    works = {f"work{place}": node for place, node in enumerate(lending)}
    returned: dict[Node, str] = {}
    stages = []
    for depth in range(last + 1):
        wanted = reductions[depth] if depth < last else []
        written = {name: node for name, node in works.items() if node.depth == depth}
        written |= stores if depth == last else {}
        results = [*written.values(), *(node.operands[0] for node in wanted)]
        stages.append(_stage(results, wanted, written, returned, depth == last))
    return tuple(stages), works


def _stage(
    results: list[Node], wanted: list[Node], written: dict[str, Node], returned: dict[Node, str], last: bool
) -> Stage:
    elements = _reach(results, lambda node: node.kind is Class.ELEMENT)
    used = [*results, *(operand for element in elements for operand in element.operands)]
    scalars = dict.fromkeys(node for node in used if node.kind < Class.LENT and node.word_name != "constant")
    lent = {}
    for node in used:
        if node.kind is Class.LENT:
            lent[node] = returned.setdefault(node, f"lent{len(returned)}")
    return Stage(tuple(scalars), tuple(elements), tuple(wanted), written, lent, last)


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
    return _reach(nodes, lambda node: node.kind < Class.LENT and node.word_name not in REDUCTIONS)
