"""Regularisation of targets, data, layers and length: smoothing, mixing, dropout by schedule, stopping.

Plain functions and small objects for anyone's own loop. What is drawn comes from torch's global generator or
from one that is given, never from elsewhere, so that a resumed training draws the same.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from downslope.errors import BadInput, nearest

# Targets


def smoothed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.1,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    count: float | Tensor | None = None,
) -> Tensor:
    """Cross entropy (nats) of logits [..., classes] to smoothed targets [...] (arXiv:1512.00567, section 7).

    Each counts 1 − smoothing for the target and smoothing/classes for every class; `weight` [classes] as in
    torch. The sum is over `count`: None for the positions counted here (for the sum of their weights, as in
    torch), or that of a whole accumulated batch. Where nothing counts the loss is 0, and so its gradient;
    torch's is NaN. Not for a teacher: smoothing erases what distillation wants to know (arXiv:1906.02629).

    >>> smoothed_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    if not 0 <= smoothing <= 1:
        raise BadInput(f"smoothing must be from 0 to 1, got {smoothing}.")
    if targets.shape != logits.shape[:-1]:
        raise BadInput(
            f"Targets of shape {list(targets.shape)} do not fit logits of {list(logits.shape)}: classes come "
            "last (torch's [N, C, d] as logits.movedim(1, -1))."
        )
    mask = targets != ignore_index
    logs = torch.log_softmax(_wide(logits).masked_fill(~mask.unsqueeze(-1), 0), dim=-1)
    classes = torch.where(mask, targets, 0).long()
    weights = torch.ones_like(logs[..., 0]) if weight is None else weight.to(logs.dtype)[classes]
    hard = weights * -logs.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    even = -(logs if weight is None else logs * weight.to(logs.dtype)).mean(-1)
    total = torch.where(mask, (1 - smoothing) * hard + smoothing * even, 0).sum()
    return _over(total, torch.where(mask, weights, 0).sum() if count is None else count)


def soft_cross_entropy(logits: Tensor, targets: Tensor, *, count: float | Tensor | None = None) -> Tensor:
    """Cross entropy (nats) of logits to probabilities, both [..., classes]: the loss of mixed targets.

    The sum over positions is divided by `count`, None for as many as there are; none give 0.

    >>> soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    tensor(1.3863)
    """
    if targets.shape != logits.shape or not targets.is_floating_point():
        raise BadInput(
            f"Soft targets are floating probabilities of the logits' shape {list(logits.shape)}, got "
            f"{targets.dtype} of {list(targets.shape)}."
        )
    terms = -(targets * torch.log_softmax(_wide(logits), dim=-1)).sum(-1)
    return _over(terms.sum(), terms.numel() if count is None else count)


