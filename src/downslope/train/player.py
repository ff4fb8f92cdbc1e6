"""A player's side of a training: its part of the model, its loss, its optimizer.

The usual task has one player, called "", and its part is the whole model.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from downslope.errors import BadInput, DownslopeError, nearest
from downslope.parallel import Objective, lost
from downslope.recipe import Recipe
from downslope.tasks import Batch, Task, guest
from downslope.train.precision import FLOOR

SKIPS = 20
"""Updates that may be skipped in a row before a training is given up."""

TOGETHER = ("start", "normalisation", "dropout", "depth", "micro", "growth", "average", "stop")
"""Strategies that see the whole model and no optimizer, so that a training may have several players."""


class Diverged(DownslopeError):  # noqa: N818  the sentence reads "diverged: …"
    """The training was given up: update after update, its gradients were not finite."""


class _Refused(Exception):  # noqa: N818  no error: the update is not to be made
    """Leaves an optimizer's step before it has begun."""


class Move(NamedTuple):
    """One player's turn: its loss (detached, before the update), its rate (of the first group), the names of
    parameters whose gradients were not finite, and whether the update was applied. `scale`: the loss scale
    under which they overflowed, where it is the scaler's work to find a lower one.
    """

    loss: Tensor
    lr: float | None
    skipped: tuple[str, ...]
    applied: bool
    scale: float | None = None

    @property
    def astray(self) -> bool:
        """Whether loss or gradients were not finite, and not because of the scale."""
        return (bool(self.skipped) and self.scale is None) or not (
            self.applied or bool(torch.isfinite(self.loss))
        )


