"""The proof of resume: straight on against stopped, saved, and gone on with in a fresh process, bit for bit.

What a training depends on must be in its checkpoint. The proof finds what is not, and looks for the culprit
among the places where state likes to hide: plain attributes of modules and data, globals of the task's file.
"""

import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downslope.errors import BadInput, DownslopeError
from downslope.recipe import Recipe
from downslope.tasks import Entry, Task, reopen
from downslope.tasks import task as find
from downslope.train.checkpoint import dump
from downslope.train.fingerprint import digest, fingerprint
from downslope.train.plan import about_data
from downslope.train.training import Attempt, Training

_MODULE = frozenset(vars(nn.Module()))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


@dataclass(frozen=True)
class Proof:
    """What `verify_resume` found: true if everything was bit-equal.

    `differences` names what was not, in the order of time: what was lost by saving and loading after `half`
    of the `steps`, then the losses, then the end. `hint` says what to do about it.
    """

    steps: int
    half: int
    differences: tuple[str, ...] = ()
    hint: str = ""

    @property
    def first(self) -> str | None:
        """The first thing that differs; None if nothing does."""
        return self.differences[0] if self.differences else None

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        course = f"{self.steps} steps straight, and {self.half} saved, loaded by a fresh process and gone on"
        if self:
            return f"Resuming is exact: {course}, are equal bit for bit."
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        return f"Resuming is not exact: {course}, first differ in {self.first}{more}. {self.hint}"


def verify_resume(
    task: Task | str, recipe: Recipe | None = None, steps: int = 20, seed: int = 0, timeout: float = 600
) -> Proof:
    """Train `steps` straight, and again with a save, a fresh process and a load half way; compare every bit.

    The task must have an address, a built-in name or path/to/file.py:function, by which a fresh process finds
    it. `timeout`: seconds for that process. Raises BadInput without an address, DownslopeError if it fails.
    """
    task = find(task) if isinstance(task, str) else task
    if task.entry is None:
        raise BadInput(
            "a fresh process must find the task: give a built-in name or path/to/file.py:function, not a "
            "Task made in this program."
        )
    if type(steps) is not int or steps < 2:
        raise BadInput(f"steps must be a whole number from 2, got {steps!r}.")
    state, half = Training(task, recipe, seed), steps // 2
    hidden = dict(_hidden(state))
    state.advance(half)
    with tempfile.TemporaryDirectory() as place:
        sha = state.save(Path(place, "half"))
        request = {"entry": task.entry.data(), "folder": str(Path(place, "half")), "sha": sha, "until": steps}
        straight = _course(state, steps)
        resumed = _fresh(Path(place), request, timeout)
    moved = _unequal(hidden, straight["hidden"])
    return Proof(steps, half, *_compare(straight, resumed, moved))


def answer(request: str) -> None:
    """What the fresh process does: load, go on, and write down beside the request what it saw."""
    path = Path(request)
    asked = json.loads(path.read_bytes())
    try:
        task = reopen(Entry.from_data(asked["entry"]))
        found = _course(Training.load(asked["folder"], task, sha=asked["sha"]), asked["until"])
    except DownslopeError as error:
        found = {"error": str(error)}
    path.with_name("answer.json").write_bytes(dump(found))


def _course(state: Training, until: int) -> dict[str, Any]:
    """What can be seen of a training from here to `until`, as texts: at both ends, and each loss between."""
    losses: dict[str, str] = {}

    def seen(attempt: Attempt) -> None:
        losses[f"the loss of batch {state.batches - 1} (step {attempt.step})"] = float(attempt.loss).hex()

    data = {f"the {part} data": repr(about) for part, about in about_data(state.task).items()}
    start = {**data, **state.fields()}
    hidden = dict(_hidden(state))
    state.advance(until, seen)
    return {"start": start, "hidden": hidden, "losses": losses, "end": state.fields()}


def _fresh(place: Path, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    (place / "request.json").write_bytes(dump(request))
    source = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, paths] if paths else [source])}
    code = "import sys; from downslope.train.proof import answer; answer(sys.argv[1])"
    command = [sys.executable, "-P", "-c", code, str(place / "request.json")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise DownslopeError(f"the fresh process was not done within {timeout:g} s.") from None
    if done.returncode:
        raise DownslopeError(f"the fresh process ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads((place / "answer.json").read_bytes())
    if "error" in found:
        raise DownslopeError(f"the fresh process could not go on: {found['error']}")
    return found


def _compare(
    straight: Mapping[str, Any], resumed: Mapping[str, Any], moved: list[str]
) -> tuple[tuple[str, ...], str]:
    """What differs and what to do; `moved` is what the training changed outside its own state."""
    lost = [f"{name} when loaded" for name in _unequal(straight["start"], resumed["start"])]
    later = _unequal(straight["losses"], resumed["losses"])
    later += [f"{name} at the end" for name in _unequal(straight["end"], resumed["end"])]
    differences = (*lost, *later)
    if not differences:
        return (), ""
    culprits = [name for name in _unequal(straight["hidden"], resumed["hidden"]) if name in moved]
    if differences[0].endswith("data when loaded"):
        hint = "The task makes other data each time it is called: seed what it draws."
    elif culprits:
        was, now = (side["hidden"].get(culprits[0], "absent") for side in (straight, resumed))
        hint = (
            f"{culprits[0]} was {was} when saved and is {now} when loaded: no checkpoint holds it. Make it a "
            "buffer of the model, or draw from the global generators of torch, numpy or random."
        )
    else:
        hint = (
            "Look for a generator of your own, a counter outside the buffers, the clock, the order of a set, "
            "or an operation that is not deterministic."
        )
    return differences, hint


def _unequal(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]


def _hidden(state: Training) -> Iterator[tuple[str, str]]:
    """(where, value) of what may change while training and is in no checkpoint."""
    task, model = state.task, state.model
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if name not in _MODULE}
        where = f"of {path or 'the model'}, a {type(module).__name__}"
        yield from ((f"attribute {name!r} {where}", text) for name, text in _texts(own))
    if not isinstance(task.train, tuple):
        own = getattr(task.train, "__dict__", {})
        yield from ((f"attribute {name!r} of the train data", text) for name, text in _texts(own))
    file = Path(task.entry.own[0]) if task.entry and task.entry.own else None
    if file and file.stem in sys.modules:
        own = vars(sys.modules[file.stem])
        yield from ((f"global {name!r} of {file.name}", text) for name, text in _texts(own))
    functions: list[Any] = [task.model, task.loss, *(player.loss for player in task.players.values())]
    for function in functions:
        if inspect.isfunction(function):
            own = dict(inspect.getclosurevars(function).nonlocals)
            yield from ((f"variable {name!r} of the task function", text) for name, text in _texts(own))


def _texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, bool | int | float) and not name.startswith("__"):
            yield name, repr(value)
        elif isinstance(value, Tensor):
            yield name, f"a tensor {fingerprint(value)[:8]}"
        elif isinstance(value, _GENERATORS):
            yield name, f"a generator at {_place(value)[:8]}"


def _place(generator: Any) -> str:
    """Where a generator stands."""
    if isinstance(generator, torch.Generator):
        return fingerprint(generator.get_state())
    if isinstance(generator, random.Random):
        return digest(repr(generator.getstate()).encode())
    state = generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else None
    return digest(repr(state or generator.bit_generator.state).encode())
