"""A recipe at another batch size: how each rule's rate goes with it, and what of a recipe that moves."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import downslope as ds
from downslope.cli import run
from downslope.errors import BadInput
from downslope.schedule import cosine
from downslope.strategies.chain import SCALES

SLOW = ("momentum", "momentum_textbook", "nesterov")  # whose momentum makes a step ten times as long
WITHOUT_DECAY = {"adamw": {"weight_decay": 0.0}}


def course(recipe: ds.Recipe, samples: int = 1200, places: int = 10_000) -> tuple[float, float]:
    """Mean and variance, over independent places, of w from 1 after so many samples of ½ 0.1 w², noise 1."""
    generator = torch.Generator().manual_seed(recipe.batch_size)
    w = nn.Parameter(torch.ones(places, dtype=torch.float64))
    optimizer = recipe.build(nn.ParameterList([w]))
    for _ in range(samples // recipe.batch_size):
        noise = torch.randn(places, dtype=torch.float64, generator=generator)
        w.grad = 0.1 * w.detach() + noise / math.sqrt(recipe.batch_size)
        optimizer.step()
    return float(w.detach().mean()), float(w.detach().var())


@pytest.mark.parametrize("name", SCALES)
def test_noise_and_way_stay_the_same_where_noise_outweighs_the_gradient(name: str) -> None:
    """Against the training itself at a batch of 1: four times the batch, a quarter of the updates.

    The gradient is at most a tenth of one sample's noise. Within 8 % of mean and variance; with the rate left
    alone, or moved by the other rule, both are off by a fifth at least.
    """
    numbers = {"lr": 0.001 if name in SLOW else 0.01, **WITHOUT_DECAY.get(name, {})}
    recipe = ds.Recipe(ds.chain(ds.rules()[name](**numbers)), 1200, 1)
    mean, variance = course(recipe)
    assert mean < 0.5, "it must have moved to tell"
    moved = recipe.with_batch(4)
    assert course(moved) == (pytest.approx(mean, rel=0.08), pytest.approx(variance, rel=0.08))
    other = 2 if SCALES[name] == "sgd" else 4
    for wrong in (1, other):
        far = course(recipe.with_(lr=numbers["lr"] * wrong, batch_size=4))
        assert abs(far[0] / mean - 1) > 0.2
        assert abs(far[1] / variance - 1) > 0.2


def test_every_rate_of_a_recipe_moves_by_the_rule_that_it_belongs_to_and_nothing_else() -> None:
    route = {"matrix": ds.chain(ds.momentum(lr=0.1))}
    roles = {"norm": {"lr": 0.5, "weight_decay": 0.0}, "matrix": {"lr": 0.3}, "bias": {"weight_decay": 0.0}}
    players = {"critic": ds.chain(ds.sgd(lr=cosine(0.2, "100 %", end=0.1)))}
    chain = ds.chain(ds.clip_norm(1.0), ds.adamw(lr=cosine(1e-3, "100 %", warmup="5 %")))
    recipe = ds.Recipe(chain, "20 epochs", 32, roles=roles, route=route, players=players)
    assert {*str(recipe.diff(recipe.with_batch(512))).splitlines()} == {
        "batch_size: 32 → 512",
        "adamw.lr.peak: 0.001 → 0.004",
        "player.critic.sgd.lr.peak: 0.2 → 3.2",
        "player.critic.sgd.lr.end: 0.1 → 1.6",
        "route.matrix.momentum.lr: 0.1 → 1.6",
        "roles.norm.lr: 0.5 → 2.0",
        "roles.matrix.lr: 0.3 → 4.8",
    }
    back = recipe.with_batch(512).with_batch(32)
    assert back == recipe


@pytest.mark.parametrize("chain", [ds.lion(), ds.chain(ds.adam(lr=0.1), ds.lion()), ds.prodigy()])
def test_a_rule_of_which_it_is_not_known_is_refused_by_name(chain: Any) -> None:
    with pytest.raises(
        BadInput, match=r"it is not known how the rate of .*(lion|prodigy) goes with the batch"
    ):
        ds.Recipe(chain, 10, 8).with_batch(16)


def test_a_batch_size_is_checked_as_ever() -> None:
    with pytest.raises(BadInput, match="batch_size must be a whole number from 1, got 0"):
        ds.Recipe(ds.adamw(), 10, 8).with_batch(0)


def test_the_command_line_says_what_it_moves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = ds.Recipe(ds.adamw(lr=1e-3), 10, 16)
    recipe.save(tmp_path / "mine.toml")
    command = ["train", "cancer-logistic", "--recipe", str(tmp_path / "mine.toml"), "--out"]
    assert run([*command, str(tmp_path / "moved"), "--batch-size", "64", "--scale-rate"]) == 0
    assert "batch_size: 16 → 64\nadamw.lr: 0.001 → 0.002\n" in capfd.readouterr().err
    assert ds.Recipe.load(tmp_path / "moved" / "recipe.toml") == recipe.with_batch(64)
    assert run([*command, str(tmp_path / "left"), "--batch-size", "64"]) == 0
    assert ds.Recipe.load(tmp_path / "left" / "recipe.toml") == recipe.with_(batch_size=64)
    capfd.readouterr()
    assert run([*command, str(tmp_path / "x"), "--scale-rate"]) == 2
    assert "give --batch-size" in capfd.readouterr().err
    assert run([*command, str(tmp_path / "x"), "--batch-size", "5000"]) == 2
    assert "--batch-size is at most the " in capfd.readouterr().err
    assert not (tmp_path / "x").exists()
