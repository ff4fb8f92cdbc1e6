"""Memory of the ranks that save and load one state in parts (FSDP2), beside the size of the whole.

    python benchmarks/sharded.py [--ranks 4] [--blocks 40] [--json]

Each rank makes its part of a model of blocks of a million float32 numbers, makes an update by adamw, and
saves; then as many new processes, half as many, and one alone load what was saved. What a rank had at most
(`ru_maxrss`) is told before the save and after it; of one that loads, before the load, after it, and after
an update: what training takes too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import downslope as ds
from downslope.parallel import Ranks, joined
from downslope.train import Training

WIDTH = 1024  # of a block: WIDTH² numbers, 4 MiB


class Blocks(nn.Module):
    """So many square layers, which FSDP2 gathers one at a time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    found: Tensor = (model(inputs) - targets).square().mean()
    return found


def peak() -> float:
    """The most memory that this process had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def task(blocks: int) -> ds.Task:
    data = (torch.zeros(8, WIDTH), torch.ones(8, WIDTH))
    return ds.Task(model=lambda: Blocks(blocks), loss=loss, train=data, valid=data, name="blocks")


def saving(ranks: Ranks, blocks: int, folder: Path) -> dict[str, float]:
    recipe = ds.Recipe(ds.chain(ds.adamw(lr=1e-3)), steps=3, batch_size=8)
    state = Training(task(blocks), recipe, 0, 1, ranks=ranks)
    state.advance(1)
    before, began = peak(), time.monotonic()
    if ranks.leads or not hasattr(state, "gather"):
        state.save(folder)
    else:  # until this benchmark was written, all that lay elsewhere was gathered
        state.gather()
    return {"before": before, "after": peak(), "seconds": time.monotonic() - began}


def loading(ranks: Ranks, blocks: int, folder: Path) -> dict[str, float]:
    made, before, began = task(blocks), peak(), time.monotonic()
    state = Training.load(folder, made, ranks=ranks)
    seconds, after = time.monotonic() - began, peak()
    state.advance(2)
    return {"before": before, "after": after, "trained": peak(), "seconds": seconds}


def on(count: int, act: Callable[[Ranks], dict[str, float]]) -> list[dict[str, float]]:
    """What so many ranks, forked from here, found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(count):
        begin, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            try:
                with joined(shard=True) as ranks, os.fdopen(end, "w") as pipe:
                    pipe.write(json.dumps(act(ranks)))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # gloo's threads may abort an ordinary exit
        os.close(end)
        children.append((child, begin))
    found = []
    for child, begin in children:
        with os.fdopen(begin) as pipe:
            found.append(json.loads(pipe.read()))
        os.waitpid(child, 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mib = 3 * asked.blocks * WIDTH**2 * 4 / 2**20  # weights, and adamw's two numbers for each
    with tempfile.TemporaryDirectory() as place:
        on(asked.ranks, lambda ranks: saving(ranks, 1, Path(place, "warm")))  # kernels are compiled once
        folder = Path(place, "saved")
        found = {f"saved by {asked.ranks}": on(asked.ranks, lambda r: saving(r, asked.blocks, folder))}
        for count in dict.fromkeys((asked.ranks, max(1, asked.ranks // 2), 1)):
            found[f"loaded by {count}"] = on(count, lambda r: loading(r, asked.blocks, folder))
    if asked.json:
        sys.stdout.write(json.dumps({"state": mib, "ranks": found}) + "\n")
        return
    sys.stdout.write(f"The whole state has {mib:.0f} MiB, a {asked.ranks}th of it {mib / asked.ranks:.0f}.\n")
    for what, ranks in found.items():
        for rank, seen in enumerate(ranks):
            numbers = ", ".join(f"{key} {value:.0f} MiB" for key, value in seen.items() if key != "seconds")
            sys.stdout.write(f"{what}, rank {rank}: {numbers}; {seen['seconds']:.1f} s\n")


if __name__ == "__main__":
    main()
