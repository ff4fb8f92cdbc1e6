"""States that lie in parts on several ranks, saved by so many and loaded by others.

    python tests/parallel/parts.py FOLDER

forks the ranks from a process that has imported torch once. Each notes what it holds, by SHA-256 of whole
tensors that torch itself gathered; `test_sharded.py` compares.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["NUMBA_NUM_THREADS"] = "1"  # a thread pool would not survive a fork

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from parallel import ranks as trials
from train import problems

import downslope as ds
from downslope.journal import read
from downslope.parallel import ALONE, Ranks, joined
from downslope.train import checkpoint, history

WORLDS = (2, 3)


class Net(nn.Module):
    """Weights of one row, of fewer rows than ranks, and of rows that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 2)])
        self.head = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().sum()
        for layer in (self.first, *self.blocks):
            x = layer(x).tanh()
        return self.head(x)


class Loop:
    """A loop of one's own: a model whose weights lie on `ranks`, an optimizer, an average of the weights."""

    def __init__(self, rule: str, ranks: Ranks, seed: int, mesh: Any = None) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        if ranks.shard:
            from torch.distributed.fsdp import fully_shard

            for block in self.model.blocks:
                fully_shard(block, mesh=mesh or ranks.mesh)
            fully_shard(self.model, mesh=mesh or ranks.mesh)
        self.optimizer = RULES[rule](self.model)
        self.average = ds.Average(self.model, ds.ema(0.9))
        self.state = ds.TrainState(self.model, self.optimizer, average=self.average, ranks=ranks)

    def train(self, steps: int = 3) -> None:
        for step in range(steps):
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            self.model(inputs).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()
            self.state.step += 1

    def held(self) -> dict[str, str]:
        """The SHA-256 of every tensor as torch gathers it, by part, parameter and slot."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {f"model {name}": value for name, value in self.model.state_dict().items()}
        for parameter, slots in self.optimizer.state.items():
            found |= {f"optimizer {names[id(parameter)]} {slot}": v for slot, v in slots.items()}
        found |= {f"average {name}": value for name, value in self.average.state()["tensors"].items()}
        return {name: sha(value) for name, value in found.items()}


def sha(tensor: Any) -> str:
    full = trials.whole(torch.as_tensor(tensor)).contiguous()
    return hashlib.sha256(f"{full.dtype} {[*full.shape]} ".encode() + full.numpy().tobytes()).hexdigest()


RULES: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda model: ds.Optimizer(model, ds.adamw(lr=0.01)),
    "muon": lambda model: ds.Optimizer(
        model, ds.route({"matrix": ds.muon(lr=0.02), "rest": ds.adamw(lr=0.01)})
    ),
    "shampoo": lambda model: ds.Optimizer(
        model, ds.route({"matrix": ds.shampoo(lr=0.02), "rest": ds.adamw(lr=0.01)})
    ),
    "adafactor": lambda model: ds.Optimizer(model, ds.adafactor(lr=0.01)),
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


def save_all(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Each rule's state after some steps, saved as it lies here; what it was."""
    found = {}
    for rule in RULES:
        loop = Loop(rule, ranks, seed=0)
        loop.train()
        found[rule] = loop.held()
        loop.state.save(folder / f"{rule}-{ranks.world}")
        loop.train(2)
        found[f"{rule} later"] = loop.held()
    return found


