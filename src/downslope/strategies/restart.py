"""Several starts in one training, of which the best ends it: for local minima."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from downslope.augment import EarlyStopping
from downslope.curvature import perturb
from downslope.errors import BadInput, nearest, under
from downslope.inspection import untouched
from downslope.schedule import KINDS, Schedule, constant, duration, in_steps, term
from downslope.strategies.escape import seed_at
from downslope.strategies.kept import Keeping, Kept
from downslope.strategies.stop import WAITED, WATCHED
from downslope.strategies.strategy import Live, Setting, Strategy

PLATEAU = "plateau"
BY = ("fresh", "ball")
RESETS = ("reset_parameters", "_reset_parameters")
"""What torch's own layers draw their first weights by."""

_BESIDE = {
    "stop": "which would end the training at a new start",
    "average": "which would mix the weights of one start with those of the next",
    "switch": "which counts one training, and not several starts",
}
_TRAINED = {
    "freeze": "which is for weights that were trained before",
    "normalisation": "whose frozen statistics are those of a trained model",
}


@dataclass(frozen=True, kw_only=True)
class restart(Strategy):
    """Train from several starts, one after the other, and end with the weights of the best validation of all.

    `at`: when the next begins, a duration, or "plateau": after `patience` validations in a row that are no
    better, by `min_delta`, than the best of this start, if as many updates are left. `starts`: at most, the
    first one included. `by`: "fresh", first weights drawn anew by each module's reset_parameters, then by
    [start]; "ball", the best so far, moved by a vector drawn evenly from a ball of `radius`. State begins
    anew, and the chain's schedules too, in proportion to the updates that a start has. Source: Rinnooy Kan
    and Timmer 1987 (multistart); Wales and Doye, arXiv:cond-mat/9803344. Not for: pretrained weights.
    """

    at: Any = PLATEAU
    starts: int = 3
    by: str = "fresh"
    radius: float = 1.0
    patience: int = 10
    min_delta: float = 0.0
    on: str = "loss"

    unfair: ClassVar[str] = "its starts are chosen by the validations that judge it"
    deeds: ClassVar[Mapping[str, str]] = {"start": "began anew"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in (("by", BY), ("on", WATCHED)):
            if (given := getattr(self, key)) not in allowed:
                with under(key):
                    raise BadInput(
                        f"{key} is one of {', '.join(allowed)}, got {given!r}.{nearest(given, allowed)}"
                    )
        with under("at"):
            if self.at != PLATEAU:
                try:
                    object.__setattr__(self, "at", duration(self.at, "at"))
                except BadInput as error:
                    hint = nearest(str(self.at), [PLATEAU])
                    raise BadInput(f'{error} Or "{PLATEAU}".{hint}') from None
        with under("starts"):
            if self.starts < 2:
                raise BadInput(f"starts are at least 2, the first one included, got {self.starts}.")
        with under("radius"):
            if not self.radius > 0:
                raise BadInput(f"radius must be above 0, got {self.radius:g}.")
        self._waiting("min")

    def alone(self, shard: bool) -> str:
        """It draws and keeps whole weights; whole on every rank, each draws the same."""
        return "it draws and keeps whole weights" if shard else ""

    def refuse(self, others: Mapping[str, Strategy]) -> None:
        """What looks at a training as one path from first weights to last."""
        reasons = _BESIDE | (_TRAINED if self.by == "fresh" else {})
        for name, reason in reasons.items():
            if name in others and (name != "normalisation" or others[name].data()["to"] == "frozen"):
                raise BadInput(f"[restart] begins anew, and does not go with [{name}], {reason}.")

    def begin(self, training: Setting) -> Live:
        """The watch over the starts."""
        steps = training.rates["run_steps"] or 0
        length = None if self.at == PLATEAU else in_steps(self.at, "at", **training.rates)
        if length is not None and not 0 < length * (self.starts - 1) < steps:
            raise BadInput(
                f"[restart] at = {self.at!r} is {length} updates: {self.starts} starts do not fit into "
                f"the {steps} of the training.",
                key=("at",),
            )
        if self.by == "fresh":
            check_fresh(training.model)
        return _Starting(self, training, length)

    def _waiting(self, mode: str) -> EarlyStopping:
        return EarlyStopping(self.patience, self.min_delta, mode=mode)


class _Starting(Keeping):
    def __init__(self, strategy: restart, training: Setting, length: int | None) -> None:
        assert training.optimizer is not None
        super().__init__(training.model)
        self.strategy, self.training, self.length = strategy, training, length
        self.optimizer, self.steps = training.optimizer, training.rates["run_steps"] or 0
        self.mode = "max" if strategy.on == "metric" and training.better else "min"
        self.plans = self.optimizer.state_dict()["schedules"]
        self.begun: list[list[Any]] = [[0, None]]  # the first update of each start, and the best it came to
        self.waiting = strategy._waiting(self.mode)
        if length is not None:
            self._anew(0)

    def before(self, step: int) -> None:
        if self._due(step):
            why = WAITED if self.length is None else f"at = {self.strategy.at}"
            best = self.begun[-1][1]
            facts = {} if best is None else {f"best {self.strategy.on} before": best}
            self.tell(step, "start", why, start=len(self.begun) + 1, **facts)
            self.begun.append([step, None])
            self.waiting = self.strategy._waiting(self.mode)
            self._move(step)
            self._anew(step)

    def _due(self, step: int) -> bool:
        if len(self.begun) == self.strategy.starts:
            return False
        begun = self.begun[-1][0]
        if self.length is not None:
            return bool(step - begun >= self.length)
        waited = step - (self.waiting.best_step or begun)
        return bool(self.waiting.stopped and self.steps - step >= waited)

    def _move(self, step: int) -> None:
        seed = seed_at(self.training.seed, step)
        if self.strategy.by == "fresh":
            redraw(self.training, seed)
            return
        if self.kept:
            self.model.load_state_dict(self.kept)
        perturb(self.model, self.strategy.radius, seed=seed)

    def _anew(self, step: int) -> None:
        """Empty state, and every schedule from its beginning, over the updates that this start has."""
        last = self.length is None or len(self.begun) == self.strategy.starts
        share = Fraction(self.steps - step if last else self.length or 0, self.steps)
        schedules = [
            [[key, index, _later(Schedule.from_data(plan), share, step).data()] for key, index, plan in plans]
            for plans in self.plans
        ]
        groups = self.optimizer.state_dict()["param_groups"]
        Kept({"param_groups": groups, "schedules": schedules}, {}).restore(self.model, self.optimizer)

    def observed(self, step: int, loss: float, metric: float) -> None:
        value = loss if self.strategy.on == "loss" else metric
        self.waiting.update(value, step)
        if not math.isfinite(value):
            return
        best = min if self.mode == "min" else max
        before = [found for _, found in self.begun if found is not None]
        if not before or best(value, *before) != best(before):
            self.keep()
        mine = self.begun[-1][1]
        self.begun[-1][1] = value if mine is None else best(value, mine)

    def data(self) -> dict[str, Any]:
        return {"begun": [[*one] for one in self.begun], "waiting": asdict(self.waiting)}

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().load(data, tensors)
        self.begun = [[*one] for one in data["begun"]]
        self.waiting = EarlyStopping.from_state(data["waiting"])


def _later(plan: Schedule, share: Fraction, at: int) -> Schedule:
    """The schedule from update `at` on, every duration of it times `share`."""
    made = _paced(plan, share)
    return constant(plan.peak).then(made, at=at) if at else made


def _paced(plan: Schedule, share: Fraction) -> Schedule:
    def paced(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(paced(name, one) for one in value)
        if isinstance(value, Schedule):
            return _paced(value, share)
        known = term(name, plan.kind)
        return max(int(value * share), int(known.least)) if known.unit == "duration" else value

    numbers = {name: paced(name, value) for name, value in plan.numbers}
    if "steps" in numbers and "warmup" in numbers:  # rounded down, they may have met
        numbers["warmup"] = min(numbers["warmup"], numbers["steps"] - 1)
    return KINDS[plan.kind](**numbers)


def redraw(training: Setting, seed: int) -> None:
    """Write first weights once more, drawn from `seed` alone: each module's own, then what the strategies
    prepare. What needs no gradient keeps its bits. No generator is touched.
    """
    model = training.model
    fixed = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    with untouched(*model.parameters()):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for module in reversed(list(model.modules())):  # what holds others has the last word
            if reset := _reset(module):
                reset()
        for strategy in training.strategies.values():
            strategy.prepare(replace(training, seed=seed))
    with torch.no_grad():
        for parameter, value in fixed:
            parameter.copy_(value)


def _reset(module: nn.Module) -> Callable[[], object] | None:
    """What draws the module's weights anew; None if it has no such thing, or is frozen."""
    own = list(module.parameters())
    if own and not any(parameter.requires_grad for parameter in own):
        return None
    return next((getattr(module, name) for name in RESETS if hasattr(module, name)), None)


def check_fresh(model: nn.Module) -> None:
    """BadInput unless every module with trainable parameters of its own can draw them anew."""
    whole = {part for module in model.modules() if _reset(module) for part in module.modules()}
    for name, module in model.named_modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if hasattr(module, "parametrizations") or (own and module not in whole):
            raise BadInput(
                "[restart] draws first weights anew by reset_parameters(), as torch's layers have it, and "
                f"{name or 'the model'} ({type(module).__name__}) has none that would do: give it one, or "
                'take by = "ball".'
            )
