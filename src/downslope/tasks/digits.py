"""8 x 8 pictures of digits, 1797 of them: classified by networks of several kinds, and factorised."""

import torch
from torch import Tensor, nn

from downslope.recipe import Recipe
from downslope.rules import chain
from downslope.rules.adaptive import adamw
from downslope.rules.links import clip_norm
from downslope.schedule import Schedule, cosine
from downslope.tasks.definition import Task, accuracy, cross_entropy, squared_error
from downslope.tasks.fit import fit
from downslope.tasks.split import Parts, needs, standardised, stratified

RANK = 10
"""Columns of each factor of `digits-factorisation`."""


def digits_mlp(seed: int = 0) -> Task:
    """8 x 8 digits by a perceptron with two hidden layers of 64: the quickest task."""
    return Task(
        **standardised(stratified("load_digits", seed), shape=(64,), by=(0, 1)),
        model=lambda: nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        loss=cross_entropy,
        metric=accuracy,
        target=0.975,
        reference="downslope train digits-mlp --seed S, S = 0 to 4: mean accuracy 0.961, on test 0.963",
    )


def digits_cnn(seed: int = 0) -> Task:
    """8 x 8 digits by two convolutions with BatchNorm: about a second of one core to train."""
    return Task(
        **_pictures(seed),
        model=lambda: nn.Sequential(*_stage(1, 16), *_stage(16, 32), nn.Flatten(), nn.Linear(128, 10)),
        loss=cross_entropy,
        metric=accuracy,
        target=0.99,
        reference="downslope train digits-cnn --seed S, S = 0 to 4: mean accuracy 0.982, on test 0.984",
    )


def digits_resnet(seed: int = 0) -> Task:
    """8 x 8 digits by a residual network of 14 layers with BatchNorm: deep, and small enough for one core."""
    return Task(
        **_pictures(seed),
        model=resnet,
        loss=cross_entropy,
        metric=accuracy,
        target=0.98,
        reference="downslope train digits-resnet --seed S, S = 0 to 4: mean accuracy 0.992, on test 0.992",
        recipe=Recipe(chain(adamw(lr=_hill(0.01), weight_decay=0.3)), steps="40 epochs", batch_size=32),
    )


def digits_lstm(seed: int = 0) -> Task:
    """8 x 8 digits read row by row, a sequence of 8 steps of 8 pixels, by an LSTM of 64 units."""
    return Task(
        **standardised(stratified("load_digits", seed), shape=(8, 8), by=(0, 1, 2)),
        model=RowReader,
        loss=cross_entropy,
        metric=accuracy,
        target=0.97,
        reference="downslope train digits-lstm --seed S, S = 0 to 4: mean accuracy 0.982, on test 0.980",
        recipe=Recipe(
            chain(clip_norm(1.0), adamw(lr=_hill(0.01), weight_decay=0.1)), steps="40 epochs", batch_size=32
        ),
    )


def digits_factorisation(seed: int = 0) -> Task:
    """All digits, a matrix of 1797 x 64, as a product of rank 10: not convex, yet its optimum is an SVD's."""
    with needs("scikit-learn"):
        from sklearn.datasets import load_digits
    pixels = (
        torch.tensor(load_digits().data) / 16
    )  # float64, so that the last digits of an excess are not noise
    left_out = torch.linalg.svdvals(pixels)[RANK:]  # Eckart & Young 1936
    return fit(
        (torch.arange(len(pixels)), pixels),
        model=lambda: Factors(*pixels.shape),
        loss=squared_error,
        objective=squared_error,
        optimum=float(left_out.square().sum() / pixels.numel()),
        target=1e-6,
        reference=(
            "downslope train digits-factorisation --seed S, S = 0 to 4: mean excess 6e-10 over the "
            "truncated SVD"
        ),
        recipe=Recipe(chain(adamw(lr=cosine(0.1, steps="100 %"), weight_decay=0.0)), 1000, 1797),
    )


def _hill(peak: float) -> Schedule:
    return cosine(peak, steps="100 %", warmup="5 %")


def _pictures(seed: int) -> Parts:
    return standardised(stratified("load_digits", seed), shape=(1, 8, 8), by=(0, 1, 2, 3))


def _stage(channels: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, [items, inputs, h, w] → [items, outputs, h, w].

    Source: He et al. 2015, arXiv:1512.03385, figure 2, shortcut B. With stride 2, h and w are halved.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of body and shortcut, rectified."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(widths: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    """ResNet-14, [items, 1, 8, 8] → logits [items, 10]: a stem, three stages of two blocks, and a head."""
    layers = [nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, width in zip((widths[0], *widths), widths, strict=False):
        layers += [Residual(before, width, 1 if width == before else 2), Residual(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class RowReader(nn.Module):
    """An LSTM over the rows of pictures [items, 8, 8]; its last state is classified: logits [items, 10]."""

    def __init__(self, units: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, units, batch_first=True)
        self.head = nn.Linear(units, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits."""
        states, _ = self.lstm(rows)
        logits: Tensor = self.head(states[:, -1])
        return logits


class Factors(nn.Module):
    """A matrix [rows, columns] as the product of two factors; `forward(index)` gives the rows at `index`."""

    def __init__(self, rows: int, columns: int, rank: int = RANK) -> None:
        super().__init__()
        self.rows = nn.Embedding(rows, rank, dtype=torch.float64)
        self.columns = nn.Linear(rank, columns, bias=False, dtype=torch.float64)

    def forward(self, index: Tensor) -> Tensor:
        """Rows [items, columns]."""
        product: Tensor = self.columns(self.rows(index))
        return product
