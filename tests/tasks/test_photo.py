"""The photographs: every pixel in one part; distances, centres and sines are what they say."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import griddata
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_sample_image
from tasks.parts import columns
from torch import nn

from downslope.tasks import task
from downslope.tasks.photo import CLUSTERS, Centres, Sine, quantisation_error, siren
from downslope.train import Training


def test_every_pixel_of_the_photograph_is_in_one_part() -> None:
    one = task("photo-kmeans", 3)
    found = torch.cat([columns(part)[0] for part in (one.train, one.valid, one.test)])
    image = torch.tensor(load_sample_image("china.jpg")).view(-1, 3).float() / 255
    assert torch.equal(found.unique(dim=0, return_counts=True)[1], image.unique(dim=0, return_counts=True)[1])
    assert torch.equal(found.unique(dim=0), image.unique(dim=0))


def test_every_place_is_asked_for_once_and_has_the_mean_colour_of_its_block() -> None:
    one = task("photo-inr", 3)
    places, colours = (
        torch.cat([columns(part)[column] for part in (one.train, one.valid, one.test)]) for column in (0, 1)
    )
    assert len(places.unique(dim=0)) == len(places) == 106 * 160
    assert (places.amin(), places.amax()) == (-1, 1)
    image = load_sample_image("flower.jpg") / 255
    row, column = 17, 41
    here = (places - torch.tensor([2 * row / 105 - 1, 2 * column / 159 - 1])).abs().sum(dim=1).argmin()
    block = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    np.testing.assert_allclose(colours[here].numpy(), block.mean(axis=(0, 1)), atol=1e-6)


def test_the_error_of_quantisation_is_scikit_learns_inertia() -> None:
    train, valid = (
        columns(part)[0][:3000] for part in (task("photo-kmeans").train, task("photo-kmeans").valid)
    )
    judge = KMeans(5, n_init=1, random_state=0).fit(train.numpy())
    model = Centres(train, 5)
    with torch.no_grad():
        model.centres.copy_(torch.tensor(judge.cluster_centers_))
    assert quantisation_error(model, (train,)).item() == pytest.approx(judge.inertia_ / len(train), rel=1e-5)
    assert quantisation_error(model, (valid,)).item() == pytest.approx(
        -judge.score(valid.numpy()) / len(valid), rel=1e-5
    )


def test_the_first_centres_are_points_and_find_clusters_that_are_far_apart() -> None:
    """Uniformly drawn, 20 centres would hit 20 clusters with a chance of 20!/20^20, one in 43 million."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.arange(20.0)[:, None] * torch.tensor([100.0, 0.0])
    points = (middles + torch.randn(50, 20, 2, generator=generator)).view(-1, 2)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        centres = Centres(points, 20).centres.detach()
    assert (torch.cdist(centres, points).amin(dim=1) == 0).all()
    assert sorted((centres[:, 0] / 100).round().tolist()) == list(range(20))


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_of_sines_is_drawn_as_its_paper_says(first: bool) -> None:
    layer = Sine(50, 2000, first)
    bound = 1 / 50 if first else math.sqrt(6 / 50) / 30
    assert bound * 0.999 < layer.weight.abs().max().item() <= bound
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    by_hand = np.sin(
        30 * (x.double().numpy() @ layer.weight.detach().double().numpy().T + layer.bias.detach().numpy())
    )
    np.testing.assert_allclose(layer(x).detach().numpy(), by_hand, atol=1e-4)


def test_sines_keep_their_spread_through_the_layers() -> None:
    """Theorem 1.8: what a layer hands on is spread like an arcsine, with a deviation of √½."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, x = siren(256), torch.rand(2000, 2) * 2 - 1
    for layer in model[:-1]:
        assert isinstance(layer, nn.Module)
        x = layer(x)
        assert x.std().item() == pytest.approx(math.sqrt(0.5), abs=0.08)


@pytest.mark.slow
def test_clusters_are_as_tight_as_those_of_the_full_algorithm_or_nearly() -> None:
    one = task("photo-kmeans")
    train, valid = columns(one.train)[0].numpy(), columns(one.valid)[0].numpy()
    judge = KMeans(CLUSTERS, n_init=5, random_state=0).fit(train)
    state = Training(one, threads=1)
    state.advance()
    tightest = -judge.score(valid) / len(valid)
    assert tightest == pytest.approx(0.00529, abs=5e-5), "as docs/tasks.md says"
    rival = MiniBatchKMeans(CLUSTERS, n_init=10, random_state=0).fit(train)
    assert 0.0054 <= -rival.score(valid) / len(valid) <= 0.0057
    assert state.evaluate().metric < tightest * 1.04


@pytest.mark.slow
def test_the_network_of_sines_fills_gaps_better_than_cubic_interpolation() -> None:
    one = task("photo-inr")
    (places, colours), (asked, true) = columns(one.train), columns(one.valid)
    told = griddata(places.numpy(), colours.numpy(), asked.numpy(), method="cubic")
    inside = np.isfinite(told).all(axis=1)
    state = Training(one, threads=1)
    state.advance()
    with torch.no_grad():
        ours = ((state.model(asked) - true) ** 2).mean(dim=1).numpy()
    theirs = ((told - true.numpy()) ** 2).mean(axis=1)[inside].mean()
    assert theirs == pytest.approx(0.0019, abs=1e-4), "as docs/tasks.md says"
    assert ours[inside].mean() < theirs


def test_centres_are_drawn_anew_as_a_fresh_model_draws_them() -> None:
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        model, second = Centres(points, 4), Centres(points, 4)
        first = model.centres.detach().clone()
        torch.manual_seed(7)
        model.reset_parameters()
        assert torch.equal(model.centres, first)
        model.reset_parameters()
    assert torch.equal(model.centres, second.centres)
    assert not torch.equal(first, second.centres)
    assert model.state_dict().keys() == {"centres"}
