"""TrainState: everything that a training needs to go on, and nothing else.

Inside `advance` and `evaluate` the process has the training's own random generators, thread count and
switches; outside it has its own again. So several trainings can take turns in one process and none notices
the others.
"""

import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from downslope.errors import BadInput, DownslopeError
from downslope.journal import read
from downslope.optimizer import Optimizer
from downslope.recipe import Recipe
from downslope.schedule import in_steps
from downslope.strategies import Training, begin
from downslope.tasks import Batch, Data, Task, guest, size, take
from downslope.train import checkpoint
from downslope.train.checkpoint import Folder
from downslope.train.fingerprint import digest, fingerprint
from downslope.train.history import history
from downslope.train.order import order, steps_per_epoch
from downslope.train.plan import Plan
from downslope.train.random import Generators
from downslope.train.surroundings import Surroundings, kept
from downslope.train.weights import at_rest, check_alike, classes, moved

SKIPS = 20
"""Updates that may be skipped in a row before a training is given up."""

_EVALUATED_AT_ONCE = 512  # fixed, so that the same weights give the same bits whatever the recipe


class Diverged(DownslopeError):  # noqa: N818  the sentence reads "diverged: …"
    """The training was given up: update after update, its gradients were not finite."""


class Attempt(NamedTuple):
    """One batch: its loss (a detached 0-d tensor, before the update), and what came of the update.

    `step` counts the updates applied before it, `lr` is the rate it used (of the first group), `skipped`
    names the parameters whose gradients were not finite; it is empty for an update that was applied.
    """

    step: int
    loss: Tensor
    lr: float | None
    skipped: tuple[str, ...]


class Evaluation(NamedTuple):
    """Means over all samples of a part of the data."""

    loss: float
    metric: float

    def data(self) -> dict[str, float]:
        """As plain data."""
        return self._asdict()


