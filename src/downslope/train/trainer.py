"""Trainers of Lightning and Hugging Face as something to be proven: driven update by update, saved and gone
on with by their own checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader

from downslope.errors import BadInput
from downslope.tasks.guest import guest
from downslope.train import hidden
from downslope.train.batches import Batches
from downslope.train.checkpoint import Folder
from downslope.train.random import Generators
from downslope.train.state import TrainState

StateOf = Callable[[], TrainState]

_FILE = "lightning.ckpt"
_OTHERS = {"downslope", "lightning", "pytorch_lightning", "transformers"}


class Trainer(Protocol):
    """One training by a framework's trainer."""

    def attach(self, before: Callable[[StateOf], None], after: Callable[[], bool]) -> None:
        """Let it tell before each update, with a way to its state; and after each, where it is to save if the
        answer is true, and then to tell again.
        """

    def fit(self, saved: Path | None) -> None:
        """Train to the end, from a checkpoint if one is given."""

    def save(self, folder: Path) -> bool:
        """Save while it stands still; false if it can do so only by itself."""

    def saved(self) -> None:
        """It has done so by itself."""

    def callbacks(self) -> Sequence[Any]:
        """What is told of its course, and may keep something of it."""

    def causes(self) -> Iterator[tuple[str, str]]:
        """How a difference begins that its checkpoints explain, and what to do about it."""


class OfTrainer:
    """A trainer's call in a thread of its own, that stands still behind an update while it is saved, and
    before one, with its next batch in hand, while its state is looked at. What it raises is raised here.
    """

    def __init__(self, trainer: Trainer, data: Any = None) -> None:
        self.trainer, self.data = trainer, data
        self._steps, self._left = 0, 0
        self._behind, self._saves, self._ended = False, False, False
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._stands: SimpleQueue[BaseException | None] = SimpleQueue()
        self._state: TrainState | None = None
        self._thread: threading.Thread | None = None
        trainer.attach(self._before, self._after)

    def advance(self, steps: int, losses: dict[str, str]) -> None:
        """So many more updates."""
        self._start(None)
        self._left = steps
        self._move()
        if self._left:
            raise BadInput(
                f"the trainer ended after {self._steps} updates: let it make more, or ask for fewer steps."
            )

    def save(self, folder: Folder) -> None:
        """Let the trainer save."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        if not self.trainer.save(folder):
            self._saves = True
            self._move()
            self.trainer.saved()

    def load(self, folder: Folder, steps: int) -> None:
        """Let the trainer go on from what it saved."""
        self._steps = steps
        self._start(Path(folder))

    def fields(self) -> dict[str, str]:
        """Its state by name."""
        return self._ready().fields()

    def hidden(self) -> Iterator[tuple[str, str]]:
        """Attributes of the model's modules, of the data, and of callbacks that are not the framework's."""
        model = self._ready().parts["model"]
        assert isinstance(model, nn.Module)
        yield from hidden.of_module(model)
        yield from hidden.of_object(getattr(self.data, "dataset", self.data), "the train data")
        for callback in self.trainer.callbacks():
            kind = type(callback)
            if kind.__module__.partition(".")[0] not in _OTHERS:
                yield from hidden.of_object(callback, f"the callback {kind.__name__}")

    def causes(self) -> Iterator[tuple[str, str]]:
        """What a framework leaves out, and a loader that knows no place."""
        yield from self.trainer.causes()
        if isinstance(self.data, DataLoader) and not hasattr(self.data, "state_dict"):
            told = "The trainer takes its samples from a DataLoader, which knows no place"
            yield "", f"{told}: give it Batches(loader) with a Sampler instead."

    def close(self) -> None:
        """Leave the trainer where it stands."""
        if self._thread is not None and not self._ended:
            self._go.put(False)
            self._thread.join()

    def _ready(self) -> TrainState:
        """The state before the next update."""
        state = self._start(None)
        if self._behind and not self._ended:
            self._move()
        state.step = self._steps
        return state

    def _start(self, saved: Path | None) -> TrainState:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(saved,), name="trainer", daemon=True)
            self._thread.start()
            self._wait()
        if self._state is None:
            raise BadInput("the trainer ended before it made an update: has it any to make?")
        return self._state

    def _move(self) -> None:
        if not self._ended:
            self._go.put(True)
            self._wait()

    def _wait(self) -> None:
        error = self._stands.get()
        with guest("The trainer"):
            if error is not None:
                raise error

    # In the trainer's thread:

    def _run(self, saved: Path | None) -> None:
        error: BaseException | None = None
        try:
            self.trainer.fit(saved)
        except _Left:
            return
        except BaseException as raised:
            error = raised
        self._ended = True
        self._stands.put(error)

    def _before(self, state_of: StateOf) -> None:
        self._state = self._state or state_of()
        self._behind = False
        if not self._left:
            self._stand()

    def _after(self) -> bool:
        self._behind = True
        if self._saves:  # it has done so
            self._saves = False
            self._stand()
            return False
        self._steps += 1
        self._left -= 1
        if not self._left:
            self._stand()
        return self._saves

    def _stand(self) -> None:
        self._stands.put(None)
        if not self._go.get():
            raise _Left


class _Left(BaseException):
    """Ends a trainer's call from inside."""


