"""Every two strategies in one training: refused with the reason, or the same bits after a stop half-way; and
each in pieces of a batch: where the whole batch ends.
"""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from strategies import problem
from strategies.rows import ROWS

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.strategies import STRATEGIES, Strategy
from downslope.train import Training

Make = Callable[[Path], Strategy]
STEPS, STOPPED = 8, 3
PAIRS = list(combinations(ROWS, 2))
REFUSED = {
    ("mix", "smoothing"): r"^\[smoothing\] beside \[mix\] would smooth twice",
    ("spikes", "switch"): r'^\[switch\] goes back by itself: leave "back" out of the ladder',
    ("spikes", "restart"): r'^\[restart\] goes back by itself: leave "back" out of the ladder',
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


EVEN = {
    "rates": st.rates(of={"low.*": 0.5}),
    "freeze": st.freeze(until={"low.*": 5}),
    "start": st.start(method="orthogonal", lsuv=True),
    "mix": st.mix(mixup=1.0),
    "smoothing": st.smoothing(),
    "spikes": st.spikes(deviations=0.01, window=8, calm=1, most=50),
    "growth": st.growth(times=2),
    "switch": st.switch(at=6, to=ds.momentum(lr=0.1), guard=4),
    "average": st.average(decay=0.8),
    "escape": st.escape(every=4, gradient=9.0, curvature=1e-6),
    "restart": st.restart(at=6),
    "stop": st.stop(patience=1, min_delta=9.0),
}
UNEVEN = {"normalisation", "dropout", "depth"}
"""What sees pieces one by one, or draws for each. The teacher's pieces are those of test_teacher.py."""


def ended(*strategies: Strategy) -> tuple[int, torch.Tensor]:
    """Updates and weights of a training in float64."""
    state = Training(problem.plain(), problem.recipe(*strategies, steps=18, observe=3), seed=1)
    state.advance()
    state.finish()
    return state.step, torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_every_strategy_is_tried_in_pieces() -> None:
    assert EVEN.keys() | UNEVEN | {"micro", "teacher"} == STRATEGIES.keys()


@pytest.mark.parametrize("name", EVEN)
def test_in_pieces_it_ends_where_the_whole_batch_does(name: str) -> None:
    """16 items in sevens leave a piece of 2. Without the strategy the weights are others."""
    steps, whole = ended(EVEN[name])
    in_pieces, pieces = ended(EVEN[name], st.micro(items=7))
    assert steps == in_pieces
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    assert float((ended()[1] - whole).abs().max()) > 1e-6
