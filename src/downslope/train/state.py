"""TrainState: everything that a training needs to go on, whoever wrote its loop."""

from __future__ import annotations

import json
import platform
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.folder import Pieces, check_name
from downslope.kernels.collective import Parted, local
from downslope.parallel import ALONE, Ranks
from downslope.state import plain_name
from downslope.train import checkpoint
from downslope.train.checkpoint import Folder
from downslope.train.fingerprint import digest, fingerprint
from downslope.train.part import LAST, Part, Told, part_of
from downslope.train.plain import Packed, leaves, pack, unpack
from downslope.train.random import Generators
from downslope.train.sharded import is_cut, start_of, whole

RESERVED = ("state", "manifest", "generators", "step", "counters", "ranks")
_OF_RANK = re.compile(r"(.+)\.rank-\d+")


@dataclass(frozen=True)
class Resumed:
    """What a load did: `restored` parts; what only one side has (`missing`: the program alone, `waiting`: the
    checkpoint alone, until the program adds it); what else did not fit (`left`, in a partial load), and the
    numbers of the program that the checkpoint's took the place of (`changed`).
    """

    step: int
    restored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"At step {self.step}, with {', '.join(self.restored) or 'nothing'}."]
        told += [f"Not in the checkpoint: {', '.join(self.missing)}."] if self.missing else []
        told += [f"Not in the program yet: {', '.join(self.waiting)}."] if self.waiting else []
        told += [f"Left as it was: {line}." for line in self.left]
        return "\n".join([*told, *(f"Taken from the checkpoint: {line}." for line in self.changed)])


@dataclass(frozen=True)
class Snapshot:
    """A state as it was, in memory of its own; `parted` is what several ranks saved in parts, by part."""

    data: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    generators: Generators | None = field(repr=False)
    parted: Mapping[str, Mapping[str, Parted]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Folder, sha: str | None = None, ranks: Ranks = ALONE) -> Self:
        """What a checkpoint holds, in the memory of its files, of which each rank reads what it needs. Every
        byte is verified first. Damaged, on all ranks, naming the file that is not as it was saved.
        """
        files = checkpoint.verify(folder, sha, ranks)["files"]
        return checkpoint.agreed(lambda: cls._read(folder, files), ranks)

    @classmethod
    def _read(cls, folder: Folder, files: Iterable[str]) -> Self:
        data = checkpoint.parse(folder, "state.json")
        tensors: dict[str, dict[str, Tensor]] = {}
        pieces: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(list))
        for file in files:
            name, dot, _ = file.rpartition(".safetensors")
            if of := dot and _OF_RANK.fullmatch(name):
                held = checkpoint.tensors(folder, file)
                with checkpoint.sound(folder, file):
                    for key, (shape, start) in json.loads(checkpoint.about(folder, file)["parts"]).items():
                        pieces[of[1]][key].append((shape, start, held[key]))
            elif dot:
                tensors[name] = checkpoint.tensors(folder, file)
        with checkpoint.sound(folder, "a file of a rank"):
            parted = {
                name: {key: Parted(ones[0][0], [one[1:] for one in ones]) for key, ones in held.items()}
                for name, held in pieces.items()
            }
        generators = data.get("generators")
        made = Generators.from_data(generators) if generators is not None else None
        return cls(data, tensors, made, parted)

    def packed(self, name: str, data: Any) -> Packed:
        """A part of it."""
        return Packed(data, dict(self.tensors.get(name, {})), self.parted.get(name, {}))


