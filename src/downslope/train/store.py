"""The checkpoints of a training: written here or behind its back, acknowledged in its journal."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from downslope.errors import BadInput
from downslope.folder import RunFolder, check_name, disk
from downslope.journal import Event, Journal, read
from downslope.parallel import ALONE, Ranks
from downslope.train import checkpoint
from downslope.train.history import history, stands_at
from downslope.train.state import Resumed, Snapshot, TrainState, files_of

KEEP = 2
"""Checkpoints that are kept; an older one goes after a newer one has been read back and verified."""

_CHECKPOINT = re.compile(r"step-\d{9,}")


class Saved(Protocol):
    """What can be saved: a TrainState, or a Training."""

    @property
    def step(self) -> int:
        """Updates so far."""

    def save(self, folder: checkpoint.Folder) -> str:
        """Write a checkpoint and return the SHA-256 of its manifest."""

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """The state at this moment, in memory of its own."""


class Elsewhere:
    """The journal of a rank that leaves it to the first."""

    last = -1

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, /, sync: bool = True, **fields: Any) -> int:
        """Nothing."""
        return 0

    def extend(self, events: Iterable[tuple[str, Mapping[str, Any]]], sync: bool = True) -> int:
        """Nothing."""
        return 0

    def check(self) -> None:
        """Nothing."""


class _Writing(NamedTuple):
    """A checkpoint that is being written by `job`, after which `finish` gives its hash."""

    name: str
    step: int
    after: int
    job: Future[Any]
    finish: Callable[[], str]


class Store:
    """The checkpoints in `folder`, each acknowledged by an event of `journal` once it is on disk and was read
    back. With `background`, `save` copies the state and leaves the rest to a thread; what goes wrong there is
    raised by the next `settle`, which is to be called often. All `ranks` do the same: each writes what of the
    state is its own, the first acknowledges what all have written, and what fails on one is raised by all.

    The copy takes as much memory as the state, once, and the first takes longer than the others.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal | Elsewhere,
        background: bool = False,
        keep: int = KEEP,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.journal, self.keep, self.ranks = folder, journal, keep, ranks
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._copy: Snapshot | None = None
        self._writing: _Writing | None = None

    def save(self, state: Saved) -> None:
        """Save the state at its step. BadInput if the disk refuses: then, or after, at the next `settle`."""
        self.settle(wait=True)
        self.ranks.told(self.journal.check)
        name, after = f"step-{state.step:09d}", self.journal.last
        path = self.folder / name
        if self._pool is None:
            sha = state.save(path)
            checkpoint.verify(path, sha, self.ranks)
            self._acknowledge(name, state.step, after, sha)
            return
        shot = self._copy = state.snapshot(into=self._copy) if self.ranks.leads or self.ranks.shard else None
        about = {"step": state.step, "world": self.ranks.world}
        if shot is not None and not self.ranks.together:
            job: Future[Any] = self._pool.submit(_write, path, shot, about)
            finish = job.result
        else:  # only here, and not in the thread, may ranks talk
            draft = checkpoint.Draft(path, self.ranks)
            job = self._pool.submit(_write_mine, draft, shot)
            finish = partial(draft.finish, job.result, **about)
        self._writing = _Writing(name, state.step, after, job, finish)

    def settle(self, wait: bool = False) -> None:
        """Acknowledge what was written in the background, and raise what went wrong there."""
        writing = self._writing
        if writing is None:
            return
        done = writing.job.done()
        busy, failed = self.ranks.most(not done, done and writing.job.exception() is not None)
        if wait or failed or not busy:
            self._writing = None
            self._acknowledge(writing.name, writing.step, writing.after, writing.finish())

    def close(self) -> None:
        """Wait for what is being written."""
        try:
            self.settle(wait=True)
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def newest(self, past: Sequence[Event], load: Callable[[Path, str], Any]) -> tuple[Any, int, list[str]]:
        """What `load` makes of the newest checkpoint that is as it was saved; the "seq" that it stands at;
        and a sentence for each that is not. None, and the first event, if there is none.

        Whatever else lies in the folder goes, but for the damaged: they are set aside. Which checkpoint is
        tried is the first rank's to say: the others need not know what is `past`.
        """
        if not self.ranks.leads:
            return self._newest_told(load)
        saved = [event for event in past if event["kind"] == "checkpoint"]
        damaged: dict[str, str] = {}
        found: Any = None
        after: int = past[0]["seq"] if past else 0
        for event in reversed(saved):
            path = self.folder / check_name(event["name"])
            if not path.exists() and event not in saved[-self.keep :]:
                continue  # it has long been replaced by newer ones
            self.ranks.told(partial(dict, name=event["name"], sha=event["sha"]))
            try:
                found, after = load(path, event["sha"]), stands_at(event)
                break
            except checkpoint.Damaged as error:
                damaged[event["name"]] = str(error)
        kept = [event["name"] for event in saved if stands_at(event) <= after][-self.keep :]

        def end() -> dict[str, Any]:
            _tidy(self.folder, set(kept), damaged.keys())
            return {"after": after, "damaged": list(damaged.values())}

        self.ranks.told(end)
        return found, after, list(damaged.values())

    def _newest_told(self, load: Callable[[Path, str], Any]) -> tuple[Any, int, list[str]]:
        """The same on a rank that tries what the first one says."""
        found: Any = None
        while "name" in (said := self.ranks.told(dict[str, Any])):
            with suppress(checkpoint.Damaged):
                found = load(self.folder / said["name"], said["sha"])
        return found, said["after"], said["damaged"]

    def _acknowledge(self, name: str, step: int, after: int, sha: str) -> None:
        """Only what is acknowledged and verified may take the place of an older one."""
        self.ranks.told(lambda: self._acknowledge_here(name, step, after, sha))

    def _acknowledge_here(self, name: str, step: int, after: int, sha: str) -> None:
        try:
            self.journal.append("checkpoint", step=step, name=name, sha=sha, after=after)
        except BadInput:  # nobody vouches for it: the disk is full, or another process goes on with the run
            with suppress(BadInput):
                checkpoint.remove(self.folder / name)
            raise
        kept = sorted(path for path in self.folder.iterdir() if _CHECKPOINT.fullmatch(path.name))
        for path in kept[: -self.keep]:
            checkpoint.remove(path)


