"""How a loader finds its place again: by our Sampler, by a state of its own, or only at an epoch's start."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from downslope.errors import BadInput
from downslope.train.plain import Packed, pack, unpack
from downslope.train.random import Generators
from downslope.train.sampler import Index, Sampler
from downslope.train.seeded import untouched


class Course(ABC):
    """A loader with the place of the training in it: `position` batches into an epoch, both from 0."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Passes that are complete."""

    @property
    @abstractmethod
    def position(self) -> int:
        """Batches of this pass that are used up."""

    @abstractmethod
    def begin(self) -> Iterator[Any]:
        """The batches from the place on."""

    @abstractmethod
    def advance(self) -> None:
        """One more batch is used up."""

    @abstractmethod
    def turn(self) -> None:
        """The epoch is over."""

    @abstractmethod
    def lose(self) -> None:
        """The batch after the place was lost, and what `begin` gave is of no more use."""

    def awaited(self) -> str:
        """Which samples the next batch has, in words, if anyone knows."""
        return ""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The place as plain data."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there; KeyError, TypeError or ValueError for what `state` did not make."""


class Ordered(Course):
    """Our Sampler is told where to begin: any batch costs the same."""

    kind = "sampler"

    def __init__(self, loader: Any, sampler: Sampler) -> None:
        held = loader.dataset
        if hasattr(held, "__len__") and len(held) != sampler.samples:
            raise BadInput(
                f"the Sampler is of {sampler.samples} samples and the dataset has {len(held)}: make it "
                "Sampler(dataset, ...)."
            )
        self.loader, self.sampler = loader, sampler
        sampler.counts = False

    @property
    def epoch(self) -> int:
        """Passes that are complete."""
        return self.sampler.epoch

    @property
    def position(self) -> int:
        """Batches of this pass that are used up."""
        return self.sampler.position

    def begin(self) -> Iterator[Any]:
        """The loader draws a seed for its workers; that must not move the training's own generator."""
        rank, _ = self.sampler.share
        with untouched():
            torch.default_generator.manual_seed(Index(rank, self.sampler.seed, self.epoch).key() >> 128)
            return iter(self.loader)

    def advance(self) -> None:
        """One more batch is used up."""
        self.sampler.advance()

    def turn(self) -> None:
        """The epoch is over."""
        self.sampler.turn()

    def lose(self) -> None:
        """The sampler is still before it."""

    def awaited(self) -> str:
        """Which samples the next batch has."""
        indices = next(self.sampler.ahead(), [])
        shown = ", ".join(str(int(index)) for index in indices[:8])
        return f" (samples {shown}{', …' if len(indices) > 8 else ''})" if indices else ""

    def state(self) -> dict[str, Any]:
        """The place as plain data."""
        return self.sampler.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.sampler.load_state_dict(state)


class Counted(Course):
    """A loader that is not told its place."""

    epoch: int = 0
    position: int = 0

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def advance(self) -> None:
        """One more batch is used up."""
        self.position += 1

    def turn(self) -> None:
        """The epoch is over."""
        self.epoch, self.position = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """The place as plain data."""
        return {"epoch": self.epoch, "position": self.position}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class Stateful(Counted):
    """The loader, or an iterable dataset read without workers, has a state of its own."""

    kind = "state"

    def __init__(self, loader: Any, keeper: Any) -> None:
        super().__init__(loader)
        self.keeper = keeper
        self._resumes = self._lost = False

    def begin(self) -> Iterator[Any]:
        """An epoch takes one number from the training's own generator, however often the loader draws."""
        if self._lost:
            raise BadInput("after a lost batch this loader goes on only from a saved state: load it first.")
        seed = 0 if self._resumes else int(torch.empty((), dtype=torch.int64).random_())
        self._resumes = False
        with untouched():
            torch.default_generator.manual_seed(seed)
            return iter(self.loader)

    def lose(self) -> None:
        """The batch after the place was lost."""
        self._lost = True

    def state(self) -> dict[str, Any]:
        """The place as plain data."""
        return {**super().state(), "state": written(self.keeper.state_dict())}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().load(state)
        self.keeper.load_state_dict(read(state["state"]))
        self._resumes, self._lost = self.position > 0, False


