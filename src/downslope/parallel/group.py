"""Joining the ranks that torchrun, or `downslope train --nproc`, has started, and leaving them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from downslope.errors import BadInput
from downslope.parallel.child import PARENT, die_with_parent
from downslope.parallel.ranks import ALONE, Lost, Ranks, lost
from downslope.parallel.watchdog import PATIENCE

VERDICTS = {1: 65, 2: 66}
"""The exit code of a rank that ended as every new start of it would, by what it means: the user's code or the
input is wrong. Any other code, such as the 1 of a crash, means that starting again may help.
"""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Place(NamedTuple):
    """Which process of how many this is, over all machines (`rank`) and on this one (`local`)."""

    rank: int
    world: int
    local: int


def place() -> Place:
    """This process as torchrun's variables RANK, WORLD_SIZE and LOCAL_RANK say; alone without them.

    BadInput for numbers that make no sense together.
    """
    told = os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_RANK", "0")
    if told[0] is None or told[1] is None:
        return Place(0, 1, 0)
    try:
        rank, world, local = (int(number) for number in told if number is not None)
    except ValueError:
        rank, world, local = -1, 0, 0
    if not 0 <= rank < world:
        raise BadInput(f"RANK={told[0]} and WORLD_SIZE={told[1]} in the environment are no rank of a world.")
    return Place(rank, world, local)


@contextmanager
def joined(shard: bool = False, patience: float = PATIENCE) -> Iterator[Ranks]:
    """The ranks of this process, joined on entry and, if nothing was raised, left together.

    A process group that is there already is used and stays. On a GPU each rank takes the one with its local
    number, and NCCL; numbers on the CPU go by gloo. Only loopback is used where the address is one.
    `patience`: seconds in which the others must answer. Raises Lost.
    """
    here = place()
    mine = not (dist.is_available() and dist.is_initialized())
    if here.world == 1 and mine:
        yield ALONE
        return
    if mine:
        _join(here, patience)
    try:
        yield _ranks(shard, patience)
        if mine:
            with lost():
                dist.barrier()
    except BaseException as error:
        # Under our agent a rank that fails ends at once, and the others must not see it go before the agent
        # can see why: the first exit is taken for the cause.
        if mine and (isinstance(error, Lost) or PARENT not in os.environ):
            _part()
        raise
    if mine:
        _part()


def _part() -> None:
    with suppress(Exception):  # who lost the others cannot part from them
        dist.destroy_process_group()


def verdict(said: str, code: int) -> int:
    """Say why this rank ends, and give its exit code: one of VERDICTS where a new start would change nothing.

    Under `supervise` torch's agent is told, so that what all ranks say is said once.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report and PARENT in os.environ:
        about = {"message": said, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": about}))
    else:
        sys.stderr.write(f"rank {place().rank}: {said}\n")
    return VERDICTS.get(code, code)


def leave(code: int) -> NoReturn:
    """End this process at once with an exit code, everything it said flushed: gloo's threads can abort an
    ordinary exit, after all is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(here: Place, patience: float) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # it was started by torchrun
        die_with_parent()
    if os.environ.get("MASTER_ADDR") in _LOOPBACK:
        for name in _INTERFACES:
            os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
    backend = "gloo"
    if torch.cuda.is_available():
        if here.local >= torch.cuda.device_count():
            raise BadInput(
                f"rank {here.rank} has no GPU of its own: this machine has {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(here.local)
        backend = "cpu:gloo,cuda:nccl"
    with lost():
        # Longer than the watchdog of a rank waits: that one writes down where it hangs.
        limit = timedelta(seconds=1.25 * patience)
        dist.init_process_group(backend, rank=here.rank, world_size=here.world, timeout=limit)


def _ranks(shard: bool, patience: float) -> Ranks:
    rank, world = dist.get_rank(), dist.get_world_size()
    with lost():
        speaks = "gloo" in str(dist.get_backend_config())
        control = dist.group.WORLD if speaks else dist.new_group(backend="gloo")
        mesh = None
        if shard and world > 1:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            mesh = init_device_mesh(device, (world,))
    return Ranks(rank, world, shard and world > 1, patience, control, mesh)