def soft_targets(targets: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Whole-number targets [...] as probabilities [..., classes], smoothed as in `smoothed_cross_entropy`.

    Not for: very many classes, all of which it writes out and `smoothed_cross_entropy` does not.

    >>> soft_targets(torch.tensor([1]), classes=2, smoothing=0.5)
    tensor([[0.2500, 0.7500]])
    """
    if targets.device.type == "cpu" and targets.numel():  # elsewhere looking would wait for the device
        lowest, highest = int(targets.min()), int(targets.max())
        if not 0 <= lowest <= highest < classes:
            raise BadInput(
                f"Targets of {classes} classes are from 0 to {classes - 1}, got {lowest} to {highest}."
            )
    even = torch.full((*targets.shape, classes), smoothing / classes, device=targets.device)
    return even.scatter_(-1, targets.long().unsqueeze(-1), 1 - smoothing + smoothing / classes)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _over(total: Tensor, count: float | Tensor) -> Tensor:
    """0 over 0 is 0: nothing counted, nothing lost."""
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, 1, count)
    if not count >= 0:
        raise BadInput(f"count must be a number from 0, got {count}.")
    return total / (count or 1)


# Data


@dataclass(frozen=True)
class Mix:
    """Mixup and CutMix of a batch: `mix(inputs, targets)` gives both mixed, each item with another one.

    `mixup`, `cutmix` are the alpha of Beta(alpha, alpha), the share of an item's own part; 0 is without.
    Where both are on, `cutmix_share` of the batches take CutMix. `probability`: how often anything is mixed.
    `per_item`: every item draws for itself. Whole-number targets [items] become probabilities of `classes`,
    smoothed; floating ones (soft, or of a regression, mixup only) are averaged. Draw in training alone. Not
    for targets that are places in the input.

    >>> mix = Mix(classes=10, mixup=0.8, cutmix=1.0)
    >>> inputs, targets = mix(torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 3, 4]))
    >>> inputs.shape, targets.shape, bool((targets.sum(1) - 1).abs().max() < 1e-6)
    (torch.Size([4, 3, 8, 8]), torch.Size([4, 10]), True)
    """

    classes: int | None = None
    mixup: float = 0.2
    cutmix: float = 0.0
    probability: float = 1.0
    cutmix_share: float = 0.5
    per_item: bool = False
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} is the alpha of a Beta, a number from 0, got {getattr(self, name)}.")
        for name in ("probability", "cutmix_share", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if not self.mixup and not self.cutmix:
            raise BadInput("Neither mixup nor cutmix is on: give one of them an alpha above 0.")

    def __call__(
        self, inputs: Tensor, targets: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both mixed, nothing in place. One number is drawn from the generator, whatever comes of it."""
        draw = np.random.default_rng(_seed(generator))
        items = len(inputs)
        own, cut = self._shares(draw, items if self.per_item else 1)
        partner = torch.from_numpy(draw.permutation(items)).to(inputs.device)
        boxes = _boxes(draw, own, cut, inputs.shape) if cut.any() else None
        if boxes is not None:
            area = (boxes[1] - boxes[0]) * (boxes[3] - boxes[2])
            own = np.where(cut, 1 - area / (inputs.shape[-1] * inputs.shape[-2]), own)
        probabilities = self._floating(inputs, targets)
        if (own == 1).all():
            return inputs, probabilities
        mixed = _blended(inputs, partner, np.where(cut, 1.0, own))
        if boxes is not None:
            inside = _inside(boxes, inputs)
            mixed = torch.where(inside, inputs[partner], mixed)
        return mixed, _blended(probabilities, partner, own)

    def _shares(self, draw: np.random.Generator, size: int) -> tuple[Any, Any]:
        """The share of each item, and whether it is cut. Every draw is made, so that none shifts another."""
        applied = draw.random(size) < self.probability
        share = self.cutmix_share if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = draw.random(size) < share
        mixed, kept = (draw.beta(alpha or 1.0, alpha or 1.0, size) for alpha in (self.mixup, self.cutmix))
        return np.where(applied, np.where(cut, kept, mixed), 1.0), cut & applied

    def _floating(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if not inputs.is_floating_point():
            raise BadInput(f"Inputs to mix must be floating numbers, got {inputs.dtype}; embed tokens first.")
        if len(inputs) != len(targets):
            raise BadInput(f"{len(inputs)} inputs do not go with {len(targets)} targets.")
        if self.cutmix and inputs.ndim < 3:
            raise BadInput(f"CutMix needs inputs [items, ..., height, width], got {list(inputs.shape)}.")
        if targets.is_floating_point():
            return targets
        if self.classes is None:
            raise BadInput("Whole-number targets can be mixed where classes=… says how many there are.")
        return soft_targets(targets, self.classes, self.smoothing)


def mixup(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.2,
    *,
    classes: int | None = None,
    per_item: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """λ·item + (1 − λ)·another, inputs and targets alike, λ from Beta(alpha, alpha) (arXiv:1710.09412).

    Whole-number targets [items] need `classes` and become probabilities; floating ones may be those of a
    regression. See `Mix` for more knobs. Not for inputs whose sum means nothing, such as token ids.
    """
    return Mix(classes, mixup=alpha, per_item=per_item)(inputs, targets, generator)


def cutmix(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    *,
    classes: int | None = None,
    per_item: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A box of another image pasted into each of [items, ..., height, width] (arXiv:1905.04899, section 3.1).

    Its centre is uniform and its area 1 − λ, λ from Beta(alpha, alpha); it is clipped at the borders, and
    targets are mixed by the area that remains. Not for regression, nor where the object is small: the label
    may be cut away.
    """
    return Mix(classes, mixup=0.0, cutmix=alpha, per_item=per_item)(inputs, targets, generator)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _boxes(draw: np.random.Generator, own: Any, cut: Any, shape: Sequence[int]) -> Any:
    """Rows [4, boxes] of top, bottom, left, right, clipped at the borders; empty where nothing is cut."""
    found = []
    for length in shape[-2:]:
        size = (length * np.sqrt(1 - own)).astype(np.int64)
        centre = draw.integers(length, size=len(own))
        start = np.clip(centre - size // 2, 0, length)
        found += [start, np.where(cut, np.clip(centre - size // 2 + size, 0, length), start)]
    return np.stack(found)


def _inside(boxes: Any, inputs: Tensor) -> Tensor:
    top, bottom, left, right = (
        edge.view(-1, *[1] * (inputs.ndim - 1)) for edge in torch.from_numpy(boxes).to(inputs.device)
    )
    row = torch.arange(inputs.shape[-2], device=inputs.device).unsqueeze(-1)
    column = torch.arange(inputs.shape[-1], device=inputs.device)
    found: Tensor = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return found


def _blended(values: Tensor, partner: Tensor, own: Any) -> Tensor:
    if (own == 1).all():
        return values
    share = torch.from_numpy(own).to(values.device, values.dtype).view(-1, *[1] * (values.ndim - 1))
    return torch.lerp(values[partner], values, share)  # exactly the item itself where its share is 1


# Layers


class StochasticDepth(nn.Module):
    """Drops a residual branch [items, ...] of an item with probability `p`, in training (arXiv:1603.09382).

    What stays is divided by 1 − p, so that the expectation is that of evaluation, where nothing happens; the
    paper multiplies by 1 − p there instead. Put it at the end of a branch, before the sum. Draws from torch's
    global generator.

    >>> StochasticDepth(0.5).eval()(torch.ones(2, 3)).sum()
    tensor(6.)
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = _rate(p)

    def forward(self, branch: Tensor) -> Tensor:
        """The branch of those items that keep it, 0 for the others."""
        return dropped(branch, self.p) if self.training else branch

    def extra_repr(self) -> str:
        """The rate."""
        return f"p={self.p}"


def dropped(branch: Tensor, p: float) -> Tensor:
    """A branch [items, ...] that is 0 for an item with probability p, and divided by 1 − p for the others."""
    if p == 0:
        return branch
    kept = torch.empty(len(branch), *[1] * (branch.ndim - 1), device=branch.device).bernoulli_(1 - p)
    scale = (kept / (1 - p) if p < 1 else kept).to(branch.dtype)
    return torch.where(kept > 0, branch * scale, 0)  # a dropped branch that is infinite is 0 too


class Depth:
    """Residual branches of a model that are dropped at random: the result of `stochastic_depth`.

    `rates` are by name; `set(rate)` gives them another last rate, at any step; `remove()` takes the hooks
    away. Under torch.compile a new rate compiles anew: change it by epochs there.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rate: float) -> None:
        self.rates: dict[str, float] = {}
        self._names = list(names)
        self.set(rate)
        branches = [_named(model, name) for name in self._names]
        self._handles: list[RemovableHandle] = [
            branch.register_forward_hook(self._hook(name))
            for branch, name in zip(branches, self._names, strict=True)
        ]

    def set(self, rate: float) -> None:
        """Rates that rise linearly to this one at the last branch."""
        self.rates |= dict(zip(self._names, linear_rates(len(self._names), rate), strict=True))

    def remove(self) -> None:
        """The model is again as it was."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def drop(branch: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise BadInput(f"The branch {name!r} puts out {type(output).__name__}, not a tensor.")
            return dropped(output, self.rates[name]) if branch.training else output

        return drop


def stochastic_depth(model: nn.Module, branches: Iterable[str], rate: float = 0.2) -> Depth:
    """Drop these residual branches in training, the l-th of L with probability rate·l/L (arXiv:1603.09382).

    `branches` names modules, from the input to the output, each of whose outputs is added to a shortcut.
    Parameters keep their names. Not for modules on the trunk: nothing would remain. BadInput for a name that
    the model does not have.

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    >>> stochastic_depth(model, ["a", "b"], rate=0.2).rates
    {'a': 0.1, 'b': 0.2}
    """
    return Depth(model, list(branches), rate)


def linear_rates(depth: int, last: float) -> list[float]:
    """last·l/depth for l = 1 … depth (arXiv:1603.09382, equation 4: the survival 1 − l/L·(1 − p_L)).

    >>> linear_rates(4, 0.5)
    [0.125, 0.25, 0.375, 0.5]
    """
    return [_rate(last) * (index + 1) / depth for index in range(depth)]


@dataclass(frozen=True)
class Rates:
    """What `set_dropout` set: (rate before, now) by module name. `restore()` puts the old rates back.

    As a context it restores at its end.
    """

    changed: dict[str, tuple[float, float]]
    _modules: dict[str, nn.Module] = field(repr=False)

    def restore(self) -> None:
        """Each module's rate from before."""
        for name, (before, _) in self.changed.items():
            setattr(self._modules[name], _knob(self._modules[name]), before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


DROPOUTS = (nn.modules.dropout._DropoutNd, StochasticDepth)
"""Modules whose rate is `p`. nn.MultiheadAttention and nn.LSTM have theirs as `dropout`: name these types."""


def set_dropout(
    model: nn.Module,
    rate: float | Mapping[str, float],
    types: type[nn.Module] | tuple[type[nn.Module], ...] = nn.modules.dropout._DropoutNd,
) -> Rates:
    """Give every module of these types this rate, or each by its name; says what it set, and can restore.

    Call it with a schedule's value at each step or epoch; under torch.compile each new rate compiles anew.
    `types` that hold a rate: DROPOUTS, nn.MultiheadAttention, recurrent layers. BadInput where the model has
    none of them. Not for: dropout that a forward calls as a function, with a rate of its own.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> with set_dropout(model, 0.1) as dropout:
    ...     dropout.changed
    {'1': (0.5, 0.1)}
    >>> model[1].p
    0.5
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, types)}
    rates = rate if isinstance(rate, Mapping) else dict.fromkeys(found, rate)
    for name in rates:
        if name not in found:
            raise BadInput(f"The model has no dropout {name!r}.{nearest(name, found)}")
    if not rates:
        wanted = types if isinstance(types, tuple) else (types,)
        names = ", ".join(kind.__name__.lstrip("_") for kind in wanted)
        raise BadInput(f"The model has no module of {names} whose rate could be set.")
    changed = {
        name: (float(getattr(found[name], _knob(found[name]))), _rate(new)) for name, new in rates.items()
    }
    for name, (_, new) in changed.items():
        setattr(found[name], _knob(found[name]), new)
    return Rates(changed, {name: found[name] for name in changed})


def _knob(module: nn.Module) -> str:
    for name in ("p", "dropout"):
        if isinstance(getattr(module, name, None), float | int):
            return name
    raise BadInput(f"{type(module).__name__} has no rate of dropout, neither as p nor as dropout.")


def _rate(p: float) -> float:
    if not 0 <= p <= 1:
        raise BadInput(f"A rate of dropout is from 0 to 1, got {p}.")
    return float(p)


def _named(model: nn.Module, name: str) -> nn.Module:
    found: dict[str, nn.Module] = dict(model.named_modules())
    if not name or name not in found:
        raise BadInput(f"The model has no module {name!r}.{nearest(name, filter(None, found))}")
    return found[name]


# Length


@dataclass
class EarlyStopping:
    """`stopping.update(value, step)` is True when `patience` validations in a row were no improvement.

    An improvement is below the best (`mode` "min") or above ("max") by more than `min_delta`, absolute, or a
    share of |best| if `relative`. Before step `warmup` nothing is counted against a training, but the best is
    kept. NaN and infinities improve nothing, and count. It only decides: keep and restore the best weights
    where `improved` is True. Not for: the data that is reported in the end.

    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.update(loss, step) for step, loss in enumerate([3.0, 2.0, 2.5, 2.1])], stopping.best_step
    ([False, False, False, True], 1)
    """

    patience: int = 10
    min_delta: float = 0.0
    relative: bool = False
    mode: str = "min"
    warmup: int = 0
    best: float | None = None
    best_step: int | None = None
    wait: int = 0
    improved: bool = False
    stopped: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise BadInput(f"mode is min or max, got {self.mode!r}.")
        if not (isinstance(self.patience, int) and self.patience >= 1):
            raise BadInput(f"patience is a number of validations, at least 1, got {self.patience}.")
        if not 0 <= self.min_delta < math.inf:
            raise BadInput(f"min_delta must be a number from 0, got {self.min_delta}.")
        if not self.warmup >= 0:
            raise BadInput(f"warmup is a number of steps from 0, got {self.warmup}.")

    def update(self, value: float, step: int) -> bool:
        """Take in one validation; True once it is time to stop, and from then on."""
        value = float(value)
        self.improved = not self.stopped and self._better(value)
        if self.improved:
            self.best, self.best_step, self.wait = value, step, 0
        elif step >= self.warmup:
            self.wait += 1
        self.stopped = self.stopped or self.wait >= self.patience
        return self.stopped

    def state(self) -> dict[str, Any]:
        """Settings and counters as JSON data."""
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`, in place; BadInput for what is none."""
        self.__dict__.update(vars(self.from_state(state)))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """As it was when `state()` was taken; BadInput for what is none."""
        names = {item.name for item in fields(cls)}
        if state.keys() != names:
            wrong = sorted(state.keys() ^ names)
            raise BadInput(f"This is no state of early stopping: {wrong[0]!r} is missing or unknown.")
        return cls(**state)

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta * (abs(self.best) if self.relative else 1.0)
