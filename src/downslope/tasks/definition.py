"""Task: everything about a training that is not an optimisation choice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.folder import check_name
from downslope.recipe import Recipe
from downslope.rules import chain
from downslope.rules.adaptive import adamw
from downslope.schedule import cosine
from downslope.tasks.data import Batch, Data, checked
from downslope.tasks.entry import Entry

Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Metric: TypeAlias = Callable[[nn.Module, Batch], Tensor | float]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy (nats) of the logits `model(inputs)` [items, classes] to int64 `targets` [items]."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of `model(inputs)` to `targets`; two shapes are BadInput, never broadcast."""
    inputs, targets = batch
    outputs = model(inputs)
    if outputs.shape != targets.shape:
        raise BadInput(
            f"Outputs of shape {list(outputs.shape)} do not match targets of {list(targets.shape)}."
        )
    return nn.functional.mse_loss(outputs, targets)


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Share of the items, 0 to 1, whose largest logit is the target's."""
    inputs, targets = batch
    right: Tensor = model(inputs).argmax(dim=1) == targets
    return right.float().mean()


def plain_recipe(rate: float = 1e-3) -> Recipe:
    """AdamW under a cosine, 20 epochs of batches of 32; at torch's default rate unless another is given."""
    falling = cosine(rate, steps="100 %", warmup="5 %")
    return Recipe(chain=chain(adamw(lr=falling, weight_decay=0.01)), steps="20 epochs", batch_size=32)


@dataclass(frozen=True)
class Player:
    """One of several players of a task: what it minimises, and how often it moves.

    `loss(model, batch)` is a mean over the batch's items, of the whole model; its gradient reaches, and its
    optimizer moves, the parameters of the submodule that has the player's name, and no others. `every`: it
    moves at the end of every so many rounds; a round is one batch. Not for: parts with one loss in common,
    which a route of the recipe gives rules of their own in one pass.

    >>> Player(cross_entropy, every=0)
    Traceback (most recent call last):
    downslope.errors.BadInput: 'every' of a player must be a whole number of rounds from 1, got 0.
    """

    loss: Loss
    every: int = 1

    def __post_init__(self) -> None:
        if not callable(self.loss) or isinstance(self.loss, nn.Module):
            raise BadInput(f"'loss' of a player must be a function, got {type(self.loss).__name__}.")
        if type(self.every) is not int or self.every < 1:
            raise BadInput(
                f"'every' of a player must be a whole number of rounds from 1, got {self.every!r}."
            )


@dataclass(frozen=True)
class _Total:
    """The losses of all players, added up."""

    players: Mapping[str, Player]
    __name__ = "total loss"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        first, *others = (player.loss(model, batch) for player in self.players.values())
        return sum(others, start=first)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: `model()` makes a fresh module, `loss(model, batch)` is the mean over a batch's items.

    `train`, `valid`, `test` are tuples of tensors of one first dimension, fed as whole batches, or map-style
    datasets. `valid` chooses; `test`, which may be None, is only reported. `metric(model, batch)` is a mean
    over items too; without it the loss is. `target` is where the metric counts as solved, `reference` says
    what was measured, and how. `players`: several with a loss each, in the order in which they move; `loss`
    then only judges, and is their sum if left out. `tokens`: how many a sample has, whose loss counts, for
    durations in tokens. Raises BadInput for what is none of this.

    >>> import torch
    >>> xy = (torch.randn(10, 3), torch.randn(10, 1))
    >>> task = Task(model=lambda: nn.Linear(3, 1), train=xy, valid=xy, loss=squared_error)
    >>> task.metric_name, task.higher_is_better
    ('squared_error', False)
    """

    model: Callable[[], nn.Module]
    train: Data
    valid: Data
    test: Data | None = None
    loss: Loss = None  # type: ignore[assignment]  # None: the sum of the players'
    players: Mapping[str, Player] = field(default_factory=dict)  # none: one, "", that is the whole model
    metric: Metric = None  # type: ignore[assignment]  # None: the loss
    metric_name: str = ""
    higher_is_better: bool = None  # type: ignore[assignment]  # None: known for accuracy and for the loss
    target: float | None = None
    tokens: int | None = None
    recipe: Recipe = field(default_factory=plain_recipe)
    reference: str = ""
    name: str = ""
    entry: Entry | None = None

    def __post_init__(self) -> None:
        settle, given = object.__setattr__, vars(self)
        for part in ("train", "valid", "test"):
            if part != "test" or self.test is not None:
                settle(self, part, checked(given[part], part))
        players, loss = _several(given["players"]), given["loss"]
        if players and (loss is None or isinstance(loss, _Total)):
            settle(self, "loss", _Total(players))
        settle(self, "metric", given["metric"] or self.loss)
        for part in ("model", "loss", "metric"):
            if not callable(given[part]):
                raise BadInput(f"{part!r} of a task must be a function, got {type(given[part]).__name__}.")
        settle(self, "players", players or MappingProxyType({"": Player(self.loss)}))
        if isinstance(self.model, nn.Module):
            raise BadInput(
                "'model' of a task must make a fresh model each time; try model=lambda: MyModel()."
            )
        if given["higher_is_better"] is None:
            if self.metric not in (self.loss, accuracy):
                raise BadInput("A metric of your own needs higher_is_better=True or False.")
            settle(self, "higher_is_better", self.metric is accuracy)
        settle(self, "metric_name", self.metric_name or getattr(self.metric, "__name__", "metric"))
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise BadInput(
                f"'tokens' of a task is how many a sample has, a whole number from 1, got {self.tokens!r}."
            )
        if self.name:
            check_name(self.name)  # the run's folder is called like it
        if not isinstance(given["recipe"], Recipe):
            raise BadInput(
                f"'recipe' of a task must be a downslope.Recipe, got {type(self.recipe).__name__}."
            )


def _several(given: object) -> Mapping[str, Player]:
    """The players as they were given, without the one that a task has else. BadInput for what are none."""
    if not isinstance(given, Mapping):
        raise BadInput(f"'players' of a task are ds.Player by name, got {type(given).__name__}.")
    players = {name: player for name, player in given.items() if name != ""}
    for name, player in players.items():
        if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
            raise BadInput(f"a player is called as its submodule is, in plain letters, got {name!r}.")
        if not isinstance(player, Player):
            raise BadInput(f"the player {name!r} must be a ds.Player, got {type(player).__name__}.")
    if players and all(player.every > 1 for player in players.values()):
        raise BadInput("no player moves in every round: give one of them every=1.")
    return MappingProxyType(players)
