"""Trainings on real ranks over gloo, each beside the same training of one process, in float64.

    python tests/parallel/ranks.py FOLDER

forks the ranks from a process that has imported torch once. Of every trial each rank notes what it found in
FOLDER; `test_shared.py` compares.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import downslope as ds
from downslope.parallel import Ranks, joined
from downslope.train import Training, training
from downslope.train.shared import Drifted, check_one_state

SIZES = (2, 3)
STEPS = 8
SAMPLES = 61


def data(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ torch.arange(18.0, dtype=torch.float64).view(6, 3).sin()).argmax(dim=1)


class Net(nn.Module):
    """Blocks that FSDP2 gathers one at a time, a tied weight, a layer that is never used, and a method that
    the loss calls instead of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.again = nn.Linear(7, 7)
        self.again.weight = self.blocks[1].weight  # type: ignore[assignment]
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(7, 3)
        self.double()

    def score(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.again(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x)


class Normed(Net):
    """BatchNorm, whose statistics are those of a rank's items."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()

    def score(self, x: Tensor) -> Tensor:
        return super().score(self.norm(x))


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    scores: Tensor = model.score(inputs)  # type: ignore[operator]
    return nn.functional.cross_entropy(scores, targets)


def forward(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model that is only called, as teachers need it."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def teacher(run: str) -> nn.Module:
    """What stands for a finished run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        return Net().eval()


def broken(model: nn.Module, batch: Any) -> Tensor:
    """Not finite for one sample, which one rank has."""
    bad = (batch[0] == data(0, SAMPLES)[0][5]).all(dim=1).any()
    return loss(model, batch) * (torch.nan if model.training and bad else 1.0)


def drifting(model: nn.Module, batch: Any) -> Tensor:
    """A rank writes what the others do not."""
    with torch.no_grad():
        model.head.bias += float(os.environ.get("RANK", "0")) * 1e-12  # type: ignore[operator,union-attr]
    return loss(model, batch)


class Drawn(torch.utils.data.Dataset[Any]):
    """Samples one by one."""

    def __init__(self) -> None:
        self.data = data(0, SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[0][index], self.data[1][index]


class Duel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(), Net()

    def score(self, x: Tensor) -> Tensor:
        both: Tensor = self.left(x) + self.right(x)
        return both


def gap(model: nn.Module, batch: Any) -> Tensor:
    return loss(model, batch) + (model.left(batch[0]) - model.right(batch[0])).square().mean()  # type: ignore[operator]


def task(**changes: Any) -> ds.Task:
    given = {"model": Net, "loss": loss, "train": data(0, SAMPLES), "valid": data(1, 1200)}
    return ds.Task(**{**given, "name": "shared", **changes})


def recipe(rule: Any = None, **changes: Any) -> ds.Recipe:
    rule = rule or ds.chain(ds.clip_norm(0.5), ds.adamw(lr=ds.cosine(0.02, steps="100 %"), eps=1e-3))
    made = ds.Recipe(rule, steps=STEPS, batch_size=13)
    return made.with_(**changes) if changes else made


@dataclass
class Case:
    """A training, and by how much several ranks may differ from one (None: they must differ)."""

    recipe: Callable[[], ds.Recipe] = recipe
    task: Callable[[], ds.Task] = task
    shard: bool = True
    near: float | None = 1e-12


S = ds.strategies
CASES = {
    "adamw": Case(),
    "muon": Case(lambda: recipe(ds.chain(ds.route({"matrix": ds.muon(lr=0.02), "rest": ds.adamw(lr=0.01)})))),
    "sam": Case(lambda: recipe(ds.chain(ds.sam(0.05), ds.sgd(lr=0.1)))),
    "pieces": Case(lambda: recipe(strategies={"micro": S.micro(items=5)})),
    "few items": Case(lambda: recipe(batch_size=2)),
    "sample by sample": Case(task=lambda: task(train=Drawn())),
    "not finite": Case(task=lambda: task(loss=broken)),
    "stop": Case(
        lambda: recipe(strategies={"stop": S.stop(patience=1, min_delta=9.0, restore=False)}, observe=2)
    ),
    "plateau": Case(
        lambda: recipe(ds.chain(ds.sgd(lr=ds.plateau(0.1, patience=0, threshold=9.0))), observe=2)
    ),
    "average": Case(lambda: recipe(strategies={"average": S.average(kind="ema", decay=0.9)}), shard=False),
    "mix": Case(lambda: recipe(strategies={"mix": S.mix(mixup=0.4)}), near=None),
    "thaw": Case(lambda: recipe(strategies={"freeze": S.freeze(until={"first.*": 4})}), shard=False),
    "players": Case(
        task=lambda: task(
            model=Duel, loss=None, players={"left": ds.Player(gap), "right": ds.Player(gap, 2)}
        ),
        shard=False,
    ),
    "growth": Case(lambda: recipe(strategies={"growth": S.growth(times=ds.linear(1, steps="100 %", end=4))})),
    "growth by the data": Case(
        lambda: recipe(
            ds.chain(ds.adamw(lr=0.02, eps=1e-3)),
            strategies={
                "growth": S.growth(times=ds.multistep(1, at=("26 samples", "2 epochs"), factor=2)),
                "micro": S.micro(items=5),
            },
        )
    ),
    "teacher": Case(
        lambda: recipe(strategies={"teacher": S.teacher(run="one", temperature=2.0)}),
        lambda: task(loss=forward),
    ),
    "teacher, cache": Case(
        lambda: recipe(strategies={"teacher": S.teacher(run="one", temperature=2.0, cache=2)}),
        lambda: task(loss=forward),
    ),
    "batchnorm": Case(task=lambda: task(model=Normed), near=None),
    "batchnorm, pieces": Case(
        lambda: recipe(strategies={"micro": S.micro(items=7)}), lambda: task(model=Normed), near=None
    ),  # 7 and 6 of 13: of each, 3 ranks have 2 items at least
}


def thirds() -> ds.Recipe:
    """Pieces of 3, 3, 3, 2 and 2 items of 13: one item for a rank of several, but not for one process."""
    return recipe(strategies={"micro": S.micro(items=3)})


REFUSED = {
    "switch": lambda ranks: Training(
        task(), recipe(strategies={"switch": S.switch(at=4, to=ds.sgd(lr=0.1), guard=2)}), ranks=ranks[True]
    ),
    "one item": lambda ranks: Training(task(model=Normed), thirds(), ranks=ranks[False]),
    "one item, sharded": lambda ranks: Training(task(model=Normed), thirds(), ranks=ranks[True]),
}


def labels(size: int) -> list[tuple[str, bool]]:
    """(case, sharded) of what so many ranks try."""
    return [(name, shard) for name, case in CASES.items() for shard in (False, True)[: 1 + case.shard]]


def found(name: str, ranks: Ranks | None, folder: Path) -> dict[str, Any]:
    """What a training ends in: weights, losses, skips, a validation, a hash of all of its state; and the
    same when it is saved half way and loaded again.
    """
    case = CASES[name]
    given = {"ranks": ranks} if ranks else {}
    state = Training(case.task(), case.recipe(), 3, 1, **given)  # type: ignore[arg-type]
    losses: list[float] = []
    skips: list[int] = []

    def seen(attempt: Any) -> None:
        losses.append(float(attempt.loss))
        skips.append(len(attempt.skipped))

    state.advance(STEPS // 2, seen)
    half = folder / f"{name}-{ranks.world if ranks else 1}-{ranks.shard if ranks else False}"
    sha = state.save(half)
    fields = state.fields()
    state.advance(None, seen)
    seen_last = state.evaluate("valid")
    again = Training.load(half, case.task(), sha=sha, **given)  # type: ignore[arg-type]
    loaded = again.fields()
    again.advance()
    end = state.fields()
    return {
        "weights": {n: whole(p).flatten().tolist() for n, p in state.model.state_dict().items()},
        "losses": [str(one) for one in losses],
        "skips": skips,
        "step": state.step,
        "valid": [*seen_last],
        "fields": end,
        "lost": [key for key in fields if loaded[key] != fields[key]],
        "resumed": [key for key, text in again.fields().items() if end[key] != text],
        "read": {key: text for key, text in loaded.items() if "generator" not in key},
    }


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def resized(name: str, ranks: Ranks, folder: Path, source: str) -> dict[str, str]:
    """The state that others saved, as it is here."""
    again = Training.load(folder / source, CASES[name].task(), ranks=ranks)
    return {key: text for key, text in again.fields().items() if "generator" not in key}


def drifted(ranks: Ranks) -> None:
    state = Training(task(loss=drifting), recipe(), 3, 1, ranks=ranks)
    check_one_state(state.model, [state.optimizer], ranks)
    state.advance(2)
    check_one_state(state.model, [state.optimizer], ranks)


def as_rank(rank: int, size: int, port: int, folder: Path) -> None:
    """One rank, all its trials: first with whole weights, then with sharded ones."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(shard=True, patience=60) as sharded:
        ranks = {True: sharded, False: Ranks(rank, size, False, 60, sharded.control)}
        notes: dict[str, Any] = {}
        for name, shard in labels(size):
            notes[f"{name} {shard}"] = tried(lambda n=name, s=shard: found(n, ranks[s], folder))  # type: ignore[misc]
        for name, make in REFUSED.items():
            notes[name] = tried(lambda m=make: m(ranks))  # type: ignore[misc]
        notes["drifting"] = tried(lambda: drifted(ranks[False]))
        for source in ("adamw-1-False", "adamw-2-True", "adamw-2-False"):
            notes[f"resized {source}"] = tried(
                lambda at=source: resized("adamw", sharded, folder, at)  # type: ignore[misc]
            )
        (folder / f"{size}-{rank}.json").write_text(json.dumps(notes))


def tried(trial: Callable[[], Any]) -> Any:
    try:
        return trial()
    except (ds.BadInput, Drifted) as error:
        return {"refused": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}


def forked(size: int, folder: Path) -> list[int]:
    """So many ranks, until all have ended; how they did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                as_rank(rank, size, port, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)  # gloo's threads may abort an ordinary exit
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    training.trained = teacher  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")
    alone = {name: tried(lambda n=name: found(n, None, place)) for name in CASES}  # type: ignore[misc]
    alone["one item"] = tried(lambda: Training(task(model=Normed), thirds()).advance())
    (place / "1-0.json").write_text(json.dumps(alone))
    ends = {size: forked(size, place) for size in SIZES}
    (place / "ends.json").write_text(json.dumps(ends))
