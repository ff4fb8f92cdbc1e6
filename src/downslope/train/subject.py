"""What a proof of resume is about: a task's training, or a loop of anyone's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.parallel import ALONE, Ranks
from downslope.recipe import Recipe
from downslope.tasks import Entry, Task, guest
from downslope.train import hidden
from downslope.train.checkpoint import Folder
from downslope.train.plan import about_data
from downslope.train.precision import PLAIN, Arithmetic
from downslope.train.state import TrainState
from downslope.train.trainer import trainer_of
from downslope.train.training import Attempt, Training


class Subject(Protocol):
    """A training that can be stopped, saved, and gone on with by another process."""

    def advance(self, steps: int, losses: dict[str, str]) -> None:
        """So many more updates; what can be seen of each goes into `losses` by its name."""

    def save(self, folder: Folder) -> None:
        """Save it into a folder that is not there."""

    def load(self, folder: Folder, steps: int) -> None:
        """Go on from what was saved after so many updates."""

    def fields(self) -> dict[str, str]:
        """All of its state by name, as text that is equal if and only if the bits are."""

    def hidden(self) -> Iterator[tuple[str, str]]:
        """(where, value) of what may change while training and is in no checkpoint."""

    def causes(self) -> Iterator[tuple[str, str]]:
        """Likely causes: how a difference begins that it explains ("" for any), and what to do about it."""

    def close(self) -> None:
        """Leave it where it stands."""


class OfTask:
    """The training of a task by a recipe."""

    def __init__(
        self, task: Task, recipe: Recipe | None, seed: int, ranks: Ranks, arithmetic: Arithmetic
    ) -> None:
        self.task, self.ranks = task, ranks
        self.training = Training(task, recipe, seed, ranks=ranks, **arithmetic.data())

    def advance(self, steps: int, losses: dict[str, str]) -> None:
        """So many more updates, and their losses."""

        def seen(attempt: Attempt) -> None:
            batch = self.training.batches - 1
            losses[f"the loss of batch {batch} (step {attempt.step})"] = float(attempt.loss).hex()

        self.training.advance(self.training.step + steps, seen)

    def save(self, folder: Folder) -> None:
        """Save it."""
        self.training.save(folder)

    def load(self, folder: Folder, steps: int) -> None:
        """Go on from what was saved."""
        self.training = Training.load(folder, self.task, ranks=self.ranks)

    def fields(self) -> dict[str, str]:
        """Its state, and what its data are."""
        data = {f"the {part} data": repr(about) for part, about in about_data(self.task).items()}
        return {**data, **self.training.fields()}

    def hidden(self) -> Iterator[tuple[str, str]]:
        """Attributes of modules and data, globals of the file, variables of the functions."""
        task = self.task
        yield from hidden.of_module(self.training.model)
        if not isinstance(task.train, tuple):
            yield from hidden.of_object(task.train, "the train data")
        if task.entry is not None and task.entry.own is not None:
            yield from hidden.of_file(Path(task.entry.own[0]))
        for function in (task.model, task.loss, *(player.loss for player in task.players.values())):
            yield from hidden.of_function(function, "the task function")

    def causes(self) -> Iterator[tuple[str, str]]:
        """None: a task is dealt its samples."""
        yield from ()

    def close(self) -> None:
        """Nothing is to be done."""


class OfLoop:
    """What the function of an address makes: a TrainState and a function that makes one update; or an object
    with advance(steps), save(folder), load(folder) and fields().
    """

    def __init__(self, made: Any, entry: Entry) -> None:
        self.made, self.entry = made, entry
        self.steps = 0
        pair = isinstance(made, tuple) and len(made) == 2
        if pair and isinstance(made[0], TrainState) and callable(made[1]):
            self.state, self.step = made
        elif all(callable(getattr(made, name, None)) for name in ("advance", "save", "load", "fields")):
            self.state, self.step = made, None
        else:
            given = [type(one).__name__ for one in made] if isinstance(made, tuple) else type(made).__name__
            raise BadInput(
                f"{entry.address} must return a Task, a pair of a TrainState and a function that makes one "
                "update, a transformers.Trainer, a lightning.Trainer with what its fit takes, or an object "
                f"with advance, save, load and fields, got {given}."
            )

    def advance(self, steps: int, losses: dict[str, str]) -> None:
        """So many more updates, with the losses that the function returns."""
        with guest(f"The loop of {self.entry.address}"):
            if self.step is None:
                self.state.advance(steps)
                self.steps += steps
                return
            for _ in range(steps):
                loss = self.step()
                if isinstance(loss, Tensor | int | float):
                    losses[f"the loss of update {self.steps}"] = float(loss).hex()
                self.steps += 1

    def save(self, folder: Folder) -> None:
        """Save it."""
        with guest(f"The loop of {self.entry.address}"):
            self.state.save(folder)

    def load(self, folder: Folder, steps: int) -> None:
        """Go on from what was saved."""
        self.steps = steps
        with guest(f"The loop of {self.entry.address}"):
            self.state.load(folder)

    def fields(self) -> dict[str, str]:
        """Its state."""
        with guest(f"The loop of {self.entry.address}"):
            found: dict[str, str] = dict(self.state.fields())
        return found

    def hidden(self) -> Iterator[tuple[str, str]]:
        """Attributes of modules and data, globals of the file, variables of the function."""
        for held in self.state.parts.values() if self.step else vars(self.made).values():
            if isinstance(held, nn.Module):
                yield from hidden.of_module(held)
        if self.entry.own is not None:
            yield from hidden.of_file(Path(self.entry.own[0]))
        if self.step is not None:
            yield from hidden.of_function(self.step, "the step function")
        else:
            yield from hidden.of_object(self.made, f"the {type(self.made).__name__}")

    def causes(self) -> Iterator[tuple[str, str]]:
        """DataLoaders and iterators that the step function took along without keeping their place."""
        for loader in hidden.loaders_of(self.step) if self.step is not None else ():
            told = f"The step function takes its samples from {loader}, which knows no place"
            yield "", f"{told}: loop over Batches(loader) with a Sampler, and add that to the TrainState."

    def close(self) -> None:
        """Nothing is to be done."""


def subject_of(
    made: object,
    entry: Entry,
    recipe: Recipe | None,
    seed: int,
    ranks: Ranks = ALONE,
    arithmetic: Arithmetic = PLAIN,
) -> Subject:
    """What an address gave, as something to be proven."""
    if isinstance(made, Task):
        return OfTask(made, recipe, seed, ranks, arithmetic)
    if recipe is not None:
        raise BadInput(f"{entry.address} is a loop of your own, which has no recipe.")
    if arithmetic != PLAIN:
        raise BadInput(f"{entry.address} is a loop of your own: precision and compile are its own matter.")
    if (trainer := trainer_of(made)) is not None:
        return trainer
    return OfLoop(made, entry)
