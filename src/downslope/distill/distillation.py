"""distill: a loss by which a student learns from a teacher, in anyone's own loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from downslope.distill import feature, logit
from downslope.distill.cache import TopK, checked_temperature
from downslope.distill.layer import captured, layers, logits_of, regressor
from downslope.distill.position import Count, counted, shared
from downslope.distill.teacher import Teacher, Teachers
from downslope.errors import BadInput, nearest

Layers: TypeAlias = Mapping[str, str] | Sequence[str]
Hard: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What one pass of student and teacher gave: logits of both, and features of each pair of layers."""

    student: Tensor
    teacher: Tensor | TopK | None
    pairs: list[tuple[Tensor, Tensor]]
    targets: Tensor
    count: Count
    own: int | Tensor  # positions counted in this batch


class Distillation:
    """`loss(model, batch)`: (1 − alpha)·hard + alpha·Σ weight·term of each method, a 0-d tensor.

    A batch is (inputs, targets), or (inputs, targets, rows) for a teacher that is a cache. `count` is the
    number of counted positions of an accumulated batch, whose micro-batches then add up to it. `temperature`,
    `alpha`, `beta` and `weights` (method → weight) are plain attributes, to be scheduled by whoever likes.
    `regressors` (layer → module) are trained with the student: give `named_parameters()` to its optimizer and
    save `state_dict()`. The teacher is in neither. Made by `distill`.
    """

    def __init__(
        self,
        teacher: Teacher | Teachers | TopK | None,
        weights: Mapping[str, float],
        *,
        temperature: float = 4.0,
        alpha: float = 0.5,
        beta: float = 8.0,
        pairs: Mapping[str, str] | None = None,
        regressors: Mapping[str, nn.Module] | None = None,
        hard: Hard | None = None,
        ignore_index: int = -100,
    ) -> None:
        self.teacher, self.weights, self.hard = teacher, dict(weights), hard
        self.temperature = checked_temperature(temperature)
        self.alpha, self.beta, self.ignore_index = logit.checked_share(alpha), beta, ignore_index
        self.layers = dict(pairs or {})
        self.regressors = dict(regressors or {})
        _check(self)

    def __call__(self, model: nn.Module, batch: Sequence[Any], count: Count = None) -> Tensor:
        """The loss of a student on a batch, whatever wraps it; only it and the regressors get gradients."""
        inputs, targets = batch[:2]
        with captured(model, self._own()) as own:
            output = logits_of(model(inputs))
        answer, theirs = self._taught(inputs, batch[2:], own)
        positions = self._positions(output, targets)
        pairs = [(self._led(mine, own[mine]), theirs[other]) for mine, other in self.layers.items()]
        seen = Seen(output, answer, pairs, targets, count, positions)
        soft = sum(weight * TERMS[name](self, seen) for name, weight in self.weights.items())
        return (1 - logit.checked_share(self.alpha)) * self._hard(seen) + self.alpha * soft

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The regressors' parameters, named "regressor.LAYER.weight" and so on: for the optimizer."""
        for layer, module in self.regressors.items():
            yield from module.named_parameters(f"regressor.{layer}")

    def state_dict(self) -> dict[str, Tensor]:
        """The regressors' tensors by name, detached; empty where there are none. The teacher is not in it."""
        return {
            f"regressor.{layer}.{name}": tensor
            for layer, module in self.regressors.items()
            for name, tensor in module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; BadInput if it is not of these regressors."""
        if state.keys() != self.state_dict().keys():
            raise BadInput("This state is not that of these regressors: the names differ.")
        for layer, module in self.regressors.items():
            head = f"regressor.{layer}."
            module.load_state_dict(
                {name.removeprefix(head): tensor for name, tensor in state.items() if name.startswith(head)}
            )

    def _own(self) -> list[str]:
        within = self.layers.values() if self.teacher is None else ()
        return list(dict.fromkeys([*self.layers, *within]))

    def _taught(
        self, inputs: Any, rows: Sequence[Tensor], own: Mapping[str, Tensor]
    ) -> tuple[Tensor | TopK | None, Mapping[str, Tensor]]:
        """The teacher's logits and features of its layers."""
        if isinstance(self.teacher, TopK):
            if len(rows) != 1:
                raise BadInput(
                    "A batch for a cached teacher is (inputs, targets, rows), rows being its items' places."
                )
            return self.teacher[rows[0]], {}
        if self.teacher is None:
            return None, own
        if isinstance(self.teacher, Teacher) and self.layers:
            return self.teacher.features(inputs, dict.fromkeys(self.layers.values()))
        return self.teacher.logits(inputs, self.temperature), {}

    def _led(self, layer: str, features: Tensor) -> Tensor:
        module = self.regressors.get(layer)
        return features if module is None else module(features)

    def _positions(self, output: Tensor, targets: Tensor) -> int | Tensor:
        mask = counted(targets, targets.shape, self.ignore_index)
        if mask is not None:
            return mask.sum()
        return len(targets) if self.hard is not None else output.shape[:-1].numel()

    def _hard(self, seen: Seen) -> Tensor:
        if self.hard is not None:
            return shared(self.hard(seen.student, seen.targets), seen.own, seen.count)
        return logit.cross_entropy(
            seen.student, seen.targets, ignore_index=self.ignore_index, count=seen.count
        )


def distill(
    student: nn.Module | None,
    teacher: nn.Module | Teacher | Teachers | TopK | None,
    method: str | Mapping[str, float] = "logits",
    temperature: float = 4.0,
    *,
    alpha: float = 0.5,
    beta: float = 8.0,
    layers: Layers = (),
    sample: Any = None,
    regressors: Mapping[str, nn.Module] | None = None,
    hard: Hard | None = None,
    ignore_index: int = -100,
) -> Distillation:
    """A loss by which the student learns from the teacher, by one of METHODS, or {method: weight} of several.

    `layers` {student's: teacher's} (or names that both have) are those of methods on features; with `sample`
    inputs both models run once, without a trace, to find where "hints" needs regressors. `student` may be
    None where no layers are named; `teacher` None takes the student's own deeper layers. `hard(output,
    targets)` replaces the cross entropy as a mean over positions. BadInput for what cannot combine. Not for:
    a teacher trained with label smoothing (arXiv:1906.02629).

    >>> student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> loss = distill(student, teacher, temperature=2.0, alpha=0.9)
    >>> loss(student, (torch.randn(8, 4), torch.zeros(8).long())).shape
    torch.Size([])
    """
    weights = {method: 1.0} if isinstance(method, str) else method
    pairs = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
    made = Distillation(
        teacher if isinstance(teacher, Teacher | Teachers | TopK | None) else Teacher(teacher),
        weights,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        pairs=pairs,
        regressors=regressors,
        hard=hard,
        ignore_index=ignore_index,
    )
    _check_layers(student, made)
    if sample is not None and "hints" in weights:
        _add_regressors(made, student, sample)
    return made


def born_again(
    model: nn.Module, method: str | Mapping[str, float] = "logits", temperature: float = 1.0, **options: Any
) -> Distillation:
    """The loss of the next generation: `model` as it is now, copied and frozen, teaches (arXiv:1805.04770).

    The student is a fresh model of the same form; train it, and call this with it again. Temperature 1 as in
    the paper; `options` are those of `distill`. Not for a weak first generation, which only hands its
    mistakes on.
    """
    return distill(None, Teacher.copy_of(model), method, temperature, **options)


def _logits(loss: Distillation, seen: Seen) -> Tensor:
    assert seen.teacher is not None
    return logit.divergence(
        seen.student,
        seen.teacher,
        seen.targets,
        temperature=loss.temperature,
        ignore_index=loss.ignore_index,
        count=seen.count,
    )


def _decoupled(loss: Distillation, seen: Seen) -> Tensor:
    assert isinstance(seen.teacher, Tensor)
    return logit.decoupled(
        seen.student,
        seen.teacher,
        seen.targets,
        temperature=loss.temperature,
        beta=loss.beta,
        ignore_index=loss.ignore_index,
        count=seen.count,
    )


def _placed(term: Callable[..., Tensor]) -> Callable[[Distillation, Seen], Tensor]:
    def of(loss: Distillation, seen: Seen) -> Tensor:
        options = {"ignore_index": loss.ignore_index, "count": seen.count}
        return torch.stack([term(*pair, seen.targets, **options) for pair in seen.pairs]).sum()

    return of


def _related(term: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Distillation, Seen], Tensor]:
    def of(_loss: Distillation, seen: Seen) -> Tensor:
        return shared(torch.stack([term(*pair) for pair in seen.pairs]).sum(), seen.own, seen.count)

    return of


