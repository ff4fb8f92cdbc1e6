"""Every table of the page on strategies, as it is written there, through a whole training."""

import re
from pathlib import Path

import pytest
from strategies import problem

import downslope as ds
from downslope.strategies import STRATEGIES
from downslope.train import Training

PAGE = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text("utf-8")
TABLE = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {part.split("\n")[0]: TABLE.findall(part) for part in PAGE.split("\n## ")[1:]}
SIZES = {"growth": ("'16 epochs'", 8)}
"""It wants epochs of 25 batches and more, of the 200 digits; the others go by any length."""


@pytest.mark.parametrize("name", STRATEGIES)
def test_its_table_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem's layers are called as the tables call them; what a run teaches is where the page says."""
    monkeypatch.chdir(tmp_path)
    if name == "teacher":
        address = f"{problem.__file__}:residual"
        ds.train(address, problem.recipe(steps=6), out="runs/teacher", seed=3, quiet=True)
    steps, batch = SIZES.get(name, (60, 32))
    for table in SECTIONS[name]:
        text = f"steps = {steps}\nbatch_size = {batch}\n{table}\n[[chain]]\npart = 'adamw'\n"
        recipe = ds.Recipe.parse(text, "strategies.md")
        assert [*recipe.strategies] == [name]
        state = Training(problem.residual(), recipe, seed=1)
        state.advance()
        assert state.done
        state.finish()
