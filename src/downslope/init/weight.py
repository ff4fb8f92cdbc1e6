"""Weights drawn by the size of their layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from downslope.errors import BadInput, nearest
from downslope.init.activation import ACTIVATIONS, DENSE, NORMS, following, gain
from downslope.inspection import table

METHODS = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal")
"""Glorot & Bengio 2010; He et al. 2015 (arXiv:1502.01852); Saxe et al. 2014 (arXiv:1312.6120)."""

_NAMES = (*METHODS, "glorot_uniform", "glorot_normal", "he_uniform", "he_normal")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Layer:
    """What `initialise` made of one module, and the activation that it found after it."""

    name: str
    kind: str
    done: str
    follows: str = ""


@dataclass(frozen=True)
class Initialised:
    """What `initialise` did, module by module; `left`: parameters it does not know. `str` gives a table."""

    layers: tuple[Layer, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        rows = [(row.name, row.kind, row.done, row.follows) for row in self.layers]
        left = [(name, "", "left as it was", "") for name in self.left]
        return table([("layer", "kind", "now", "followed by"), *rows, *left])


@dataclass(frozen=True)
class _Draw:
    """How weights are drawn: on the generator's own device, so that the numbers are the same anywhere."""

    method: str
    fan: str
    embedding: float
    source: torch.Generator | None

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        return self._empty(like).normal_(0.0, deviation, generator=self.source)

    def weight(self, like: Tensor, fans: tuple[float, float], factor: float) -> Tensor:
        if self.method == "orthogonal":
            return nn.init.orthogonal_(self._empty(like), factor, generator=self.source)
        mean = sum(fans) / 2 if self.method.startswith("xavier") else fans[self.fan == "out"]
        deviation = factor / math.sqrt(mean)
        if self.method.endswith("normal"):
            return self.normal(like, deviation)
        bound = math.sqrt(3) * deviation
        return self._empty(like).uniform_(-bound, bound, generator=self.source)

    def _empty(self, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.empty(like.shape, dtype=dtype, device=self.source.device if self.source else "cpu")


@torch.no_grad()
def initialise(
    model: nn.Module,
    method: str = "kaiming_normal",
    *,
    follows: str | float | nn.Module | None = None,
    fan: str = "in",
    embedding: float = 0.02,
    generator: torch.Generator | int | None = None,
) -> Initialised:
    """Initialise a model in place: linear, convolution, recurrent and attention weights by one of METHODS.

    The gain is that of the activation that follows in the model (`following`), or of `follows`, its name or a
    number. Recurrent and attention weights have gain 1, gate by gate. Biases become 0, norms 1 and 0 with
    fresh statistics, embeddings normal with deviation `embedding`, 0 at padding_idx. Fans count
    what reaches one output, or backwards one input: groups, and strides of transposed convolutions (where
    torch's differ). fan: "in" or "out", for kaiming. The draw depends on generator or seed alone, not on
    the device. Tied weights are drawn once, as an embedding if they are one. Other parameters are left,
    and named. Not for models with a scheme of their own.
    """
    method = _known(method.replace("glorot", "xavier"), method)
    if fan not in ("in", "out"):
        raise BadInput(f"fan is 'in' or 'out', got {fan!r}.")
    source = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    draw = _Draw(method, fan, embedding, source)
    found = following(model) if follows is None else {}
    modules = list(model.named_modules())
    embedded = {p for _, m in modules if isinstance(m, _EMBEDDINGS) for p in m.parameters(recurse=False)}
    rows, left, done = list[Layer](), list[str](), set[nn.Parameter]()
    for name, module in modules:
        after = found.get(name, "linear") if follows is None else follows
        factor = gain(after) if isinstance(module, DENSE) else 1.0
        said: list[str] = []
        for key, p in module.named_parameters(recurse=False):
            if is_lazy(p):
                raise BadInput(f"{name}.{key} has no shape yet: call the model on a batch first.")
            if p in done or (p in embedded and not isinstance(module, _EMBEDDINGS)):
                continue
            done.add(p)
            what = _fill(module, key, p, draw, factor)
            (said if what else left).append(what or f"{name}.{key}".lstrip("."))
        if said:
            shown = after if isinstance(after, str | float | int) else ACTIVATIONS[type(after)]
            rows.append(
                Layer(name, type(module).__name__, ", ".join(dict.fromkeys(said)), str(shown) * (factor != 1))
            )
        if isinstance(module, _NormBase):
            module.reset_running_stats()
    return Initialised(tuple(rows), tuple(left))


def _known(method: str, given: str) -> str:
    method = "kaiming" + method[2:] if method.startswith("he_") else method
    if method not in METHODS:
        raise BadInput(f"no method {given!r}; there are {', '.join(METHODS)}.{nearest(given, _NAMES)}")
    return method


def _fill(module: nn.Module, key: str, p: nn.Parameter, draw: _Draw, factor: float) -> str:
    """Fill one parameter, and say with what; nothing for one that is not known."""
    if isinstance(module, NORMS):
        p.fill_(float(key == "weight"))
        return "1 and 0"
    if isinstance(module, _EMBEDDINGS):
        p.copy_(draw.normal(p, draw.embedding))
        if module.padding_idx is not None:
            p[module.padding_idx] = 0
        return f"normal {draw.embedding:g}"
    if not isinstance(module, (*DENSE, *_RECURRENT, nn.MultiheadAttention)):
        return ""
    if "bias" in key:
        p.zero_()
        return "bias 0"
    for piece in _pieces(module, key, p):
        piece.copy_(draw.weight(piece, _fans(module, piece), factor))
    return f"{draw.method} × {factor:.4g}"


def _pieces(module: nn.Module, key: str, p: Tensor) -> tuple[Tensor, ...]:
    """The parts of a weight that are matrices of their own: groups, gates, the three of attention."""
    count = 1
    if isinstance(module, _ConvNd):
        count = module.groups
    elif isinstance(module, nn.MultiheadAttention):
        count = 3 if key == "in_proj_weight" else 1
    elif isinstance(module, _RECURRENT) and "_hr" not in key:
        count = next((n for word, n in (("LSTM", 4), ("GRU", 3)) if word in type(module).__name__), 1)
    return p.chunk(count)


def _fans(module: nn.Module, piece: Tensor) -> tuple[float, float]:
    """How many inputs reach one output, and how many outputs one input reaches."""
    if isinstance(module, nn.Bilinear):
        return piece[0].numel(), piece.shape[0]
    taps = math.prod(piece.shape[2:])
    one, two = piece.shape[1] * taps, piece.shape[0] * taps
    if not isinstance(module, _ConvNd):
        return one, two
    stride = math.prod(module.stride)
    return (two / stride, one) if isinstance(module, _ConvTransposeNd) else (one, two / stride)
