"""Every link in a recipe: in pieces it ends where the whole batch does, and it goes on to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LINK_CASES
from strategies import problem

from downslope import strategies as st
from downslope.rules import LINKS, Chain, chain
from downslope.train import Training

STEPS, HALF = 12, 5
MOMENTUM = CASES["momentum"]
SHARP: dict[str, dict[str, float]] = {
    "clip_norm": {"max_norm": 0.1},
    "clip_tensor": {"max_norm": 0.05},
    "clip_value": {"max_value": 0.01},
    "clip_history": {"deviations": 0.1, "settle": 2},
}
"""Bounds that are met here."""

ROUNDED = {"stochastic_rounding"}
"""What does nothing to weights of float64; its own tests are of half precision."""


def ended(state: Training) -> torch.Tensor:
    state.advance()
    state.finish()
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("name", LINKS)
def test_a_link_goes_on_to_the_bit_and_counts_once_in_pieces(name: str, tmp_path: Path) -> None:
    case = LINK_CASES[name]
    case = replace(case, numbers={**case.numbers, **SHARP.get(name, {})})
    linked, plain = case.chain(MOMENTUM), chain(MOMENTUM.part)

    def training(*strategies: Any, rule: Chain = linked) -> Training:
        return Training(problem.plain(), problem.recipe(*strategies, steps=STEPS, chain=rule), seed=1)

    straight, stopped = (training(st.micro(items=7)) for _ in range(2))
    stopped.advance(HALF)
    resumed = Training.load(tmp_path / "x", problem.plain(), sha=stopped.save(tmp_path / "x"))
    pieces = ended(straight)
    ended(resumed)
    assert resumed.fields() == straight.fields()
    torch.testing.assert_close(pieces, ended(training()), rtol=0, atol=1e-10)
    bare = ended(training(rule=plain))
    assert (float((pieces - bare).abs().max()) > 1e-9) is (name not in ROUNDED)
