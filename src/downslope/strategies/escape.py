"""Off saddle points: now and then a test by gradient and curvature, and where it finds one, a move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from downslope import curvature as measure
from downslope.errors import BadInput, nearest, under
from downslope.inspection import untouched
from downslope.kernels.bucket import initial
from downslope.machine import own_numbers
from downslope.optimizer import Optimizer
from downslope.rules import Chain
from downslope.schedule import Duration, in_steps
from downslope.strategies.chain import chain_of
from downslope.strategies.strategy import Batch, Live, Loss, Setting, Strategy

BY = ("direction", "ball")

PAIRED = "lbfgs"
"""The rule that takes every change of the gradient for the work of its own steps."""

_PROBE = torch.tensor([0.37], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class escape(Strategy):
    """Leave strict saddles: where the gradient is small and the least curvature negative, move the weights.

    Every `every`, over the first `batches` of the training as they are trained on: the norm of the gradient
    is at most `gradient`, and the least eigenvalue of the Hessian, by `products` of Lanczos at most, below
    -`curvature`. `by`: "direction", along its eigenvector, with the sign and at most the length `radius` that
    lower the loss; "ball", a vector drawn evenly from a ball. Source: Jin et al., arXiv:1703.00887, algorithm
    2, whose t_thres is `every`; here the curvature decides, not its f_thres. Not for: local minima, which
    have no such direction; penalties of the chain, which the loss does not see.
    """

    deeds: ClassVar[Mapping[str, str]] = {"move": "moved the weights off a saddle"}

    every: Duration = 100
    batches: int = 8
    gradient: float = 1e-3
    curvature: float = 1e-3
    products: int = 50
    by: str = "direction"
    radius: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in BY:
            with under("by"):
                raise BadInput(f"by is one of {', '.join(BY)}, got {self.by!r}.{nearest(self.by, BY)}")
        for name in ("every", "batches", "products", "gradient", "curvature", "radius"):
            if not isinstance(given := getattr(self, name), str) and not given > 0:
                with under(name):
                    raise BadInput(f"{name} must be above 0, got {given:g}.")

    def alone(self, shard: bool) -> str:
        """It takes products with whole weights; whole on every rank, each finds the same."""
        return "it looks at and moves whole weights" if shard else ""

    def refuse(self, others: Mapping[str, Strategy]) -> None:
        """The rule that is switched to is not there yet when the training begins."""
        if "switch" in others:
            _check(others["switch"].to)  # type: ignore[attr-defined]

    def begin(self, training: Setting) -> Live:
        """The watch over gradient and curvature."""
        assert training.optimizer is not None
        for group in training.optimizer.param_groups:
            _check(chain_of(training.optimizer, group))
        for name, module in training.model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
                raise BadInput(f"[escape] takes second derivatives, and {name} gives row-sparse gradients.")
        return _Escaping(self, training)


def _check(chain: Chain) -> None:
    if any(part.name == PAIRED for part in chain.parts):
        raise BadInput(
            f"[escape] moves the weights between updates, which {PAIRED} would take for curvature."
        )


class _Escaping(Live):
    def __init__(self, strategy: escape, training: Setting) -> None:
        self.strategy, self.training = strategy, training
        self.every = max(1, in_steps(strategy.every, "every", **training.rates))
        self.taught = training.loss
        self.moves: list[dict[str, float]] = []

    def loss(self, loss: Loss) -> Loss:
        self.taught = loss
        return loss

    def applied(self, step: int) -> None:
        # Behind the last update nothing would train the moved weights.
        if step % self.every == 0 and step != self.training.rates["run_steps"]:
            with untouched(self.training.model):
                self._look(step)

    def _look(self, step: int) -> None:
        chosen, model, losses = self.strategy, self.training.model, list(self._losses())
        evidence = self._evidence(losses)
        if evidence is None or evidence.curvature is None or not evidence.found:
            return
        optimizer = self.training.optimizer
        assert optimizer is not None
        before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        if chosen.by == "ball":
            measure.perturb(model, chosen.radius, seed=seed_at(self.training.seed, step))
        else:
            measure.escape(losses, model, evidence, radius=chosen.radius)
        found = {"gradient": evidence.gradient_norm, "curvature": evidence.curvature}
        found["distance"] = carry(optimizer, before)
        self.moves.append({"step": step, **found})
        self.tell(step, "move", "the gradient was small and the least curvature negative", **found)

    def _evidence(self, losses: list[measure.Loss]) -> measure.Saddle | None:
        """Of a saddle; None where the curvature is no finite number."""
        limits = {"gradient": self.strategy.gradient, "curvature": self.strategy.curvature}
        steps, seed = self.strategy.products, self.training.seed
        try:
            return measure.saddle(losses, self.training.model, **limits, steps=steps, seed=seed)
        except measure.NotFiniteError:
            return None
        except NotImplementedError as error:
            said = str(error).split("\n")[0]
            raise BadInput(f"[escape] takes second derivatives of the loss: {said}") from error

    def _losses(self) -> Iterator[measure.Loss]:
        """The loss of every piece of the fixed batches by its share; what is drawn in it, is drawn alike."""
        batches = list(self.training.batches(self.strategy.batches))
        for place, batch in enumerate(batches):
            torch.manual_seed(seed_at(self.training.seed, place))
            for piece, share in self.training.parts(batch):
                yield partial(self._value, piece, share / len(batches))

    def _value(self, piece: Batch, share: float) -> Tensor:
        torch.manual_seed(self.training.seed)
        return self.taught(self.training.model, piece) * share

    def data(self) -> dict[str, Any]:
        return {"moves": [dict(move) for move in self.moves]} if self.moves else {}

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.moves = [dict(move) for move in data["moves"]]


def seed_at(seed: int, step: int) -> int:
    """A seed for what is drawn at a step, of 64 bits.

    >>> seed_at(0, 1) == seed_at(0, 1) != seed_at(1, 0)
    True
    """
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


@torch.no_grad()
def carry(optimizer: Optimizer, before: Mapping[Tensor, Tensor]) -> float:
    """Move what the rules keep of the weights (a slow copy, an average, a start) along with them, from where
    they were `before`; how far that was, over all weights.
    """
    square = 0.0
    for group in optimizer.param_groups:
        chain = chain_of(optimizer, group)
        copies = [
            name
            for name, (place, slot) in chain.slots.items()
            if slot.per == "element"
            and torch.equal(initial(slot, _PROBE, own_numbers(chain, place, group)), _PROBE)
        ]
        for parameter in group["params"]:
            moved = parameter - before[parameter]
            square += float(moved.double().square().sum())
            for name in copies if parameter in optimizer.state else ():
                optimizer.state[parameter][name].add_(moved)
    return math.sqrt(square)
