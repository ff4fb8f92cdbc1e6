"""Distillation: a student learns from the models of finished runs beside its targets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from downslope.distill import Distillation, Places, Teacher, Teachers, TopK, distill, remember
from downslope.distill.layer import logits_of
from downslope.distill.teacher import AVERAGES
from downslope.errors import BadInput, nearest, under
from downslope.optimizer import Optimizer
from downslope.rules.adaptive import adam
from downslope.schedule import Schedule
from downslope.strategies.field import extent
from downslope.strategies.strategy import Batch, Live, Loss, Setting, Strategy

BATCHNORM = ("eval", "train")
_WITHIN_A_BATCH = ("distance", "angle", "relational")


@dataclass(frozen=True, kw_only=True)
class teacher(Strategy):
    """Learn from finished runs: (1 − alpha)·the task's loss + alpha·Σ weight·term of `distill`'s methods.

    `run`: a run's folder, seen from the working directory, or several with `weights`, their "probabilities"
    or "logits" `average`d. `method`: one, or weights by name; those on features take `layers`, pairs of
    student's and teacher's, and train regressors between widths by an Adam of their own at `rate`.
    `temperature`, `alpha`: numbers or schedules. `batchnorm`: statistics that run ("eval") or are the batch's
    ("train"). `cache`: keep that many classes of each answer, and ask once; "logits" alone. Items count
    alike; a target `ignore_index` not at all. Source: arXiv:1503.02531. Not for: teachers trained with label
    smoothing, which tell less (arXiv:1906.02629).
    """

    run: str | tuple[str, ...]
    weights: tuple[float, ...] | None = None
    average: str = "probabilities"
    method: str | Mapping[str, float] = "logits"
    temperature: float | Schedule = 4.0
    alpha: float | Schedule = 0.5
    beta: float = 8.0
    layers: tuple[tuple[str, str], ...] = ()
    rate: float = 1e-3
    batchnorm: str = "eval"
    cache: int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs or not all(self.runs):
            raise BadInput(f"run is the folder of a finished run, or a list of them, got {self.run!r}.")
        if len(set(self.runs)) < len(self.runs):
            raise BadInput(f"run names a folder twice: {', '.join(self.runs)}.")
        if self.weights is not None and len(self.weights) != len(self.runs):
            raise BadInput(f"weights has {len(self.weights)} numbers for {len(self.runs)} runs.")
        if self.batchnorm not in BATCHNORM:
            with under("batchnorm"):  # "update" would make the teacher a part of the training's state
                hint = nearest(self.batchnorm, BATCHNORM)
                raise BadInput(f"batchnorm is one of {', '.join(BATCHNORM)}, got {self.batchnorm!r}.{hint}")
        if not self.rate > 0:
            with under("rate"):
                raise BadInput(f"rate must be above 0, got {self.rate!r}.")
        self._check_numbers()
        self._check_cache()
        Distillation(self._taught({run: nn.Identity() for run in self.runs}), **self._options())

    def _check_numbers(self) -> None:
        """What schedules, and distillations that have no use for them, let pass."""
        (coldest, _), (least, most) = extent(self.temperature), extent(self.alpha)
        weights = {} if isinstance(self.method, str) else self.method
        for key, wrong, said in (
            ("temperature", coldest <= 0, f"temperature must stay above 0, got {coldest:g}"),
            (
                "alpha",
                not 0 <= least <= most <= 1,
                f"alpha is the teacher's share, from 0 to 1, got {most:g}",
            ),
            ("beta", self.beta < 0, f"beta must be a number from 0, got {self.beta:g}"),
            ("method", min(weights.values(), default=0) < 0, "weights of methods are numbers from 0"),
            (
                "average",
                self.average not in AVERAGES,
                f"average is one of {', '.join(AVERAGES)}, got {self.average!r}",
            ),
        ):
            if wrong:
                with under(key):
                    raise BadInput(f"{said}.")

    def _check_cache(self) -> None:
        """One answer for each input must be all that a method needs."""
        other = [name for name in self.methods if name != "logits"]
        for wrong, said in (
            (self.cache is not None and self.cache < 1, f"keeps at least 1 class, got {self.cache}"),
            (bool(other), f"keeps logits, and the method {''.join(other[:1])!r} needs more of a teacher"),
            (isinstance(self.temperature, Schedule), "keeps answers at one temperature, not at a schedule's"),
            (
                self.batchnorm == "train",
                'keeps one answer to an input; of batchnorm "train" each batch has its own',
            ),
        ):
            if self.cache is not None and wrong:
                with under("cache"):
                    raise BadInput(f"cache {said}.")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' names."""
        return (self.method,) if isinstance(self.method, str) else tuple(self.method)

    @property
    def runs(self) -> tuple[str, ...]:
        """The folders."""
        return (self.run,) if isinstance(self.run, str) else self.run

    def alone(self, shard: bool) -> str:
        """Items of one batch must not lie on several ranks, nor regressors learn from one rank's items."""
        if related := [name for name in self.methods if name in _WITHIN_A_BATCH]:
            return f"its method {related[0]!r} compares the items of a batch with each other"
        return "regressors between layers are trained on one rank's items" if self.layers else ""

    def refuse(self, others: Mapping[str, Strategy]) -> None:
        """What the methods compare must be there."""
        related = [name for name in self.methods if name in _WITHIN_A_BATCH]
        if "micro" in others and related:
            raise BadInput(
                f"[teacher] with the method {related[0]!r} compares the items of a batch with each other, "
                "which [micro] takes apart: leave out one of them."
            )
        soft = [name for name in ("mix", "smoothing") if name in others]
        if "decoupled" in self.methods and soft:
            raise BadInput(
                f"[teacher] with the method 'decoupled' needs a class for each item, and [{soft[0]}] makes "
                "probabilities of them: take the method 'logits', or leave it out."
            )
        if self.cache is not None and "mix" in others:
            raise BadInput(
                "[teacher] with cache knows the inputs of the data, and [mix] makes others of them for each "
                "batch: leave out cache or [mix]."
            )

    def begin(self, training: Setting) -> Live:
        """The loss with the teachers in it, tried on the first batch without a trace."""
        device = next(training.model.parameters()).device
        models = {run: training.teacher(run).to(device) for run in self.runs}
        (batch,) = training.batches(1)
        inputs, _ = _pair(batch)
        with torch.no_grad():
            own = training.of(lambda student, given: logits_of(Teacher(student)(given)).shape, inputs)
        _check_answers(models, own, inputs)
        taught, places = self._remembered(self._taught(models), training, own[-1])
        with torch.random.fork_rng(devices=[]):  # a student draws as it would alone
            torch.manual_seed(training.seed)
            loss = distill(
                training.model,
                taught,
                self.method,
                layers=dict(self.layers),
                sample=inputs if "hints" in self.methods else None,
                **{key: value for key, value in self._options().items() if key not in ("weights", "pairs")},
            )
        if loss.regressors and training.optimizer is not None and training.optimizer.asks_again:
            raise BadInput(
                f"[teacher] steps the regressor behind {next(iter(loss.regressors))!r} once a batch, and "
                f"{training.optimizer.chain.name} asks for the gradient several times: take layers alike."
            )
        teachers = {run: _sha(model) for run, model in models.items()}
        return _Taught(loss, self._schedules(training), teachers, self.rate, places)

    def _schedules(self, training: Setting) -> dict[str, Schedule]:
        """The numbers that follow one."""
        return {
            name: number.resolve(**training.rates)
            for name in ("temperature", "alpha")
            if isinstance(number := getattr(self, name), Schedule)
        }

    def _remembered(
        self, taught: Teacher | Teachers, training: Setting, classes: int
    ) -> tuple[Teacher | Teachers | TopK, Places | None]:
        """With `cache`, the answers to all samples: asked for in one order and in the same batches wherever
        a training begins or goes on, they are the same to the bit, and need not be saved.
        """
        if self.cache is None:
            return taught, None
        if self.cache > classes:
            with under("cache"):
                raise BadInput(f"[teacher] cache is at most the {classes} classes, got {self.cache}.")
        temperature = self._options()["temperature"]
        inputs = (_pair(batch)[0] for batch in training.samples())
        return remember(
            lambda one: taught.logits(one, temperature), inputs, self.cache, temperature=temperature
        )

    def _taught(self, models: Mapping[str, nn.Module]) -> Teacher | Teachers:
        """The teachers as one."""
        each = {run: Teacher(model, batchnorm=self.batchnorm) for run, model in models.items()}
        if len(each) == 1:
            return next(iter(each.values()))
        weights = None if self.weights is None else dict(zip(self.runs, self.weights, strict=True))
        return Teachers(each, weights, average=self.average)

    def _options(self) -> dict[str, Any]:
        """What a `Distillation` is made with; a schedule's value comes before each update."""
        return {
            "weights": {self.method: 1.0} if isinstance(self.method, str) else dict(self.method),
            "temperature": 1.0 if isinstance(self.temperature, Schedule) else self.temperature,
            "alpha": 0.5 if isinstance(self.alpha, Schedule) else self.alpha,
            "beta": self.beta,
            "pairs": dict(self.layers),
            "ignore_index": self.ignore_index,
        }


