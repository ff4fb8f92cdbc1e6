"""Who teaches: a model that is only read."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from downslope.distill.cache import checked_temperature
from downslope.distill.layer import bare, captured, logits_of
from downslope.errors import BadInput, nearest

BATCHNORM = ("eval", "train", "update")
AVERAGES = ("probabilities", "logits")


class Teacher:
    """A model as a teacher: `teacher(inputs)` is its output in evaluation mode, without gradient.

    Each call borrows the model: modes are set for that call and put back to what they were, layer by layer,
    and no flag of a parameter changes; so student and teacher may share layers, or be one. It is not an
    nn.Module: kept as an attribute of one, it enters neither state dict nor optimizer. `batchnorm` is "eval"
    (running statistics, the default), "train" (those of the batch; the running ones stay as they are) or
    "update" (the running ones follow too). Not for: one that learns beside its student: see `mutual`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    >>> teacher = Teacher(model)
    >>> teacher(torch.ones(1, 2)).requires_grad, model.training
    (False, True)
    """

    def __init__(self, model: nn.Module, *, batchnorm: str = "eval") -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"A teacher must be a torch.nn.Module, got {type(model).__name__}.")
        if batchnorm not in BATCHNORM:
            raise BadInput(
                f"batchnorm of a teacher is one of {', '.join(BATCHNORM)}, got {batchnorm!r}."
                f"{nearest(batchnorm, BATCHNORM)}"
            )
        self.model, self.batchnorm = model, batchnorm

    @classmethod
    def copy_of(cls, model: nn.Module, *, batchnorm: str = "eval") -> Self:
        """A teacher with a frozen copy of the model as it is now, which training it does not change."""
        return cls(copy.deepcopy(bare(model)).requires_grad_(False), batchnorm=batchnorm)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, computed without gradient."""
        with torch.no_grad(), _borrowed(self.model, self.batchnorm):
            return self.model(*args, **kwargs)

    def features(self, inputs: Any, names: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Its logits, and what the layers of these names put out; BadInput for a name it does not have."""
        with captured(self.model, names) as found:
            output = self(inputs)
        return logits_of(output), found

    def logits(self, inputs: Any, temperature: float = 1.0) -> Tensor:
        """Its logits, the same for whatever temperature they will be softened by."""
        checked_temperature(temperature)
        return logits_of(self(inputs))

    @torch.no_grad()
    def follow(self, model: nn.Module, decay: float = 0.999) -> None:
        """Become decay·own + (1 − decay)·model, parameters and floating buffers (arXiv:1703.01780).

        For a teacher from `copy_of`, after each update: the student's own earlier average teaches it. Other
        buffers are copied. Save `teacher.model` with such a training: it is state. Not for weights in half
        precision, where small moves round to none. BadInput for a model with other names, or with the same
        tensors.
        """
        if not 0 <= decay <= 1:
            raise BadInput(f"decay must be from 0 to 1, got {decay}.")
        own, theirs = (_tensors(bare(side)) for side in (self.model, model))
        if own.keys() != theirs.keys():
            raise BadInput("A teacher can only follow a model with its own parameters and buffers.")
        if any(own[name] is theirs[name] for name in own):
            raise BadInput("This teacher is the model it should follow; make it by Teacher.copy_of(model).")
        for name, tensor in own.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name].detach().to(tensor), 1 - decay)
            else:
                tensor.copy_(theirs[name])


class Teachers:
    """Several teachers by name, as one: the weighted average of their probabilities, or of their logits.

    `weights` (default: equal) are numbers from 0, made to sum to 1, and may be changed between calls.
    Averaged logits are the geometric mean of probabilities: what one teacher excludes is excluded. Not
    for: methods on features, of which several models have no average.
    """

    def __init__(
        self,
        teachers: Mapping[str, nn.Module | Teacher],
        weights: Mapping[str, float] | None = None,
        *,
        average: str = "probabilities",
    ) -> None:
        if not teachers:
            raise BadInput("Teachers must be named: {'name': model, ...}; there are none.")
        self.teachers = {
            name: one if isinstance(one, Teacher) else Teacher(one) for name, one in teachers.items()
        }
        self.weights = dict(weights) if weights is not None else dict.fromkeys(self.teachers, 1.0)
        self.average = average
        _weighted(self.teachers, self.weights, average)

    def logits(self, inputs: Any, temperature: float = 1.0) -> Tensor:
        """Logits whose softmax at this temperature is the average of the teachers' at this temperature."""
        answers = {name: teacher.logits(inputs) for name, teacher in self.teachers.items()}
        return averaged(answers, self.weights, average=self.average, temperature=temperature)


def averaged(
    answers: Mapping[str, Tensor],
    weights: Mapping[str, float] | None = None,
    *,
    average: str = "probabilities",
    temperature: float = 1.0,
) -> Tensor:
    """One teacher's logits [..., classes] from several, by name, to be softened by the same temperature.

    >>> sure, unsure = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 0.0])
    >>> averaged({"a": sure, "b": unsure}, {"a": 1, "b": 3}, average="logits")
    tensor([1., 0.])
    """
    checked_temperature(temperature)
    parts = _weighted(answers, weights or dict.fromkeys(answers, 1.0), average)
    if len({answer.shape for answer in answers.values()}) != 1:
        shapes = {name: list(answer.shape) for name, answer in answers.items()}
        raise BadInput(f"Several teachers must answer in one shape, got {shapes}.")
    if average == "logits":
        return torch.stack([part * answers[name] for name, part in parts.items()]).sum(0)
    logs = [
        torch.log_softmax(answers[name] / temperature, dim=-1) + math.log(part)
        for name, part in parts.items()
        if part > 0
    ]
    return temperature * torch.stack(logs).logsumexp(0)


def _weighted(names: Iterable[str], weights: Mapping[str, float], average: str) -> dict[str, float]:
    names = list(names)
    for name in weights:
        if name not in names:
            raise BadInput(f"There is no teacher {name!r}.{nearest(name, names)}")
    if missing := [name for name in names if name not in weights]:
        raise BadInput(f"The teacher {missing[0]!r} has no weight.")
    if not (all(0 <= weight < math.inf for weight in weights.values()) and sum(weights.values()) > 0):
        raise BadInput(f"Weights of teachers are numbers from 0, not all 0, got {dict(weights)}.")
    if average not in AVERAGES:
        raise BadInput(
            f"average is one of {', '.join(AVERAGES)}, got {average!r}.{nearest(average, AVERAGES)}"
        )
    return {name: weights[name] / sum(weights.values()) for name in names}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@contextmanager
def _borrowed(model: nn.Module, batchnorm: str) -> Iterator[None]:
    """Evaluation mode inside, set layer by layer: `train()` and `eval()` of some models do more than that."""
    before = {module: module.training for module in model.modules()}
    kept = [
        module
        for module in before
        if isinstance(module, _BatchNorm) and batchnorm == "train" and module.track_running_stats
    ]
    try:
        for module in before:
            module.training = batchnorm != "eval" and isinstance(module, _BatchNorm)
        for module in kept:
            module.track_running_stats = False  # torch then neither reads nor writes them in training mode
        yield
    finally:
        for module in kept:
            module.track_running_stats = True
        for module, training in before.items():
            module.training = training