class Checkpoints:
    """The checkpoints of your own loop, in a folder that this process alone writes: the newest `keep` stay.

    A `save` survives kill -9 at any instant after it; with `background` it only copies the state, and the
    rest survives from the next `save`, `settle` or `close` on. `load` goes on from the newest that is as it
    was saved. BadInput if the folder is being written, or holds something else. Not for: keeping the best,
    since older ones go.

    >>> import tempfile
    >>> from torch import nn
    >>> state = TrainState(nn.Linear(2, 1))
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as kept:
    ...     first = kept.load(state)
    ...     state.step = 100
    ...     kept.save(state)
    ...     first, kept.load(state).step
    (None, 100)
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = KEEP, background: bool = False) -> None:
        if type(keep) is not int or keep < 1:
            raise BadInput(f"keep is how many checkpoints stay, a whole number from 1, got {keep!r}.")
        self._folder = RunFolder(folder)
        path = self._folder.path
        try:
            self._journal = Journal.open(path / "journal.jsonl")
        except BaseException:
            self._folder.close()
            raise
        with disk(f"write the folder {path}"):
            (path / "ckpt").mkdir(mode=0o700, exist_ok=True)
        self._store = Store(path / "ckpt", self._journal, background, keep)
        self.damaged: list[str] = []
        """A sentence for each checkpoint that the last `load` passed over."""

    def save(self, state: Saved) -> None:
        """Save a state at its step, once: BadInput if it was saved at that step, or the disk refuses."""
        self._store.save(state)

    def settle(self) -> None:
        """With `background`: raise what has gone wrong since. Costs nothing; call it at every step."""
        self._store.settle()

    def load(self, state: TrainState, *, strict: bool = True) -> Resumed | None:
        """Go on from the newest good checkpoint; None if there is none. `damaged` names those passed over.

        Raises BadInput, as `TrainState.load` does, if the checkpoint is of another program.
        """
        self._store.settle(wait=True)
        past = history(read(self._journal.path))
        found, after, self.damaged = self._store.newest(
            past, lambda path, sha: state.load(path, strict=strict, sha=sha)
        )
        if past:
            self._journal.append("resume", step=state.step, after=after, damaged=self.damaged)
        assert found is None or isinstance(found, Resumed)
        return found

    def close(self) -> None:
        """Wait for what is being written, and let another process write; twice is once."""
        try:
            self._store.close()
        finally:
            self._journal.close()
            self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _write(path: Path, shot: Snapshot, about: dict[str, Any]) -> str:
    sha = checkpoint.write(path, files_of(shot), **about)
    checkpoint.verify(path, sha)
    return sha


def _write_mine(draft: checkpoint.Draft, shot: Snapshot | None) -> dict[str, Any]:
    """Write and read back the files of this rank, of those that write together."""
    entries = draft.write(files_of(shot, draft.ranks)) if shot is not None else {}
    checkpoint.check(draft.beside, entries, entries)
    return entries


def _tidy(folder: Path, good: Set[str], damaged: Set[str]) -> None:
    """Nothing is left where a checkpoint will be written."""
    for path in folder.iterdir():
        if path.name in damaged:
            aside = path.with_name(f"{path.name}.damaged")
            checkpoint.remove(aside)
            with disk(f"rename {path}"):
                path.rename(aside)
        elif path.name not in good and not path.name.endswith(".damaged"):
            checkpoint.remove(path)