class TrainState:
    """The state of a training: models, optimizers, torch's schedulers and scalers, averages, early stopping,
    samplers, generators of your own, each under a name; `step`, and your own `counters` (plain data).

    `generators`: whether the global ones of python, numpy and torch belong to it. State is matched by names
    of parts and parameters, whatever the order in which they were made or added. The checkpoint's numbers
    win over the program's, and what differs is told. `ranks` save and load together, of sharded tensors each
    its part; else every rank gathers all of them. Raises BadInput for a part that has no state. Not for:
    publishing a model, for which its weights are enough.

    >>> model = nn.Linear(2, 1)
    >>> state = TrainState(model, torch.optim.AdamW(model.parameters()))
    >>> before = state.snapshot()
    >>> state.step, model.weight.data[:] = 5, 0.0
    >>> state.restore(before).step, bool((model.weight == 0).any())
    (0, False)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        generators: bool = True,
        ranks: Ranks = ALONE,
        **parts: Any,
    ) -> None:
        self.step = 0
        self.counters: dict[str, Any] = {}
        self.generators = generators
        self.ranks = ranks
        self._parts: dict[str, Part] = {}
        self._names: dict[int, str] = {}
        self._waiting: dict[str, Packed] = {}
        self._moved = 0
        given = {"model": model, "optimizer": optimizer, **parts}
        for name, held in given.items():
            if held is not None:
                self.add(name, held)

    def add(self, name: str, held: Any) -> None:
        """Let one more part belong to the state. If a checkpoint was loaded that has it, it goes on from
        there at once, and so do the optimizers, whose rate a new scheduler has just written. BadInput if the
        training has moved since.
        """
        if name in RESERVED or name in self._parts or _OF_RANK.fullmatch(name):
            raise BadInput(f"the name {name!r} is taken: call it something else.")
        check_name(name)
        if name in self._waiting and self._moves() != self._moved:
            raise BadInput(
                f"{name} is in the checkpoint, and comes after an update: add it before you train on."
            )
        if isinstance(held, nn.Module):
            self._names |= {id(p): f"{name}.{plain}" for plain, p in _parameters(held)}
        self._parts[name] = part_of(name, held, self._names)
        if name in self._waiting:
            due = [
                name,
                *(other for other, part in self._parts.items() if part.turn == LAST and other != name),
            ]
            self._put_back({one: self._waiting[one] for one in due if one in self._waiting}, strict=True)
            self._wait(self._waiting)

    @property
    def parts(self) -> Mapping[str, Any]:
        """What belongs to it, by name."""
        return {name: part.held for name, part in self._parts.items()}

    def save(self, folder: Folder) -> str:
        """Write a checkpoint, durably and whole or not at all, and return the SHA-256 of its manifest. All
        `ranks` call it.

        The same state gives the same bytes. BadInput if the folder is there already, the disk refuses, or a
        part holds what is neither a tensor nor plain data.
        """
        return checkpoint.write(folder, self.files(), self.ranks, step=self.step, world=self.ranks.world)

    def files(self) -> dict[str, Pieces]:
        """What this rank writes of a checkpoint of this moment, by file: before anything goes on."""
        return files_of(self._shot(), self.ranks)

    def load(self, folder: Folder, *, strict: bool = True, sha: str | None = None) -> Resumed:
        """Go on from a checkpoint, and warn of numbers of the program that it replaced. Every byte is
        verified first; `sha` is what `save` returned.

        Strict raises BadInput, with nothing changed, where names, shapes or types of tensors differ; else
        what fits is put back. Parts that the program does not have yet wait until they are added. Raises
        Damaged, naming the file that is not as it was saved.
        """
        return self.resume(Snapshot.read(folder, sha, self.ranks), folder, strict=strict)

    def resume(self, shot: Snapshot, folder: Folder, *, strict: bool = True) -> Resumed:
        """Go on from a checkpoint that was read; as `load` does it."""
        with checkpoint.sound(folder, "state.json"):
            return self.restore(shot, strict=strict, what=f"the checkpoint {folder}")

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """The state at this moment, in memory of its own: that of `into`, a snapshot that is not needed any
        more, where it has as much.
        """
        shot, old = self._shot(), into.tensors if into is not None else {}
        tensors = {
            name: {key: _copied(tensor, old.get(name, {}).get(key)) for key, tensor in held.items()}
            for name, held in shot.tensors.items()
        }
        return Snapshot(shot.data, tensors, shot.generators)

    def restore(self, shot: Snapshot, *, strict: bool = True, what: str = "the snapshot") -> Resumed:
        """Go on from a snapshot, which may be used again; as `load` does it."""
        saved = {name: shot.packed(name, data) for name, data in shot.data["parts"].items()}
        ready = {name: packed for name, packed in saved.items() if name in self._parts}
        told = self._put_back(ready, strict, what)
        self._wait(saved)
        self.step = shot.data["step"]
        self.counters = unpack(shot.packed("counters", shot.data["counters"]))
        if shot.generators is not None and self.generators:
            shot.generators.restore()
        missing = tuple(name for name in self._parts if name not in saved)
        waiting = tuple(name for name in saved if name not in self._parts)
        found = Resumed(self.step, tuple(ready), missing, waiting, tuple(told.wrong), tuple(told.changed))
        if missing or found.left or found.changed:
            warnings.warn(str(found), stacklevel=2)
        return found

    def fields(self) -> dict[str, str]:
        """Every counter, generator and tensor by name, as text that is equal if and only if the bits are."""
        shot = self._shot()
        found = {"step": str(self.step)}
        found |= {f"counter {key}": text for key, text in leaves(shot.data["counters"])}
        if shot.generators is not None:
            found |= generator_fields(shot.generators)
        for name, held in shot.tensors.items():
            found |= {f"{name} {key}": fingerprint(whole(tensor)) for key, tensor in held.items()}
        for name, data in shot.data["parts"].items():
            found |= {f"{name} {key}": text for key, text in leaves(data)}
        return found

    def _wait(self, saved: Mapping[str, Packed]) -> None:
        """Hold what the program has not yet, and for its sake the optimizers; else nothing."""
        absent = saved.keys() - self._parts.keys()
        held = {name: one for name, one in saved.items() if name in absent or self._parts[name].turn == LAST}
        self._waiting, self._moved = (held if absent else {}), self._moves()

    def _moves(self) -> int:
        """A number that grows with every update of a model."""
        models = (part.held for part in self._parts.values() if isinstance(part.held, nn.Module))
        every = (parameter for model in models for parameter in model.parameters())
        return sum(parameter._version for parameter in every if not parameter.is_inference())

    def _shot(self) -> Snapshot:
        if lost := [name for name in self._waiting if name not in self._parts]:
            warnings.warn(
                f"the checkpoint that was loaded had {', '.join(lost)}, which this program never added: it "
                "is not in what is saved now.",
                stacklevel=3,
            )
            self._waiting = {}
        packed = {name: part.pack() for name, part in self._parts.items()}
        counters = pack(self.counters, "counters")
        data = {
            "schema": checkpoint.SCHEMA,
            "step": self.step,
            "counters": counters.data,
            "parts": {name: one.data for name, one in packed.items()},
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        tensors = {
            name: {key: self._held(key, tensor) for key, tensor in one.tensors.items()}
            for name, one in packed.items()
            if one.tensors
        }
        tensors |= {"counters": counters.tensors} if counters.tensors else {}
        return Snapshot(data, tensors, Generators.now() if self.generators else None)

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as it is saved: whole, unless each of several ranks saves a part."""
        return tensor if self.ranks.together and is_cut(name, tensor) else whole(tensor)

    def _put_back(self, ready: Mapping[str, Packed], strict: bool, what: str = "the checkpoint") -> Told:
        """Check everything, and only then change anything: first what may yet refuse by itself, and
        optimizers after what writes into their rates.
        """
        told = Told()
        for name, packed in ready.items():
            self._parts[name].check(packed, told)
        if told.wrong and strict:
            first = "; ".join(told.wrong[:3]) + ("; …" if len(told.wrong) > 3 else "")
            raise BadInput(f"{what} does not fit: {first}.")
        for name in sorted(ready, key=lambda one: self._parts[one].turn):
            self._parts[name].load(ready[name], told)
        return told


