"""Who races: a problem keeps its own penalty, and what cannot be judged is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

import downslope as ds
from downslope.race.candidates import baseline, brought, grid
from downslope.tasks import task


def test_every_candidate_keeps_the_penalty_that_is_part_of_the_problem() -> None:
    recipe = task("diabetes-lasso").recipe
    penalty = next(part for part in recipe.chain.parts if part.name == "l1")
    found = grid(recipe)
    assert len(found) > 20
    for one in (*found, baseline(recipe)):
        assert [part.numbers for part in one.recipe.chain.parts if part.name == "l1"] == [penalty.numbers]
    assert not any(one.family == "lion" for one in found), "a sign rule has no effective step"


def test_roles_keep_what_they_say_of_the_penalty_and_nothing_else() -> None:
    made = ds.chain(ds.l2(0.1), ds.momentum(lr=0.1), ds.l1(1e-3))
    like = ds.Recipe(made, 100, 32, roles={"bias": {"l1": 0.0, "l2": 0.0}, "norm": {"lr": 0.1}})
    for one in grid(like, ["adamw", "sgd"]):
        assert one.recipe.roles["bias"]["l1"] == 0.0
        assert "lr" not in one.recipe.roles.get("norm", {})
    assert {role: dict(numbers) for role, numbers in baseline(like).recipe.roles.items()} == {
        "bias": {"l1": 0.0}
    }


def test_a_penalty_that_no_rule_takes_is_refused() -> None:
    like = replace(task("digits-mlp").recipe, chain=ds.chain(ds.sgd(lr=0.1), ds.l1(1e-3)))
    with pytest.raises(ds.BadInput, match="takes the recipe's l1"):
        grid(like, ["lion", "signsgd"])


def test_without_a_penalty_every_rule_races() -> None:
    assert {one.family for one in grid(task("digits-mlp").recipe)} >= {"adamw", "lion", "momentum"}


def test_a_strategy_that_a_race_cannot_judge_is_refused_by_name(tmp_path: Path) -> None:
    """A stopped training does not get on: without this the race would wait for it for ever."""
    own = task("digits-mlp").recipe
    stopping = replace(own, strategies=[ds.strategies.stop(patience=3)])
    said = r"has \[stop\], which a race cannot judge: it ends a training early"
    with pytest.raises(ds.BadInput, match=f"^The recipe 'mine' {said}"):
        brought({"mine": stopping})
    with pytest.raises(ds.BadInput, match=f"^The task's recipe {said}"):
        baseline(stopping)
    with pytest.raises(ds.BadInput, match=f"^The recipe 'mine' {said}"):
        ds.race("digits-mlp", recipes={"mine": stopping}, out=tmp_path / "race")
    assert not (tmp_path / "race" / "race.json").exists()
    others = [ds.strategies.average(), ds.strategies.micro(items=8)]
    assert brought({"mine": replace(own, strategies=others)})[0].recipe.strategies.keys() == {
        "micro",
        "average",
    }


def test_a_task_with_several_players_does_not_race(tmp_path: Path) -> None:
    with pytest.raises(ds.BadInput, match="several players: use downslope train"):
        ds.race("digits-gan", budget="2x", out=tmp_path / "race")
