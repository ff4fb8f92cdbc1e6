"""Speed of the loop and of saving: ours against what one writes by hand, in turn, on one machine.

    python benchmarks/loop.py [--blocks 30] [--steps 20] [--json]

The plain loop has the same model, batches, loss and schedule, torch's fused AdamW, and reads its loss every
100 updates; ours has its guard and its journal on. Both train in turn, block after block; a ratio is that of
two blocks side by side, and what is printed is their median with the quartiles. Then a state of 85 million
numbers is saved, and again with AdamW's state of it, in the background and in the foreground. Memory is the
peak of a process of its own that trains, and of one that resumes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import downslope as ds
from downslope.journal import Journal
from downslope.tasks import take
from downslope.train.loop import Loop
from downslope.train.order import order
from downslope.train.plan import Plan
from downslope.train.progress import Show
from downslope.train.store import Store

TASKS = ("digits-mlp", "digits-cnn", "chars-transformer")
SHAPES = [(768, 768 * 3), (768, 768), (768, 768 * 4), (768 * 4, 768)] * 12  # 85 million, GPT-2's blocks


def recipe_of(task: ds.Task) -> ds.Recipe:
    """AdamW, as both run it, long enough never to end here."""
    rate = ds.cosine(1e-3, steps="100 %", warmup="5 %")
    return task.recipe.with_(steps=10**6, chain=ds.chain(ds.adamw(lr=rate)), strategies=[])


def plain(task: ds.Task, recipe: ds.Recipe) -> Callable[[int], None]:
    """The loop that one writes by hand."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = ds.cosine(1.0, steps=10**6, warmup=50_000)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    samples, size = len(task.train[0]), recipe.batch_size  # type: ignore[index]

    def batches() -> Iterator[Any]:
        for epoch in range(10**6):
            places = order(samples, 0, epoch)
            for start in range(0, samples - size + 1, size):
                yield take(task.train, places[start : start + size])

    source, seen = batches(), [0]
    model.train()

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = task.loss(model, next(source))
            loss.backward()
            optimizer.step()
            scheduler.step()
            seen[0] += 1
            if seen[0] % 100 == 0:
                float(loss.detach())

    return run


def ours(task: ds.Task, recipe: ds.Recipe, folder: Path) -> Callable[[int], None]:
    """The loop of `train`, journal and guard on."""
    plan = Plan.of(task, recipe, 0, 10**6, 10**6)
    state = ds.Training(task, recipe, 0)
    (folder / "ckpt").mkdir(parents=True)
    store = Store(folder / "ckpt", Journal.open(folder / "journal.jsonl"))
    loop = Loop(state, plan, store, [], Show("", 1, "", quiet=True))
    return lambda steps: loop._advance(state.step + steps)


def speed(name: str, blocks: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step of both, and the ratio."""
    task = ds.task(name)
    recipe = recipe_of(task)
    with tempfile.TemporaryDirectory() as folder:
        loops = [plain(task, recipe), ours(task, recipe, Path(folder, "run"))]
        times: list[list[float]] = [[], []]
        for block in range(blocks + 2):
            for place in (0, 1) if block % 2 else (1, 0):
                start = time.perf_counter()
                loops[place](steps)
                times[place].append((time.perf_counter() - start) / steps * 1e3)
    theirs, mine = (side[2:] for side in times)  # the first blocks compile and warm up
    ratios = sorted(b / a for a, b in zip(theirs, mine, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "task": name,
        "plain ms": round(statistics.median(theirs), 3),
        "ours ms": round(statistics.median(mine), 3),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


class Large(nn.Module):
    """85 million numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(*shape) * 0.02) for shape in SHAPES])

    def forward(self) -> Tensor:
        """Something that depends on all of them."""
        return sum((weight.square().mean() for weight in self.weights), start=torch.zeros(()))


def saving(with_optimizer: bool, times: int = 6) -> dict[str, Any]:
    """Seconds for which a save keeps the training waiting: behind its back, the first time apart, and not."""
    model = Large()
    optimizer = torch.optim.AdamW(model.parameters()) if with_optimizer else None
    if optimizer is not None:
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = ds.TrainState(model, optimizer)
    found: dict[str, Any] = {"numbers": 85 * (3 if with_optimizer else 1)}
    for background in (True, False):
        waits, ends = [], []
        with (
            tempfile.TemporaryDirectory() as folder,
            ds.Checkpoints(folder, background=background) as checkpoints,
        ):
            for _ in range(times):
                state.step += 1
                start = time.perf_counter()
                checkpoints.save(state)
                waits.append(time.perf_counter() - start)
                checkpoints._store.settle(wait=True)
                ends.append(time.perf_counter() - start)
        kind = "background" if background else "foreground"
        found[kind] = round(statistics.median(waits[1:]), 3)
        found[f"{kind}, first"] = round(waits[0], 3)
        found[f"{kind}, on disk"] = round(statistics.median(ends[1:]), 3)
    return found


def peak(role: str, folder: str) -> None:
    """Train a little and save, or resume and train on; print the peak of this process's memory, in MB."""
    model = Large()
    optimizer = torch.optim.AdamW(model.parameters())
    state = ds.TrainState(model, optimizer)
    if role == "resume":
        state.load(f"{folder}/c")
    for _ in range(2):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # before saving: that is measured apart
    if role == "train":
        state.save(f"{folder}/c")


def memory() -> dict[str, int]:
    """Peaks of a process that trains and of one that resumes, in MB."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for role in ("train", "resume"):
            command = [sys.executable, __file__, "--peak", role, folder]
            found[f"{role} MB"] = int(
                subprocess.run(command, capture_output=True, check=True, text=True).stdout
            )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.peak:
        peak(*asked.peak)
        return
    found = {
        "loops": [speed(name, asked.blocks, asked.steps) for name in asked.tasks],
        "saving": [saving(False), saving(True)],
        "memory": memory(),
    }
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    print("| task | plain, ms a step | ours, ms | ratio | quartiles |\n|---|--:|--:|--:|---|")
    for row in found["loops"]:
        low, high = row["quartiles"]
        print(f"| {row['task']} | {row['plain ms']} | {row['ours ms']} | {row['ratio']} | {low} to {high} |")
    print("\n| million numbers | background, s | the first time | on disk after | foreground |")
    print("|--:|--:|--:|--:|--:|")
    kinds = ("background", "background, first", "background, on disk", "foreground")
    for row in found["saving"]:
        print(f"| {row['numbers']} | {' | '.join(str(row[kind]) for kind in kinds)} |")
    peaks = found["memory"]
    print(f"\nPeak memory: {peaks['train MB']} MB training, {peaks['resume MB']} MB resuming.")


if __name__ == "__main__":
    main()
