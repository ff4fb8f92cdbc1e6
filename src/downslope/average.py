"""Averages of the weights over a training: what is averaged as plain data, and the average that follows it.

All averages here are one recurrence, `average ← average + w·(weight − average)`, and differ in what the n-th
sample weighs (n from 0; the first one always weighs 1, so that nothing is left of where the memory began):

- `ema`: w = 1 − decay, with a smaller decay to begin with where asked
- `swa`: w = 1/(n + 1), the plain mean of the samples from an update on
- `tail`: the same over the last part of a training of known length
- `polynomial_average`: w = (η + 1)/(n + 1 + η), which forgets the beginning of a training of any length
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from downslope.errors import BadInput, nearest, under
from downslope.kernels.collective import Share, is_shared, local, reshard
from downslope.schedule import Duration, duration, in_steps
from downslope.state import listed, plain_name

T = TypeVar("T")

WARMUPS = ("none", "ratio", "power", "debiased")
"""How the decay of an ema begins; n counts the samples before.

none: `decay` at once, which leaves the first sample a weight of decay^n. ratio: min(decay, (1 + n)/(10 + n)),
TensorFlow's. power: min(decay, 1 − (1 + n/gamma)^−power), the inverse gamma form. debiased: the mean with
weights decay^age, as Adam corrects its moments.
"""

BUFFERS = ("copy", "average", "recompute")
"""What evaluation with averaged weights does about BatchNorm's running statistics and other float buffers.