class Restarted(Counted):
    """Nothing knows its place: the epoch begins again, with the generators as they were when it began."""

    kind = "epoch"

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._start: dict[str, Any] | None = None
        iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
        warnings.warn(f"this {_ITERABLE if iterable else _PLAIN}.", stacklevel=4)

    def begin(self) -> Iterator[Any]:
        """The order is drawn with the first batch."""
        if self._start is None:
            self._start = {"own": self._own(), "global": Generators.now().data()}
            return iter(self.loader)
        now = Generators.now()
        self._restore(self._start["own"])
        Generators.from_data(self._start["global"]).restore()
        try:
            live = iter(self.loader)
            return chain(list(islice(live, 1)), live)
        finally:
            now.restore()

    def turn(self) -> None:
        """The epoch is over."""
        super().turn()
        self._start = None

    def lose(self) -> None:
        """The batch after the place was lost."""
        self.position = 0

    def state(self) -> dict[str, Any]:
        """The place as plain data."""
        return {**super().state(), **(self._start or {"own": self._own(), "global": None})}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._restore(state["own"])
        super().load(state)
        self._start = None
        if state["global"] is not None:
            self._start = {"own": state["own"], "global": state["global"]}
        if self.position:
            warnings.warn(
                f"epoch {self.epoch} begins again: {self.position} batches of it are used a second time.",
                stacklevel=3,
            )
            self.position = 0

    def _own(self) -> list[Any]:
        return [written(generator.get_state()) for generator in self._generators()]

    def _restore(self, states: list[Any]) -> None:
        found = self._generators()
        if len(found) != len(states):
            raise BadInput(
                f"the loader had {len(states)} generators of its own then, and has {len(found)} now."
            )
        for generator, state in zip(found, states, strict=True):
            generator.set_state(read(state))

    def _generators(self) -> list[torch.Generator]:
        """Those that the loader draws from, each once."""
        batches = getattr(self.loader, "batch_sampler", None)
        single = getattr(self.loader, "sampler", None)
        holders = (self.loader, single, batches, getattr(batches, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


_PLAIN = (
    "loader does not know its place: a training resumed in the middle of an epoch begins that epoch again. "
    "Give the DataLoader batch_sampler=downslope.Sampler(dataset, batch_size), or take torchdata's "
    "StatefulDataLoader"
)
_ITERABLE = (
    "iterable dataset does not know its place: a training resumed in the middle of an epoch begins it again. "
    "Give the dataset state_dict and load_state_dict, and read it with num_workers=0 or torchdata's "
    "StatefulDataLoader"
)


def course_of(loader: Any) -> Course:
    """The way of this loader. BadInput for what can be read only once."""
    if isinstance(getattr(loader, "batch_sampler", None), Sampler):
        return Ordered(loader, loader.batch_sampler)
    if isinstance(getattr(loader, "sampler", None), Sampler):
        raise BadInput("a Sampler gives whole batches: write batch_sampler=..., not sampler=..., for it.")
    if not hasattr(loader, "__iter__") or hasattr(loader, "__next__"):
        raise BadInput(f"a loader can be read again and again, which a {type(loader).__name__} cannot.")
    if _stateful(getattr(loader, "base_dataloader", loader)):  # accelerate's has the methods in any case
        return Stateful(loader, loader)
    alone = isinstance(loader, DataLoader) and loader.num_workers == 0
    if alone and isinstance(loader.dataset, IterableDataset) and _stateful(loader.dataset):
        return Stateful(loader, loader.dataset)
    return Restarted(loader)


def _stateful(held: Any) -> bool:
    return all(callable(getattr(held, name, None)) for name in ("state_dict", "load_state_dict"))


def written(value: Any) -> dict[str, Any]:
    """Nested values and tensors as JSON; BadInput for what is neither.

    >>> read(written({"at": (1, torch.arange(2))}))
    {'at': (1, tensor([0, 1]))}
    """
    packed = pack(value, "the state of the loader")
    tensors = {name: [*_shape(tensor), _bytes(tensor).hex()] for name, tensor in packed.tensors.items()}
    return {"data": packed.data, "tensors": tensors}


def read(data: Mapping[str, Any]) -> Any:
    """What `written` was given."""
    tensors = {}
    for name, (dtype, shape, text) in data["tensors"].items():
        flat = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
        tensors[name] = flat.view(getattr(torch, dtype)).reshape(shape)
    return unpack(Packed(data["data"], tensors))


def _shape(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
