"""Another rule from some update on: at a step, where validations stop getting better, or as SWATS decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from downslope.admission import admit
from downslope.augment import EarlyStopping
from downslope.errors import BadInput, nearest, under
from downslope.rules import Chain
from downslope.schedule import Duration, Schedule, duration, in_steps
from downslope.strategies.chain import carried, numbers_of, parsed, staged, tables
from downslope.strategies.kept import Kept
from downslope.strategies.stop import WAITED
from downslope.strategies.strategy import Batch, Live, Loss, Setting, Strategy

MATCHES = ("size", "swats", "none")
TRIGGERS = {"plateau": WAITED, "swats": "the projected rate settled"}
"""When to switch, if not at a step, and what then happened."""

SWATS = {"sgd": "", "momentum": "momentum", "nesterov": "momentum"}
"""Rules whose rate SWATS estimates, with the number by which a steady gradient adds up to 1/(1 - μ)."""

_REPEATS = 3  # of the first step, where it is not linear in its rate


@dataclass(frozen=True, kw_only=True)
class switch(Strategy):
    """Train by another chain from `at` on: a duration, "plateau" (`patience` validations without a better
    loss) or "swats" (its projected rate settles within `tolerance`).

    `to`: parts as in [[chain]]; schedules run in what remains. `match`: the first new update is as long as
    the last old one ("size", over all weights together), the rate is SWATS's ("swats"), or is left ("none").
    `rewarm`: a rise to that rate. `guard`: for so long the old weights and state are kept, and come back if
    the mean loss is `rise` deviations above that of as many updates before. Sources: Keskar and Socher,
    arXiv:1712.07628. Not for: a rate that is already small at `at`, which "size" keeps small.
    """

    unfair: ClassVar[str] = "its cooldown branches follow the first rule's rate"
    deeds: ClassVar[Mapping[str, str]] = {
        "switch": "went over to another rule",
        "return": "went back to the first rule",
    }

    at: Any = "50 %"
    to: Any = field(default_factory=lambda: [{"part": "momentum"}])
    match: str | None = None
    rewarm: Duration = 0
    guard: Duration = 0
    rise: float = 2.0
    patience: int = 5
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        super().__post_init__()
        with under("at"):
            if self.at not in TRIGGERS:
                hint = nearest(str(self.at), TRIGGERS)
                try:
                    object.__setattr__(self, "at", duration(self.at, "at"))
                except BadInput as error:
                    raise BadInput(f'{error} Or one of "plateau", "swats".{hint}') from None
        with under("to"):
            object.__setattr__(self, "to", parsed(self.to))
        if self.match is None:
            object.__setattr__(self, "match", "swats" if self.at == "swats" else "size")
        self._check()

    def _check(self) -> None:
        rule = next(part for part in self.to.parts if part.rule.kind == "rule")
        if self.match not in MATCHES:
            hint = nearest(str(self.match), MATCHES)
            raise BadInput(f"match is one of {', '.join(MATCHES)}, got {self.match!r}.{hint}")
        if self.match == "swats" and (self.at != "swats" or rule.name not in SWATS):
            raise BadInput(
                f'match = "swats" needs at = "swats" and one of {", ".join(SWATS)} to go on by, '
                f"got at = {self.at!r} and {rule.name}."
            )
        if self.match == "size" and (self.to.ascent or self.to.search):
            raise BadInput(f'{self.to.name} takes several gradients a step: give match = "none".')
        for key, wrong, allowed in (
            ("at", self.at == 0, "at least 1"),
            ("patience", self.patience < 1, "at least 1"),
            ("tolerance", self.tolerance <= 0, "above 0"),
            ("rise", self.rise < 0, "at least 0"),
        ):
            if wrong:
                with under(key):
                    raise BadInput(f"{key} must be {allowed}, got {getattr(self, key)!r}.")

    def data(self) -> dict[str, Any]:
        """As plain data, the chain as a list of tables."""
        return {**super().data(), "to": tables(self.to)}

    def alone(self, shard: bool) -> str:
        """What it keeps and measures is whole, and on this rank."""
        if shard:
            return "it measures and keeps whole weights"
        return "its guard goes by the losses of one rank" if self.guard else ""

    def refuse(self, others: Mapping[str, Strategy]) -> None:
        """An average of the weights is not one of those that a rule evaluates."""
        own = [part.name for part in self.to.parts if part.rule.evaluation]
        if own and "average" in others:
            raise BadInput(f"{own[0]} has evaluation weights of its own: leave out [average].")

    def begin(self, training: Setting) -> Live:
        """The watch over when to switch, and what follows."""
        steps = training.rates["run_steps"] or 0
        at = None if self.at in TRIGGERS else in_steps(self.at, "at", **training.rates)
        if at is not None and not 0 < at < steps:
            raise BadInput(f"[switch] at = {self.at!r} is update {at} of a training of {steps}.", key=("at",))
        assert training.optimizer is not None
        for group in training.optimizer.param_groups:
            admit(group["params"], self.to.matrix.name if self.to.matrix else None)
        reacts = any(isinstance(n, Schedule) and n.reacts for n in numbers_of(self.to))
        return (_Told if reacts or self.at == "plateau" else _Switching)(self, training, at)


class _Switching(Live):
    def __init__(self, strategy: switch, training: Setting, due: int | None) -> None:
        assert training.optimizer is not None
        self.strategy, self.due = strategy, due
        self.model, self.optimizer, self.rates = training.model, training.optimizer, training.rates
        self.rewarm = in_steps(strategy.rewarm, "rewarm", **training.rates)
        self.guard = in_steps(strategy.guard, "guard", **training.rates)
        self.plateau = EarlyStopping(strategy.patience)
        self.chain = self.optimizer.chain
        self.at: int | None = None
        self.returned: int | None = None
        self.factor, self.size = 1.0, 0.0
        self.estimate, self.count = 0.0, 0
        self.losses: list[float] = []
        self.kept: Kept | None = None
        self.pieces: list[Tensor] = []
        self.weights: dict[Tensor, Tensor] = {}
        self.first: dict[Tensor, dict[str, Tensor]] = {}

    def loss(self, loss: Loss) -> Loss:
        if not self.guard:
            return loss

        def noted(model: nn.Module, batch: Batch) -> Tensor:
            found = loss(model, batch)
            self.pieces.append(found.detach())
            return found

        return noted

    def observed(self, step: int, loss: float, metric: float) -> None:
        self.plateau.update(loss, step)

    def before(self, step: int) -> None:
        self.pieces = []
        if self._last(step) or (self.at == step and self.strategy.match == "size"):
            self.weights = {p: p.detach().clone() for p in self._parameters()}
            state = self.optimizer.state.items()
            self.first = {p: {name: v.clone() for name, v in slots.items()} for p, slots in state}

    def after(self, applied: bool, names: Sequence[str]) -> None:
        if self.kept and (names or (self.pieces and not math.isfinite(self._loss()))):
            self._return(self.optimizer.steps, "its loss or gradients were not finite")

    def applied(self, step: int) -> None:
        if self.guard and self.returned is None:
            self.losses.append(self._loss())
        if self._last(step - 1):
            if self.strategy.at != "swats" or self._settled():
                self._switch(step)
        elif self.at == step - 1 and self.strategy.match == "size" and self.returned is None:
            self._match()
        if self.at is None:
            self.losses = self.losses[-self.guard :] if self.guard else []
        elif self.kept and step >= self.at + self.guard:
            self._judge(step)
        self.weights, self.first = {}, {}

    def _last(self, step: int) -> bool:
        """Whether update `step`, from 0, may be the last one of the old rule."""
        if self.at is not None:
            return False
        return {"swats": True, "plateau": self.plateau.stopped}.get(self.strategy.at, step + 1 == self.due)

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _loss(self) -> float:
        return fmean(float(piece) for piece in self.pieces) if self.pieces else math.nan

    def _moved(self) -> float:
        """How far the last update went, over all weights."""
        steps = (p.detach().double() - old.double() for p, old in self.weights.items())
        return math.sqrt(sum(float(step.square().sum()) for step in steps))

    def _settled(self) -> bool:
        """Whether the rate by which SGD would go as far, p·p / -p·g, is near its running mean (SWATS)."""
        square = slope = 0.0
        for p, old in self.weights.items():
            if p.grad is not None:
                step = p.detach().double() - old.double()
                square += float(step.square().sum())
                slope -= float((step * p.grad.double()).sum())
        self.count += 1
        if slope == 0:
            return False
        betas = self.optimizer.param_groups[0].get("betas", (0.9, 0.999))
        self.estimate = betas[1] * self.estimate + (1 - betas[1]) * square / slope
        mean = self.estimate / (1 - betas[1] ** self.count)
        if not (self.count > 1 and mean > 0 and abs(mean - square / slope) < self.strategy.tolerance):
            return False
        if self.strategy.match == "swats":
            rule = next(part for part in self.strategy.to.parts if part.rule.name in SWATS)
            gain = rule.numbers.get(SWATS[rule.name], 0.0)
            peak = self.strategy.to.lr
            self.factor = mean * (1 - float(gain)) / (peak.peak if isinstance(peak, Schedule) else peak)
        return True

    def _chain(self) -> Chain:
        """The new chain as it runs: from the switch on, in what remains, at the rate that was found."""
        assert self.at is not None
        left = {**self.rates, "run_steps": (self.rates["run_steps"] or 0) - self.at}
        return staged(self.strategy.to, self.at, self.factor, self.rewarm, left)

    def _switch(self, step: int) -> None:
        self.at, self.size = step, self._moved()
        why = TRIGGERS.get(self.strategy.at, f"at = {self.strategy.at}")
        self.tell(step, "switch", why, to=self.strategy.to.name)
        if self.guard:
            self.kept = Kept.of(self.model, self.optimizer)
        chain = self._chain()
        if self.optimizer.averages and not any(part.rule.evaluation for part in chain.parts):
            with self.optimizer.averaged():
                evaluated = [p.detach().clone() for p in self._parameters()]
            with torch.no_grad():
                for p, value in zip(self._parameters(), evaluated, strict=True):
                    p.copy_(value)
        self.optimizer.become(chain, carried(self.optimizer, chain))

    def _match(self) -> None:
        """Make the first new update anew, at the rate that makes it as long as the last old one."""
        for place in range(_REPEATS):
            size = self._moved() * (self.rewarm + 1)
            if not (0 < size < math.inf and self.size > 0) or (place and abs(size / self.size - 1) < 1e-3):
                return
            self.factor *= self.size / size
            with torch.no_grad():
                for p, old in self.weights.items():
                    p.copy_(old)
            for group in self.optimizer.param_groups:
                group["step"] -= 1
            self.optimizer.become(self._chain(), self.first)
            self.optimizer.step()

    def _judge(self, step: int) -> None:
        before, after = self.losses[: -self.guard], self.losses[-self.guard :]
        noise = stdev(before) if len(before) > 1 else 0.0
        means = {"before": fmean(before), "after": fmean(after)}
        if not means["after"] <= means["before"] + self.strategy.rise * noise:
            self._return(step, "the mean loss rose", **means)
        self.kept, self.losses = None, []

    def _return(self, step: int, why: str, **facts: float) -> None:
        assert self.kept is not None
        self.tell(step, "return", why, **facts, to=self.chain.name)
        self.optimizer.become(self.chain)
        self.kept.restore(self.model, self.optimizer)
        self.returned, self.kept, self.losses = step, None, []

    def tensors(self) -> dict[str, Tensor]:
        return self.kept.tensors if self.kept else {}

    def data(self) -> dict[str, Any]:
        names = ("at", "returned", "factor", "size", "estimate", "count", "losses")
        found = {name: getattr(self, name) for name in names} | {"plateau": asdict(self.plateau)}
        return {**found, "losses": [*self.losses], **({"kept": self.kept.numbers} if self.kept else {})}

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name in ("at", "returned", "factor", "size", "estimate", "count"):
            setattr(self, name, data[name])
        self.losses, self.plateau = [*data["losses"]], EarlyStopping.from_state(data["plateau"])
        if "kept" in data:
            self.kept = Kept(data["kept"], dict(tensors))
        if self.at is not None and self.returned is None:
            self.optimizer.become(self._chain())


class _Told(_Switching):
    reacts: ClassVar[bool] = True
