"""What a batch looks like on its way through a model: scaled to unit variance (LSUV), or checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from downslope.errors import BadInput
from downslope.init.activation import DENSE, following, gain
from downslope.init.weight import _fans, initialise
from downslope.inspection import Call, feed, table, untouched
from downslope.norm import batch_statistics

WEIGHTED = (*DENSE, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Scaled:
    """What LSUV did to one layer: the variance of its outputs before and after, and rescalings it took."""

    layer: str
    before: float
    after: float
    passes: int
    converged: bool


@torch.no_grad()
def lsuv(
    model: nn.Module,
    batch: Any,
    *,
    tolerance: float = 0.1,
    passes: int = 10,
    start: str | None = "orthogonal",
    generator: torch.Generator | int | None = None,
    call: Call = feed,
) -> tuple[Scaled, ...]:
    """Layer-sequential unit variance (Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1), in place.

    First `initialise(model, start, follows="linear")`, unless start is None; then one forward pass, in which
    the weight of each linear and convolution layer is divided by the deviation of its outputs until their
    variance is within `tolerance` of 1. BatchNorm uses the batch, dropout is off; modes, buffers and the
    generators are left as they were, but for the draw of `start`. Layers that share a weight, are
    parametrised, or give constants are not scaled; those that are not called have no row. Not for:
    pretrained weights, nor after `zero_residual`, which comes last.
    """
    if start is not None:
        initialise(model, start, follows="linear", generator=generator)
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    rows: dict[str, Scaled] = {}

    def scale(name: str) -> Callable[..., Tensor | None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if name in rows:
                return None
            before = variance = _variance(name, output)
            free = not parametrize.is_parametrized(layer) and shared[id(layer.weight)] == 1
            count = 0
            assert isinstance(layer.weight, Tensor)
            free = free and bool(layer.weight.any())  # else nothing but the bias is left to see
            while abs(variance - 1) > tolerance and count < passes and variance > 0 and free:
                layer.weight.div_(math.sqrt(variance))
                output = layer.forward(*args, **kwargs)
                variance, count = _variance(name, output), count + 1
            rows[name] = Scaled(name, before, variance, count, abs(variance - 1) <= tolerance)
            return output

        return hook

    with untouched(model), ExitStack() as stack:
        batch_statistics(model)
        for name, module in model.named_modules():
            if isinstance(module, DENSE):
                stack.callback(module.register_forward_hook(scale(name), with_kwargs=True).remove)
        call(model, batch)
    if not rows:
        raise BadInput(f"{type(model).__name__} called no linear or convolution layer on this batch.")
    return tuple(rows.values())


def _variance(name: str, output: Tensor) -> float:
    variance = float(output.to(torch.promote_types(output.dtype, torch.float32)).var(correction=0))
    if not math.isfinite(variance):
        raise BadInput(f"the outputs of layer {name!r} are not finite on this batch.")
    return variance


# The check


@dataclass(frozen=True)
class LayerSignal:
    """One call of a layer with weights, on a batch.

    mean, std: of its outputs. ratio: std over that of the call before (of its input, for the first).
    gradient: std of the loss's gradient by its outputs. verdict: what is off, and what mends it, or nothing.
    """

    layer: str
    kind: str
    mean: float
    std: float
    ratio: float
    gradient: float | None
    verdict: str


@dataclass(frozen=True)
class Check:
    """The signals of all layers, in the order of their calls; `str` gives a table and the verdict."""

    layers: tuple[LayerSignal, ...]

    @property
    def off(self) -> tuple[LayerSignal, ...]:
        """The layers of which something is off."""
        return tuple(layer for layer in self.layers if layer.verdict)

    @property
    def verdict(self) -> str:
        """A line for each layer that is off, and one if gradients change a hundredfold on their way."""
        lines = [f"{layer.layer}: {layer.verdict}" for layer in self.off]
        known = [layer.gradient for layer in self.layers if layer.gradient]
        if known and not 0.01 < known[0] / known[-1] < 100:
            what = "vanish" if known[0] < known[-1] else "explode"
            lines.append(f"gradients {what}: {known[0] / known[-1]:.2g} of the last layer's reach the first")
        return "\n".join(lines) or "every layer keeps the signal's size"

    def __str__(self) -> str:
        head = ("layer", "kind", "mean", "std", "ratio", "gradient std", "off")
        rows = [
            (
                *(row.layer, row.kind),
                *(f"{value:.3g}" for value in (row.mean, row.std, row.ratio)),
                *("–" if row.gradient is None else f"{row.gradient:.3g}", "×" if row.verdict else ""),
            )
            for row in self.layers
        ]
        return f"{table([head, *rows])}\n{self.verdict}"


def check(
    model: nn.Module, batch: Any, *, loss: Callable[[nn.Module, Any], Tensor] | None = None, call: Call = feed
) -> Check:
    """Send a batch through a model, and back if a loss(model, batch) is given; say whose variance is off.

    Off is a linear or convolution layer that multiplies the size (root mean square) of its input by more than
    twice or less than half the gain of the activation that follows it, at which the signal has grown or
    shrunk tenfold since the first, or whose outputs are constant or not finite; and a first one whose input
    is not of about unit size. BatchNorm uses the batch, dropout is off; modes, buffers, generators and
    gradients are left as they were. Not for: a trained model, which may be off by right.
    """
    calls: list[_Heard] = []

    def listen(name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            x = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
            calls.append(_Heard(name, layer, *_spread(out), *((0.0, 1.0) if x is None else _spread(x))))
            if out.requires_grad:
                out.register_hook(calls[-1].back)  # sees the gradient before what is done in place behind

        return hook

    with untouched(model), torch.set_grad_enabled(loss is not None), ExitStack() as stack:
        batch_statistics(model)
        for name, module in model.named_modules():
            if isinstance(module, WEIGHTED):
                stack.callback(module.register_forward_hook(listen(name, module)).remove)
        value = (loss or call)(model, batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        if loss is not None and trained:
            torch.autograd.grad(value, trained, allow_unused=True)
    if not calls:
        raise BadInput(f"{type(model).__name__} called no layer with weights on this batch.")
    return Check(tuple(_judged(calls, following(model))))


@dataclass
class _Heard:
    name: str
    layer: nn.Module
    mean: float
    std: float
    input_mean: float
    input_std: float
    gradient: float | None = None

    @property
    def size(self) -> float:
        """The root mean square of its input."""
        return math.hypot(self.input_mean, self.input_std)

    def back(self, gradient: Tensor) -> None:
        self.gradient = _spread(gradient)[1]


def _spread(x: Tensor) -> tuple[float, float]:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return float(x.mean()), float(x.std(correction=0))


def _judged(calls: list[_Heard], follows: dict[str, str | nn.Module]) -> list[LayerSignal]:
    rows: list[LayerSignal] = []
    counts: Counter[str] = Counter()
    before, first, drifted = calls[0].input_std, 0.0, False
    for heard in calls:
        counts[heard.name] += 1
        name = heard.name if counts[heard.name] == 1 else f"{heard.name} (call {counts[heard.name]})"
        ratio = heard.std / before if before else math.inf
        verdict = ""
        if not math.isfinite(heard.std):
            verdict = "its outputs are not finite"
        elif heard.std == 0:
            verdict = "its outputs are constant: right only at the end of a residual branch or of the model"
        elif isinstance(heard.layer, DENSE):
            drift = heard.std / first if first and not drifted else 1.0
            verdict = _verdict(heard, gain(follows.get(heard.name, "linear")), drift, not first)
            first, drifted = first or heard.std, drifted or not 0.1 <= drift <= 10
        rows.append(
            LayerSignal(
                name, type(heard.layer).__name__, heard.mean, heard.std, ratio, heard.gradient, verdict
            )
        )
        before = heard.std or before
    return rows


def _verdict(heard: _Heard, wanted: float, drift: float, first: bool) -> str:
    weight = heard.layer.weight
    assert isinstance(weight, Tensor)
    piece = weight.detach().chunk(getattr(heard.layer, "groups", 1))[0]
    factor = float(piece.float().square().mean().sqrt()) * math.sqrt(_fans(heard.layer, piece)[0]) / wanted
    own = heard.std / heard.size / wanted if heard.size else 0.0
    if not 0.5 <= own <= 2:
        said = f"it multiplies the signal by {own * wanted:.2g}, where {wanted:.2g} is due"
        if not 2 / 3 <= factor <= 3 / 2:
            return (
                f"{said}: its weights are {factor:.2g} times as large as they should be; initialise, or lsuv"
            )
        return f"{said}, though its weights have the right size; lsuv, or a norm layer before it"
    if first and not 0.1 <= heard.size <= 10:
        return f"its input has size {heard.size:.2g}; standardise the data"
    if not 0.1 <= drift <= 10:
        return f"the signal has changed {drift:.2g}-fold since the first layer; lsuv, or norm layers"
    return ""
