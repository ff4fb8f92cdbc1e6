"""Activations: the gain that each asks of the layer before it, and which follows which layer in a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from downslope.errors import BadInput, nearest
from downslope.inspection import graphs, untouched

DENSE = (nn.Linear, _ConvNd, nn.Bilinear)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# fmt: off
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.PReLU: "leaky_relu", nn.RReLU: "leaky_relu",
    nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SELU: "selu", nn.GELU: "gelu", nn.SiLU: "silu",
    nn.ELU: "elu", nn.CELU: "celu", nn.Mish: "mish", nn.Softplus: "softplus", nn.Softsign: "softsign",
    nn.Hardswish: "hardswish", nn.Hardtanh: "hardtanh", nn.ReLU6: "relu6", nn.Hardsigmoid: "hardsigmoid",
}
# fmt: on
NAMES = ("linear", *dict.fromkeys(ACTIVATIONS.values()))
_OF_TORCH = ("linear", "relu", "leaky_relu", "tanh", "sigmoid", "selu")

POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
SHAPES = (nn.Identity, _DropoutNd, nn.Flatten, nn.Unflatten)
SHAPE_CALLS = {
    *("dropout", "flatten", "reshape", "view", "contiguous", "permute", "transpose", "squeeze", "unsqueeze")
}
_PASSED = {"batch_norm", "layer_norm", "group_norm", "max_pool1d", "max_pool2d", "max_pool3d"}


def gain(activation: str | float | nn.Module) -> float:
    """The factor on a layer's weights that keeps the second moment of what the activation after it gives.

    An activation of torch, by name or as a module. Where `torch.nn.init.calculate_gain` has the name, its
    value (√2 for relu, 5/3 for tanh); else 1/√E[φ(z)²] for a standard normal z, which is where relu's √2
    comes from. A number is itself. BadInput for a name or module that is not known.

    >>> round(gain("relu"), 4), round(gain(nn.GELU()), 4), gain(0.5)
    (1.4142, 1.5335, 0.5)
    """
    if isinstance(activation, int | float):
        return float(activation)
    name = ACTIVATIONS.get(type(activation)) if isinstance(activation, nn.Module) else activation
    if name not in NAMES:
        word = type(activation).__name__ if name is None else name
        raise BadInput(f"no gain is known for {word!r}; known are {', '.join(NAMES)}.{nearest(word, NAMES)}")
    if name in _OF_TORCH:
        slope = _slope(activation) if name == "leaky_relu" and isinstance(activation, nn.Module) else None
        return nn.init.calculate_gain(name, slope)  # type: ignore[arg-type]
    function = activation if isinstance(activation, nn.Module) else getattr(functional, name)
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return 1 / math.sqrt(float(torch.trapezoid(function(z.clone()) ** 2 * density, z)))


def _slope(activation: nn.Module) -> float:
    """The mean slope below 0."""
    if isinstance(activation, nn.PReLU):
        return float(activation.weight.detach().mean())
    if isinstance(activation, nn.RReLU):
        return (activation.lower + activation.upper) / 2
    assert isinstance(activation, nn.LeakyReLU)
    return activation.negative_slope


def following(model: nn.Module) -> dict[str, str | nn.Module]:
    """The activation that follows each linear or convolution layer, by layer name; "linear" where none does.

    Between them may stand norms, dropout, max pooling and changes of shape. Read from the calls of the model
    in evaluation by torch.fx; for what cannot be traced, from the order in which modules are registered.
    """
    with untouched(model):
        traced = graphs(model.eval())
    found: dict[str, str | nn.Module] = {}
    for prefix, graph in traced.items():
        root = model.get_submodule(prefix)
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(root.get_submodule(node.target), DENSE):
                found[".".join(filter(None, (prefix, node.target)))] = _after(node, root)
    for name, module in model.named_modules():
        if isinstance(module, TRANSFORMERS):
            act: Any = module.activation
            known = act if type(act) in ACTIVATIONS else getattr(act, "__name__", "")
            found[f"{name}.linear1".lstrip(".")] = (
                known if type(act) in ACTIVATIONS or known in NAMES else "linear"
            )
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    for place, (name, module) in enumerate(leaves):
        if isinstance(module, DENSE) and name not in found:
            after = (m for _, m in leaves[place + 1 :] if not isinstance(m, (*NORMS, *SHAPES, *POOLS)))
            first = next(after, None)
            found[name] = first if first is not None and type(first) in ACTIVATIONS else "linear"
    return found


def _after(node: fx.Node, root: nn.Module) -> str | nn.Module:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if type(module) in ACTIVATIONS:
                return module
            if not isinstance(module, (*NORMS, *SHAPES, *POOLS)):
                break
        else:
            name = called(node)
            if name == "leaky_relu":
                return nn.LeakyReLU(node.kwargs.get("negative_slope", [*node.args, 0.01][1]))  # type: ignore[arg-type]
            if name in NAMES:
                return name
            if name not in SHAPE_CALLS | _PASSED:
                break
    return "linear"


def called(node: fx.Node) -> str:
    """The name of the function or method that a node calls, without the underscore of one in place."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return target.rstrip("_") if node.op in ("call_function", "call_method") else ""