copy: those of the live model at that time. average: averaged as the weights are (infinities stay). recompute:
measured anew by the caller's function, on training data. Whole numbers are always the live ones.
"""

DTYPES = ("float32", "float64")
"""The least precision that an average is kept in; finer weights keep their own."""

_DURATIONS = {"start": 0, "every": 1, "steps": 1}


@dataclass(frozen=True, repr=False)
class Averaging:
    """Which updates are sampled and what each weighs: plain data, equal by content, hashable.

    Made by ema, swa, tail, polynomial_average, or from data. Durations with a unit must be resolved before
    the first use.

    >>> swa(start="75 %", every="1 epoch").resolve(run_steps=800, steps_per_epoch=50)
    swa(start=600, every=50)
    """

    kind: str
    numbers: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.numbers)})"

    @property
    def resolved(self) -> bool:
        """Whether every duration is in updates."""
        return not any(isinstance(value, str) for name, value in self.numbers if name in _DURATIONS)

    def resolve(self, **rates: int | None) -> Averaging:
        """The same with every duration in applied updates, by what `downslope.schedule.in_steps` takes:
        `run_steps`, `steps_per_epoch` … BadInput if what a unit needs is not given.
        """
        found = dict(self.numbers)
        for name in found.keys() & _DURATIONS.keys():
            found[name] = max(in_steps(found[name], f"{self.kind}: {name}", **rates), _DURATIONS[name])
        return KINDS[self.kind](**found)

    def weight(self, n: int) -> float:
        """What the n-th sample weighs against those before it, from 1 for n = 0.

        >>> [swa().weight(n) for n in range(4)]
        [1.0, 0.5, 0.3333333333333333, 0.25]
        """
        return 1.0 if n == 0 else _WEIGHTS[self.kind](n, dict(self.numbers))

    def due(self, step: int, last: int) -> bool:
        """Whether a sample is due at the applied update `step`, from 1, the one looked at before being
        `last`.

        >>> [step for step in range(1, 12) if swa(start=5, every=3).due(step, step - 1)]
        [5, 8, 11]
        """
        numbers = dict(self.numbers)
        if self.kind == "tail":
            numbers["start"] = numbers["steps"] - max(round(numbers["fraction"] * numbers["steps"]), 1) + 1
        start, every = numbers["start"], numbers["every"]
        return bool(step >= start and (step - start) // every > max((last - start) // every, -1))

    def data(self) -> dict[str, Any]:
        """The averaging as plain JSON or TOML data; `from_data` reads it back."""
        return {"average": self.kind, **dict(self.numbers)}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Averaging:
        """The averaging that `data()` describes. BadInput names a key that is unknown.

        >>> Averaging.from_data({"average": "swa", "start": "75 %"})
        swa(start='75 %', every=1)
        """
        if not isinstance(data, Mapping):
            raise BadInput(f"an averaging is a table such as {ema().data()}, got {data!r}.")
        numbers = dict(data)
        kind = numbers.pop("average", None)
        with under("average"):
            _among("an average", kind, KINDS)
        allowed = signature(KINDS[kind]).parameters
        for name in numbers:
            with under(name):
                _among(f"a number of {kind}", name, allowed)
        return KINDS[kind](**numbers)


def ema(
    decay: float = 0.999,
    warmup: str = "none",
    gamma: float | None = None,
    power: float | None = None,
    start: Duration = 0,
    every: Duration = 1,
) -> Averaging:
    """An exponential moving average, over about 1/(1 − decay) samples.

    warmup: "none", "ratio", "power" (with gamma, 1 if not given, and power, 2/3) or "debiased"; see WARMUPS.
    start, every: the updates that are sampled; the decay is of a sample, not of an update. Not for: runs of
    fewer than a few times 1/(1 − decay) samples without a warmup.

    >>> ema(0.999, warmup="ratio").weight(1)  # 1 − 2/11
    0.8181818181818181
    """
    _among("the warmup of an ema", warmup, WARMUPS)
    if warmup != "power" and (gamma, power) != (None, None):
        raise BadInput(f'gamma and power belong to warmup="power", not to {warmup!r}.')
    form = {}
    if warmup == "power":
        form = {"gamma": 1.0 if gamma is None else gamma, "power": 2 / 3 if power is None else power}
    return _averaging("ema", decay=decay, warmup=warmup, **form, start=start, every=every)


def swa(start: Duration = 0, every: Duration = 1) -> Averaging:
    """Stochastic weight averaging: the plain mean of the weights at `start` and each `every` updates after.

    It wants a rate that stays high while it samples, constant or cyclic, and BatchNorm's statistics measured
    anew. Source: Izmailov et al., arXiv:1803.05407, algorithm 1. Not for: rates that have already decayed,
    whose samples hardly differ.
    """
    return _averaging("swa", start=start, every=every)


def tail(fraction: float = 0.5, steps: Duration = "100 %", every: Duration = 1) -> Averaging:
    """The plain mean over the last `fraction` of a training of `steps` updates.

    Source: α-suffix averaging, Rakhlin et al., arXiv:1109.5647, section 5. Not for: trainings whose length is
    not known; polynomial_average needs none.

    >>> [step for step in range(1, 9) if tail(0.25, steps=8).due(step, step - 1)]
    [7, 8]
    """
    return _averaging("tail", fraction=fraction, steps=steps, every=every)


def polynomial_average(eta: float = 3.0, start: Duration = 0, every: Duration = 1) -> Averaging:
    """Polynomial-decay averaging: at any time about the last 1/(eta + 1) of all samples; eta = 0 is their
    mean.

    Source: Shamir and Zhang, arXiv:1212.1824, section 4. Not for: a rate that ends at 0, after which there is
    little to average.

    >>> polynomial_average(eta=3).weight(1)  # 4/5
    0.8
    """
    return _averaging("polynomial_average", eta=eta, start=start, every=every)


KINDS: dict[str, Callable[..., Averaging]] = {
    made.__name__: made for made in (ema, swa, tail, polynomial_average)
}
"""The constructor of each kind, by the name it has in data."""


def _ema(n: int, numbers: Mapping[str, Any]) -> float:
    decay, warmup = numbers["decay"], numbers["warmup"]
    if warmup == "debiased":
        return (1 - decay) / (1 - decay ** (n + 1)) if decay else 1.0
    if warmup == "ratio":
        decay = min(decay, (1 + n) / (10 + n))
    if warmup == "power":
        decay = min(decay, 1 - (1 + n / numbers["gamma"]) ** -numbers["power"])
    return 1.0 - float(decay)


_WEIGHTS: dict[str, Callable[[int, Mapping[str, Any]], float]] = {
    "ema": _ema,
    "swa": lambda n, numbers: 1.0 / (n + 1),
    "tail": lambda n, numbers: 1.0 / (n + 1),
    "polynomial_average": lambda n, numbers: (numbers["eta"] + 1.0) / (n + 1.0 + numbers["eta"]),
}

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "decay": ("from 0 to below 1", lambda value: 0 <= value < 1),
    "fraction": ("above 0, at most 1", lambda value: 0 < value <= 1),
    "gamma": ("above 0", lambda value: 0 < value < math.inf),
    "power": ("above 0", lambda value: 0 < value < math.inf),
    "eta": ("at least 0", lambda value: 0 <= value < math.inf),
}


def _averaging(kind: str, **numbers: Any) -> Averaging:
    """The one door: spells durations alike, checks ranges."""
    for name, value in numbers.items():
        with under(name):
            if name in _DURATIONS:
                numbers[name] = duration(value, f"{kind}: {name}")
                if numbers[name] == 0 and _DURATIONS[name]:
                    raise BadInput(f"{kind}: {name} must be at least 1 update, got {value!r}.")
            elif name in _RANGES:
                said, holds = _RANGES[name]
                plain = isinstance(value, int | float) and not isinstance(value, bool)
                if not plain or not holds(value):
                    raise BadInput(f"{kind}: {name} must be a number {said}, got {value!r}.")
                numbers[name] = float(value)
    return Averaging(kind, tuple(numbers.items()))


class Average:
    """The average of a model's weights over a training, beside it: for any optimizer of torch.

    `averaging`: ema(...), swa(...), tail(...) or polynomial_average(...). `buffers`: "copy", "average" or
    "recompute", see BUFFERS. `dtype`: the least precision it is kept in; `device`: where, if not beside the
    weights. Weights are known by name, without what DDP, FSDP2 or torch.compile put into it; what needs no
    gradient is not averaged, and what begins to need one joins at the next sample, as its first. Not for:
    rules that average by themselves, such as schedule_free and asgd.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = Average(model, swa())
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = model.weight.data.fill_(value)  # instead of optimizer.step()
    ...     _ = average.update()
    >>> with average.swapped(model):
    ...     model.weight.item()
    3.0
    """

    def __init__(
        self,
        model: nn.Module,
        averaging: Averaging,
        *,
        buffers: str = "copy",
        dtype: str = "float32",
        device: torch.device | str | None = None,
    ) -> None:
        _among("the policy for buffers", buffers, BUFFERS)
        _among("the dtype of an average", dtype, DTYPES)
        if not isinstance(averaging, Averaging):
            raise BadInput(f"averaging must be ema(...) or another of {', '.join(KINDS)}, got {averaging!r}.")
        if not averaging.resolved:
            raise BadInput(f"{averaging!r} has durations that are not in updates: call resolve(...) first.")
        self.model, self.averaging, self.buffers = model, averaging, buffers
        self.steps, self.samples = 0, 0
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = None if device is None else torch.device(device)
        self._averages: dict[str, Tensor] = {}
        self._since: dict[str, int] = {}  # samples before the first one of those that joined later
        self._placed: set[int] = set()
        _tensors(model)  # refuses what has no memory yet

    def update(self, step: int | None = None) -> bool:
        """Call once after each applied update; whether a sample was taken.

        step: the optimizer's count of applied updates, if it has one (`optimizer.steps`): while that stands
        still, as after a step that was skipped, nothing happens. The live weights are only read.
        """
        now = self.steps + 1 if step is None else int(step)
        if now < self.steps:
            raise BadInput(f"step counts applied updates and never falls: {now} after {self.steps}.")
        due = self.averaging.due(now, self.steps)
        if due:
            with torch.inference_mode(False), torch.no_grad():
                self._sample()
        self.steps = now
        return due

    @contextmanager
    def swapped(
        self, model: nn.Module | None = None, recalibrate: Callable[[nn.Module], object] | None = None
    ) -> Iterator[nn.Module]:
        """The averaged weights in place of the live ones, which come back bit for bit, buffers too, whatever
        happens inside.

        model: the model itself, a wrapper of it, or another with its names. recalibrate: with
        buffers="recompute", a function that measures BatchNorm's statistics of the model it is given. Costs
        one copy of the weights. Nested, the inner one does nothing. Before the first sample the weights are
        the live ones.
        """
        target = self.model if model is None else model
        placing = self._sources(target, recalibrate)
        mine = {id(tensor) for tensor, _ in placing} - self._placed
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            self._placed |= mine
            if mine:
                with torch.no_grad():
                    for tensor, source in placing:
                        kept.append((local(tensor), local(tensor).clone()))
                        local(tensor).copy_(local(source))
                if recalibrate is not None and self.samples:
                    recalibrate(target)
            yield target
        finally:
            reshard(target)
            with torch.no_grad():
                for tensor, copy in kept:
                    tensor.copy_(copy)
            self._placed -= mine

    def copy_to(
        self, model: nn.Module | None = None, recalibrate: Callable[[nn.Module], object] | None = None
    ) -> None:
        """Write the averaged weights into a model for good: the model itself, or another with its names."""
        if self._placed:
            raise BadInput("the averaged weights are in place already; leave swapped() before copy_to().")
        target = self.model if model is None else model
        placing = self._sources(target, recalibrate)
        with torch.no_grad():
            for tensor, source in placing:
                local(tensor).copy_(local(source))
        if recalibrate is not None and self.samples:
            recalibrate(target)

    def state(self) -> dict[str, Any]:
        """What it needs to go on: "tensors" by name, and "numbers", which are JSON.

        As in torch's `state_dict`, the tensors are those that are averaged into: save them, or clone them.
        """
        numbers = {
            "steps": self.steps,
            "samples": self.samples,
            "since": dict(self._since),
            "averaging": self.averaging.data(),
        }
        return {"tensors": dict(self._averages), "numbers": numbers}

    def load(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Go on from a `state()`, bit for bit, in memory of its own. The names of weights that it has no
        average for, and that need a gradient, are returned: they join at the next sample.

        Its averaging counts, and a warning tells where the program's differs. Raises BadInput, with nothing
        changed, for names or shapes that the model does not have. Sharded weights take whole tensors too.
        """
        tensors, numbers = state["tensors"], state["numbers"]
        averaging = Averaging.from_data(numbers["averaging"])
        parameters, buffers = _tensors(self.model)
        self._check(tensors, parameters | buffers, "the saved average has")
        if averaging != self.averaging:
            warnings.warn(
                f"the saved averaging is used: {self.averaging!r} here, {averaging!r} there.", stacklevel=2
            )
        self._averages = {}  # first, so that there are never three of it
        with torch.inference_mode(False), torch.no_grad():
            for name, value in tensors.items():
                like = (parameters | buffers)[name]
                made = self._averages[name] = self._memory(like, value.dtype)
                whole = is_shared(like) and not is_shared(value)
                local(made).copy_(Share(name, like).part(value) if whole else local(value))
        self.averaging, self.steps, self.samples = averaging, int(numbers["steps"]), int(numbers["samples"])
        self._since = {name: int(count) for name, count in numbers["since"].items()}
        return tuple(name for name, p in parameters.items() if p.requires_grad and name not in tensors)

    def _sample(self) -> None:
        parameters, buffers = _tensors(self.model)
        if self._placed & {id(tensor) for tensor in parameters.values()}:
            raise BadInput("the averaged weights are in place; leave swapped() before the next update.")
        self._check(self._averages, parameters | buffers, "there is an average of")
        blending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in (parameters | (buffers if self.buffers == "average" else {})).items():
            if name in self._averages:
                pair = (local(self._averages[name]), local(tensor.detach()))
                if name in buffers:
                    _blend_finite(*pair, self.averaging.weight(self.samples - self._since.get(name, 0)))
                else:
                    blending.setdefault(self.samples - self._since.get(name, 0), []).append(pair)
            elif _is_averaged(tensor) and (name in buffers or tensor.requires_grad):
                self._averages[name] = self._memory(tensor, _finer(tensor.dtype, self._dtype))
                local(self._averages[name]).copy_(local(tensor))
                self._since |= {name: self.samples} if self.samples else {}
        for n, pairs in blending.items():
            _blend(pairs, self.averaging.weight(n))
        self.samples += 1

    def _memory(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of an average, laid out as its weight is; its content is open."""
        device = like.device if self._device is None else self._device
        if is_shared(like) and device.type != like.device.type:
            raise BadInput(f"an average of sharded weights lies beside them, not on {device}.")
        return torch.empty_like(like.detach(), dtype=dtype, device=device, requires_grad=False)

    def _sources(
        self, target: nn.Module, recalibrate: Callable[[nn.Module], object] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """What must be written in a model, each with where it comes from; nothing before the first sample."""
        parameters, buffers = mine, own = _tensors(self.model)
        if target is not self.model:
            parameters, buffers = _tensors(target)
        source = mine | own | self._averages
        self._check(source, parameters | buffers, "the average is of")
        if recalibrate is not None and self.buffers != "recompute":
            raise BadInput(f'recalibrate belongs to buffers="recompute", not to {self.buffers!r}.')
        if recalibrate is None and self.buffers == "recompute" and _keeps_statistics(target):
            raise BadInput(
                'buffers="recompute" needs recalibrate: a function that measures the statistics of the model '
                "it is given, on training data."
            )
        placing = [(tensor, source[n]) for n, tensor in parameters.items() if source[n] is not tensor]
        # Buffers are kept where nothing is put into them too: inside, a forward pass may write them.
        return placing + [(tensor, source[name]) for name, tensor in buffers.items()]

    def _check(self, wanted: Mapping[str, Tensor], held: Mapping[str, Tensor], what: str) -> None:
        """Every name is in a model, with its shape."""
        if missing := [name for name in wanted if name not in held]:
            hint = nearest(missing[0], held)
            raise BadInput(f"{what} {listed(missing)}, which the model does not have.{hint}")
        for name, tensor in wanted.items():
            if tensor.shape != held[name].shape:
                mine, theirs = tuple(held[name].shape), tuple(tensor.shape)
                raise BadInput(f"{what} {name} of shape {theirs}; in the model its shape is {mine}.")


@functools.cache
def _plain(name: str) -> str:
    return plain_name(name)


def _by_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """By names without what wrappers put into them, unless two would then be one."""
    held = dict(named)
    plain = {_plain(name): value for name, value in held.items()}
    return plain if len(plain) == len(held) else held


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers of a model by name, tied ones once, as the optimizer sees them."""
    reshard(model)
    parameters: dict[str, Tensor] = _by_name(model.named_parameters())
    buffers = _by_name(model.named_buffers())
    for name, tensor in (parameters | buffers).items():
        if is_lazy(tensor) or tensor.is_meta:
            raise BadInput(f"{name} has no memory yet; run a batch through the model (or to_empty) first.")
    return parameters, buffers


def _keeps_statistics(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _finer(dtype: torch.dtype, least: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, least) if dtype.itemsize > 1 else least  # float8 has no promotion


def _blend(pairs: list[tuple[Tensor, Tensor]], weight: float) -> None:
    """average ← average + weight·(tensor − average); what is not of the average's kind, one at a time, so
    that no second copy of all weights is made.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for average, tensor in pairs:
        if (tensor.dtype, tensor.device) == (average.dtype, average.device):
            alike.setdefault((average.dtype, average.device), []).append((average, tensor))
        else:
            average.lerp_(tensor.to(average.device, average.dtype), weight)
    for held in alike.values():
        torch._foreach_lerp_([average for average, _ in held], [tensor for _, tensor in held], weight)


def _blend_finite(average: Tensor, tensor: Tensor, weight: float) -> None:
    """The same where equal numbers stay as they are: a mask of −inf would become NaN."""
    tensor = tensor.to(average.device, average.dtype)
    average.copy_(torch.where(average == tensor, average, average.lerp(tensor, weight)))


def _among(what: str, given: object, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if given not in names:
        raise BadInput(f"{what} is one of {', '.join(names)}; got {given!r}.{nearest(str(given), names)}")
