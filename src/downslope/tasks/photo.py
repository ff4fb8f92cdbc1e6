"""Sample photographs of scikit-learn: their colours clustered, and one of them learnt as a function."""

import math

import torch
from torch import Tensor, nn

from downslope.recipe import Recipe
from downslope.rules import chain
from downslope.rules.adaptive import adam
from downslope.schedule import cosine
from downslope.tasks.data import Batch
from downslope.tasks.definition import Task, squared_error
from downslope.tasks.split import needs, shuffled

CLUSTERS = 16
"""Colours that are left of the photograph in `photo-kmeans`."""


def photo_kmeans(seed: int = 0) -> Task:
    """The colours of a photograph, 273 000 pixels, in 16 clusters by mini-batches: k-means as a loss."""
    parts = shuffled((_photograph("china.jpg").view(-1, 3),), seed)
    return Task(
        **parts,
        model=lambda: Centres(parts["train"][0], CLUSTERS),
        loss=quantisation_error,
        metric_name="squared distance",
        target=0.0055,
        reference=(
            "downslope train photo-kmeans --seed S, S = 0 to 4: mean 0.00535, on test 0.00532; "
            "scikit-learn's KMeans (n_init 10) 0.00529, MiniBatchKMeans 0.0054 to 0.0056"
        ),
        recipe=Recipe(chain(adam(lr=cosine(0.01, steps="100 %"))), steps="5 epochs", batch_size=1024),
    )


def photo_inr(seed: int = 0) -> Task:
    """A photograph as a function of the place, by a network of sines: pixels it never saw are asked for."""
    pixels = nn.functional.avg_pool2d(_photograph("flower.jpg").permute(2, 0, 1), 4).permute(1, 2, 0)
    axes = [torch.linspace(-1, 1, count) for count in pixels.shape[:2]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return Task(
        **shuffled((places.view(-1, 2), pixels.reshape(-1, 3)), seed),
        model=siren,
        loss=squared_error,
        metric_name="squared error",
        target=1.9e-3,
        reference=(
            "downslope train photo-inr --seed S, S = 0 to 4: mean 0.00174 (27.6 dB), on test 0.00169; "
            "cubic interpolation (SciPy) 0.0019 to 0.0020"
        ),
        recipe=Recipe(chain(adam(lr=cosine(3e-4, steps="100 %"))), steps="200 epochs", batch_size=1024),
    )


def _photograph(name: str) -> Tensor:
    """A sample photograph, [427, 640, 3] in red, green and blue from 0 to 1, float32."""
    with needs("scikit-learn and Pillow"):
        from sklearn.datasets import load_sample_image

        return torch.tensor(load_sample_image(name)).float() / 255


def quantisation_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared distance of the points to their nearest centre: scikit-learn's inertia over the items."""
    (points,) = batch
    nearest: Tensor = model(points).min(dim=1).values
    return nearest.mean()


class Centres(nn.Module):
    """Centres of clusters; `forward(points)` gives all squared distances, [items, dimensions] → [items, k].

    They start by greedy k-means++ (Arthur & Vassilvitskii 2007) on 16384 of the points: the first is drawn at
    random, every other is the best of four, drawn in proportion to the squared distance from those before.
    """

    def __init__(self, points: Tensor, k: int) -> None:
        super().__init__()
        self.points = points
        self.centres = nn.Parameter(points.new_empty(k, points.shape[1]))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a start anew, as `[restart]` does: which minimum k-means ends in depends on it."""
        drawn = self.points[torch.randint(len(self.points), (16384,))]
        chosen, distance = [drawn[0]], _squared_distance(drawn, drawn[:1])[:, 0]
        while len(chosen) < len(self.centres):
            candidates = drawn[torch.multinomial(distance, 4)]
            left = _squared_distance(drawn, candidates).minimum(distance[:, None])
            best = left.sum(dim=0).argmin()
            chosen.append(candidates[best])
            distance = left[:, best]
        self.centres.copy_(torch.stack(chosen))

    def forward(self, points: Tensor) -> Tensor:
        """Squared distances."""
        return _squared_distance(points, self.centres)


def _squared_distance(points: Tensor, centres: Tensor) -> Tensor:
    return (points[:, None] - centres).square().sum(dim=2)


class Sine(nn.Linear):
    """sin(ω · (W x + b)), drawn so that what passes keeps its spread. Sitzmann et al. 2020, arXiv:2006.09661.

    First layers, which see coordinates, draw W from ±1/n; others from ±√(6/n)/ω (section 3.2, theorem 1.8).
    """

    def __init__(self, inputs: int, outputs: int, first: bool = False, omega: float = 30.0) -> None:
        self.omega, self.bound = omega, 1 / inputs if first else math.sqrt(6 / inputs) / omega
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Draw weights and biases anew."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -self.bound, self.bound)

    def forward(self, x: Tensor) -> Tensor:
        """[items, inputs] → [items, outputs]."""
        return torch.sin(self.omega * super().forward(x))


def siren(width: int = 128) -> nn.Sequential:
    """Places [items, 2] in [-1, 1]² → colours [items, 3]: three layers of sines and a linear one."""
    return nn.Sequential(
        Sine(2, width, first=True), Sine(width, width), Sine(width, width), nn.Linear(width, 3)
    )
