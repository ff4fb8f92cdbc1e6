"""A strategy: a choice of a recipe beyond the update rule, as plain data, and what it does in one training.

A strategy is a frozen dataclass whose fields are numbers, texts, lists and schedules; its class, in lower
case, is the name of its table in a recipe, of which there is one at most. `shape` changes the model for good,
in every process that goes on with the training; `prepare` writes first weights, once; `begin` gives the
`Live` part, which the training tells of every step and which it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_type_hints

from torch import Tensor, nn

from downslope.errors import BadInput, nearest, under
from downslope.optimizer import Optimizer
from downslope.schedule import Duration, Schedule
from downslope.strategies.field import settled
from downslope.strategies.pace import Pace, Rates

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Setting:
    """What a strategy may know of the training it is part of.

    `rates`: what durations need, in updates (see `ds.Recipe.rates`). `batches(n)`: the first n of the
    training's batches; `samples()`: all samples once, in batches. `better`: whether of two metrics the higher
    is better. `teacher(folder)`: the trained model of a finished run. `objective`: see `of`. `world`: the
    ranks that share every piece of a batch. Where live parts are told of anything: `strategies`, all of the
    recipe's; `parts(batch)`: a batch as they change and cut it, in pieces with their shares.
    """

    model: nn.Module
    rates: Mapping[str, int | None]
    batches: Callable[[int], Iterable[Batch]]
    classes: int | None
    better: bool
    seed: int
    loss: Loss
    teacher: Callable[[str], nn.Module]
    samples: Callable[[], Iterable[Batch]] = tuple
    optimizer: Optimizer | None = None
    strategies: Mapping[str, Strategy] = field(default_factory=dict)
    parts: Callable[[Batch], Iterable[tuple[Batch, float]]] = lambda batch: [(batch, 1.0)]
    objective: Callable[[Callable[[nn.Module, Any], Any], Any], Any] | None = None
    world: int = 1

    def of(self, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """A function of the model and a batch, also where the model lies in parts on several ranks."""
        return function(self.model, batch) if self.objective is None else self.objective(function, batch)


class Live:
    """What a strategy does in a training. Each of these does nothing unless a strategy says otherwise."""

    reacts: ClassVar[bool] = False
    """Whether it wants to be told of validations."""

    judges: ClassVar[bool] = False
    """Whether it looks at every loss before the update is made."""

    told: Sequence[Mapping[str, Any]] = ()
    """What it did since it was last asked, as plain data for the journal: see `tell`."""

    def tell(self, step: int, did: str, why: str, **facts: float | str) -> None:
        """Let the journal, and the page drawn from it, say what was done after `step` updates: one of the
        strategy's `deeds`, for what reason, and numbers and names that belong to it.
        """
        self.told = [*self.told, {"step": step, "did": did, "why": why, "facts": facts}]

    @property
    def stopped(self) -> bool:
        """Whether the training is to end here."""
        return False

    def loss(self, loss: Loss) -> Loss:
        """The loss to train by, in place of `loss`."""
        return loss

    def batch(self, batch: Batch) -> Batch:
        """The batch to train on, in place of the data's."""
        return batch

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """The batch in pieces, each with its share of the items."""
        yield batch, 1.0

    def before(self, step: int) -> None:
        """Called before update `step`, from 0, is computed."""

    def admits(self, loss: float) -> bool:
        """Whether an update of this loss is to be made, of one that `judges`."""
        return True

    def after(self, applied: bool, names: Sequence[str]) -> None:
        """Called after every attempt at an update: whether it was applied; of which parameters the gradients
        were not finite.
        """

    @property
    def keeps(self) -> int:
        """Updates between two states that are kept to go back to; 0: none."""
        return 0

    @property
    def returns(self) -> bool:
        """Whether the training is to go back, after the last attempt, to the state that was kept."""
        return False

    @property
    def given_up(self) -> str:
        """Why the training has diverged; empty while it has not."""
        return ""

    def applied(self, step: int) -> None:
        """Called when `step` updates have been applied."""

    def observed(self, step: int, loss: float, metric: float) -> None:
        """Called with a validation after `step` updates."""

    def evaluating(self) -> AbstractContextManager[object]:
        """Entered around every evaluation."""
        return nullcontext()

    @property
    def best(self) -> Mapping[str, Tensor] | None:
        """The weights (a state dict) that the training should end with, if not its last ones."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it needs to go on, by name."""
        return {}

    def data(self) -> dict[str, Any]:
        """What else it needs to go on, as plain JSON data."""
        return {}

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `data` and `tensors` were."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A choice of a recipe beyond the update rule; see the module."""

    unfair: ClassVar[str] = ""
    """Why a race, which trains everybody equally long, cannot judge it; empty if it can."""

    deeds: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What its live part may `tell` that it did: the journal's words, each with what a page says for it."""

    def __post_init__(self) -> None:
        """Check every field against its declared type. One that overrides this calls it first."""
        for key, declared in self.declared().items():
            with under(key):
                object.__setattr__(self, key, settled(key, getattr(self, key), declared))

    @classmethod
    def declared(cls) -> dict[str, Any]:
        """The fields by name, each with its type."""
        hints = get_type_hints(cls)
        return {item.name: hints[item.name] for item in fields(cls)}

    @property
    def name(self) -> str:
        """Its table in a recipe."""
        return type(self).__name__

    def data(self) -> dict[str, Any]:
        """The strategy as plain data, every field written out but those that are None."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: plain(value) for key, value in values.items() if value is not None}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The strategy of a table. BadInput names a key that is unknown or missing."""
        if not isinstance(data, Mapping):
            raise BadInput(f"[{cls.__name__}] is a table, got {data!r}.")
        allowed = [item.name for item in fields(cls)]
        for key in data:
            if key not in allowed:
                hint = nearest(str(key), allowed)
                told = ", ".join(allowed)
                raise BadInput(f"[{cls.__name__}] has no key {key!r}.{hint} Allowed: {told}.", key=(key,))
        given: dict[str, Any] = {}
        try:
            for key, declared in cls.declared().items():
                if key in data:
                    with under(key):
                        given[key] = settled(key, _read(data[key]), declared)
            for item in fields(cls):
                if item.name not in given and item.default is item.default_factory is MISSING:
                    raise BadInput(f"[{cls.__name__}] needs a key {item.name!r}.")
            return cls(**given)
        except BadInput as error:
            said = str(error)
            named = said if said.startswith("[") else f"[{cls.__name__}] {said}"
            raise BadInput(named, key=error.key or _culprit(cls, given)) from None

    def alone(self, shard: bool) -> str:
        """Why it does not go with a batch that several ranks share and, if `shard`, with weights that lie in
        parts on them; empty if it does.
        """
        return ""

    def refuse(self, others: Mapping[str, Strategy]) -> None:
        """Raise BadInput, with the reason, for another strategy that this one does not combine with."""

    def suit(self, recipe: Mapping[str, Any]) -> None:
        """Raise BadInput, with the reason, for what else of a recipe's data it does not combine with."""

    def pace(self, length: Duration, batch: Rates) -> Pace | None:
        """How many batches each update takes, if it sets that, in a training of this length; `batch`: what
        durations need to become batches.
        """
        return None

    def shape(self, model: nn.Module) -> nn.Module:
        """The model to train in place of `model`."""
        return model

    def prepare(self, training: Setting) -> None:
        """Write the first weights; only where a training begins."""

    def multipliers(self, model: nn.Module) -> Mapping[str, float]:
        """Learning-rate multipliers by parameter name; 1 where none is given."""
        return {}

    def begin(self, training: Setting) -> Live:
        """Its part in a training, whose optimizer is there now."""
        return Live()


def _culprit(kind: type[Strategy], given: Mapping[str, Any]) -> tuple[str, ...]:
    """The key without which what was given would be right, if there is one."""
    for key in given:
        try:
            kind(**{name: value for name, value in given.items() if name != key})
        except (BadInput, TypeError):
            continue
        return (key,)
    return ()


def _read(value: Any) -> Any:
    if isinstance(value, Mapping) and "schedule" in value:
        return Schedule.from_data(value)
    return tuple(_read(one) for one in value) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A number, a schedule, or whatever holds such, as plain data."""
    if isinstance(value, Schedule):
        return value.data()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, tuple | list) else value
