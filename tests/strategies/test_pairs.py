"""Every two strategies in one training: refused with the reason, or the same bits after a stop half-way."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from strategies import problem
from strategies.rows import ROWS

import downslope as ds
from downslope.errors import BadInput
from downslope.strategies import Strategy
from downslope.train import Training

Make = Callable[[Path], Strategy]
STEPS, STOPPED = 8, 3
PAIRS = list(combinations(ROWS, 2))
REFUSED = {
    ("mix", "smoothing"): r"^\[smoothing\] beside \[mix\] would smooth twice",
    ("freeze", "restart"): r"^\[restart\] begins anew, and does not go with \[freeze\], which is for weights",
    (
        "switch",
        "restart",
    ): r"^\[restart\] begins anew, and does not go with \[switch\], which counts one training",
    ("average", "restart"): r"^\[restart\] begins anew, and does not go with \[average\], which would mix",
    ("restart", "stop"): r"^\[restart\] begins anew, and does not go with \[stop\], which would end",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    address = f"{problem.__file__}:residual"
    ds.train(address, problem.recipe(steps=6), out=folder / "teacher", seed=3, quiet=True)
    return folder


@pytest.mark.parametrize("pair", PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_two_of_them_go_on_to_the_bit_or_are_refused_with_the_reason(
    pair: tuple[str, str], runs: Path, tmp_path: Path
) -> None:
    """The first setting of each, with all that either does within eight updates."""
    one, other = (ROWS[name][0](runs) for name in pair)
    if pair in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[pair]):
            problem.recipe(one, other)
        return
    recipe = problem.recipe(one, other, steps=STEPS, observe=2)
    assert {*recipe.strategies} == {*pair}
    assert problem.recipe(other, one, steps=STEPS, observe=2).hash == recipe.hash
    straight, stopped = (Training(problem.residual(), recipe, seed=1) for _ in range(2))
    straight.advance()
    stopped.advance(STOPPED)
    resumed = Training.load(tmp_path / "x", problem.residual(), recipe, stopped.save(tmp_path / "x"))
    assert resumed.fields() == stopped.fields()
    resumed.advance()
    assert resumed.step == straight.step > STOPPED
    assert resumed.fields() == straight.fields()
    assert resumed.evaluate() == straight.evaluate()
    assert resumed.finish() == straight.finish()
    assert resumed.fields() == straight.fields()