class Lightning:
    """A `lightning.Trainer` with the arguments of its `fit`."""

    def __init__(self, trainer: Any, module: nn.Module, *data: Any) -> None:
        self.trainer, self.module, self.data = trainer, module, data

    def attach(self, before: Callable[[StateOf], None], after: Callable[[], bool]) -> None:
        """By a callback, behind all others."""

        class Told(_lightning().Callback):  # type: ignore[misc]
            def on_train_batch_start(self, trainer: Any, module: Any, *given: Any) -> None:
                self.steps = trainer.global_step
                schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
                named = {**_numbered("optimizer", trainer.optimizers), **_numbered("scheduler", schedulers)}
                before(lambda: TrainState(module, **named))

            def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
                if trainer.global_step > self.steps:
                    after()

        self.trainer.callbacks.append(Told())

    def fit(self, saved: Path | None) -> None:
        """Train."""
        self.trainer.fit(self.module, *self.data, ckpt_path=None if saved is None else str(saved / _FILE))

    def save(self, folder: Path) -> bool:
        """Save."""
        self.trainer.save_checkpoint(folder / _FILE)
        return True

    def saved(self) -> None:
        """Nothing is to be done."""

    def callbacks(self) -> Sequence[Any]:
        """Its callbacks."""
        held: Sequence[Any] = self.trainer.callbacks
        return held

    def causes(self) -> Iterator[tuple[str, str]]:
        """Its checkpoints have no generators, unless `keep_generators` puts them in."""
        if not any(hasattr(callback, "generators") for callback in self.trainer.callbacks):
            told = "Lightning's checkpoints leave the generators out"
            yield "generator", f"{told}: give its trainer the callback keep_generators()."


