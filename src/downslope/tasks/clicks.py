"""Clicks on advertisements, drawn from a known model, so that the best possible log loss is known too."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from downslope.recipe import Recipe
from downslope.rules import chain
from downslope.rules.adaptive import adam, adamw
from downslope.schedule import cosine
from downslope.tasks.data import Batch
from downslope.tasks.definition import Task
from downslope.tasks.split import shuffled

FIELDS = {"hour": 24, "weekday": 7, "site": 400, "advertiser": 200, "device": 30, "region": 60, "user": 1000}
"""What is known of an impression, and how many values each has."""

_IMPRESSIONS = 400_000


def clicks_deepfm(seed: int = 0) -> Task:
    """Clicks of 7 fields, drawn from a factorisation machine, learnt by DeepFM with row-sparse gradients."""
    return Task(
        **shuffled(impressions(_IMPRESSIONS, seed), seed),
        model=DeepFM,
        loss=log_loss,
        metric=excess_log_loss,
        metric_name="log loss above the known model's",
        higher_is_better=False,
        target=0.022,
        reference=(
            "downslope train clicks-deepfm --seed S, S = 0 to 4: mean 0.0186, on test 0.0182, the known "
            "model's own log loss being 0.404; logistic regression on the same fields 0.090"
        ),
        recipe=Recipe(
            chain(adamw(lr=cosine(1e-3, steps="100 %"))),
            steps="4 epochs",
            batch_size=512,
            route={"embedding": chain(adam(lr=cosine(1e-2, steps="100 %")))},
        ),
    )


class Machine(NamedTuple):
    """A factorisation machine (Rendle 2010, eq. 1) over the values of all fields, numbered through."""

    bias: Tensor
    weights: Tensor
    factors: Tensor

    def logit(self, values: Tensor) -> Tensor:
        """[items, fields] → [items]: what it adds up to, b + Σ w + Σ ⟨v, v'⟩ over all pairs of fields."""
        return self.bias + self.weights[values].sum(dim=1) + pairs(self.factors[values])


def pairs(factors: Tensor) -> Tensor:
    """Sum of the inner products of all pairs of fields, [items, fields, rank] → [items] (lemma 3.1).

    >>> pairs(torch.tensor([[[1.0], [2.0], [3.0]]]))  # 1 · 2 + 1 · 3 + 2 · 3
    tensor([11.])
    """
    return (factors.sum(dim=1).square() - factors.square().sum(dim=1)).sum(dim=1) / 2


def known_model() -> Machine:
    """The machine that decides about every click, whatever the seed of a task: rank 4, a fifth are clicks."""
    generator = torch.Generator().manual_seed(2010)
    total = sum(FIELDS.values())
    weights = 0.4 * torch.randn(total, generator=generator)
    factors = 0.35 * torch.randn(total, 4, generator=generator)
    return Machine(torch.tensor(-1.5), weights, factors)


def impressions(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, clicked, logit) of impressions: int64 [count, fields], float32 0 or 1, the known logit.

    Values of a field are as unequally frequent as words are (Zipf); those of all fields are numbered through.
    """
    generator = torch.Generator().manual_seed(seed)
    columns, first = [], 0
    for size in FIELDS.values():
        frequency = 1 / (torch.arange(size) + 3.0)
        columns.append(first + torch.multinomial(frequency, count, replacement=True, generator=generator))
        first += size
    values = torch.stack(columns, dim=1)
    logit = known_model().logit(values)
    return values, torch.bernoulli(logit.sigmoid(), generator=generator), logit


def log_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy, nats, of the logits `model(values)` [items] to the clicks."""
    values, clicked, _ = batch
    return nn.functional.binary_cross_entropy_with_logits(model(values), clicked)


def excess_log_loss(model: nn.Module, batch: Batch) -> Tensor:
    """How much worse than the model that drew the clicks: 0 is the best that can be expected."""
    _, clicked, logit = batch
    return log_loss(model, batch) - nn.functional.binary_cross_entropy_with_logits(logit, clicked)


class DeepFM(nn.Module):
    """A factorisation machine and a perceptron that share their embeddings. Source: arXiv:1703.04247.

    Values [items, fields] → logits [items]. The gradients of the embeddings are row-sparse: only what a batch
    holds is stepped, so their rule must be one that takes such gradients (sgd, adagrad, rmsprop, adam, ftrl).
    """

    def __init__(self, rank: int = 4, width: int = 64) -> None:
        super().__init__()
        total = sum(FIELDS.values())
        self.weights = nn.Embedding(total, 1, sparse=True)
        self.factors = nn.Embedding(total, rank, sparse=True)
        self.perceptron = nn.Sequential(
            nn.Linear(len(FIELDS) * rank, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )
        for embedding in (self.weights, self.factors):
            nn.init.normal_(embedding.weight, std=0.01)

    def forward(self, values: Tensor) -> Tensor:
        """Logits."""
        factors = self.factors(values)
        deep = self.perceptron(factors.flatten(1)).squeeze(1)
        logits: Tensor = self.weights(values).sum(dim=(1, 2)) + pairs(factors) + deep
        return logits
