"""Who is where: the role of each parameter by the module that holds it, its layer by the structure of the
model, and what differs with either: learning rates, decay, the update from which it is trained.

Everything here is plain data by parameter name, made once, for any optimizer of torch. A *pattern* is a role
("norm"), or a glob on the name of a parameter or of a module above it ("features", "encoder.layer.1[01]").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from downslope.errors import BadInput, nearest, under
from downslope.schedule import Duration, Schedule, duration, in_steps
from downslope.state import plain_name

ROLES = ("matrix", "conv", "embedding", "head", "norm", "bias", "scale", "other")
"""matrix: weights of linear, recurrent, attention layers; head: the last of them, where there are several;
scale: a vector that multiplies; other: everything unknown.
"""

UNDECAYED = ("norm", "bias", "scale", "embedding")
"""Roles that usually take no weight decay. Norm, bias, scale: what multiplies or shifts has no scale to
control (Jia et al., arXiv:1807.11205, section 3.2; He et al., arXiv:1812.01187, section 3.1). Embedding: a
decay reaches rows that no batch has touched too (minGPT decays none; GPT-2's later codes decay them).
"""

REST = "rest"
NEVER = "never"
"""The date, in a plan, of what stays frozen throughout."""

MOST_NAMES = 5
"""How many names a sentence lists."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRICES = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Member:
    """One parameter: its name, role, shape, and the other names that tied weights give it."""

    name: str
    role: str
    shape: tuple[int, ...]
    tied: tuple[str, ...] = ()

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def taken_by(self, pattern: str) -> bool:
        """Whether it has the role, or it or a module above it the name, that a pattern says."""
        if pattern in ROLES:
            return pattern == self.role
        return any(fnmatchcase(path, pattern) for name in (self.name, *self.tied) for path in _upwards(name))


@dataclass(frozen=True)
class Groups:
    """Every parameter of a model in exactly one role. Iterate over members; `str` gives a table."""

    members: tuple[Member, ...]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def role(self, name: str) -> str:
        """The role of the parameter called `name`, with or without what wrappers put into it; KeyError if
        there is none.
        """
        wanted = {name, plain_name(name)}
        for member in self.members:
            if not wanted.isdisjoint((member.name, *member.tied)):
                return member.role
        raise KeyError(name)

    def names(self, role: str) -> tuple[str, ...]:
        """The names of the parameters of one role, in the model's order."""
        return tuple(member.name for member in self.members if member.role == role)

    def taken(self, patterns: Iterable[str]) -> dict[str, str]:
        """The first of the patterns that takes it, by the name of each parameter that one takes, in the
        model's order.

        BadInput for a pattern that takes nothing, or nothing that those before it left.
        """
        found: dict[str, str] = {}
        for pattern in patterns:
            with under(pattern):
                mine = [member.name for member in self if member.taken_by(pattern)]
                if not mine:
                    raise BadInput(
                        f"no parameter is called or has the role {pattern!r}.{self._near(pattern)}"
                    )
                if not (left := [name for name in mine if name not in found]):
                    raise BadInput(f"{pattern!r} takes nothing that {found[mine[0]]!r} has not taken before.")
            found.update(dict.fromkeys(left, pattern))
        return {member.name: found[member.name] for member in self if member.name in found}

    def _near(self, pattern: str) -> str:
        paths = [path for member in self for path in _upwards(member.name)]
        return nearest(pattern.rstrip(".*"), dict.fromkeys([*ROLES, *paths]))

    def __str__(self) -> str:
        rows = [(m.role, m.name, _by(m.shape), ", ".join(m.tied)) for m in self.members]
        return _aligned([("role", "parameter", "shape", "tied to"), *rows])


@dataclass(frozen=True)
class Frozen:
    """The update, from 0, from which each parameter is trained, by name; None: never. What is not named is
    trained throughout. A pure function of the update: a run that resumes calls `apply` as any other.
    """

    until: Mapping[str, int | None]

    def at(self, step: int) -> tuple[str, ...]:
        """The names of what is frozen at an update.

        >>> Frozen({"0.weight": 100, "1.weight": None}).at(100)
        ('1.weight',)
        """
        return tuple(name for name, until in self.until.items() if until is None or step < until)

    @property
    def changes(self) -> tuple[int, ...]:
        """The updates before which something begins to be trained."""
        return tuple(sorted({until for until in self.until.values() if until}))

    def apply(self, model: nn.Module, step: int) -> tuple[str, ...]:
        """Set `requires_grad` of the named parameters as update `step` wants it; the names of what changed.

        Call it before the forward pass; gradients must be None by then (`zero_grad`). All parameters belong
        into the optimizer from the beginning: one without a gradient is left alone, bit for bit. BatchNorm's
        running statistics go on. Refused where DDP or FSDP2 has noted what is trained: wrap after it.
        """
        frozen, held = {*self.at(step)}, _parameters(model)
        if missing := [name for name in self.until if name not in held]:
            raise BadInput(f"the model has no parameter {missing[0]!r}.{nearest(missing[0], held)}")
        changed = [name for name in self.until if held[name].requires_grad == (name in frozen)]
        if changed and (wrapper := _wrapper(model)):
            raise BadInput(
                f"{wrapper} noted what is trained when it was made: freeze and unfreeze before it."
            )
        for name in changed:
            held[name].requires_grad_(name not in frozen)
        return tuple(changed)


def groups(model: nn.Module) -> Groups:
    """The role of every parameter of `model`, by the type of the module that holds it; a tied weight counts
    once. Names are without what torch.compile or DDP put into them.

    A weight shared by an embedding and an output layer is an embedding, whichever comes first. The head is
    the weight of the linear layer that the model names last, outside attention and repeated blocks, unless it
    is the only matrix. Raises BadInput for a lazy parameter. Not for: layers of your own whose parameters
    are something else than their number of dimensions says.

    >>> print(groups(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    role    parameter  shape  tied to
    matrix  0.weight   3×4
    bias    0.bias     3
    norm    1.weight   3
    norm    1.bias     3
    """
    names: dict[int, list[str]] = {}
    roles: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{path}." for path in _blocks(modules))
    last = 0
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if is_lazy(parameter):
                raise BadInput(f"{full} is lazy, without a shape yet; run a batch through the model first.")
            path, owner, tensor = _owner(modules, prefix, name)
            names.setdefault(id(parameter), []).append(full)
            roles.setdefault(id(parameter), []).append(_role(owner, tensor, tuple(parameter.shape)))
            shapes[id(parameter)] = tuple(parameter.shape)
            above = modules.get(path.rpartition(".")[0])
            inner = path.startswith(inside) or (path and isinstance(above, nn.MultiheadAttention))
            if isinstance(owner, nn.Linear) and tensor == "weight" and not inner:
                last = id(parameter)
    matrices = [key for key, found in roles.items() if found[0] == "matrix"]
    if len(matrices) > 1 and last in matrices and "embedding" not in roles[last]:
        roles[last] = ["head"]
    plain = _plain_names(name for held in names.values() for name in held)
    members = []
    for key, held in names.items():
        first, *tied = (plain[name] for name in held)
        role = "embedding" if "embedding" in roles[key] else roles[key][0]
        members.append(Member(first, role, shapes[key], tuple(tied)))
    return Groups(tuple(members))


def layers(model: nn.Module, blocks: Sequence[str] | None = None) -> tuple[tuple[str, ...], ...]:
    """The names of all parameters, layer by layer from the input to the output, tied weights once.

    A layer is a block; what stands before all blocks is the first layer, what stands behind them the last,
    and what is between two goes with the one before. Blocks are those children of an outermost ModuleList or
    Sequential that are made of modules, if there are several, of one class; or the modules that `blocks`
    names, as globs from low to high. Without any, each module with a weight is a layer. Not for: branches
    side by side, unless `blocks` orders them.

    >>> layers(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1)))
    (('0.weight', '0.bias', '1.weight', '1.bias'), ('2.weight', '2.bias'))
    """
    known = groups(model)
    paths = _blocks(dict(model.named_modules())) if blocks is None else _named(model, blocks)
    if not paths:
        return _by_weight(known)
    homes = [next((i for i, path in enumerate(paths) if _is_in(m.name, path)), None) for m in known]
    last = max(place for place, home in enumerate(homes) if home is not None)
    found: list[list[str]] = [[] for _ in range(len(paths) + 2)]
    layer = 0
    for place, (member, home) in enumerate(zip(known, homes, strict=True)):
        layer = home + 1 if home is not None else layer if place < last else len(paths) + 1
        found[layer].append(member.name)
    return tuple(tuple(names) for names in found if names)


def layer_decay(model: nn.Module, factor: float, blocks: Sequence[str] | None = None) -> dict[str, float]:
    """Rate multipliers by parameter name: factor^(layers above), so that the head has 1 and the embedding the
    least; see `layers`.

    For fine-tuning: BEiT's 0.65 to 0.95 (arXiv:2106.08254), or 1/2.6 over few layers as in ULMFiT
    (arXiv:1801.06146, section 3.1). Not for: training from scratch.

    >>> layer_decay(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2, bias=False)), 0.5)
    {'0.weight': 0.25, '1.weight': 0.5, '1.bias': 0.5, '2.weight': 1.0}
    """
    _check_multiplier("factor", factor)
    held = layers(model, blocks)
    return {name: float(factor) ** (len(held) - 1 - i) for i, names in enumerate(held) for name in names}


def discriminative(model: nn.Module, multipliers: Mapping[str, float]) -> dict[str, float]:
    """Rate multipliers by parameter name, from multipliers by pattern; the first that takes it counts, and 1
    where none does. BadInput for patterns that take nothing.

    Not for: holding a layer still, whose gradient and state a rate of 0 goes on computing: see `freeze`.

    >>> discriminative(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1, bias=False)), {"bias": 2, "0": 0.1})
    {'0.weight': 0.1, '0.bias': 2.0, '1.weight': 1.0}
    """
    for pattern, value in multipliers.items():
        with under(pattern):
            _check_multiplier(f"the multiplier of {pattern!r}", value)
    known = groups(model)
    taken = known.taken(multipliers)
    return {m.name: float(multipliers[taken[m.name]]) if m.name in taken else 1.0 for m in known}


def no_decay(*roles: str) -> dict[str, dict[str, float]]:
    """A weight decay of 0 for these roles, or those in UNDECAYED: as `roles` of `param_groups` or a Recipe.

    Not for: links whose numbers have other names, such as l1 and l2.

    >>> no_decay("norm", "bias")
    {'norm': {'weight_decay': 0.0}, 'bias': {'weight_decay': 0.0}}
    """
    for role in roles:
        if role not in ROLES:
            raise BadInput(f"unknown role {role!r}.{nearest(role, ROLES)} Allowed: {', '.join(ROLES)}.")
    return {role: {"weight_decay": 0.0} for role in roles or UNDECAYED}


def param_groups(
    model: nn.Module,
    lr: float | Schedule,
    rates: Mapping[str, float] | None = None,
    roles: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Param groups for any optimizer of torch: every parameter once, by name, with `lr` times its multiplier
    in `rates` and the numbers of its role.

    A role that `roles` does not name is "rest". A schedule is scaled, so that groups keep their ratio at
    every update; of torch's schedulers OneCycleLR does not. Not for: optimizers of one group, as torch's
    LBFGS.

    >>> model = nn.Linear(4, 3)
    >>> made = param_groups(model, 0.1, {"weight": 0.5}, no_decay("bias"))
    >>> [(group["role"], group["lr"], group.get("weight_decay")) for group in made]
    [('rest', 0.05, None), ('bias', 0.1, 0.0)]
    """
    known, rates, roles = groups(model), rates or {}, roles or {}
    held = _parameters(model)
    for name in rates:
        if name not in held:
            raise BadInput(f"the model has no parameter {name!r}.{nearest(name, held)}")
    no_decay(*roles)  # refuses what is no role
    found: dict[tuple[str, float], list[tuple[str, Tensor]]] = {}
    for member in known:
        role = member.role if member.role in roles else REST
        key = (role, float(rates.get(member.name, 1.0)))
        found.setdefault(key, []).append((member.name, held[member.name]))
    return [
        {"params": members, "role": role, "lr": _times(lr, rate)} | dict(roles.get(role, {}))
        for (role, rate), members in found.items()
    ]


def freeze(model: nn.Module, plan: Mapping[str, Duration], **rates: int | None) -> Frozen:
    """What is frozen until when, from a plan: patterns, each with its first update as a duration, or "never".

    The first pattern that takes a parameter counts; BadInput for those that take nothing. `rates` are what
    units need: `run_steps`, `steps_per_epoch`, `batch_size`, `tokens_per_step`. Not for: a model that is
    wrapped by DDP or FSDP2, which decide once what is trained.

    >>> freeze(nn.Linear(4, 3), {"bias": "never", "weight": "2 epochs"}, steps_per_epoch=50).until
    {'weight': 100, 'bias': None}
    """
    dates: dict[str, int | None] = {}
    for pattern, date in plan.items():
        with under(pattern):
            if isinstance(date, str) and date.strip().isalpha() and date != NEVER:
                raise BadInput(f"a plan has durations or {NEVER!r}, got {date!r}.{nearest(date, [NEVER])}")
            dates[pattern] = None if date == NEVER else in_steps(duration(date, pattern), pattern, **rates)
    return Frozen({name: dates[pattern] for name, pattern in groups(model).taken(plan).items()})


def gradual_unfreeze(
    model: nn.Module, every: Duration, blocks: Sequence[str] | None = None, **rates: int | None
) -> Frozen:
    """Train the last layer first, then one more layer below it each `every` updates; see `layers`.

    Source: Howard and Ruder, arXiv:1801.06146, section 3.3, with one epoch each. Not for: training from
    scratch.
    """
    held, steps = layers(model, blocks), in_steps(every, "every", **rates)
    return Frozen({name: (len(held) - 1 - i) * steps for i, names in enumerate(held) for name in names})


def roster(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    rates: Mapping[str, float] | None = None,
    frozen: Frozen | None = None,
) -> str:
    """Who is where, as a table: role, name, shape, numbers; group, live rate and decay in an optimizer; rate
    multiplier; the update from which it is trained.

    Not for: programs, for which `groups` has the same as data.

    >>> print(roster(nn.Linear(4, 3), rates={"weight": 0.5}))
    role    parameter  shape  numbers  rate ×
    matrix  weight     3×4         12     0.5
    bias    bias       3            3       1
    """
    members, held = list(groups(model)), _parameters(model)
    columns = {
        "role": [member.role for member in members],
        "parameter": [member.name for member in members],
        "shape": [_by(member.shape) for member in members],
        "numbers": [f"{member.numbers:,}" for member in members],
    }
    if optimizer is not None:
        homes = {id(p): (i, g) for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        found: list[tuple[Any, dict[str, Any]]] = [homes.get(id(held[m.name]), ("none", {})) for m in members]
        columns["group"] = [str(place) for place, _ in found]
        columns["lr"] = [_short(group.get("lr")) for _, group in found]
        columns["decay"] = [_short(group.get("weight_decay")) for _, group in found]
    if rates is not None:
        columns["rate ×"] = [_short(rates.get(member.name, 1.0)) for member in members]
    if frozen is not None:
        dates = [frozen.until.get(member.name, 0) for member in members]
        columns["trained from"] = [NEVER if date is None else str(date) for date in dates]
    rows = zip(*([head, *cells] for head, cells in columns.items()), strict=True)
    return _aligned(list(rows), right=3)


def _by_weight(known: Groups) -> tuple[tuple[str, ...], ...]:
    """A layer for each module with weights, and what follows it; what comes before the first goes with it."""
    found: list[list[str]] = [[]]
    owner = None
    for member in known:
        if member.role in ("matrix", "conv", "embedding", "head"):
            mine = f".{member.name}".rpartition(".")[0].partition(".parametrizations.")[0]
            if owner not in (None, mine):
                found.append([])
            owner = mine
        found[-1].append(member.name)
    return tuple(tuple(names) for names in found if names)


def _is_in(name: str, path: str) -> bool:
    """Whether a parameter lies in the module at a path, which may have a wrapper's names in it."""
    return f"{name}.".startswith((f"{path}.", f"{plain_name(path)}."))


def _upwards(name: str) -> list[str]:
    """A parameter's name and those of the modules above it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers put into them, unless two would then be one."""
    held = {name: plain_name(name) for name in names}
    return held if len({*held.values()}) == len(held) else {name: name for name in held}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by the names that `groups` gives them."""
    plain = _plain_names(name for name, _ in model.named_parameters(remove_duplicate=False))
    return {plain[name]: parameter for name, parameter in model.named_parameters()}


def _blocks(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the blocks: children of a container that are made of modules, where there are several with
    parameters and all of one class. Containers come before those inside them, whose blocks change nothing.
    """
    found: list[str] = []
    for path, module in modules.items():
        if isinstance(module, _CONTAINERS):
            held = {name: child for name, child in module.named_children() if _is_built(child)}
            if len(held) > 1 and len({type(child) for child in held.values()}) == 1:
                found += [f"{path}.{name}".lstrip(".") for name in held]
    return found


def _is_built(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def named(names: Sequence[str]) -> str:
    """The first of many names, as text.

    >>> named(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d, e and 1 more'
    """
    left = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {left} more" if left > 0 else "")


def _named(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The paths of the outermost modules that each pattern names, in the order of the patterns."""
    paths = [
        plain_name(path) for path, module in model.named_modules() if any(True for _ in module.parameters())
    ]
    found: list[str] = []
    for pattern in patterns:
        mine = [path for path in paths if fnmatchcase(path, pattern)]
        mine = [path for path in mine if not {*_upwards(path)[1:]} & {*mine}]
        if not mine:
            raise BadInput(f"no module with parameters is called {pattern!r}.{nearest(pattern, paths)}")
        if twice := {*mine} & {*found}:
            raise BadInput(f"{min(twice)} is named twice among the blocks.")
        found += mine
    return found


def _owner(modules: Mapping[str, nn.Module], prefix: str, name: str) -> tuple[str, nn.Module, str]:
    """The path of the module whose tensor a parameter stands for, the module, and the tensor's name: seen
    through parametrizations. The magnitude of a weight norm is a tensor of its own.
    """
    module = modules[prefix]
    if isinstance(module, ParametrizationList) and name.startswith("original"):
        path, _, tensor = f".{prefix}".rpartition(".parametrizations.")
        magnitude = isinstance(module[0], _WeightNorm) and name == "original0"
        return path[1:], modules[path[1:]], "magnitude" if magnitude else tensor
    if name.endswith("_g") and hasattr(module, f"{name[:-2]}_v"):  # torch.nn.utils.weight_norm
        return prefix, module, "magnitude"
    if name.endswith(("_v", "_orig")):
        return prefix, module, name.rpartition("_")[0]
    return prefix, module, name


def _role(module: nn.Module, name: str, shape: tuple[int, ...]) -> str:
    if isinstance(module, _NORMS):
        return "norm"
    if name == "magnitude":
        return "scale"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if name.startswith("bias") or "_bias" in name:
        return "bias"
    # In three dimensions and more a vector is often spread: a layer's scale, a class token.
    if len(shape) <= 1 or (not isinstance(module, (*_MATRICES, _ConvNd)) and _is_spread(shape)):
        return "scale"
    if isinstance(module, _ConvNd):
        return "conv"
    return "matrix" if isinstance(module, _MATRICES) or len(shape) == 2 else "other"


def _is_spread(shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and sum(size > 1 for size in shape) <= 1


def _wrapper(model: nn.Module) -> str | None:
    """What has noted which parameters need a gradient, if anything has."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "DDP"
        if callable(getattr(module, "unshard", None)) and hasattr(module, "reshard"):
            return "FSDP2"
    return None


def _times(lr: float | Schedule, rate: float) -> float | Schedule:
    if rate == 1.0:
        return lr
    return lr.scaled(rate) if isinstance(lr, Schedule) else lr * rate


def _check_multiplier(what: str, value: object) -> None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not 0 <= value < math.inf:  # type: ignore[operator]
        raise BadInput(f"{what} must be a number at least 0, got {value!r}.")


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "1"


def _short(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"


def _aligned(rows: Sequence[tuple[str, ...]], right: int | None = None) -> str:
    """Rows as a table; columns from `right` on are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cut = len(widths) if right is None else right
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < cut else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
