"""All strategies of one training, told of everything in one order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor

from downslope.strategies.strategy import Batch, Live, Loss, Setting, Strategy


def begin(strategies: Mapping[str, Strategy], training: Setting) -> Company:
    """The live parts of a training's strategies, each of which may look at all."""
    company = Company({name: strategy.begin(training) for name, strategy in strategies.items()})
    training.strategies, training.parts = strategies, company.parts
    return company


class Company:
    """The live parts by name. `tensors` and `data` are of all, under their names."""

    def __init__(self, parts: Mapping[str, Live]) -> None:
        self.lives = dict(parts)

    @property
    def reacts(self) -> bool:
        """Whether any wants to be told of validations."""
        return any(live.reacts for live in self.lives.values())

    @property
    def stopped(self) -> bool:
        """Whether any ends the training here."""
        return any(live.stopped for live in self.lives.values())

    @cached_property
    def changes(self) -> bool:
        """Whether any changes batches, for which it must see them whole."""
        return any(type(live).batch is not Live.batch for live in self.lives.values())

    def loss(self, loss: Loss) -> Loss:
        """The loss to train by."""
        for live in self.lives.values():
            loss = live.loss(loss)
        return loss

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """The batch as it is trained on, in pieces with their shares."""
        for live in self.lives.values():
            batch = live.batch(batch)
        pieces = [(batch, 1.0)]
        for live in self.lives.values():
            pieces = [(piece, share * part) for whole, share in pieces for piece, part in live.parts(whole)]
        yield from pieces

    def before(self, step: int) -> None:
        """Tell all of an update to come."""
        for live in self.lives.values():
            live.before(step)

    @cached_property
    def judges(self) -> bool:
        """Whether any looks at every loss before the update is made."""
        return any(live.judges for live in self.lives.values())

    def admits(self, loss: float) -> bool:
        """Whether all let an update of this loss be made."""
        answers = [live.admits(loss) for live in self.lives.values() if live.judges]
        return all(answers)

    def after(self, applied: bool, names: Sequence[str]) -> None:
        """Tell all how an attempt ended."""
        for live in self.lives.values():
            live.after(applied, names)

    def tidings(self) -> tuple[Mapping[str, Any], ...]:
        """What all did since this was last asked, each with the name of who did it."""
        told = tuple({"by": name, **note} for name, live in self.lives.items() for note in live.told)
        for live in self.lives.values() if told else ():
            live.told = ()
        return told

    @property
    def keeps(self) -> int:
        """Updates between two states that are kept to go back to; 0: none."""
        return max((live.keeps for live in self.lives.values()), default=0)

    @property
    def returns(self) -> bool:
        """Whether any wants to go back."""
        return any(live.returns for live in self.lives.values())

    @property
    def given_up(self) -> str:
        """Why the training has diverged, if it has."""
        return next((why for live in self.lives.values() if (why := live.given_up)), "")

    def moved(self) -> Company:
        """Those whose state goes back when the training does."""
        return Company({name: live for name, live in self.lives.items() if not live.keeps})

    def applied(self, step: int) -> None:
        """Tell all of an update that was made."""
        for live in self.lives.values():
            live.applied(step)

    def observed(self, step: int, loss: float, metric: float) -> None:
        """Tell all of a validation."""
        for live in self.lives.values():
            live.observed(step, loss, metric)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What evaluation sees."""
        with ExitStack() as stack:
            for live in self.lives.values():
                stack.enter_context(live.evaluating())
            yield

    @property
    def best(self) -> Mapping[str, Tensor] | None:
        """The weights that the training should end with, if not its last ones."""
        return next((live.best for live in self.lives.values() if live.best is not None), None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all."""
        return {
            f"{name}/{key}": value
            for name, live in self.lives.items()
            for key, value in live.tensors().items()
        }

    def data(self) -> dict[str, Any]:
        """The plain data of all."""
        return {name: data for name, live in self.lives.items() if (data := live.data())}

    def state(self) -> dict[str, Any]:
        """What all need to go on."""
        return {"data": self.data(), "tensors": self.tensors()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`."""
        data, tensors = state["data"], state["tensors"]
        for name, live in self.lives.items():
            mine = {
                key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")
            }
            if name in data or mine:
                live.load(data.get(name, {}), mine)
