"""A generative adversarial network on 8 x 8 digits: two players, two optimizers, one recipe."""

from typing import Any

import torch
from torch import Tensor, nn

from downslope.recipe import Recipe
from downslope.rules import Chain, chain
from downslope.rules.adaptive import adam
from downslope.schedule import cosine
from downslope.strategies import average
from downslope.tasks.data import Batch
from downslope.tasks.definition import Player, Task
from downslope.tasks.split import stratified

LATENT = 16
"""Numbers that a picture is made of."""


def digits_gan(seed: int = 0) -> Task:
    """8 x 8 digits made by a perceptron that learns to pass for real before another one, the critic."""
    parts = stratified("load_digits", seed)
    return Task(
        train=(parts["train"][0] / 8 - 1,),
        valid=(parts["valid"][0] / 8 - 1,),
        test=(parts["test"][0] / 8 - 1,),
        model=Adversaries,
        players={"critic": Player(discrimination), "maker": Player(deception)},
        metric=told_apart,
        metric_name="told apart",
        higher_is_better=False,
        target=0.75,
        reference=(
            "downslope train digits-gan --seed S, S = 0 to 4: mean 0.660, on test 0.647; real pictures for "
            "made ones 0.47 to 0.52, a Gaussian fitted to the train part 0.94 to 0.96"
        ),
        recipe=Recipe(_adam(), steps="150 epochs", batch_size=32).with_(
            strategies=[average()], players={"critic": _adam()}
        ),
    )


def _adam() -> Chain:
    return chain(adam(lr=cosine(5e-3, steps="100 %"), betas=(0.5, 0.99)))


class Adversaries(nn.Module):
    """A `maker` of noise [items, 16] → pixels [items, 64] in [-1, 1]; a `critic` of pixels → [items, 1]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.critic = nn.Sequential(
            nn.Linear(64, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )
        self.maker = nn.Sequential(
            nn.Linear(LATENT, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 64),
            nn.Tanh(),
        )

    def made(self, real: Tensor) -> Tensor:
        """As many pictures as are real, of noise from the global generator."""
        pictures: Tensor = self.maker(torch.randn_like(real[:, :LATENT]))
        return pictures


def discrimination(model: Any, batch: Batch) -> Tensor:
    """The critic's: the cross entropy of telling real from made, equation 1 of arXiv:1406.2661."""
    (real,) = batch
    with torch.no_grad():
        made = model.made(real)
    softplus = nn.functional.softplus
    return softplus(-model.critic(real)).mean() + softplus(model.critic(made)).mean()


def deception(model: Any, batch: Batch) -> Tensor:
    """The maker's: the non-saturating loss -log D(G(z)) of arXiv:1406.2661, section 3."""
    (real,) = batch
    return nn.functional.softplus(-model.critic(model.made(real))).mean()


def told_apart(model: Any, batch: Batch) -> Tensor:
    """Share of real pictures whose nearest neighbour, among the others and as many made ones, is real.

    The leave-one-out accuracy on real items of a 1-nearest-neighbour classifier (Xu et al.,
    arXiv:1806.07755): 0.5 where made pictures cannot be told from real ones, 1 where all can. It sees
    pictures that are off and a maker that makes few kinds; not one that knows its training data by heart.
    The noise is the same each time.
    """
    (real,) = batch
    noise = torch.randn(len(real), LATENT, generator=torch.Generator().manual_seed(0))
    made = model.maker(noise.to(real.device))
    among = torch.cdist(real, real).fill_diagonal_(torch.inf).min(dim=1).values
    return (among < torch.cdist(real, made).min(dim=1).values).double().mean()