def files_of(shot: Snapshot, ranks: Ranks = ALONE) -> dict[str, Pieces]:
    """The files of a checkpoint of a snapshot that are this rank's to write: its parts of sharded tensors;
    the first writes all else, a safetensors file a part and state.json.
    """
    files: dict[str, Pieces] = {}
    for name, held in shot.tensors.items():
        cut = {key: start_of(key, tensor) for key, tensor in held.items() if is_cut(key, tensor)}
        if uncut := {key: tensor for key, tensor in held.items() if key not in cut and ranks.leads}:
            files[f"{name}.safetensors"] = checkpoint.pack(uncut)
        if boxes := {key: [[*held[key].shape], start] for key, start in cut.items() if start is not None}:
            parts = {key: local(held[key]) for key in boxes}
            files[f"{name}.rank-{ranks.rank}.safetensors"] = checkpoint.pack(
                parts, {"parts": json.dumps(boxes)}
            )
    if not ranks.leads:
        return files
    generators = None if shot.generators is None else shot.generators.data()
    return {**files, "state.json": checkpoint.dump({**shot.data, "generators": generators})}


def generator_fields(generators: Generators) -> dict[str, str]:
    """The state of each generator by name, as text that is equal if and only if the bits are."""
    found: dict[str, str] = {}
    for name, value in generators.data().items():
        items = value if name == "devices" else {name: value}
        found |= {f"generator {key}": digest(str(item).encode()) for key, item in items.items()}
    return found


def _copied(tensor: Tensor, old: Tensor | None) -> Tensor:
    if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
        return tensor.clone(memory_format=torch.contiguous_format)
    return old.copy_(tensor)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter
