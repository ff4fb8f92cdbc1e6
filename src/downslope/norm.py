"""BatchNorm: what it does in its two modes, statistics measured anew, freezing, folding, and what replaces it
where batches are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from downslope.errors import BadInput, nearest
from downslope.inspection import Call, feed, graphs, table, untouched

CHANNELS_A_GROUP = 16
"""The best fixed number of channels a group in table 3 of Wu & He 2018 (arXiv:1803.08494)."""


def batch_statistics(model: nn.Module, used: bool = True) -> None:
    """Put BatchNorm into training (or, with `used=False`, evaluation) mode, and all else into evaluation.

    So batch statistics are used as in training, and dropout draws nothing. What `freeze` holds stays.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(used)


# What the two modes do


@dataclass(frozen=True)
class Gap:
    """How far the two modes of one BatchNorm layer are apart on a batch.

    mean: batch mean − running mean, in running standard deviations, root mean square over channels.
    variance: batch variance / running variance, geometric mean over channels. output: distance between its
    outputs in the two modes on one input, as a part of their deviation. through: the same, with all BatchNorm
    of the model in the one mode or the other, so that what the layers before do adds up.
    """

    layer: str
    mean: float
    variance: float
    output: float
    through: float


@dataclass(frozen=True)
class Gaps:
    """The gaps of all BatchNorm layers, in the order of their calls; `str` gives a table."""

    layers: tuple[Gap, ...]

    def __iter__(self) -> Iterator[Gap]:
        return iter(self.layers)

    def __str__(self) -> str:
        head = ("layer", "mean", "variance", "output", "through")
        rows = [(g.layer, *(f"{v:.3g}" for v in (g.mean, g.variance, g.output, g.through))) for g in self]
        return table([head, *rows])


def compare(model: nn.Module, batch: Any, *, call: Call = feed) -> Gaps:
    """How far BatchNorm's batch and running statistics, and its outputs in both modes, are apart on a batch.

    The model runs twice without gradients, all else in evaluation mode, and is left as it was. A large
    `output` early in training is natural; at its end it says that evaluation sees another network than
    training: batches too small, a momentum too slow, or weights that were averaged. BadInput without
    BatchNorm. Not for: a batch of few items, whose statistics are noise.
    """
    layers = _layers(model)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    own: list[tuple[str, float, float, float]] = []
    running = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}

    def watch(name: str, batches: bool) -> Callable[..., None]:
        def hook(layer: _BatchNorm, args: tuple[Tensor], output: Tensor) -> None:
            seen[batches].append(output.detach().clone())  # what follows may write into it
            if batches:
                own.append((name, *_gap(layer, args[0], output, *running[name])))

        return hook

    for batches in (False, True):
        with untouched(model), torch.no_grad(), ExitStack() as stack:
            batch_statistics(model, batches)
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(watch(name, batches)).remove)
            call(model, batch)
    _heard(bool(own))
    apart = [_apart(one, two) for one, two in zip(seen[False], seen[True], strict=True)]
    return Gaps(tuple(Gap(*gap, through) for gap, through in zip(own, apart, strict=True)))


def _gap(
    layer: _BatchNorm, x: Tensor, output: Tensor, mean: Tensor | None, variance: Tensor | None
) -> tuple[float, float, float]:
    if mean is None or variance is None:  # no running statistics: both modes are one
        return 0.0, 1.0, 0.0
    of_batch, about, _ = _moments(x, correction=0)
    scale = variance.float() + layer.eps
    shift = ((of_batch - mean.float()) / scale.sqrt()).square().mean().sqrt()
    ratio = ((about + layer.eps) / scale).log().mean().exp()
    evaluated = nn.functional.batch_norm(x, mean, variance, layer.weight, layer.bias, False, 0.0, layer.eps)
    return float(shift), float(ratio), _apart(evaluated, output)


def _apart(one: Tensor, two: Tensor) -> float:
    """Root mean square distance over the deviation of the second."""
    distance = (one.float() - two.float()).square().mean().sqrt()
    return float(distance / two.float().std(correction=0).clamp_min(torch.finfo(torch.float32).tiny))


def _moments(x: Tensor, correction: int) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of every channel of a layer's input, and how many values a channel has."""
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=correction)
    return mean, variance, x.numel() // x.shape[1]


def _heard(anything: bool) -> None:
    if not anything:
        raise BadInput(
            "no BatchNorm layer was called; a compiled model passes hooks over: give the one inside."
        )


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not found:
        raise BadInput(f"{type(model).__name__} has no BatchNorm layer.")
    return found


# Running statistics measured anew


class _Sums:
    """Sums of means and variances over batches, each weighted by the values it was taken over."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        device = layer.running_mean.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.mean, self.variance = torch.zeros(2, layer.num_features, dtype=wide, device=device)
        self.count = self.calls = 0

    def add(self, layer: _BatchNorm, args: tuple[Tensor]) -> None:
        x = args[0].detach()
        if x.numel() <= x.shape[1]:
            raise BadInput(
                "a batch gives a BatchNorm layer one value per channel, which has no variance: "
                "drop the batch of one item, or join it to another."
            )
        mean, variance, count = _moments(x, correction=1)
        self.count, self.calls = self.count + count, self.calls + 1
        self.mean += (mean - self.mean) * (count / self.count)
        self.variance += (variance - self.variance) * (count / self.count)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, call: Call = feed) -> None:
    """Set BatchNorm's running statistics to those over `batches`, as momentum=None would, ragged ones too.

    The mean over batches of mean and unbiased variance, each weighted by its values per channel: the running
    mean is that of all items. For weights that were averaged or set from elsewhere. Only BatchNorm is in
    training mode: dropout is off, as where the statistics will be used (torch's update_bn leaves it on, and
    weights batches alike). Modes, generators, gradients and what `freeze` holds stay, and everything if it
    raises. BadInput without batches, or for one value per channel. All ranks must see the same batches.
    Not for: batches of the validation or test part, which would judge what was made from them.
    """
    layers = [
        layer for layer in _layers(model).values() if layer.running_mean is not None and not _hold(layer)
    ]
    sums = [(layer, _Sums(layer)) for layer in layers]
    with untouched(model), ExitStack() as stack:
        batch_statistics(model)
        for layer, found in sums:
            stack.callback(layer.register_forward_pre_hook(found.add).remove)
        empty = True
        for batch in batches:
            empty = False
            call(model, batch)
    if empty:
        raise BadInput(
            "there were no batches to take statistics from: an iterator is used up by its first loop."
        )
    _heard(not sums or any(found.calls for _, found in sums))
    for layer, found in sums:
        if found.calls:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            layer.running_mean.copy_(found.mean)
            layer.running_var.copy_(found.variance)
            layer.num_batches_tracked.fill_(found.calls)


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[Any], *, call: Call = feed) -> Iterator[nn.Module]:
    """Inside, running statistics are those over `batches` (see `recalibrate`); after it, also if it raises,
    the live ones are back, bit for bit. To evaluate averaged weights in the middle of a training. Not for:
    every step, since it takes a pass over `batches`.
    """
    live = [(buffer, buffer.clone()) for layer in _layers(model).values() for buffer in layer.buffers(False)]
    try:
        recalibrate(model, batches, call=call)
        yield model
    finally:
        with torch.no_grad():
            for buffer, kept in live:
                buffer.copy_(kept)


# Freezing


@dataclass(frozen=True, eq=False)
class _Hold:
    """Stands in for a layer's `train`, so that its mode stays; copies of a model are held as the model is.

    A hook that resets the mode would be passed over by a model that was compiled before.
    """

    layer: nn.Module
    trained: tuple[str, ...]  # the affine parameters that were trainable before

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.layer


def _hold(layer: nn.Module) -> _Hold | None:
    found = vars(layer).get("train")
    return found if isinstance(found, _Hold) else None


def freeze(model: nn.Module, *, affine: bool = False) -> tuple[str, ...]:
    """Freeze the running statistics of every BatchNorm layer, also through a later `model.train()`.

    The layers normalise by running statistics until `unfreeze(model)`. affine: their weight and bias need no
    gradient either. For fine-tuning on small batches or other data. Returns the layers' names. Not for: a
    fresh model, whose running statistics are no data's.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> freeze(model), model.train()(torch.randn(8, 2)).shape, model[1].running_mean.tolist()
    (('1',), torch.Size([8, 3]), [0.0, 0.0, 0.0])
    """
    layers = {name: layer for name, layer in _layers(model).items() if layer.running_mean is not None}
    unfreeze(model)
    for layer in layers.values():
        trained = tuple(name for name, p in layer.named_parameters() if affine and p.requires_grad)
        for name in trained:
            layer.get_parameter(name).requires_grad_(False)
        layer.eval().train = _Hold(layer, trained)  # type: ignore[assignment, method-assign]
    return tuple(layers)


def unfreeze(model: nn.Module) -> tuple[str, ...]:
    """Undo `freeze`: layers follow `model.train()` again, and affine weights are trained if they were before.

    Returns the names of the layers that were frozen. Not for: layers that `eval()` holds, which `freeze` did
    not.
    """
    released = []
    for name, layer in model.named_modules():
        hold = _hold(layer)
        if hold:
            del layer.train
            layer.train(model.training)
            for parameter in hold.trained:
                layer.get_parameter(parameter).requires_grad_(True)
            released.append(name)
    return tuple(released)


# Where batches are small


class _Ghost(_BatchNorm):
    def __init__(self, num_features: int, size: int = 32, **numbers: Any) -> None:
        super().__init__(num_features, **numbers)
        if size < 2:
            raise BadInput(f"a ghost batch has at least 2 items, got size={size!r}.")
        self.size = size

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
        parts = input.shape[0] // self.size
        if parts < 2 or not (self.training or self.running_mean is None):
            return super().forward(input)
        forward = super().forward
        return torch.cat([forward(part) for part in input.tensor_split(parts)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"  # type: ignore[no-untyped-call]


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """BatchNorm over ghost batches of at least `size` items (Hoffer et al. 2017, arXiv:1705.08741, alg. 1).

    A batch of n is cut into n // size parts, as even as they can be, each normalised by its own statistics;
    running statistics take in one part after the other, as in the paper. Evaluation is BatchNorm's, and so
    are the names of parameters and buffers. For large batches that generalise worse. Not across devices.
    Other numbers are BatchNorm1d's.
    """


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """`GhostBatchNorm1d` for images: inputs (N, C, H, W)."""


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """`GhostBatchNorm1d` for volumes: inputs (N, C, D, H, W)."""


_GHOSTS: dict[type[nn.Module], type[_Ghost]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def to_ghost(model: nn.Module, size: int = 32) -> nn.Module:
    """A copy of the model with every BatchNorm layer as a ghost BatchNorm (see `GhostBatchNorm1d`).

    Names, weights and running statistics are carried over; both models load each other's state. BadInput,
    by name, for layers that are frozen or no plain BatchNorm1d, 2d or 3d. Not for: small batches, for which
    `to_group` is.
    """
    return _converted(
        model,
        lambda norm: _GHOSTS[type(norm)](
            norm.num_features,
            size,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=norm.affine,
            track_running_stats=norm.track_running_stats,
        ),
    )


def to_group(model: nn.Module, groups: int | None = None) -> nn.Module:
    """A copy of the model with every BatchNorm layer as a GroupNorm (Wu & He 2018, arXiv:1803.08494).

    The number of groups is the largest divisor of the channels that is not above `groups`, or leaves 16
    channels a group if `groups` is None, and never leaves one channel alone (on vectors that gives 0). Affine
    weights keep names and values; running statistics are dropped. For batches below about 16 items.
    Not for: a model that is not trained on, whose outputs change. BadInput, by name, as for `to_ghost`.

    >>> [to_group(nn.Sequential(nn.BatchNorm2d(c)))[0].num_groups for c in (7, 8, 64, 96)]
    [1, 1, 4, 6]
    """
    if groups is not None and groups < 1:
        raise BadInput(f"groups must be at least 1, got {groups!r}.")

    def convert(norm: _BatchNorm) -> nn.Module:
        channels = norm.num_features
        most = min(groups or channels // CHANNELS_A_GROUP, channels // 2)
        count = max((d for d in range(1, most + 1) if channels % d == 0), default=1)
        return nn.GroupNorm(count, channels, eps=norm.eps, affine=norm.affine)

    return _converted(model, convert)


def _converted(model: nn.Module, convert: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    copy = deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, norm in _layers(copy).items():
        if type(norm) not in _GHOSTS or _hold(norm):
            why = "is frozen: unfreeze it first" if _hold(norm) else f"is a {type(norm).__name__}"
            raise BadInput(f"layer {name!r} {why}; what can be converted is a plain BatchNorm1d, 2d or 3d.")
        made[norm] = convert(norm)
        for key, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if hasattr(made[norm], key):
                setattr(made[norm], key, tensor)
        made[norm].train(norm.training)
    for module in [copy, *copy.modules()]:
        for key, child in module._modules.items():
            if child in made:
                module._modules[key] = made[child]
    return made.get(copy, copy)


# Folding


_DIMENSIONS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, GhostBatchNorm1d), 1),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, GhostBatchNorm2d), 2),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, GhostBatchNorm3d), 3),
}


@dataclass(frozen=True)
class Folded:
    """A model without the BatchNorm layers that were folded, for evaluation; `str` says what became of each.

    pairs: (BatchNorm layer, layer it went into). kept: BatchNorm layer and why it could not be folded.
    """

    model: nn.Module
    pairs: tuple[tuple[str, str], ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        rows = [(norm, f"folded into {layer}") for norm, layer in self.pairs]
        return table([("layer", "what became of it"), *rows, *self.kept.items()])


def fold(
    model: nn.Module, batch: Any = None, *, layers: Iterable[str] | None = None, call: Call = feed
) -> Folded:
    """Fold BatchNorm into the linear or (transposed) convolution layer before it, in a copy of the model.

    Its outputs are those of the model in evaluation mode, to rounding. Pairs are found by torch.fx where a
    module can be traced. Layers used twice or shared, without running statistics, parametrised, or with
    another reader of what lies between are kept, each with the reason; those named in `layers` are refused
    with BadInput instead. A batch shows whether a Linear is followed over its own channels: BatchNorm1d on
    (N, L, C) normalises L; without one, (N, C) is assumed. Not for models that are trained on.
    """
    copy = deepcopy(model).eval()
    norms = _layers(copy)
    wanted = list(norms if layers is None else layers)
    for name in wanted:
        if name not in norms:
            raise BadInput(f"{name!r} is no BatchNorm layer of this model.{nearest(name, norms)}")
    sites = _Sites(copy, _ranks(copy, batch, call))
    pairs, kept = [], {}
    for name in wanted:
        before, reason = sites.before(name)
        if reason is None:
            pairs.append((name, before))
        elif layers is not None:
            raise BadInput(f"BatchNorm layer {name!r} cannot be folded: {reason}.")
        else:
            kept[name] = reason
    for name, before in pairs:
        _fold_into(copy.get_submodule(before), norms[name])
        parent, _, key = name.rpartition(".")
        setattr(copy.get_submodule(parent), key, nn.Identity())
    return Folded(copy, tuple(pairs), kept)


def _ranks(model: nn.Module, batch: Any, call: Call) -> dict[nn.Module, int]:
    """How many dimensions the outputs of linear layers have on a batch."""
    ranks: dict[nn.Module, int] = {}
    if batch is not None:
        with untouched(model), torch.no_grad(), ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    hook = module.register_forward_hook(lambda m, _, y: ranks.update({m: y.ndim}))
                    stack.callback(hook.remove)
            call(model, batch)
    return ranks


class _Sites:
    """Where layers are called in a model, and what stands in the way of folding one into another."""

    def __init__(self, model: nn.Module, ranks: dict[nn.Module, int]) -> None:
        self.ranks = ranks
        self.names: dict[nn.Module, list[str]] = {}
        self.tied: dict[nn.Parameter, int] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        for module in self.names:
            for parameter in module.parameters(recurse=False):
                self.tied[parameter] = self.tied.get(parameter, 0) + 1
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        self.of: dict[fx.Node, nn.Module] = {}
        self.read: set[nn.Module] = set()
        for prefix, graph in graphs(model).items():
            root = model.get_submodule(prefix)
            for node in graph.nodes:
                if node.op == "call_module":
                    self.of[node] = root.get_submodule(node.target)
                    self.calls.setdefault(self.of[node], []).append(node)
                elif node.op == "get_attr":
                    self.read.add(root.get_submodule(node.target.rpartition(".")[0]))
        self.modules = {name: module for module, names in self.names.items() for name in names}

    def before(self, name: str) -> tuple[str, str | None]:
        """The layer that this BatchNorm layer could go into, and what stands in the way if anything does."""
        norm = self.modules[name]
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None:
            return "", "it keeps no running statistics"
        if len(self.calls.get(norm, [])) == 0:
            return "", "no trace shows where it is called"
        if reason := self.crossed(norm):
            return "", f"it {reason}"
        source = (*self.calls[norm][0].args, None)[0]
        layer = self.of.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(layer, nn.Linear | _ConvNd):
            return "", "no linear or convolution layer comes right before it"
        before = self.names[layer][0]
        if reason := self.crossed(layer) or self.mismatched(layer, norm):
            return before, f"{before}, before it, {reason}"
        if isinstance(source, fx.Node) and len(source.users) > 1:
            return before, f"what {before} gives is also used elsewhere"
        return before, None

    def crossed(self, module: nn.Module) -> str | None:
        if len(self.names[module]) > 1:
            return f"is shared, as {' and '.join(self.names[module])}"
        if len(self.calls[module]) > 1:
            return "is used twice"
        if parametrize.is_parametrized(module):
            return "is parametrised"
        if module._forward_hooks or module._forward_pre_hooks:
            return "has hooks"
        if any(self.tied[parameter] > 1 for parameter in module.parameters()):
            return "shares a weight with another layer"
        if module in self.read:
            return "is also read without being called"
        return None

    def mismatched(self, layer: nn.Module, norm: _BatchNorm) -> str | None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if type(layer) not in _DIMENSIONS:
            return f"is a {type(layer).__name__}, which may compute something of its own"
        if type(norm) is not nn.SyncBatchNorm and _DIMENSIONS.get(type(norm)) != _DIMENSIONS[type(layer)]:
            return f"is a {type(layer).__name__}, and it a {type(norm).__name__}"
        if channels != norm.num_features or self.ranks.get(layer, 2) != 2:
            return "has its channels in another dimension than the one normalised"
        return None


@torch.no_grad()
def _fold_into(layer: nn.Module, norm: nn.Module) -> None:
    """W ← W·γ/σ and b ← β + (b − μ)·γ/σ, channel by channel, in float64."""
    assert isinstance(layer, nn.Linear | _ConvNd)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double()

    scale = (wide(norm.running_var) + norm.eps).rsqrt()
    shift = (0 if layer.bias is None else wide(layer.bias)) - wide(norm.running_mean)
    if norm.affine:
        scale *= wide(norm.weight)
    weight, bias = wide(layer.weight), shift * scale + (wide(norm.bias) if norm.affine else 0)
    ones = [1] * (weight.ndim - 2)
    if isinstance(layer, _ConvTransposeNd):  # its weight is (inputs, outputs / groups, …)
        parted = weight.view(layer.groups, -1, *weight.shape[1:]) * scale.view(layer.groups, 1, -1, *ones)
        weight = parted.flatten(0, 1)
    else:
        weight *= scale.view(-1, 1, *ones)
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