class Side:
    """One player in one training. `steps` and `steps_per_epoch` are the training's, in rounds.

    While it moves, no other player's parameter requires a gradient: theirs stay as they are, and the graph
    behind them is not built. The modules of all are in the mode they are in, so a BatchNorm's statistics
    follow every pass through it, whoever moves.
    """

    def __init__(
        self, task: Task, name: str, objective: Objective, recipe: Recipe, steps: int, steps_per_epoch: int
    ) -> None:
        player = task.players[name]
        self.name, self.every = name, player.every
        self.loss = player.loss
        model = objective.model
        self.part = model.get_submodule(name)
        self.objective = objective if self.part is model else Objective(model, self.part, objective.ranks)
        own = {id(parameter) for parameter in self.part.parameters()}
        self._alone = _Still([parameter for parameter in model.parameters() if id(parameter) not in own])
        self._before = f"{name}." if name else ""
        self._guarded = guest(f"The loss of {name or task.name or 'the task'}")
        self.skips = 0
        self.scaler: torch.amp.GradScaler | None = None
        self.tokens = task.tokens
        mine = replace(recipe.players.get(name, recipe), strategies=recipe.strategies)
        mine, measures = self._own(mine, steps, steps_per_epoch)
        self.optimizer = mine.build(self.part, **measures)

    def rates(self, recipe: Recipe, steps: int, steps_per_epoch: int) -> dict[str, Any]:
        """What the durations of its part of a recipe need, by its own updates."""
        mine, measures = self._own(recipe, steps, steps_per_epoch)
        return dict(mine.rates(**measures))

    def _own(self, recipe: Recipe, steps: int, steps_per_epoch: int) -> tuple[Recipe, dict[str, int | None]]:
        """Schedules count a player's own updates, each of which takes `every` batches of the data."""
        measures = {
            "steps": max(1, steps // self.every),
            "steps_per_epoch": cast("int", Fraction(steps_per_epoch, self.every)),
            "tokens_per_sample": self.tokens,
        }
        return replace(recipe, batch_size=recipe.batch_size * self.every), measures

    @property
    def part_name(self) -> str:
        """Its optimizer's name among the parts of the training's state."""
        return f"optimizer.{self.name}" if self.name else "optimizer"

    @property
    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        """Its gradient scaler, if it has one, by name among the parts of the training's state."""
        name = f"scaler.{self.name}" if self.name else "scaler"
        return {} if self.scaler is None else {name: self.scaler}

    def due(self, step: int) -> bool:
        """Whether it moves in round `step`, from 0."""
        return (step + 1) % self.every == 0

    def move(
        self, pieces: Sequence[tuple[Batch, float]], admits: Callable[[float], bool] | None = None
    ) -> Move:
        """Take the gradient of its loss over a batch in pieces with their shares, and make its update, if
        `admits` lets it.
        """
        optimizer, objective, before = self.optimizer, self.objective, self.optimizer.steps
        lr = optimizer.param_groups[0].get("lr")

        def closure() -> Tensor:
            with lost(), self._guarded:
                optimizer.zero_grad()
                losses = []
                for place, (piece, share) in enumerate(pieces, 1):
                    with objective.piece(last=place == len(pieces)):
                        losses.append(_backward(objective.of(self.loss, piece), share, self.scaler))
            total = objective.ranks.mean(losses[0] if len(losses) == 1 else torch.stack(losses).sum())
            if admits is not None and not asked:
                asked.append(total)
                if not admits(float(total)):
                    raise _Refused
            return total

        asked: list[Tensor] = []
        scale = None
        with lost(), self._alone:
            try:
                if self.scaler is not None:
                    loss, scale = self._scaled(self.scaler, closure)
                elif optimizer.asks_again:
                    loss = optimizer.step(closure)
                else:
                    loss = closure()
                    optimizer.step()
            except _Refused:
                return Move(asked[0], lr, (), False)
        names = optimizer.skipped.names if optimizer.skipped else ()
        self.skips = self.skips + 1 if names and scale is None else 0
        skipped = tuple(f"{self._before}{name}" for name in names)
        return Move(loss, lr, skipped, optimizer.steps > before, scale)

    def _scaled(
        self, scaler: torch.amp.GradScaler, closure: Callable[[], Tensor]
    ) -> tuple[Tensor, float | None]:
        """An update by gradients of a loss times a scale; the loss, and the scale if they overflowed under it
        though the loss is finite.
        """
        optimizer = self.optimizer
        loss = closure()
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return loss, None
        waiting, scale = [loss], scaler.get_scale()

        def again() -> Tensor:
            return waiting.pop() if waiting else closure()

        scaler.step(optimizer, *([again] if optimizer.asks_again else []))
        scaler.update()
        if not optimizer.skipped:
            return loss, None
        if scaler.get_scale() == scale:  # a second gradient overflowed, at which torch's scaler does not look
            scaler.update(scale * scaler.get_backoff_factor())
        return loss, scale if scale > FLOOR and bool(torch.isfinite(loss)) else None

    def check(self, step: int, skipped: tuple[str, ...]) -> None:
        """After an update that was not applied: raise Diverged or BadInput if none ever will be."""
        if self.skips >= SKIPS:
            whose = f" of {self.name}" if self.name else ""
            raise Diverged(
                f"{SKIPS} updates in a row{whose} were skipped at step {step}, because the gradients of "
                f"{_listed(skipped)} were not finite: the training diverged; a lower rate may help."
            )
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            which, what = (f"loss of {self.name}", "its") if self.name else ("loss", "the model's")
            raise BadInput(
                f"the {which} gave no parameter a gradient: does it depend on {what} trainable parameters?"
            )


class _Still:
    """Within it, some parameters require no gradient."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.lent: list[nn.Parameter] = []

    def __enter__(self) -> None:
        self.lent = [parameter for parameter in self.parameters if parameter.requires_grad]
        for parameter in self.lent:
            parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for parameter in self.lent:
            parameter.requires_grad_(True)


def sides(
    task: Task, recipe: Recipe, objective: Objective, steps: int, steps_per_epoch: int
) -> tuple[Side, ...]:
    """The sides of a task's players, in the order in which they move; `objective` is of the whole model.

    BadInput unless every trainable parameter of the model is one player's, and the recipe knows only these
    players and no strategy that is about one optimizer.
    """
    names, model = list(task.players), objective.model
    check_players(task, recipe)
    owner: dict[int, str] = {}
    for name in names:
        try:
            part = model.get_submodule(name)
        except AttributeError:
            near = nearest(name, [child for child, _ in model.named_children()])
            raise BadInput(
                f"the model has no submodule {name!r} for the player of that name.{near}"
            ) from None
        for path, parameter in part.named_parameters():
            if other := owner.get(id(parameter)):
                raise BadInput(f"{name}.{path} of the model is {other}'s too: a parameter has one player.")
            owner[id(parameter)] = name
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owner:
            raise BadInput(f"{path} of the model is no player's ({', '.join(names)}): who is to train it?")
    found = tuple(Side(task, name, objective, recipe, steps, steps_per_epoch) for name in names)
    for side in found if len(found) > 1 and "average" in recipe.strategies else ():
        if side.optimizer.averages:
            raise BadInput(f"the rule of {side.name} has evaluation weights of its own: leave out [average].")
    return found


def check_players(task: Task, recipe: Recipe) -> None:
    """BadInput where a recipe's players or strategies are not for the players of a task."""
    names = [name for name in task.players if name]
    for name in recipe.players:
        if name not in names:
            there = f"There are: {', '.join(names)}." if names else "It has one, and needs no [player]."
            raise BadInput(f"the task has no player {name!r}.{nearest(name, names)} {there}")
    for name in recipe.strategies if names else ():
        if name not in TOGETHER:
            raise BadInput(
                f"[{name}] is about one loss and one optimizer, and this task has the players "
                f"{', '.join(names)}: leave it out. With several go {', '.join(TOGETHER)}."
            )


def _backward(loss: Tensor, share: float, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Send a loss backward, as a share of the whole. ValueError if it is not one number."""
    if not isinstance(loss, Tensor) or loss.ndim:
        given = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"a loss must be a tensor with one number (0-d), got {given}")
    part = loss if share == 1.0 else loss * share
    sent = part if scaler is None else scaler.scale(part)
    sent.backward()  # type: ignore[no-untyped-call]
    return part.detach()


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
