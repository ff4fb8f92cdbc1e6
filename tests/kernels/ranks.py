"""Real ranks over gloo, and one process, that step the same model and say what came of it.

`python -m kernels.ranks FOLDER` tries everything alone, with plain tensors, and then forks 2, 3 and 4 ranks,
which so need not import torch and load the kernels anew. What is tried is named "layout: trial"; a layout
says how the parameters lie on the ranks, a trial what is done with them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, LINK_CASES, draw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import downslope as ds
from downslope.rules import RULES
from downslope.rules.value import largest, norm

SIZES = (2, 3, 4)
STEPS, HALF = 8, 4
BATCH = 12
WAIT = timedelta(seconds=60)
"""How long a rank waits for the others."""


class Net(nn.Module):
    """Layers whose rows are cut evenly, unevenly, and so that a rank is left with nothing, by 2 and by 3."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        kind = {"dtype": dtype}
        self.conv = nn.Conv2d(2, 3, 2, **kind)  # rows 2 + 1; 1 + 1 + 1
        self.first = nn.Linear(4, 6, **kind)  # 3 + 3; 2 + 2 + 2
        self.second = nn.Linear(6, 5, **kind)  # 3 + 2; 2 + 2 + 1
        self.twin = nn.Linear(6, 5, **kind)  # of one shape with the second: gathered with it
        self.norm = nn.LayerNorm(5, **kind)
        self.third = nn.Linear(5, 4, **kind)  # 2 + 2; 2 + 2 + 0
        self.last = nn.Linear(4, 1, bias=False, **kind)  # 1 + 0; 1 + 0 + 0
        self.scale = nn.Parameter(torch.ones(1, **kind))
        self.gain = nn.Parameter(torch.ones(2, **kind))
        drawn, _ = draw(1, seed=5, shapes=shapes_of(self))
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), drawn, strict=True):
                parameter.copy_(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).reshape(len(x), 3, 4)
        x = torch.tanh(self.first(x))
        x = self.third(self.norm(self.second(x) * torch.tanh(self.twin(x))))
        return self.last(self.scale * x).mean((1, 2)) * self.gain.sum()


def shapes_of(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(parameter.shape) for parameter in model.parameters())