class HuggingFace:
    """A `transformers.Trainer`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def attach(self, before: Callable[[StateOf], None], after: Callable[[], bool]) -> None:
        """By a callback, behind all others. It saves by itself between two updates, where a callback asks."""
        from transformers import TrainerCallback

        class Told(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **held: Any) -> None:
                bare = {  # accelerate wraps both
                    "optimizer": getattr(held["optimizer"], "optimizer", held["optimizer"]),
                    "scheduler": getattr(held["lr_scheduler"], "scheduler", held["lr_scheduler"]),
                }
                before(lambda: TrainState(held["model"], **bare))

            def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> Any:
                self.asked = after()
                control.should_save |= self.asked
                return control

            def on_save(self, args: Any, state: Any, control: Any, **held: Any) -> None:
                if self.asked:
                    self.asked = after()

        self.trainer.add_callback(Told())

    def fit(self, saved: Path | None) -> None:
        """Train."""
        found = None if saved is None else str(next(saved.glob("checkpoint-*")))
        self.trainer.train(resume_from_checkpoint=found)

    def save(self, folder: Path) -> bool:
        """It does so only by itself, and now there."""
        self.folder, self.trainer.args.output_dir = self.trainer.args.output_dir, str(folder)
        return False

    def saved(self) -> None:
        """It saves where it did before."""
        self.trainer.args.output_dir = self.folder

    def causes(self) -> Iterator[tuple[str, str]]:
        """Settings that give up the place in the data, or most of the state."""
        if self.trainer.args.save_only_model:
            told = "save_only_model leaves optimizer, scheduler and generators out of checkpoints"
            yield from (
                (begins, f"{told}: leave it out.") for begins in ("optimizer", "scheduler", "generator")
            )
        if self.trainer.args.ignore_data_skip:
            told = "ignore_data_skip lets the trainer begin its pass over the data anew after a stop"
            yield "generator", f"{told}: leave it out."

    def callbacks(self) -> Sequence[Any]:
        """Its callbacks."""
        held: Sequence[Any] = self.trainer.callback_handler.callbacks
        return held


def keep_generators() -> Any:
    """A callback for `lightning.Trainer` that puts the generators of torch, numpy and python into Lightning's
    checkpoints, where they are missing: with it, dropout and augmentation go on where they stopped.

    The place in `Batches` too, which Lightning does not load at the end of a pass over the data: the next
    pass begins then. Not for: several processes, each of which has generators of its own; BadInput.
    """

    class Kept(_lightning().Callback):  # type: ignore[misc]
        generators: Generators | None = None
        places: Sequence[dict[str, Any]] = ()

        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            if trainer.world_size > 1:
                raise BadInput("keep_generators keeps those of one process, not of several.")
            self.trainer = trainer

        def state_dict(self) -> dict[str, Any]:
            places = [batches.state_dict() for batches in _batches(self.trainer)]
            return {"generators": Generators.now().data(), "batches": places}

        def load_state_dict(self, saved: dict[str, Any]) -> None:
            self.generators, self.places = Generators.from_data(saved["generators"]), saved["batches"]

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if self.generators is None:
                return
            for batches, place in zip(_batches(trainer), self.places, strict=True):
                batches.load_state_dict(place)
                if batches.position >= len(batches):
                    next(iter(batches), None)  # the end, for which Lightning, who counts, never asks
            self.generators.restore()  # not before: to get there, generators were asked
            self.generators = None

    return Kept()


def trainer_of(made: object) -> OfTrainer | None:
    """What a function returned, if that is a transformers.Trainer, or a lightning.Trainer with what its `fit`
    takes.
    """
    first, *rest = made if isinstance(made, tuple) and made else (made,)
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(first).__mro__}
    if kinds & {"lightning.Trainer", "pytorch_lightning.Trainer"} and rest and isinstance(rest[0], nn.Module):
        return OfTrainer(Lightning(first, *rest), rest[1] if len(rest) > 1 else None)
    if "transformers.Trainer" in kinds and not rest:
        return OfTrainer(HuggingFace(first), first.train_dataset)
    return None


def _lightning() -> Any:
    """The package, by whichever name it is installed. BadInput if it is not."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            return import_module(name)
    raise BadInput("this is for Lightning, which is not installed: pip install lightning.")


def _batches(trainer: Any) -> list[Batches]:
    """Those of ours among Lightning's loaders for training: one, a list, or a dict."""
    held = trainer.train_dataloader
    every = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else [held]
    return [loader for loader in every if isinstance(loader, Batches)]


def _numbered(name: str, held: list[Any]) -> dict[str, Any]:
    """One by its name, several by number."""
    return {f"{name}{place or ''}": one for place, one in enumerate(held)}
