"""Breaks the loading of samples, many times, and demands the batches of the training that nothing broke.

    python tests/train/feeding.py COUNT SEED FOLDER

Every case draws its data, its workers (0, 1 or 2) and one fault: a worker or the whole process killed at a
random instant, a worker that dies at a sample, a sample that raises, other data on resume. A training goes on
from the state it saved after every step; its batches, with their augmentation, and its own random numbers
must then be those of the straight one. Prints one line of JSON: what was done, and what was found wrong.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from downslope.errors import BadInput
from downslope.train.batches import Batches, BatchLost
from downslope.train.random import Generators, seed_all
from downslope.train.sampler import Sampler
from downslope.train.seeded import Seeded

EPOCHS, LIMIT = 2, 90
FAULTS = ("worker killed", "worker dies at a sample", "process killed", "sample raises", "data changed")


class Case(NamedTuple):
    """What is loaded, and what happens to it: the fault waits for `sample`, or for a time, `delay`."""

    fault: str
    samples: int
    batch_size: int
    seed: int
    workers: int
    persistent: bool
    again: bool
    sample: int
    delay: float
    change: str

    @classmethod
    def drawn(cls, number: int, seed: int) -> "Case":
        draw = random.Random(f"{seed} {number}")
        fault = FAULTS[number % len(FAULTS)]
        samples, batch_size = draw.randint(8, 60), draw.randint(1, 8)
        workers = draw.choice((1, 2) if "worker" in fault else (0, 1, 2))
        drawn_in_an_epoch = samples // batch_size * batch_size
        place = draw.randrange(drawn_in_an_epoch * EPOCHS)
        change = draw.choice(("samples", "data", "seed", "shuffle"))
        persistent, again = workers > 0 and draw.random() < 0.5, draw.random() < 0.5
        start, delay = draw.randrange(2**32 - 1), draw.random()
        return cls(fault, samples, batch_size, start, workers, persistent, again, place, delay, change)


class Noisy(Dataset[Any]):
    """Samples with numbers from all three generators; `trap(epoch, index)` may go off when one is read."""

    def __init__(self, samples: int, trap: Callable[[int, int], None] | None = None) -> None:
        self.samples, self.trap = samples, trap

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: Any) -> tuple[int, float]:
        if self.trap:
            self.trap(index.epoch, int(index))
        drawn = torch.rand((), dtype=torch.float64)
        return int(index), random.random() + float(np.random.rand()) + float(drawn)


def loader(case: Case, dataset: Dataset[Any], **changed: Any) -> Batches:
    options = {"samples": case.samples, "seed": case.seed, **changed}
    sampler = Sampler(batch_size=case.batch_size, **options)
    return Batches(
        DataLoader(
            Seeded(dataset),
            batch_sampler=sampler,
            num_workers=case.workers,
            persistent_workers=case.persistent,
        )
    )


def train(batches: Batches, state: Path) -> None:
    """Two epochs, from the saved state if there is one, which is saved after every step."""
    log: list[Any] = []
    if state.exists():
        saved = json.loads(state.read_text())
        batches.load_state_dict(saved["batches"])
        Generators.from_data(saved["generators"]).restore()
        log = saved["log"]
    while batches.epoch < EPOCHS:
        for indices, values in batches:
            dropped = float(torch.rand((), dtype=torch.float64))
            log.append([batches.epoch, indices.tolist(), values.tolist(), dropped])
            found = {"batches": batches.state_dict(), "generators": Generators.now().data(), "log": log}
            state.with_suffix(".new").write_text(json.dumps(found))
            state.with_suffix(".new").rename(state)


def straight(case: Case, state: Path) -> list[Any]:
    seed_all(case.seed)
    train(loader(case._replace(workers=0, persistent=False), Noisy(case.samples)), state)
    found: list[Any] = json.loads(state.read_text())["log"]
    return found


def once(case: Case, folder: Path, act: Callable[[], None]) -> Callable[[int, int], None]:
    """A trap that goes off once in the life of a case, at its sample."""
    drawn = [index for epoch in range(EPOCHS) for index in at(case, epoch)]
    epoch, target = case.sample // (len(drawn) // EPOCHS), drawn[case.sample]

    def trap(at_epoch: int, index: int) -> None:
        if (at_epoch, index) == (epoch, target):
            with suppress(FileExistsError):
                (folder / "sprung").touch(exist_ok=False)
                act()

    return trap


def at(case: Case, epoch: int) -> list[int]:
    sampler = Sampler(case.samples, case.batch_size, case.seed)
    sampler.seek(epoch)
    return [int(index) for batch in sampler for index in batch]


def wait_for(state: Path, delay: float) -> None:
    """Until a training has begun, and then some."""
    began = time.monotonic()
    while not state.exists() and time.monotonic() - began < 20:
        time.sleep(0.001)
    time.sleep(delay * 0.2)


def kill_a_worker(case: Case, state: Path) -> None:
    wait_for(state, case.delay)
    workers = multiprocessing.active_children()
    if workers:
        os.kill(workers[case.sample % len(workers)].pid or 0, signal.SIGKILL)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(epoch: int, index: int) -> None:
    time.sleep(0.004)  # so that there is work to be killed in


def fail() -> None:
    raise OSError("the image is broken")


def broken(case: Case, folder: Path) -> list[str]:
    """Train until a fault strikes, judge how it was told, and go on from what was saved. What was wrong."""
    state, told = folder / "state.json", []
    traps = {"worker dies at a sample": die, "sample raises": fail}
    trap = once(case, folder, traps[case.fault]) if case.fault in traps else linger
    if case.fault == "worker killed":
        threading.Thread(target=kill_a_worker, args=(case, state), daemon=True).start()
    seed_all(case.seed)
    batches, lost = loader(case, Noisy(case.samples, trap)), False
    for _ in range(3):
        try:
            train(batches, state)
            break
        except BatchLost as error:
            told += wrong_words(case, error, batches) if not lost else [f"told again: {error}"]
            lost = True
        except RuntimeError as error:  # torch raises in whatever the process does when a worker dies
            if "DataLoader worker" not in str(error) or lost:
                raise
        (folder / "felt").touch()
        if not (case.again and state.exists()):
            batches = loader(case, Noisy(case.samples, trap))
            seed_all(case.seed)
    return told


def wrong_words(case: Case, error: BatchLost, batches: Batches) -> list[str]:
    """An error must say which batch of which epoch it is about, and which sample raised."""
    told = [] if f"batch {batches.position} of epoch {batches.epoch}" in str(error) else [f"unnamed: {error}"]
    if case.fault == "sample raises":
        index = [i for epoch in range(EPOCHS) for i in at(case, epoch)][case.sample]
        words = f"sample {index} of epoch {batches.epoch} raised OSError: the image is broken"
        told += [] if words in str(error) else [f"not {words!r}: {error}"]
    elif "a worker died" not in str(error):
        told.append(f"no word of a worker: {error}")
    return told


def changed(case: Case, folder: Path) -> list[str]:
    """Resume with other data or another order: it must be refused by name, and nothing be changed."""
    (folder / "felt").touch()
    batches = loader(case, Noisy(case.samples))
    for _ in range(1 + case.sample % len(batches)):
        next(iter(batches))
    state = json.loads(json.dumps(batches.state_dict()))
    other = {"samples": case.samples + 1, "data": "other", "seed": case.seed + 1, "shuffle": False}
    count = case.samples + (case.change == "samples")
    resumed = loader(case, Noisy(count), **{case.change: other[case.change]})
    before = resumed.state_dict()
    try:
        resumed.load_state_dict(state)
    except BadInput as error:
        words = f"{case.change} {state[case.change]!r} then and {other[case.change]!r} now"
        told = [] if words in str(error) else [f"not {words!r}: {error}"]
        return told + ([] if resumed.state_dict() == before else ["a refused state changed the place"])
    return [f"another {case.change} was taken"]


def inside(case: Case, folder: Path) -> None:
    """One case in a process of its own, which ends with 0 and a report, or is killed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT)
    warnings.simplefilter("ignore")  # more workers than cores
    folder.mkdir(exist_ok=True)
    if case.fault == "data changed":
        told = changed(case, folder)
    else:
        told = broken(case, folder)
        expected = straight(case, folder / "straight.json")
        if json.loads((folder / "state.json").read_text())["log"] != expected:
            told.append("the batches differ from the straight ones")
    (folder / "report.json").write_text(json.dumps(told))


def forked(case: Case, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    try:
        inside(case, folder)
    except BaseException:
        (folder / "report.json").write_text(json.dumps([traceback.format_exc()]))
    os._exit(0)


def reaped(child: int) -> int:
    """How a case ended; its workers end with it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return code


def judged(case: Case, folder: Path) -> list[str]:
    child = forked(case, folder)
    if case.fault == "process killed":
        wait_for(folder / "state.json", case.delay)
        os.kill(child, signal.SIGKILL)
        if reaped(child):
            (folder / "felt").touch()
        child = forked(case, folder)
    if code := reaped(child):
        return ["hung" if code == -signal.SIGALRM else f"ended with {code}"]
    found: list[str] = json.loads((folder / "report.json").read_text())
    return found


def main(count: int, seed: int, folder: Path) -> dict[str, Any]:
    began, felt, wrong = time.monotonic(), Counter[str](), []
    for number in range(count):
        case, place = Case.drawn(number, seed), folder / f"case-{number}"
        place.mkdir()
        if found := judged(case, place):
            wrong.append({"case": number, **case._asdict(), "found": found})
        felt[case.fault] += (place / "felt").exists()
    return {"cases": count, "felt": felt, "seconds": time.monotonic() - began, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))) + "\n")
