"""Residual branches that start at zero, so that a deep network starts as a shallow one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from downslope.errors import BadInput, nearest
from downslope.init.activation import (
    ACTIVATIONS,
    DENSE,
    NORMS,
    POOLS,
    SHAPE_CALLS,
    SHAPES,
    TRANSFORMERS,
    called,
)
from downslope.inspection import graphs, table, untouched

_BENT = {"sigmoid", "softplus", "hardsigmoid"}  # 0 does not stay 0 behind these
_KEEP_ZERO = set(ACTIVATIONS.values()) - _BENT


@dataclass(frozen=True)
class Zeroed:
    """The last layers of residual branches that were set to zero, and additions for which none was found.

    layers: names of modules whose weight and bias are 0 now. left: branch and the reason it was left.
    """

    layers: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = [(name, "weight and bias are 0") for name in self.layers]
        return table([("layer", "what became of it"), *rows, *self.left.items()])


@torch.no_grad()
def zero_residual(model: nn.Module, layers: Iterable[str] | None = None) -> Zeroed:
    """Set the last layer of every residual branch to zero, in place, so that each block starts as its skip.

    That is Fixup's first rule (Zhang et al. 2019, arXiv:1901.09321), and for a norm at the branch's end its
    γ = 0 (Goyal et al. 2017, arXiv:1706.02677, 5.1). Branches are found in torch's transformer layers,
    and by torch.fx where a branch is added to its own input, or to a shorter branch of one input, as where a
    block changes its width; or name their last layers in `layers`. Fixup's other rules (scaled weights inside
    branches, scalar biases) are not applied: they are for networks without norms. BadInput for a name that is
    no such layer. What follows a zero layer has no gradient before it in the first step. Not for: pretrained
    weights.
    """
    tied = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    ends: dict[str, None] = {}
    left: dict[str, str] = {}
    if layers is not None:
        names = dict(model.named_modules())
        for name in layers:
            if not isinstance(names.get(name), (*DENSE, *NORMS, nn.MultiheadAttention)):
                raise BadInput(
                    f"{name!r} is no linear, convolution, attention or norm layer.{nearest(name, names)}"
                )
            ends[name] = None
    else:
        for where, end in _branches(model):
            if end is None:
                left[where] = "the branch does not end in one layer after which 0 stays 0"
            else:
                ends[end] = None
    zeroed = []
    for name in ends:
        module = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            name, module = f"{name}.out_proj", module.out_proj
        own = list(module.parameters(recurse=False))
        if any(tied[id(p)] > 1 for p in own):
            left[name] = "its weight is tied to another layer's"
            continue
        for p in own:
            p.zero_()
        zeroed.append(name)
    return Zeroed(tuple(zeroed), left)


def _branches(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Where a branch is added to its input, and the name of the branch's last layer."""
    for name, module in model.named_modules():
        if isinstance(module, TRANSFORMERS):
            for key in ("self_attn", "multihead_attn", "linear2"):
                if hasattr(module, key):
                    yield name, f"{name}.{key}".lstrip(".")
    with untouched(model):
        traced = graphs(model.eval())
    for prefix, graph in traced.items():
        root = model.get_submodule(prefix)
        for node in graph.nodes:
            if called(node) in ("add", "iadd"):
                branch = _branch(node, root)
                if branch is not None:
                    end = _end(branch, root)
                    yield f"{prefix}.{node.name}".lstrip("."), end and f"{prefix}.{end}".lstrip(".")


def _branch(add: fx.Node, root: nn.Module) -> fx.Node | None:
    """The side of an addition that is a residual branch: it starts at the other, or is the longer of two."""
    if len(add.all_input_nodes) != 2:
        return None
    one, two = add.all_input_nodes
    above = {one: _above(one), two: _above(two)}
    for side, other in ((one, two), (two, one)):
        if other in above[side] and _layers(above[side] - above[other] - {other}, root):
            return side
    common = above[one] & above[two]
    for side, other in ((one, two), (two, one)):
        skip = _layers(above[other] - common, root)
        if common and 0 < len(skip) < len(_layers(above[side] - common, root)):
            shallow = (*DENSE, *NORMS, *SHAPES, *POOLS, nn.AvgPool2d)
            if all(isinstance(module, shallow) for module in skip):
                return side
    return None


def _above(node: fx.Node) -> set[fx.Node]:
    """The node and all that it comes from."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return seen


def _layers(nodes: Iterable[fx.Node], root: nn.Module) -> list[nn.Module]:
    called = [root.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    return [module for module in called if any(True for _ in module.parameters())]


def _end(node: fx.Node, root: nn.Module) -> str | None:
    """The last layer of a branch, back through what keeps 0 at 0."""
    while True:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if isinstance(module, (*DENSE, nn.MultiheadAttention)):
                return str(node.target)
            if isinstance(module, NORMS):
                return str(node.target) if any(True for _ in module.parameters()) else None
            if not isinstance(module, SHAPES) and ACTIVATIONS.get(type(module)) not in _KEEP_ZERO:
                return None
        elif called(node) not in _KEEP_ZERO | SHAPE_CALLS | {"mul", "imul", "getitem"}:
            return None
        inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
        if len(inputs) != 1:
            return None
        node = inputs[0]