@dataclass
class Place:
    """Where a trial runs: alone, or as one of `size` ranks; what it found is kept here."""

    size: int
    rank: int
    folder: Path
    layout: str = "fsdp"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    meshes: dict[tuple[int, ...], Any] = field(default_factory=dict)
    gradients: dict[tuple[Any, ...], list[list[Tensor]]] = field(default_factory=dict)

    def mesh(self, *sizes: int) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if sizes not in self.meshes:
            names = ("outer", "inner")[-len(sizes) :]
            self.meshes[sizes] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        return self.meshes[sizes]

    def model(self, dtype: torch.dtype = torch.float64) -> Net:
        """The model, laid out."""
        model = Net(dtype)
        if self.size > 1:
            LAYOUTS[self.layout](self, model)
        return model

    def like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """A tensor that every rank has whole, placed as the parameter is, by torch alone."""
        from torch.distributed.tensor import DTensor, Replicate

        if not isinstance(parameter, DTensor):
            return whole.clone()
        mesh = parameter.device_mesh
        made = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return made.redistribute(placements=parameter.placements)

    def drawn(self, model: nn.Module, dtype: torch.dtype, **how: Any) -> list[list[Tensor]]:
        """Known gradients for every step, placed as the weights are; drawn once, as no step writes them."""
        key = (self.layout, dtype, *how.items())
        if key not in self.gradients:
            _, drawn = draw(STEPS, shapes=shapes_of(model), **how)
            self.gradients[key] = [
                [
                    self.like(torch.tensor(value, dtype=dtype), parameter)
                    for value, parameter in zip(values, model.parameters(), strict=True)
                ]
                for values in drawn
            ]
        return self.gradients[key]

    def cut(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch; all of it where ranks do not average what they found."""
        return batch.chunk(self.size)[self.rank] if self.layout in ("fsdp", "hsdp", "mixed") else batch


def whole(tensor: Any) -> Tensor:
    """The full tensor, in memory of its own."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone().contiguous()


# How parameters lie on the ranks.


def fsdp(place: Place, model: Net, **settings: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    settings = {"mesh": place.mesh(place.size), **settings}
    for module in (model.conv, model.first, model.second, model.norm, model):
        fully_shard(module, **settings)


def hsdp(place: Place, model: Net) -> None:
    fsdp(place, model, mesh=place.mesh(2, place.size // 2))


def mixed(place: Place, model: Net) -> None:
    """Some parameters are left as plain tensors, whose gradients the ranks average by themselves."""
    left = {model.gain, model.norm.weight, model.twin.weight}
    fsdp(place, model, ignored_params=left)
    for parameter in left:
        parameter.register_hook(lambda gradient: summed(gradient) / place.size)


def summed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor


def placed(place: Place, model: Net, mesh: Sequence[int], kinds: Sequence[str]) -> None:
    """Every parameter as a DTensor by itself: "R" replicated, "0" cut by rows, "1" by columns."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    made = place.mesh(*mesh)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            axes = [kind if int(kind == "1") < parameter.ndim else "0" for kind in kinds]
            placements = [Replicate() if axis == "R" else Shard(int(axis)) for axis in axes]
            held = DTensor.from_local(parameter.data, made, [Replicate()] * made.ndim, run_check=False)
            setattr(module, name, nn.Parameter(held.redistribute(placements=placements)))


def tensor_parallel(place: Place, model: Net) -> None:
    """FSDP2 over layers whose rows tensor parallelism has cut already: the placement has no public name."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = place.mesh(2, place.size // 2)
    plan = {name: ColwiseParallel() for name in ("first", "third")}
    fsdp(place, parallelize_module(model, mesh["inner"], plan), mesh=mesh["outer"])


LAYOUTS: dict[str, Callable[[Place, Net], None]] = {
    "fsdp": fsdp,
    "hsdp": hsdp,
    "mixed": mixed,
    "replicated": lambda place, model: placed(place, model, (place.size,), "R"),
    "columns": lambda place, model: placed(place, model, (place.size,), "1"),
    "rows twice": lambda place, model: placed(place, model, (2, place.size // 2), "00"),
    "rows and columns": lambda place, model: placed(place, model, (2, place.size // 2), "01"),
    "tensor parallel": tensor_parallel,
}


# What is tried.


def chain_of(name: str) -> Any:
    """The chain of a case of the table; of a rule of matrices, a route that gives it every matrix."""
    part = CASES[name].part
    if RULES[name].takes != "matrix":
        return ds.chain(part)
    return ds.route({"matrix": part, "head": part, "conv": part, "rest": ds.adamw(lr=0.1, eps=1e-3)})


def drive(
    place: Place, model: Net, optimizer: Any, steps: range, case: Any = None, dtype: Any = torch.float64
) -> None:
    """Step by known gradients. Where the chain takes them twice, they depend on the weights."""
    gradients = place.drawn(model, dtype, steady=bool(case and case.steady))
    estimates = place.drawn(model, dtype, seed=1) if case and case.estimates else []

    def give(drawn: Sequence[Any], bent: bool = False) -> None:
        for parameter, gradient in zip(model.parameters(), drawn, strict=True):
            with torch.no_grad():
                parameter.grad = gradient * (1 + 0.3 * parameter**2) if bent else gradient

    for k in steps:
        if case and case.estimates and k % case.estimates == 0:
            give(estimates[k])
            optimizer.estimate()
        twice = optimizer.passes > 1
        give(gradients[k], bent=twice)
        optimizer.step(partial(give, gradients[k], True) if twice else None)


def keep(place: Place, model: nn.Module, optimizer: Any) -> None:
    """Note the weights, those to evaluate, and a digest of what every rank must hold alike: them, and the
    state that is not sharded.
    """
    place.tensors |= {f"weight {name}": whole(p) for name, p in model.named_parameters()}
    with optimizer.averaged():
        place.tensors |= {f"evaluated {name}": whole(p) for name, p in model.named_parameters()}
    slots = [value for entry in optimizer.state.values() for value in entry.values()]
    digest = hashlib.sha256()
    for tensor in [*place.tensors.values(), *(value for value in slots if not hasattr(value, "placements"))]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    place.facts["digest"] = digest.hexdigest()


def rule(name: str, place: Place) -> None:
    model = place.model()
    optimizer = ds.Optimizer(model, chain_of(name))
    drive(place, model, optimizer, range(STEPS), CASES[name])
    keep(place, model, optimizer)


def chained(make: Callable[[], Any], place: Place) -> None:
    model = place.model()
    optimizer = ds.Optimizer(model, make())
    drive(place, model, optimizer, range(STEPS))
    keep(place, model, optimizer)


def linked(name: str, place: Place) -> None:
    """A link with a rule that it goes with."""
    link = LINK_CASES[name]
    rule = CASES["momentum" if link.metric == "number" else "adam"]
    chained(lambda: link.chain(rule), place)


def muon_and_adamw() -> Any:
    parts = ds.muon(lr=0.05, momentum=0.8), ds.adamw(lr=0.02, eps=1e-3)
    return ds.chain(
        ds.clip_norm(1.5), ds.route({"matrix": parts[0], "conv": parts[0], "rest": parts[1]}), ds.decay(0.1)
    )


CHAINS: dict[str, Callable[[], Any]] = {
    "clip > adamw > decay > l1": lambda: ds.chain(
        ds.clip_norm(1.5), ds.adamw(lr=0.05, eps=1e-3), ds.decay(0.1), ds.l1(0.02)
    ),
    "clip > route of muon and adamw > decay": muon_and_adamw,
    "centralize > noise > agc > lamb > lookahead": lambda: ds.chain(
        ds.centralize(), ds.noise(0.1, seed=7), ds.agc(0.5), ds.lamb(lr=0.05), ds.lookahead(every=3)
    ),
    "clip > soap": lambda: ds.chain(
        ds.clip_norm(2.0), ds.route({"matrix": ds.soap(lr=0.05, every=3), "rest": ds.adamw(lr=0.05)})
    ),
}


def trained(make: Callable[[], Any], place: Place) -> None:
    """Real forward and backward passes, every rank with its part of the batch, and looks in between."""
    model = place.model()
    optimizer = ds.Optimizer(model, make())
    draws = torch.Generator().manual_seed(3)
    losses: list[float] = []
    for _ in range(STEPS):
        x = place.cut(torch.randn(BATCH, 2, 3, 3, dtype=torch.float64, generator=draws))
        y = place.cut(torch.randn(BATCH, dtype=torch.float64, generator=draws))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            losses.append(float(loss))
            return loss

        optimizer.step(closure)
        with torch.no_grad(), optimizer.averaged():  # what a look gathers must not be trained on
            place.tensors[f"outputs {len(losses)}"] = model(torch.ones_like(x)).mean()
    keep(place, model, optimizer)
    place.facts["calls"] = len(losses)
    assert all(map(math.isfinite, losses)), losses


TRAINED: dict[str, Callable[[], Any]] = {
    "adamw": CHAINS["clip > adamw > decay > l1"],
    "muon": muon_and_adamw,
    "sam": lambda: ds.chain(ds.sam(0.1), ds.adam(lr=0.02, eps=1e-3)),
    "schedule_free": lambda: ds.chain(ds.schedule_free_adamw(lr=0.05)),
    "gd that backtracks": lambda: ds.chain(ds.gd(lr=1.0, shrink=0.5, slope=0.3)),
}


@ds.rule(ds.Slot("size", per="tensor"), ds.Slot("most", per="tensor"), source="this test")
def measured(g: Any, p: Any, s: Any) -> Any:
    """Notes the norm of all gradients, and their largest number."""
    s.size, s.most = norm(g, over="all"), largest(g, over="all")
    return g


def measures(odd: float, place: Place) -> None:
    """What spans all parameters is the same number on every rank, and NaN if any rank holds one."""
    model = place.model()
    optimizer = ds.Optimizer(model, measured(lr=0.0))
    spoil(place, model, odd)
    optimizer.step()
    slots = optimizer.state[model.scale]
    place.facts |= {name: float(slots[name]).hex() for name in ("size", "most")}
    keep(place, model, optimizer)


def spoil(place: Place, model: Net, odd: float) -> None:
    """Known gradients, with one odd number in the last row of the second weight: on one rank."""
    _, (drawn,) = draw(1, shapes=shapes_of(model))
    for (name, parameter), value in zip(model.named_parameters(), drawn, strict=True):
        gradient = torch.tensor(value)
        if name == "second.weight":
            gradient[-1, -1] = odd
        parameter.grad = place.like(gradient, parameter)


def guarded(odd: float, make: Callable[[], Any], place: Place) -> None:
    """One odd number on one rank: none steps, all name the same culprit, nothing at all changes."""
    model = place.model()
    optimizer = ds.Optimizer(model, make(), guard=True)
    drive(place, model, optimizer, range(2))
    before = contents(model, optimizer)
    spoil(place, model, odd)
    optimizer.step()
    place.facts["skipped"] = list(optimizer.skipped.names) if optimizer.skipped else None
    place.facts["untouched"] = same(before, contents(model, optimizer))
    place.facts["steps"] = optimizer.steps
    drive(place, model, optimizer, range(2, STEPS))
    keep(place, model, optimizer)


def contents(model: nn.Module, optimizer: Any) -> list[Tensor]:
    slots = [value for entry in optimizer.state.values() for value in entry.values()]
    held = [*model.parameters(), *slots]
    return [(v.to_local() if hasattr(v, "to_local") else v).detach().clone() for v in held]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def rounded(place: Place) -> None:
    """bfloat16 weights rounded by chance: the same bits, wherever an element lies."""
    model = place.model(torch.bfloat16)
    optimizer = ds.Optimizer(model, ds.chain(ds.adamw(lr=0.01), ds.stochastic_rounding(seed=5)))
    drive(place, model, optimizer, range(STEPS), dtype=torch.bfloat16)
    keep(place, model, optimizer)


def absent(place: Place) -> None:
    """Weights that get no gradient for a while stand still, and count their own updates."""
    model = place.model()
    optimizer = ds.Optimizer(model, muon_and_adamw())
    for k in range(STEPS):
        idle = [model.second.weight, model.gain] if 1 < k < 5 else []
        for parameter, gradient in zip(model.parameters(), place.drawn(model, torch.float64)[k], strict=True):
            parameter.grad = None if any(parameter is one for one in idle) else gradient
        optimizer.step()
    keep(place, model, optimizer)
    place.facts["t"] = [int(optimizer.state[p]["t"]) for p in model.parameters()]


def scaled(odd: float, place: Place) -> None:
    """torch's GradScaler: gradients carry its scale, and an overflow on one rank stops all."""
    model = place.model()
    optimizer = ds.Optimizer(model, ds.chain(ds.clip_norm(1.5), ds.adam(lr=0.1, eps=1e-3)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    skipped = []
    for k in range(STEPS):
        if k == 3:
            spoil(place, model, odd)
        else:
            drawn = place.drawn(model, torch.float64)[k]
            for parameter, gradient in zip(model.parameters(), drawn, strict=True):
                parameter.grad = gradient * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(list(optimizer.skipped.names) if optimizer.skipped else None)
    keep(place, model, optimizer)
    place.facts |= {"skipped": skipped, "steps": optimizer.steps, "scale": scaler.get_scale()}


def summands(place: Place) -> None:
    """Gradients that do not lie as the weights do: a summand a rank, as sequence parallelism leaves them, or
    whole.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    model = place.model()
    optimizer = ds.Optimizer(model, muon_and_adamw())
    for drawn in place.drawn(model, torch.float64):
        for parameter, gradient in zip(model.parameters(), drawn, strict=True):
            parameter.grad = gradient
            if isinstance(parameter, DTensor):
                replicated = parameter.placements == (Replicate(),)
                mine = torch.arange(gradient.numel()).view(gradient.shape) % place.size == place.rank
                part = whole(gradient) * mine if replicated else whole(gradient)
                kind = Partial() if replicated else Replicate()
                parameter.grad = DTensor.from_local(part, parameter.device_mesh, [kind], run_check=False)
        optimizer.step()
    keep(place, model, optimizer)


def refused(place: Place) -> None:
    """What no rank can step, by its name."""
    from torch.distributed.tensor import DTensor, Partial

    model = place.model()
    mesh = model.second.weight.device_mesh
    summand = nn.Parameter(DTensor.from_local(torch.ones(5, 6), mesh, [Partial()], run_check=False))
    place.facts["refusals"] = []
    for parameter, links in ((summand, []), (model.second.weight, [ds.noise(0.1)])):
        optimizer = ds.Optimizer([("second.weight", parameter)], ds.chain(*links, ds.sgd(lr=0.1)))
        parameter.grad = parameter.detach()
        try:
            optimizer.step()
        except ds.BadInput as raised:
            place.facts["refusals"].append(str(raised))


# State that is saved on some ranks and loaded on others.

SAVED: dict[str, Callable[[], Any]] = {
    "adamw": lambda: ds.chain(ds.clip_norm(1.5), ds.adamw(lr=ds.cosine(0.1, steps=20, warmup=3), eps=1e-3)),
    "adafactor": partial(chain_of, "adafactor"),
    "shampoo": partial(chain_of, "shampoo"),
    "psgd": partial(chain_of, "psgd"),
    "prodigy": partial(chain_of, "prodigy"),
    "lookahead": lambda: ds.chain(ds.schedule_free_adamw(lr=0.05), ds.lookahead(every=3)),
}
WAYS = ("ours", "torch's")


def saved(name: str, way: str, place: Place) -> None:
    """Save halfway, go on; then go on from what other numbers of ranks saved."""
    case = CASES.get(name) if name == "prodigy" else None
    model = place.model()
    optimizer = ds.Optimizer(model, SAVED[name]())
    drive(place, model, optimizer, range(HALF), case)
    state = state_of(model, optimizer, way)
    weights = {label: whole(p) for label, p in model.named_parameters()}
    if place.rank == 0:
        path = place.folder / f"{name}-{way}-{place.size}.pt"
        torch.save({"state": state, "weights": weights}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    drive(place, model, optimizer, range(HALF, STEPS), case)
    keep(place, model, optimizer)


def resumed(name: str, way: str, size: int, place: Place) -> None:
    """Go on from what `size` ranks saved."""
    case = CASES.get(name) if name == "prodigy" else None
    kept = torch.load(place.folder / f"{name}-{way}-{size}.pt", weights_only=True)
    model = place.model()
    optimizer = ds.Optimizer(model, SAVED[name]())
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            parameter.copy_(place.like(kept["weights"][label], parameter))
    if way == "ours":
        optimizer.load_state_dict(kept["state"])
    else:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, kept["state"], options=options)
    drive(place, model, optimizer, range(HALF, STEPS), case)
    keep(place, model, optimizer)


def state_of(model: nn.Module, optimizer: Any, way: str) -> Any:
    """The state with full tensors: of our state dict, or as torch's tool gathers it."""
    if way == "ours":
        held = optimizer.state_dict()
        held["state"] = {
            key: {name: whole(value) for name, value in slots.items()} for key, slots in held["state"].items()
        }
        return held
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))


SHARDED_ONLY: dict[str, Callable[[Place], None]] = {"refused": refused}
TRIALS: dict[str, Callable[[Place], None]] = {
    **{f"rule {name}": partial(rule, name) for name in CASES},
    **{f"link {name}": partial(linked, name) for name in LINK_CASES},
    **{f"chain {name}": partial(chained, make) for name, make in CHAINS.items()},
    **{f"trained {name}": partial(trained, make) for name, make in TRAINED.items()},
    **{f"measures {odd}": partial(measures, odd) for odd in (1.0, float("inf"), float("nan"))},
    **{
        f"guard {name} {odd}": partial(guarded, odd, make)
        for odd in (float("inf"), float("nan"))
        for name, make in (("adamw", partial(ds.adamw, lr=0.1)), ("muon", muon_and_adamw))
    },
    "rounding": rounded,
    "absent": absent,
    "summands": summands,
    **{f"scaled {odd}": partial(scaled, odd) for odd in (float("inf"), float("nan"))},
    **{f"saved {name} {way}": partial(saved, name, way) for name in SAVED for way in WAYS},
    **{
        f"resumed {name} {way} from {size}": partial(resumed, name, way, size)
        for name in SAVED
        for way in WAYS
        for size in (1, 2, 3)
    },
}


def trials(size: int) -> list[str]:
    """What so many ranks try, in order."""
    full = [name for name in TRIALS if not name.startswith("resumed")]
    few = ["rule adam", "chain clip > route of muon and adamw > decay", "rule adafactor", "link group_lasso"]
    drawn = ["link noise", "rounding", "guard muon nan", "measures nan"]
    some = {
        2: {
            "fsdp": full,
            "mixed": [*few, *drawn, "trained adamw"],
            "replicated": [*few, "summands"],
            "columns": few,
        },
        3: {"fsdp": full},
        4: {
            "hsdp": [*few, *drawn, "trained adamw", "trained muon"],
            "rows twice": [*few, *drawn],
            "rows and columns": few,
            "tensor parallel": few,
        },
    }[size]
    return [f"{layout}: {name}" for layout, names in some.items() for name in names] + resumptions(size)


def resumptions(size: int) -> list[str]:
    sources = {1: (2, 3), 2: (1,), 3: (2,), 4: ()}[size]
    return [
        f"fsdp: resumed {name} {way} from {source}" for name in SAVED for way in WAYS for source in sources
    ]


def attempt(label: str, place: Place) -> None:
    """One trial; what it raised is a fact."""
    place.layout, name = label.split(": ", 1)
    place.tensors, place.facts = {}, {}
    try:
        (TRIALS | SHARDED_ONLY)[name](place)
    except Exception:
        place.facts = {"error": traceback.format_exc()}


class Report:
    """What the trials of one process find, noted trial by trial, so that it outlives the process."""

    def __init__(self, size: int, rank: int, folder: Path) -> None:
        self.place = Place(size, rank, folder)
        self.notes = (folder / f"{size}-{rank}.jsonl").open("a")

    def run(self, labels: Sequence[str]) -> None:
        """All trials; ranks that lost each other in one cannot find together again, and try no more."""
        place = self.place
        for label in labels:
            attempt(label, place)
            if place.rank == 0 and place.tensors:
                save_file(place.tensors, tensors_of(place.folder, place.size, label))
            print(json.dumps([label, place.facts]), file=self.notes, flush=True)
            if "gloo" in place.facts.get("error", ""):
                raise SystemExit(f"the ranks lost each other in {label}")


def tensors_of(folder: Path, size: int, label: str) -> Path:
    return folder / f"{size} {label.replace(': ', ' ')}.safetensors"


def tensors(size: int, folder: Path, label: str) -> dict[str, Tensor]:
    """The full tensors that the first of so many ranks noted of a trial."""
    return load_file(tensors_of(folder, size, label))


def facts(size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of so many ranks noted, by trial."""
    lines = [(folder / f"{size}-{rank}.jsonl").read_text().splitlines() for rank in range(size)]
    return [dict(map(json.loads, of_rank)) for of_rank in lines]


def as_rank(size: int, rank: int, folder: Path, labels: Sequence[str]) -> None:
    """One rank, from its first to its last breath."""
    import torch.distributed as dist

    store = f"file://{folder / f'store-{size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=WAIT)
    Report(size, rank, folder).run(labels)
    dist.barrier()
    dist.destroy_process_group()


def forked(size: int, folder: Path, labels: Sequence[str]) -> list[int]:
    """So many ranks, until all have ended; how they did."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                as_rank(size, rank, folder, labels)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # gloo's threads may abort an ordinary exit
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """All of it. What goes backward comes last: torch's autograd cannot be forked."""
    import torch.distributed.fsdp

    folder, asked = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    alone = Report(1, 0, folder)
    names = [name for name in TRIALS if not name.startswith("resumed")]
    backward = [name for name in names if name.startswith("trained")]
    alone.run([f"fsdp: {name}" for name in names if name not in backward])
    ends = {}
    for size in SIZES:
        labels = [*trials(size), *(["columns: refused"] if size == 2 else [])]
        ends[size] = forked(size, folder, [label for label in labels if not asked or label in asked])
    alone.run([f"fsdp: {name}" for name in backward] + ([] if asked else resumptions(1)))
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