class TrainState:
    """A training of `task` by `recipe` (default: the task's own) that can be paused, saved and branched.

    Initial weights and the order of samples come from `seed`. `model` and `optimizer` are live;
    `optimizer.follow("lr", schedule)` makes a branch. `steps` is the length that the recipe asks for; `done`
    may come earlier. A batch whose update is skipped is used up, but is no step. Raises BadInput, and
    UserCodeError where the task's own code raises. `threads`: torch's, if not as many as the process has.

    >>> from downslope.tasks import task
    >>> state = TrainState(task("cancer-logistic"), seed=1)
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
    ) -> None:
        self.task, self.recipe, self.seed = task, recipe or task.recipe, seed
        self.samples = size(task.train)
        self.steps_per_epoch = steps_per_epoch(self.samples, self.recipe.batch_size)
        self.steps = self.recipe.run_steps(self.steps_per_epoch)
        self.batches = 0
        self.skips_in_a_row = 0
        self.finished = False
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._surroundings = Surroundings.seeded(seed, threads)
        with self._inside():
            with guest("The model"):
                self.model = task.model()
            if not isinstance(self.model, nn.Module):
                raise BadInput(
                    f"'model' of a task must return a torch.nn.Module, got {type(self.model).__name__}."
                )
            self._train: Data = task.train
            self._begin(fresh)

    def _begin(self, fresh: bool) -> None:
        """Let the strategies shape the model, give it its first weights, and join the training."""
        strategies = self.recipe.strategies
        for strategy in strategies.values():
            self.model = strategy.shape(self.model)
        self._device = next(self.model.parameters()).device
        if isinstance(self.task.train, tuple):
            self._train = moved(self.task.train, self._device)
        rates = {
            "run_steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "batch_size": self.recipe.batch_size,
        }
        training = Training(
            model=self.model,
            rates=rates,
            batches=self._first_batches,
            classes=classes(self.task.train),
            better=self.task.higher_is_better,
            seed=self.seed,
            loss=self.task.loss,
            teacher=trained,
        )
        if fresh:
            for strategy in strategies.values():
                strategy.prepare(training)
        self.optimizer: Optimizer = self.recipe.build(
            self.model, steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        training.optimizer = self.optimizer
        self.company = begin(strategies, training)
        self._loss = self.company.loss(self.task.loss)
        self._observes = 0
        if self.company.reacts or self.optimizer.reacts:
            self._observes = max(1, in_steps(self.recipe.observe, "observe", **rates))

    @property
    def step(self) -> int:
        """Applied updates."""
        return self.optimizer.steps

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
        goal = self.steps if until is None else until
        with self._inside():
            while self.step < goal and not self.company.stopped:
                attempt = self._attempt()
                pause = on_step is not None and on_step(attempt)
                if self.step == attempt.step:
                    self._check_progress(attempt.skipped)
                elif pause:
                    break

    def evaluate(self, part: str = "valid") -> Evaluation:
        """Loss and metric over a part of the data, "train", "valid" or "test".

        In evaluation mode, with the rule's evaluation weights, and without a trace: generators, buffers,
        modes and weights are as before.
        """
        with kept():
            self._surroundings.restore()
            with self._evaluating():
                return self._judge(part)

    def finish(self) -> bool:
        """Put the weights that are evaluated into the model for good; whether they are not the last ones that
        were. For a training that is done.
        """
        with self._evaluating():
            last = {name: value.clone() for name, value in self._weights().items()}
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
                stack.enter_context(self.optimizer.averaged())
                stack.enter_context(self.company.evaluating())
            yield

    def _judge(self, part: str) -> Evaluation:
        data = {"train": self.task.train, "valid": self.task.valid, "test": self.task.test}.get(part)
        if data is None:
            raise BadInput(f"this task has no part {part!r}; there are train, valid and, if given, test.")
        losses, metrics, counts = [], [], []
        task, total = self.task, size(data)
        for start in range(0, total, _EVALUATED_AT_ONCE):
            indices = torch.arange(start, min(start + _EVALUATED_AT_ONCE, total))
            with guest(f"The loss or metric of {task.name or 'the task'}"):
                batch = moved(take(data, indices), self._device)
                losses.append(float(task.loss(self.model, batch)))
                same = task.metric is task.loss
                metrics.append(losses[-1] if same else float(task.metric(self.model, batch)))
            counts.append(len(indices))
        return Evaluation(_mean(losses, counts), _mean(metrics, counts))

    def _observe(self) -> None:
        """Validate, and tell the strategies and schedules that go by it."""
        with self._evaluating():
            seen = self._judge("valid")
            self.company.observed(self.step, seen.loss, seen.metric)
        self.optimizer.observe(seen.loss)

    def save(self, folder: Folder) -> str:
        """Write a checkpoint, durably and whole or not at all, and return the SHA-256 of its manifest.

        The same state gives the same bytes. BadInput if the folder is there already, or the disk refuses.
        """
        files = {
            "model.safetensors": checkpoint.pack(self._weights()),
            "optimizer.safetensors": checkpoint.pack(self._slots()),
            "state.json": checkpoint.dump(self._data()),
        }
        if hidden := self._hidden_buffers():
            files["buffers.safetensors"] = checkpoint.pack(hidden)
        if held := self.company.tensors():
            files["strategies.safetensors"] = checkpoint.pack(held)
        return checkpoint.write(folder, files, step=self.step, world=1)

    @classmethod
    def load(cls, folder: Folder, task: Task, recipe: Recipe | None = None, sha: str | None = None) -> Self:
        """The state that was saved in `folder`; `sha` is what `save` returned.

        Raises Damaged (a BadInput) naming the file that is not as it was saved, and BadInput if task or
        recipe are not those of the checkpoint.
        """
        files = checkpoint.verify(folder, sha)["files"]
        data = checkpoint.parse(folder, "state.json")
        saved = Recipe.parse(data["recipe"], f"{folder}/state.json")
        if recipe is not None and recipe.hash != saved.hash:
            changes = "; ".join(map(str, saved.diff(recipe)))
            raise BadInput(f"the checkpoint {folder} was made by another recipe: {changes}.")
        state = cls(task, saved, data["seed"], fresh=False)
        if state.samples != data["samples"]:
            raise BadInput(
                f"the checkpoint {folder} saw {data['samples']} samples, the task now has {state.samples}."
            )
        weights = checkpoint.tensors(folder, "model.safetensors")
        check_alike(state._weights(), weights, Path(folder))
        with torch.no_grad():
            state.model.load_state_dict(weights)
            hidden = state._hidden_buffers()
            if "buffers.safetensors" in files:
                for name, buffer in checkpoint.tensors(folder, "buffers.safetensors").items():
                    hidden[name].copy_(buffer)
        held = "strategies.safetensors" in files
        state.company.load(
            data["strategies"], checkpoint.tensors(folder, "strategies.safetensors") if held else {}
        )
        state._load_optimizer(data["optimizer"], checkpoint.tensors(folder, "optimizer.safetensors"))
        state.batches, state.skips_in_a_row = data["batches"], data["skips_in_a_row"]
        state._surroundings = Surroundings(Generators.from_data(data["generators"]), data["threads"])
        return state

    def fields(self) -> dict[str, str]:
        """Every counter, generator and tensor by name, as text that is equal if and only if the bits are."""
        data = self._data()
        found = {name: str(data[name]) for name in ("step", "batches", "skips_in_a_row", "threads")}
        for name, value in data["generators"].items():
            items = value if name == "devices" else {name: value}
            found |= {f"generator {key}": digest(str(item).encode()) for key, item in items.items()}
        tensors = {f"model {name}": tensor for name, tensor in self._weights().items()}
        tensors |= {f"model {name}": tensor for name, tensor in self._hidden_buffers().items()}
        tensors |= {f"optimizer {name}": tensor for name, tensor in self._slots().items()}
        tensors |= {f"strategy {name}": tensor for name, tensor in self.company.tensors().items()}
        found |= {name: fingerprint(tensor) for name, tensor in tensors.items()}
        for place, group in enumerate(data["optimizer"]["param_groups"]):
            found |= {f"optimizer group {place} {key}": repr(value) for key, value in group.items()}
        found |= {f"strategy {name}": repr(held) for name, held in data["strategies"].items()}
        found["optimizer seen"] = repr(data["optimizer"]["seen"])
        return {**found, "optimizer schedules": repr(data["optimizer"]["schedules"])}

    def _attempt(self) -> Attempt:
        step, lr = self.step, self.optimizer.param_groups[0].get("lr")
        guarded = partial(guest, f"The loss of {self.task.name or 'the task'}")
        with guarded():
            batch = self._batch()
        self.company.before(step)
        pieces = list(self.company.parts(batch))

        def closure() -> Tensor:
            with guarded():
                self.optimizer.zero_grad()
                losses = [_backward(self._loss(self.model, piece), share) for piece, share in pieces]
                return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

        if self.optimizer.asks_again:
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            self.optimizer.step()
        self.batches += 1
        skipped = self.optimizer.skipped.names if self.optimizer.skipped else ()
        if self.step > step:
            self.company.applied(self.step)
            if self._observes and self.step % self._observes == 0:
                self._observe()
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        return Attempt(step, loss.detach(), lr, skipped)

    def _check_progress(self, skipped: tuple[str, ...]) -> None:
        if self.skips_in_a_row >= SKIPS:
            raise Diverged(
                f"{SKIPS} updates in a row were skipped at step {self.step}, because the gradients of "
                f"{_listed(skipped)} were not finite: the training diverged; a lower rate may help."
            )
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            raise BadInput(
                "the loss gave no parameter a gradient: does it depend on the model's trainable parameters?"
            )

    def _batch(self) -> Batch:
        epoch, position, count = self.epoch, self.position, self.recipe.batch_size
        if self._order[0] != epoch:
            self._order = (epoch, order(self.samples, self.seed, epoch))
        return self._taken(self._order[1][position * count : (position + 1) * count])

    def _taken(self, indices: Tensor) -> Batch:
        batch = take(self._train, indices)
        return batch if self._train is not self.task.train else moved(batch, self._device)

    def _first_batches(self, count: int) -> Iterator[Batch]:
        """The first batches of the training, in the order of its first pass; no more than that has."""
        first, items = order(self.samples, self.seed, 0), self.recipe.batch_size
        for place in range(min(count, self.steps_per_epoch)):
            yield self._taken(first[place * items : (place + 1) * items])

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with kept():
            self._surroundings.restore()
            try:
                yield
            finally:
                now = Generators.now()
                self._surroundings = Surroundings(now, self._surroundings.threads)

    def _weights(self) -> dict[str, Tensor]:
        """The model's state dict. BadInput if a module keeps something in it that is no tensor."""
        weights: dict[str, Any] = self.model.state_dict()
        for name, value in weights.items():
            if not isinstance(value, Tensor):
                raise BadInput(
                    f"{name} of the model is a {type(value).__name__}, and a checkpoint holds tensors; "
                    "let get_extra_state return a tensor."
                )
        return weights

    def _hidden_buffers(self) -> dict[str, Tensor]:
        """Buffers that the state dict leaves out (persistent=False), which a training may still need."""
        shown = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name not in shown}

    def _slots(self) -> dict[str, Tensor]:
        """The optimizer's state by "<parameter name>.<slot>"."""
        packed = self.optimizer.state_dict()
        names = _names(packed["param_groups"])
        return {
            f"{names[identity]}.{slot}": tensor
            for identity, slots in packed["state"].items()
            for slot, tensor in slots.items()
        }

    def _data(self) -> dict[str, Any]:
        """Everything that is no tensor of model and optimizer, as plain data."""
        packed = self.optimizer.state_dict()
        return {
            "schema": checkpoint.SCHEMA,
            "task": self.task.name,
            "samples": self.samples,
            "seed": self.seed,
            "recipe": self.recipe.text(),
            "step": self.step,
            "batches": self.batches,
            "skips_in_a_row": self.skips_in_a_row,
            "threads": self.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "generators": self._surroundings.generators.data(),
            "strategies": self.company.data(),
            "optimizer": {
                "param_groups": _plain(packed["param_groups"]),
                "schedules": packed["schedules"],
                "seen": packed["seen"],
            },
        }

    def _load_optimizer(self, data: Mapping[str, Any], slots: Mapping[str, Tensor]) -> None:
        ids = {name: identity for identity, name in _names(data["param_groups"]).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in slots.items():
            name, _, slot = key.rpartition(".")
            state.setdefault(ids[name], {})[slot] = tensor
        with warnings.catch_warnings():
            # What a branch follows differs from its recipe on purpose; the recipe itself was compared.
            warnings.filterwarnings("ignore", message="the checkpoint's numbers are used")
            self.optimizer.load_state_dict({**data, "state": state})


def trained(folder: str) -> nn.Module:
    """The model of a finished run, with the weights that were evaluated; BadInput if it has not ended."""
    plan = Plan.read(folder)
    events = history(read(Path(folder, "journal.jsonl")))
    if not any(event["kind"] == "end" for event in events):
        raise BadInput(f"the run in {folder} has not ended; go on with it by `downslope resume {folder}`.")
    last = next(event for event in reversed(events) if event["kind"] == "checkpoint")
    task = plan.find_task(None, allow_code_change=False)
    state = TrainState.load(Path(folder, "ckpt", last["name"]), task, sha=last["sha"])
    state.finish()
    return state.model


def _backward(loss: Tensor, share: float) -> Tensor:
    """Send a loss backward, as a share of the whole. ValueError if it is not one number."""
    if not isinstance(loss, Tensor) or loss.ndim:
        given = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"a loss must be a tensor with one number (0-d), got {given}")
    part = loss if share == 1.0 else loss * share
    part.backward()  # type: ignore[no-untyped-call]
    return part.detach()


def _names(groups: list[dict[str, Any]]) -> dict[int, str]:
    return {
        identity: name
        for group in groups
        for identity, name in zip(group["params"], group["param_names"], strict=True)
    }


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in groups
    ]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _mean(values: list[float], counts: list[int]) -> float:
    total = sum(value * count for value, count in zip(values, counts, strict=True))
    return total / sum(counts)