TERMS: dict[str, Callable[[Distillation, Seen], Tensor]] = {
    "logits": _logits,
    "decoupled": _decoupled,
    "hints": _placed(feature.hints),
    "attention": _placed(feature.attention),
    "distance": _related(feature.distance),
    "angle": _related(feature.angle),
    "relational": _related(feature.relational),
}
METHODS = tuple(TERMS)
"""Names of the methods: on logits the first two, on features the others, summed over the named layers."""

_ON_LOGITS = METHODS[:2]


def _check(loss: Distillation) -> None:
    """What cannot combine is refused, with the reason."""
    for name in loss.weights:
        if name not in TERMS:
            raise BadInput(
                f"There is no method {name!r}.{nearest(name, METHODS)} There are: {', '.join(METHODS)}."
            )
    on_logits = [name for name in loss.weights if name in _ON_LOGITS]
    on_features = [name for name in loss.weights if name not in _ON_LOGITS]
    if not loss.weights:
        raise BadInput(f"A distillation needs a method: {', '.join(METHODS)}.")
    if on_features and not loss.layers:
        raise BadInput(
            f"The method {on_features[0]!r} compares features: name them, layers={{'student': 'teacher'}}."
        )
    if loss.layers and not on_features:
        raise BadInput(f"The method {on_logits[0]!r} compares logits; layers are for methods on features.")
    if isinstance(loss.teacher, TopK | Teachers) and on_features:
        raise BadInput(
            f"The method {on_features[0]!r} needs the features of one model; {type(loss.teacher).__name__} "
            "has logits only."
        )
    if isinstance(loss.teacher, TopK) and "decoupled" in on_logits:
        raise BadInput("The method 'decoupled' needs every class; TopK keeps some of them.")
    if isinstance(loss.teacher, TopK) and loss.teacher.temperature != loss.temperature:
        raise BadInput(
            f"The cache was made at temperature {loss.teacher.temperature}; say temperature="
            f"{loss.teacher.temperature}, got {loss.temperature}."
        )
    if loss.teacher is None and on_logits:
        raise BadInput(
            f"The method {on_logits[0]!r} needs a teacher; a model whose exits learn from its last one has "
            "downslope.distill.exits."
        )
    for layer in loss.regressors:
        if layer not in loss.layers:
            raise BadInput(
                f"A regressor is named after a student's layer, got {layer!r}.{nearest(layer, loss.layers)}"
            )


def _check_layers(student: nn.Module | None, loss: Distillation) -> None:
    if student is not None:
        layers(student, loss._own())
    if isinstance(loss.teacher, Teacher):
        layers(loss.teacher.model, loss.layers.values())


def _add_regressors(loss: Distillation, student: nn.Module | None, sample: Any) -> None:
    """One pass of each model over `sample` in evaluation mode shows the widths."""
    if student is None:
        raise BadInput("To find the widths of its features from a sample, the student itself is needed.")
    _, own = Teacher(student).features(sample, loss._own())
    theirs = own
    if isinstance(loss.teacher, Teacher):
        _, theirs = loss.teacher.features(sample, dict.fromkeys(loss.layers.values()))
    for mine, other in loss.layers.items():
        if mine not in loss.regressors and (made := regressor(own[mine], theirs[other])) is not None:
            loss.regressors[mine] = made