def load_all(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What becomes of each state in a program that has none, and what two more steps make of it."""
    found = {}
    for rule in RULES:
        for world in (1, *WORLDS):
            loop = Loop(rule, ranks, seed=1)
            loop.state.load(folder / f"{rule}-{world}")
            found[f"{rule} {world}"] = loop.held()
            if world == ranks.world:
                loop.train(2)
                found[f"{rule} later"] = loop.held()
    return found


def boxes(ranks: Ranks) -> dict[str, Any]:
    """Which part of each weight this rank saves, by our count and by torch's."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from downslope.train.sharded import start_of

    found = {}
    for name, value in Loop("adamw", ranks, seed=0).model.named_parameters():
        weight: Any = value
        shape, offset = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        ours = [start_of(name, weight), [*weight.to_local().shape]]
        found[name] = [ours, [[*offset], [*shape]]]
    return found


def snapshots(ranks: Ranks) -> list[bool]:
    """A snapshot is the state of its moment, and what is put back is that, in memory of its own."""
    loop = Loop("adamw", ranks, seed=0)
    loop.train()
    before, shot = loop.held(), loop.state.snapshot()
    loop.train(2)
    moved = loop.held() != before
    loop.state.restore(shot)
    back = loop.held() == before
    loop.train(2)
    loop.state.restore(shot)
    return [moved, back, loop.held() == before]


def copies(ranks: Ranks, folder: Path) -> dict[str, str]:
    """On a mesh of two times two, where every part lies on two ranks: one of them saves it."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    loop = Loop("adamw", ranks, seed=0, mesh=mesh)
    loop.train()
    loop.state.save(folder / "copies")
    return loop.held()


def as_ranks(world: int, shard: bool, act: Callable[[Ranks], Any], patience: float = 60) -> list[Any]:
    """What so many ranks make of it, by rank: their notes, and how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [os.pipe() for _ in range(world)]
    children = []
    for rank, (_, end) in enumerate(pipes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code, note = 0, None
            try:
                with joined(shard, patience) as ranks:
                    note = act(ranks)
            except BaseException as error:
                code, note = 1, f"{type(error).__name__}: {error}"
                traceback.print_exc()
            sys.stderr.flush()
            with os.fdopen(end, "w") as pipe:
                pipe.write(json.dumps(note))
            os._exit(code)  # gloo's threads may abort an ordinary exit
        os.close(end)
        children.append(child)
    notes = []
    for child, (begin, _) in zip(children, pipes, strict=True):
        with os.fdopen(begin) as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        notes.append({"code": code, "note": json.loads(said) if said else None})
    return notes


def states(folder: Path) -> dict[str, Any]:
    notes: dict[str, Any] = {"saved 1": [{"code": 0, "note": save_all(ALONE, folder)}]}
    notes |= {f"saved {n}": as_ranks(n, True, lambda r: save_all(r, folder)) for n in WORLDS}
    notes["loaded 1"] = [{"code": 0, "note": load_all(ALONE, folder)}]
    for n in WORLDS:
        notes[f"loaded {n}"] = as_ranks(n, True, lambda r: load_all(r, folder))
        notes[f"boxes {n}"] = as_ranks(n, True, boxes)
    notes["whole 2"] = as_ranks(2, False, lambda r: load_all(r, folder))
    notes["snapshots"] = as_ranks(2, True, snapshots)
    notes["copies"] = as_ranks(4, True, lambda r: copies(r, folder))
    loop = Loop("adamw", ALONE, seed=1)
    loop.state.load(folder / "copies")
    notes["copies loaded"] = loop.held()
    return notes


TASK = f"{problems.__file__}:rich"
STEPS, EVERY = 12, 4
MODES = [(shard, background) for shard in (False, True) for background in (False, True)]
STAGES = ("before", "within", "after")
FILES = {0: ["model.rank-0", "state", "manifest"], 1: ["optimizer.rank-1"]}


def go(out: Path, shard: bool = True, background: bool = False) -> int:
    """Start a run, or go on with it, as one of several ranks."""
    recipe = problems.recipe(steps=STEPS)
    given: dict[str, Any] = {"save_every": EVERY, "valid_every": EVERY, "quiet": True}
    return ds.train(TASK, recipe, out=out, seed=1, shard=shard, background=background, **given).steps


def ran(out: Path) -> dict[str, Any]:
    """What a run's folder tells: its checkpoints that count, what it found damaged, what lies there."""
    events = read(out / "journal.jsonl")
    return {
        "shas": [e["sha"] for e in history(events) if e["kind"] == "checkpoint"],
        "damaged": [line for e in events if e["kind"] == "resume" for line in e["damaged"]],
        "from": [e["step"] for e in events if e["kind"] == "resume"],
        "files": sorted(path.name for path in (out / "ckpt").iterdir()),
    }


def begin(out: Path, world: int = 2, shard: bool = True, background: bool = False) -> list[Any]:
    return as_ranks(world, shard, lambda _: go(out, shard, background))


def failing(name: str, stage: str, fail: Callable[[], object]) -> None:
    """From now on, `fail` happens to this process where it writes this file of the second checkpoint."""
    real = checkpoint.write_new

    def write(path: Path, pieces: Any) -> None:
        at = path.name.startswith(name) and f"{2 * EVERY:09d}" in path.parent.name
        if not at or stage == "after":
            real(path, pieces)
        elif stage == "within":
            data = pieces if isinstance(pieces, bytes) else b"".join(map(bytes, pieces))
            real(path, data[: len(data) // 2])
        if at:
            fail()

    checkpoint.write_new = write  # type: ignore[assignment]


def killed(out: Path, rank: int, name: str, stage: str, background: bool) -> dict[str, Any]:
    """A rank is killed while it writes a file: how the others end, what is left, and where it leads."""

    def act(_: Ranks) -> int:
        if os.environ["RANK"] == str(rank):
            failing(name, stage, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return go(out, True, background)

    ends, left = as_ranks(2, True, act), ran(out)
    return {"ends": ends, "left": left, "again": begin(out), "in the end": ran(out)}


def refused(out: Path, rank: int, name: str, shard: bool, background: bool) -> dict[str, Any]:
    """The disk of a rank is full in the middle of a file; later it is not."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def act(_: Ranks) -> int:
        if os.environ["RANK"] == str(rank):
            failing(name, "within", full)
        return go(out, shard, background)

    ends, left = as_ranks(2, shard, act), ran(out)
    again = begin(out, 2, shard, background)
    return {"ends": ends, "left": left, "again": again, "in the end": ran(out)}


def damaged(straight: Path, out: Path, name: str, flip: bool, world: int) -> dict[str, Any]:
    """A byte of one rank's file of the newest checkpoint is another, or the file is gone."""
    shutil.copytree(straight, out)
    path = out / "ckpt" / f"step-{STEPS:09d}" / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink()
    if flip:
        path.write_bytes(data)
    return {"ends": begin(out, world), "in the end": ran(out)}


def misread(straight: Path, out: Path) -> dict[str, Any]:
    """After all bytes were verified, one rank cannot read a file of the newest checkpoint."""
    shutil.copytree(straight, out)
    real = checkpoint.tensors

    def tensors(folder: Any, name: str) -> dict[str, Tensor]:
        if str(folder).endswith(f"{STEPS:09d}") and name == "model.rank-0.safetensors":
            raise checkpoint.Damaged(f"{name} cannot be read")
        return real(folder, name)

    def act(_: Ranks) -> int:
        if os.environ["RANK"] == "1":
            checkpoint.tensors = tensors
        return go(out)

    return {"ends": as_ranks(2, True, act), "in the end": ran(out)}


def runs(folder: Path) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for shard, background in MODES:
        out = folder / f"run-{shard}-{background}"
        notes[f"run {shard} {background}"] = [begin(out, 2, shard, background), ran(out)]
    for rank, names in FILES.items():
        for name in names:
            for stage, background in itertools.product(STAGES, (False, True)):
                at = f"killed {rank} {name} {stage} {background}"
                notes[at] = killed(folder / at.replace(" ", "-"), rank, name, stage, background)
    for shard, background in MODES:
        for rank, name in ((0, "state"), (1, "model.rank-1"))[: 1 + shard]:
            at = f"refused {rank} {shard} {background}"
            notes[at] = refused(folder / at.replace(" ", "-"), rank, name, shard, background)
    notes["misread"] = misread(folder / "run-True-False", folder / "misread")
    for flip in (True, False):
        for world in (1, *WORLDS):
            at = f"damaged {flip} {world}"
            name = "optimizer.rank-1.safetensors"
            out = folder / at.replace(" ", "-")
            notes[at] = damaged(folder / "run-True-False", out, name, flip, world)
    return notes


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin(place / "warm")  # kernels are compiled once; later children find them
    (place / "notes.json").write_text(json.dumps({**states(place), **runs(place)}))
