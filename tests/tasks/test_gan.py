"""digits-gan: the losses and the metric against what others compute, and a metric that sees what is wrong."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from downslope.tasks import task
from downslope.tasks.gan import LATENT, Adversaries, deception, discrimination, told_apart
from downslope.train import Training


class Fixed(nn.Module):
    """A maker that makes these pictures, whatever the noise."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures = pictures

    def forward(self, noise: Tensor) -> Tensor:
        return self.pictures[: len(noise)]


def judged(pictures: Tensor, real: Tensor) -> float:
    model = Adversaries()
    model.maker = Fixed(pictures)  # type: ignore[assignment]
    return float(told_apart(model, (real,)))


def parts() -> tuple[Tensor, Tensor, Tensor]:
    one = task("digits-gan")
    return one.train[0], one.valid[0], one.test[0]  # type: ignore[index]


def test_the_metric_is_scikit_learns_nearest_neighbour() -> None:
    train, real, _ = parts()
    made = train[: len(real)] + 0.1 * torch.randn(len(real), 64, generator=torch.Generator().manual_seed(1))
    everybody = np.concatenate([real.numpy(), made.numpy()]).astype(np.float64)
    _, found = NearestNeighbors(n_neighbors=2).fit(everybody).kneighbors(real.numpy().astype(np.float64))
    assert judged(made, real) == pytest.approx((found[:, 1] < len(real)).mean(), abs=0.003)


def test_the_metric_knows_real_pictures_noise_blur_and_a_collapse() -> None:
    train, real, test = parts()
    noise = torch.randn(len(real), 64, generator=torch.Generator().manual_seed(1))
    lower = torch.linalg.cholesky(torch.cov(train.T) + 1e-4 * torch.eye(64))
    assert judged(torch.cat([test, test]), real) == pytest.approx(0.5, abs=0.05)
    assert judged((train.mean(dim=0) + noise @ lower.T).clamp(-1, 1), real) > 0.9
    assert judged(train[: len(real)] + 0.2 * noise, real) > 0.75
    assert judged(train[:1].expand(len(real), -1) + 0.01 * noise, real) > 0.95
    assert judged(train.mean(dim=0).expand(len(real), -1), real) > 0.5


def test_the_losses_are_the_papers() -> None:
    torch.manual_seed(0)
    model = Adversaries().double()
    real = torch.rand(7, 64, dtype=torch.float64) * 2 - 1
    drawn: list[Tensor] = []
    made = model.maker(torch.randn(7, LATENT).double()).detach()
    model.made = lambda real: (drawn.append(made), made)[1]  # type: ignore[method-assign,assignment]
    says = {
        name: 1 / (1 + np.exp(-model.critic(x).detach().numpy()))
        for name, x in (("real", real), ("made", made))
    }
    critic = -(np.log(says["real"]) + np.log(1 - says["made"])).mean()
    assert discrimination(model, (real,)).item() == pytest.approx(critic, rel=1e-12)
    assert deception(model, (real,)).item() == pytest.approx(-np.log(says["made"]).mean(), rel=1e-12)
    assert len(drawn) == 2


def test_the_metric_takes_the_same_noise_and_draws_nothing() -> None:
    _, real, _ = parts()
    model, before = Adversaries(), torch.get_rng_state()
    assert told_apart(model, (real,)) == told_apart(model, (real,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_reaches_its_target_and_too_high_a_rate_misses_it(seed: int) -> None:
    one = task("digits-gan", seed)
    state = Training(one, seed=seed, threads=1)
    state.advance()
    assert one.target is not None
    assert state.evaluate("test").metric <= one.target
    high = one.recipe.with_(lr=0.1, players={})
    state = Training(one, high, seed=seed, threads=1)
    state.advance()
    assert state.evaluate("test").metric > one.target