class _Taught(Live):
    """Of the teachers only fingerprints are saved, and another teacher is refused."""

    def __init__(
        self,
        loss: Distillation,
        schedules: Mapping[str, Schedule],
        teachers: Mapping[str, str],
        rate: float,
        places: Places | None,
    ) -> None:
        self.distillation, self.schedules, self.teachers = loss, schedules, teachers
        self.places = places
        named = list(loss.named_parameters())
        self.optimizer = Optimizer(named, adam(lr=rate), guard=True) if named else None

    def loss(self, loss: Loss) -> Loss:
        def taught(model: nn.Module, batch: Batch) -> Tensor:
            once = _Once(model, loss, batch)
            self.distillation.hard = once.hard
            inputs, targets = _pair(batch)
            rows = () if self.places is None else (self.places(inputs),)
            return self.distillation(once, (inputs, targets, *rows))

        return taught

    def before(self, step: int) -> None:
        for name, schedule in self.schedules.items():
            setattr(self.distillation, name, schedule(step))
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def applied(self, step: int) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        if self.optimizer is None:
            return {}
        slots = {
            f"slot.{place}.{slot}": tensor
            for place, held in self.optimizer.state_dict()["state"].items()
            for slot, tensor in held.items()
        }
        return {**self.distillation.state_dict(), **slots}

    def data(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {"teachers": dict(self.teachers)}
        packed = self.optimizer.state_dict()
        del packed["state"]
        return {"teachers": dict(self.teachers), "regressors": packed}

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for run, sha in data["teachers"].items():
            if self.teachers.get(run) != sha:
                raise BadInput(
                    f"the teacher in {run} is not the one that this training began with: the SHA-256 of its "
                    f"weights is {self.teachers.get(run, 'unknown')[:12]}…, and was {sha[:12]}…."
                )
        if self.optimizer is None:
            return
        slots: dict[int, dict[str, Tensor]] = {}
        weights = {}
        for key, tensor in tensors.items():
            head, _, rest = key.partition(".")
            if head == "slot":
                place, _, slot = rest.partition(".")
                slots.setdefault(int(place), {})[slot] = tensor
            else:
                weights[key] = tensor
        self.distillation.load_state_dict(weights)
        self.optimizer.load_state_dict({**data["regressors"], "state": slots})


class _Once(nn.Module):
    """The student as a distillation calls it: its answer in the one pass that the task's own loss makes."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch) -> None:
        super().__init__()
        self.module = model
        self.task_loss, self.batch = loss, batch

    def forward(self, _inputs: Any) -> Any:
        with _answers(self.module) as found:
            self.value = self.task_loss(self.module, self.batch)
        if len(found) != 1:
            raise BadInput(f"[teacher] needs a loss that runs the model once; it ran {len(found)} times.")
        return found[0]

    def hard(self, _output: Tensor, _targets: Tensor) -> Tensor:
        """The task's own loss, of that pass."""
        return self.value


@contextmanager
def _answers(model: nn.Module) -> Any:
    """A list of what the model returns inside."""
    found: list[Any] = []
    keep: Callable[..., None] = lambda _model, _inputs, output: found.append(output)  # noqa: E731
    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _pair(batch: Batch) -> tuple[Any, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise BadInput("to learn from a teacher, a batch must be (inputs, targets).")
    return batch[0], batch[1]


def _check_answers(models: Mapping[str, nn.Module], own: torch.Size, inputs: Any) -> None:
    """BadInput for a teacher of other inputs, or other classes than those of the student's logits."""
    for run, model in models.items():
        try:
            theirs = Teacher(model).logits(inputs).shape
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            said = str(error).strip().split("\n")[0]
            raise BadInput(f"the teacher in {run} does not take this task's inputs: {said}.") from error
        if theirs != own:
            raise BadInput(
                f"the teacher in {run} answers with logits of shape {list(theirs)}, and the student with "
                f"{list(own)}: they must have the same positions and classes."
            )


def _sha(model: nn.Module) -> str:
    """The SHA-256 of names, types, shapes and bits of a state dict."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {list(plain.shape)} ".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
