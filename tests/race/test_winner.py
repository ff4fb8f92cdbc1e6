"""The winner of the race that a newcomer runs, held against AdamW as it comes, on fresh seeds."""

from pathlib import Path

import pytest

import downslope as ds
from downslope.race.candidates import baseline
from downslope.race.statistics import paired


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_winner_is_not_worse_than_adamw_at_its_default(tmp_path: Path) -> None:
    """Ten fresh paired seeds; the race itself used others."""
    winner = ds.race("digits-cnn", out=tmp_path / "race").winner
    task = ds.task("digits-cnn")
    default = baseline(task.recipe).recipe

    def trained(recipe: ds.Recipe) -> list[ds.Training]:
        states = [ds.Training(task, recipe, seed, threads=1) for seed in range(1000, 1010)]
        for state in states:
            state.advance()
        return states

    ours, theirs = trained(winner), trained(default)
    for part in ("valid", "test"):
        difference = paired(
            [state.evaluate(part).metric for state in ours], [state.evaluate(part).metric for state in theirs]
        )
        assert difference.high is not None
        assert difference.high >= 0, f"the winner is worse on the {part} part: {difference}"
