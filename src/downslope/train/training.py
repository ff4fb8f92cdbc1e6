"""Training: everything that a training needs to go on, and nothing else.

Inside `advance` and `evaluate` the process has the training's own random generators, thread count and
switches; outside it has its own again. So several trainings can take turns in one process and none notices
the others.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from downslope.errors import BadInput
from downslope.journal import read
from downslope.optimizer import Optimizer
from downslope.parallel import ALONE, Objective, Ranks, alive, lost, sharded
from downslope.recipe import Recipe
from downslope.schedule import in_steps
from downslope.strategies import Setting, begin
from downslope.tasks import Batch, Data, Task, guest, size, take
from downslope.train import checkpoint
from downslope.train.checkpoint import Folder
from downslope.train.culprit import began
from downslope.train.history import history
from downslope.train.order import measures, steps_per_epoch
from downslope.train.plan import Plan
from downslope.train.player import Move, Side, sides
from downslope.train.precision import Arithmetic, uncompiled
from downslope.train.random import Generators, seed_all
from downslope.train.reader import Reader
from downslope.train.rescue import Rescue
from downslope.train.shared import check_shared, key, shares
from downslope.train.state import Snapshot, TrainState
from downslope.train.surroundings import Surroundings, kept
from downslope.train.weights import Buffers, at_rest, classes, moved

T = TypeVar("T")

_EVALUATED_AT_ONCE = 512  # fixed, so that the same weights give the same bits whatever the recipe


class Attempt(NamedTuple):
    """One update: its loss (a detached 0-d tensor, before it), and what came of it.

    `step` counts the updates applied before it, `lr` is the rate it used (of the first group), `skipped`
    names the parameters whose gradients were not finite; it is empty for an update that was applied.
    `moves` tells the same of every player that had its turn; `loss` is their sum, `lr` that of the first.
    `batches`: how many it took. `told`: what strategies did. `culprit`: what made it not finite, of the first
    in a row, on a single rank. `scale`: the loss scale under which gradients of fp16 overflowed.
    """

    step: int
    loss: Tensor
    lr: float | None
    skipped: tuple[str, ...]
    moves: Mapping[str, Move] = MappingProxyType({})
    batches: int = 1
    told: tuple[Mapping[str, Any], ...] = ()
    culprit: str = ""
    scale: float | None = None

    @property
    def applied(self) -> bool:
        """Whether anything was updated."""
        return any(move.applied for move in self.moves.values())


class Evaluation(NamedTuple):
    """Means over all samples of a part of the data."""

    loss: float
    metric: float

    def data(self) -> dict[str, float]:
        """As plain data."""
        return self._asdict()


class Training:
    """A training of `task` by `recipe` (default: the task's own) that can be paused, saved and branched.

    Initial weights and the order of samples come from `seed`. `model` and `optimizer` are live;
    `optimizer.follow("lr", schedule)` makes a branch. `steps` is the length that the recipe asks for; `done`
    may come earlier. A batch whose update is skipped is used up, but is no step. Of several players a step is
    a round, in which one at least was updated. Raises BadInput, and UserCodeError where the task's own code
    raises. `threads`: torch's, if not as many as the process has. `precision`: "bf16" or "fp16", if not
    float32; `compile`: whether torch.compile compiles the model.

    >>> from downslope.tasks import task
    >>> state = Training(task("cancer-logistic"), seed=1)
    >>> before = state.evaluate("valid").loss
    >>> state.advance(50)
    >>> state.step, state.evaluate("valid").loss < before
    (50, True)
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe | None = None,
        seed: int = 0,
        threads: int | None = None,
        *,
        fresh: bool = True,
        ranks: Ranks = ALONE,
        precision: str | None = None,
        compile: bool = False,
    ) -> None:
        self.task, self.recipe, self.seed = task, recipe or task.recipe, seed
        self.arithmetic, self.ranks = Arithmetic(precision, compile), ranks
        check_shared(task, self.recipe, ranks)
        self.samples = size(task.train)
        self.steps_per_epoch = steps_per_epoch(self.samples, self.recipe.batch_size)
        self.measures = measures(task, self.recipe.batch_size)
        self.steps = self.recipe.run_steps(**self.measures)
        self.pace = self.recipe.pace(**self.measures)
        if (most := self.pace.most(self.steps)) > self.steps_per_epoch:
            raise BadInput(
                f"[growth] an update would take {most} batches, and a pass over the data has "
                f"{self.steps_per_epoch}: it would see samples twice.",
                key=("growth", "times"),
            )
        self.step, self.batches = 0, 0
        self.finished = False
        self._surroundings = Surroundings.seeded(seed, threads)
        with self._inside():
            with guest("The model"):
                self.model = task.model()
            if not isinstance(self.model, nn.Module):
                raise BadInput(
                    f"'model' of a task must return a torch.nn.Module, got {type(self.model).__name__}."
                )
            self._begin(fresh)
        self.rescue = Rescue(self.model, self.company, self.sides)
        self._buffers = Buffers(self.model)
        self.state = TrainState(self.model, strategies=self.company, ranks=ranks, **self._parts())

    def _begin(self, fresh: bool) -> None:
        """Let the strategies shape the model, give it its first weights, and join the training."""
        strategies = self.recipe.strategies
        for strategy in strategies.values():
            self.model = strategy.shape(self.model)
        self.arithmetic.check(self.model, self.recipe)
        device = next(self.model.parameters()).device
        self.reader = Reader(self.task, self.seed, self.recipe.batch_size, device)
        training = Setting(
            model=self.model,
            rates=self.recipe.rates(steps=self.steps, **self.measures),
            batches=self.reader.first,
            samples=self.reader.everything,
            classes=classes(self.task.train),
            better=self.task.higher_is_better,
            seed=self.seed,
            loss=self.arithmetic.plain(self.task.loss),
            teacher=trained,
            world=self.ranks.world,
        )
        if fresh:
            for strategy in strategies.values():
                strategy.prepare(training)
        self.objective = (
            sharded(self.model, self.ranks)
            if self.ranks.shard
            else Objective(self.model, self.model, self.ranks)
        )
        self.sides: tuple[Side, ...] = sides(
            self.task, self.recipe, self.objective, self.steps, self.steps_per_epoch
        )
        training.objective = self.objective.of
        training.optimizer = self.sides[0].optimizer  # several share only strategies that do not touch it
        self.company = begin(strategies, training)
        self._compute(device)
        self._observes = 0
        if self.company.reacts or any(side.optimizer.reacts for side in self.sides):
            batch = self.recipe.per_batch(**self.measures)
            self._observes = max(1, in_steps(self.recipe.observe, "observe", **batch))

    def _compute(self, device: torch.device) -> None:
        """Let losses and metrics be computed as they are to be."""
        how, task = self.arithmetic, self.task
        for side in self.sides:
            side.loss = how.cast(self.company.loss(side.loss), device)
            side.scaler = how.scaler(side.optimizer, device)
        self._loss, self._metric = how.cast(task.loss, device), how.cast(task.metric, device)
        how.begin(self.model, task.players)

    def _parts(self) -> dict[str, Any]:
        """What belongs to the state besides the model and the strategies."""
        parts: dict[str, Any] = {side.part_name: side.optimizer for side in self.sides}
        for side in self.sides:
            parts |= side.scalers
        return parts | ({"kept": self.rescue} if self.company.keeps else {})

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the one player that a usual task has; BadInput if it has several."""
        if len(self.sides) > 1:
            names = ", ".join(side.name for side in self.sides)
            raise BadInput(f"the players {names} have an optimizer each: see `sides`.")
        return self.sides[0].optimizer

    @property
    def epoch(self) -> int:
        """Whole passes over the data."""
        return self.batches // self.steps_per_epoch

    @property
    def position(self) -> int:
        """Batches taken from the present pass."""
        return self.batches % self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether the training is over: all updates were applied, or a strategy stopped it."""
        return self.step >= self.steps or self.company.stopped

    @property
    def threads(self) -> int:
        """torch's threads for this training; only with as many are the numbers the same."""
        return self._surroundings.threads

    def advance(self, until: int | None = None, on_step: Callable[[Attempt], object] | None = None) -> None:
        """Train until `until` updates (default: the recipe's) were applied in all.

        `on_step` is told of every attempt, after it; where it returns something true, the training pauses.
        Raises Diverged after 20 skipped updates in a row, UserCodeError for what the task's code raises.
        """
        goal, before = self.steps if until is None else until, self.batches
        with self._inside(), self.arithmetic.working():
            while self.step < goal and not self.company.stopped:
                attempt = self._attempt()
                pause = on_step is not None and on_step(attempt)
                for side in self.sides:
                    move = attempt.moves.get(side.name)
                    if move is not None and not move.applied:
                        side.check(self.step, move.skipped)
                if pause and self.step > attempt.step:
                    break
        if self.batches > before:
            self.arithmetic.check_called(self.model)

    def evaluate(self, part: str = "valid") -> Evaluation:
        """Loss and metric over a part of the data, "train", "valid" or "test".

        In evaluation mode, with the rule's evaluation weights, and without a trace: generators, buffers,
        modes and weights are as before.
        """
        with kept():
            self._surroundings.restore()
            with self._evaluating(), self.arithmetic.working():
                return self._judge(part)

    def finish(self) -> bool:
        """Put the weights that are evaluated into the model for good; whether they are not the last ones that
        were. For a training that is done.
        """
        with self._evaluating():
            last = {name: value.clone() for name, value in self.model.state_dict().items()}
        best = self.company.best
        with torch.no_grad():
            self.model.load_state_dict(last if best is None else best)
        self.finished = True
        return best is not None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode and weights, and afterwards everything as it was."""
        with kept(), torch.no_grad(), at_rest(self.model), ExitStack() as stack:
            if not self.finished:
                for side in self.sides:
                    stack.enter_context(side.optimizer.averaged())
                stack.enter_context(self.company.evaluating())
            yield

    def _judge(self, part: str) -> Evaluation:
        data = {"train": self.task.train, "valid": self.task.valid, "test": self.task.test}.get(part)
        if data is None:
            raise BadInput(f"this task has no part {part!r}; there are train, valid and, if given, test.")
        blocks = range(0, size(data), _EVALUATED_AT_ONCE)
        rows = []
        for turn in range(0, len(blocks), self.ranks.world):
            # Whoever has no block left repeats the last one, because FSDP2 gathers weights on all ranks.
            start = blocks[min(turn + self.ranks.rank, len(blocks) - 1)]
            rows.append(self._judged(data, start, min(start + _EVALUATED_AT_ONCE, size(data))))
        losses, metrics, counts = zip(*self.ranks.rows(rows)[: len(blocks)], strict=True)
        return Evaluation(_mean(losses, counts), _mean(metrics, counts))

    def _judged(self, data: Data, start: int, end: int) -> tuple[float, float, float]:
        """Loss and metric of the samples from `start` to before `end`, and how many these are."""
        alive()
        task, of = self.task, self.objective.of
        with lost(), guest(f"The loss or metric of {task.name or 'the task'}"):
            batch = moved(take(data, torch.arange(start, end)), self.reader.device)
            loss = float(of(self._loss, batch))
            metric = loss if task.metric is task.loss else float(of(self._metric, batch))
        return loss, metric, end - start

    def _observe(self) -> None:
        """Validate, and tell the strategies and schedules that go by it."""
        with self._evaluating():
            seen = self._judge("valid")
            self.company.observed(self.step, seen.loss, seen.metric)
        for side in self.sides:
            side.optimizer.observe(seen.loss)

    def save(self, folder: Folder) -> str:
        """Write a checkpoint, durably and whole or not at all, and return the SHA-256 of its manifest.

        The same state gives the same bytes. BadInput if the folder is there already, or the disk refuses. All
        ranks call it: the first writes what all hold, and each its parts of sharded weights and state.
        """
        return self._counted(lambda state: state.save(folder))

    @classmethod
    def load(
        cls,
        folder: Folder,
        task: Task,
        recipe: Recipe | None = None,
        sha: str | None = None,
        ranks: Ranks = ALONE,
        arithmetic: Arithmetic | None = None,
    ) -> Self:
        """The state that was saved in `folder`, on as many ranks or others, which all call it; `sha` is what
        `save` returned.

        Raises Damaged (a BadInput) naming the file that is not as it was saved, and BadInput if task, recipe
        or arithmetic are not those of the checkpoint.
        """
        shot = Snapshot.read(folder, sha, ranks)
        with checkpoint.sound(folder, "state.json"):
            saved = {**shot.data["counters"]}
        began = Recipe.parse(saved["recipe"], f"{folder}/state.json")
        if recipe is not None and recipe.hash != began.hash:
            changes = "; ".join(map(str, began.diff(recipe)))
            raise BadInput(f"the checkpoint {folder} was made by another recipe: {changes}.")
        how = Arithmetic.of(saved)
        if arithmetic not in (None, how):
            raise BadInput(f"the checkpoint {folder} was computed in {how}, not in {arithmetic}.")
        made = cls(task, began, saved["seed"], saved["threads"], fresh=False, ranks=ranks, **how.data())
        if made.samples != saved["samples"]:
            raise BadInput(
                f"the checkpoint {folder} saw {saved['samples']} samples, the task now has {made.samples}."
            )
        made._go_on(shot, folder)
        return made

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """The training at this moment, in memory of its own: that of `into`, if it has as much."""
        return self._counted(lambda state: state.snapshot(into))

    def fields(self) -> dict[str, str]:
        """Every counter, generator and tensor by name, as text that is equal if and only if the bits are."""
        about = ("counter task", "counter recipe", "counter samples")
        found = self._counted(TrainState.fields)
        return {name: text for name, text in found.items() if name not in about}

    def _counted(self, take: Callable[[TrainState], T]) -> T:
        """What `take` takes of the state, with the counters as they stand and the training's generators."""
        self.state.step = self.step
        self.state.counters = {
            "task": self.task.name,
            "samples": self.samples,
            "seed": self.seed,
            "recipe": self.recipe.text(),
            "batches": self.batches,
            "threads": self.threads,
            **self.arithmetic.data(),
            "skips in a row": {side.name: side.skips for side in self.sides},
        }
        with self._inside():
            return take(self.state)

    def _go_on(self, shot: Snapshot, folder: Folder) -> None:
        with self._inside(), warnings.catch_warnings():
            # What a branch follows differs from its recipe on purpose; the recipe itself was compared.
            warnings.filterwarnings("ignore", message="(?s).*the checkpoint's numbers are used")
            self.state.resume(shot, folder)
        self.step, self.batches = self.state.step, self.state.counters["batches"]
        for side in self.sides:
            side.skips = self.state.counters["skips in a row"][side.name]

    def _attempt(self) -> Attempt:
        step = self.step
        self.company.before(step)
        count = self.pace.count(step)
        pieces = [
            (piece, share / count)
            for number in range(self.batches, self.batches + count)
            for piece, share in self._pieces(number)
        ]
        self._draw(1 + self.ranks.rank)
        self.rescue.keep(step)
        moves = {side.name: self._move(side, pieces) for side in self.sides if side.due(step)}
        self.ranks.follow(self.model.buffers())
        self.batches += count
        self._draw(0)
        first, *others = moves.values()
        loss = sum((move.loss for move in others), start=first.loss)
        skipped = tuple(name for move in moves.values() for name in move.skipped)
        applied = any(move.applied for move in moves.values())
        scale = _scale(moves) if skipped else None
        self.company.after(applied, skipped if scale is None else ())
        attempt = Attempt(step, loss, first.lr, skipped, moves, count, scale=scale)
        if applied:
            self.step += 1
            self.company.applied(self.step)
            if self._observation_due():
                self._observe()
        else:
            attempt = attempt._replace(culprit=self._culprit(moves, pieces))
            self.step = self.rescue.step(step)
        told = self.company.tidings()
        return attempt._replace(told=told) if told else attempt

    def _move(self, side: Side, pieces: list[tuple[Batch, float]]) -> Move:
        """One player's turn; if it makes no update, the batch leaves no trace in running statistics."""
        self._buffers.keep()
        move = side.move(pieces, self.company.admits if self.company.judges else None)
        if not move.applied:
            self._buffers.put_back()
        return move

    def _culprit(self, moves: Mapping[str, Move], pieces: list[tuple[Batch, float]]) -> str:
        """What made a loss or its gradients not finite, of the first update in a row, on a single rank."""
        wrong = [side for side in self.sides if side.name in moves and moves[side.name].astray]
        if self.ranks.together or all(side.skips > 1 for side in wrong):
            return ""
        with kept():
            players, device = self.task.players, self.reader.device
            losses = [
                self.arithmetic.cast(self.arithmetic.plain(players[side.name].loss), device) for side in wrong
            ]
            return began(self.model, losses, [piece for piece, _ in pieces])

    def _observation_due(self) -> bool:
        """Whether the last update reached a multiple of `observe`, in updates or data, as that is given."""
        if not self._observes:
            return False
        by_data = isinstance(self.recipe.observe, str)
        before, after = (self.pace.taken(s) if by_data else s for s in (self.step - 1, self.step))
        return before // self._observes < after // self._observes

    def _draw(self, stream: int) -> None:
        """Among several ranks, let random numbers depend on seed, batch and stream alone. Stream 0 is common
        to all, so that between two batches they have one state; the others are a rank's own.
        """
        if self.ranks.together:
            seed_all(key(self.seed, self.batches, stream))

    def _pieces(self, number: int) -> list[tuple[Batch, float]]:
        """The pieces of a batch, counted from the training's first, or of this rank's part of it, with what
        they count.
        """
        reader, ranks = self.reader, self.ranks
        if self.company.changes or reader.in_memory or not ranks.together:
            return list(shares(self.company.parts(reader.batch(number)), ranks))
        # Samples that are made one by one are made by the rank that trains on them.
        indices = reader.indices(number)
        return [(reader.taken(mine), share) for mine, share in shares(self.company.parts(indices), ranks)]

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with kept():
            self._surroundings.restore()
            try:
                yield
            finally:
                now = Generators.now()
                self._surroundings = Surroundings(now, self._surroundings.threads)


def trained(folder: str) -> nn.Module:
    """The model of a finished run, with the weights that were evaluated; BadInput if it has not ended."""
    plan = Plan.read(folder)
    events = history(read(Path(folder, "journal.jsonl")))
    if not any(event["kind"] == "end" for event in events):
        raise BadInput(f"the run in {folder} has not ended; go on with it by `downslope resume {folder}`.")
    last = next(event for event in reversed(events) if event["kind"] == "checkpoint")
    task = plan.find_task(None, allow_code_change=False)
    state = Training.load(Path(folder, "ckpt", last["name"]), task, sha=last["sha"])
    state.finish()
    return uncompiled(state.model)


def _scale(moves: Mapping[str, Move]) -> float | None:
    """The loss scale that was too high, of several the highest; None if it was none."""
    return max((move.scale for move in moves.values() if move.scale is not None), default=None)


def _mean(values: Sequence[float], counts: Sequence[float]) -> float:
    total = sum(value * count for value, count in zip(values, counts, strict=True))
    return total / sum(counts)
