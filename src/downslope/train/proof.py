"""The proof of resume: straight on against stopped, saved, and gone on with in a fresh process, bit for bit.

What a training depends on must be in its checkpoint. The proof finds what is not, and looks for the culprit
among the places where state likes to hide.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downslope.errors import BadInput, DownslopeError
from downslope.parallel import Ranks, joined, leave
from downslope.recipe import Recipe
from downslope.tasks import Entry, Task, made_by, reopen
from downslope.tasks import task as find
from downslope.train.checkpoint import dump
from downslope.train.precision import Arithmetic
from downslope.train.subject import Subject, subject_of
from downslope.train.surroundings import kept


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
    nproc: int = 1

    @property
    def first(self) -> str | None:
        """The first thing that differs; None if nothing does."""
        return self.differences[0] if self.differences else None

    def data(self) -> dict[str, Any]:
        """As plain data."""
        about = {"exact": bool(self), "steps": self.steps, "half": self.half, "nproc": self.nproc}
        return {**about, "differences": list(self.differences), "hint": self.hint}

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        ranks = f" on {self.nproc} ranks" if self.nproc > 1 else ""
        fresh = "a fresh process" if self.nproc == 1 else "fresh processes"
        course = f"{self.steps} steps straight{ranks}, and {self.half} saved, loaded by {fresh} and gone on"
        if self:
            return f"Resuming is exact: {course}, are equal bit for bit."
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        return f"Resuming is not exact: {course}, first differ in {self.first}{more}. {self.hint}"

    __repr__ = __str__  # what pytest shows of `assert verify_resume(...)`


def verify_resume(
    target: Task | str,
    recipe: Recipe | None = None,
    steps: int = 20,
    seed: int = 0,
    timeout: float = 600,
    *,
    nproc: int = 1,
    shard: bool = False,
    precision: str | None = None,
    compile: bool = False,
) -> Proof:
    """Train `steps` straight, and again with a save, a fresh process and a load half way; compare every bit.

    `target`: a task, or path/to/file.py:function of your own. That returns a TrainState and a function that
    makes one update; or a transformers.Trainer; or a lightning.Trainer with what its fit takes; or an object
    with advance(steps), save(folder), load(folder), fields().
    With `nproc`, that many ranks train a task together (`shard`: FSDP2); `precision` and `compile` are those
    of `train`. `timeout`: seconds for a process. Raises BadInput for what a fresh process cannot find,
    DownslopeError if one fails. Not for: a whole training, of which some steps show as much.

    In a test: `assert downslope.verify_resume("train.py:make_run")`.
    """
    if type(steps) is not int or steps < 2:
        raise BadInput(f"steps must be a whole number from 2, got {steps!r}.")
    how = Arithmetic(precision, compile)
    made, entry = _made(target)
    if nproc != 1 and not isinstance(made, Task):
        raise BadInput("the ranks of a loop of your own are its own matter: nproc is for tasks.")
    half = steps // 2
    about = {
        "entry": entry.data(),
        "recipe": recipe.text() if recipe is not None else None,
        "seed": seed,
        "loaded": half,
        "steps": steps - half,
        "shard": shard,
        "arithmetic": how.data(),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place, "half"))
        if nproc == 1:
            with kept(), closing(subject_of(made, entry, recipe, seed, arithmetic=how)) as subject:
                straight = _straight(subject, half, steps - half, folder)
        else:
            straight = _fresh(Path(place), {**about, "half": half, "folder": folder}, timeout, nproc)
        resumed = _fresh(Path(place), {**about, "folder": folder}, timeout, nproc)
        differences = _differences(straight, resumed)
        again = _fresh(Path(place), {**about, "folder": folder}, timeout, nproc) if differences else resumed
    return Proof(steps, half, differences, _hint(differences, straight, resumed, again), nproc)


def answer(request: str) -> None:
    """What a fresh process does, or each of several ranks: train, and write down what it saw."""
    path = Path(request)
    asked = json.loads(path.read_bytes())
    with joined(asked["shard"]) as ranks:
        try:
            found = _answer(asked, ranks)
        except DownslopeError as error:
            found = {"error": str(error)}
        told = path.with_name("answer.json")
        if ranks.leads or ("error" in found and not told.exists()):  # the first error is the cause
            told.write_bytes(dump(found))
        if ranks.together and "error" in found:
            leave(0)  # the others must not wait for this one
    if ranks.together:
        leave(0)


def _answer(asked: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    entry = Entry.from_data(asked["entry"])
    made = made_by(entry.address, entry.seed, entry.sha256)[0] if entry.own else None
    if made is None or isinstance(made, Task):
        made = reopen(entry)
    recipe = Recipe.parse(asked["recipe"]) if asked["recipe"] is not None else None
    how = Arithmetic.of(asked["arithmetic"])
    with closing(subject_of(made, entry, recipe, asked["seed"], ranks, how)) as subject:
        if "half" in asked:
            return _straight(subject, asked["half"], asked["steps"], asked["folder"])
        subject.load(asked["folder"], asked["loaded"])
        return _course(subject, asked["steps"], {})


def _made(target: Task | str) -> tuple[object, Entry]:
    """What the target is, and its address."""
    if isinstance(target, Task):
        if target.entry is None:
            raise BadInput(
                "a fresh process must find the task: give a built-in name or path/to/file.py:function, not a "
                "Task made in this program."
            )
        return target, target.entry
    if not Entry(target).own and ".py" not in target:
        made = find(target)
        assert made.entry is not None
        return made, made.entry
    loop, entry = made_by(target)
    return (find(target) if isinstance(loop, Task) else loop), entry


def _straight(subject: Subject, half: int, rest: int, folder: str) -> dict[str, Any]:
    """Half way, saved, and on; with what the first half changed outside of the state."""
    before, losses = dict(subject.hidden()), dict[str, str]()
    subject.advance(half, losses)
    subject.save(folder)
    found = _course(subject, rest, {})
    moved = [name for name in _unequal(before, found["hidden"]) if name in before]
    return {**found, "moved": moved, "causes": list(subject.causes())}


def _course(subject: Subject, steps: int, losses: dict[str, str]) -> dict[str, Any]:
    """What can be seen of a training in the next steps, as texts: at both ends, and each loss between."""
    start, hidden = subject.fields(), dict(subject.hidden())
    subject.advance(steps, losses)
    return {"start": start, "hidden": hidden, "losses": losses, "end": subject.fields()}


def _fresh(place: Path, request: Mapping[str, Any], timeout: float, nproc: int) -> dict[str, Any]:
    (place / "request.json").write_bytes(dump(request))
    (place / "answer.json").unlink(missing_ok=True)
    source = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, paths] if paths else [source])}
    try:
        done = subprocess.run(
            _command(str(place / "request.json"), nproc),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DownslopeError(f"the fresh process was not done within {timeout:g} s.") from None
    if done.returncode:
        raise DownslopeError(f"the fresh process ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads((place / "answer.json").read_bytes())
    if "error" in found:
        raise DownslopeError(f"the fresh process could not go on: {found['error']}")
    return found


def _command(request: str, nproc: int) -> Sequence[str]:
    """A fresh process, or torchrun's with as many ranks on this machine."""
    python = [sys.executable, "-P"]
    code = "import sys; from downslope.train.proof import answer; answer(sys.argv[1])"
    if nproc == 1:
        return [*python, "-c", code, request]
    options = ["--nnodes=1", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
    options += ["--rdzv-endpoint=127.0.0.1:0", "--max-restarts=0", "--no-python"]
    return [*python, "-m", "torch.distributed.run", *options, *python, "-c", code, request]


def _differences(straight: Mapping[str, Any], resumed: Mapping[str, Any]) -> tuple[str, ...]:
    lost = [f"{name} when loaded" for name in _unequal(straight["start"], resumed["start"])]
    later = _unequal(straight["losses"], resumed["losses"])
    later += [f"{name} at the end" for name in _unequal(straight["end"], resumed["end"])]
    return (*lost, *later)


def _hint(
    differences: Sequence[str],
    straight: Mapping[str, Any],
    resumed: Mapping[str, Any],
    again: Mapping[str, Any],
) -> str:
    """What is to be done; `again` is a second process that went on from the same checkpoint."""
    if not differences:
        return ""
    if differences[0].endswith("data when loaded"):
        return "The task makes other data each time it is called: seed what it draws."
    unequal = _unequal(straight["hidden"], resumed["hidden"])
    culprits = [name for name in unequal if name in straight["moved"]]
    if culprits:
        was, now = (side["hidden"].get(culprits[0], "absent") for side in (straight, resumed))
        return (
            f"{culprits[0]} was {was} when saved and is {now} when loaded: no checkpoint holds it. Make it a "
            "buffer of the model, add it to the TrainState, or draw from the global generators of torch, "
            "numpy or random."
        )
    causes: list[tuple[str, str]] = straight["causes"]
    known = [told for begins, told in causes if begins and differences[0].startswith(begins)]
    likely = [told for begins, told in causes if not begins]
    lost = differences[0].endswith(" when loaded") and not differences[0].startswith("generator")
    if known or (likely and not lost):
        return (known + likely)[0]
    if differences[0].endswith(" when loaded"):
        return "It is saved, but something else stands there after loading."
    if _differences(resumed, again):
        return (
            "Two processes that go on from the same checkpoint differ too: look for a generator of your own, "
            "a shuffle or a worker's augmentation that nobody seeded, the clock, the order of a set, or an "
            "operation that is not deterministic."
        )
    return (
        "Every process that goes on from the checkpoint does the same, but not what the first one did: look "
        "for a counter, a cache or an iterator that is not in the state."
    )


def _unequal(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
