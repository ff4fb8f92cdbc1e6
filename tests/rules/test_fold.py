"""What is scalar is folded alike whether all parameters share one number or each has its own, and alike by
the host and by compiled code.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from downslope.kernels.bucket import Member
from downslope.kernels.update import Update
from downslope.rules import chain, rule, trace
from downslope.rules.fold import fold
from downslope.rules.trace import Class, Trace
from downslope.rules.value import WORDS, speak, where

ODD = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1.0, -1.0, 0.5, -2.0, 3.0, 1e300, -1e300, 5e-324]
UNARY = ("neg", "abs", "sqrt", "exp", "log", "sign", "isfinite")
CONDITIONS = ("lt", "le", "gt", "ge", "isfinite")
WANTED = sorted({*WORDS} - {"where", "dither"})


@pytest.mark.parametrize("word", sorted({*WORDS} - {"dither"}))
def test_one_number_gives_what_an_array_gives(word: str) -> None:
    tape, count = Trace(), {"where": 3}.get(word, 1 if word in UNARY else 2)
    inputs = tuple(tape.input("number", Class.HOST, str(place)) for place in range(count))
    node = tape.word(word, *inputs)
    rows = np.array(list(itertools.product(ODD, repeat=count)))
    many: dict[Any, Any] = dict(zip(inputs, rows.T, strict=True))
    fold([node], many)
    with np.errstate(all="ignore"):
        assert np.array_equal(many[node], WORDS[word](*rows.T), equal_nan=True)
    for row, want in zip(rows, many[node], strict=True):
        one: dict[Any, Any] = dict(zip(inputs, row, strict=True))
        fold([node], one)
        got = one[node]
        assert isinstance(got, np.generic)  # whose arithmetic raises nothing, as Python's floats do
        near = word == "pow" and np.isclose(got, want, rtol=3e-16, atol=0)  # rounded another way
        assert near or got == want or (np.isnan(got) and np.isnan(want)), (row, got, want)
        assert np.signbit(np.float64(got)) == np.signbit(np.float64(want)) or np.isnan(want)


def told(word: str, executor: str, alike: bool) -> np.ndarray:
    """What a step writes that stores a word of two of its numbers, for every pair of odd ones."""

    def body(g: Any, p: Any, s: Any, *, a: float = 1.0, b: float = 1.0) -> Any:
        found = speak(word, a) if word in UNARY else speak(word, a, b)
        s.out = (where(found, 1.0, 0.0) if word in CONDITIONS else found) + 0.0 * abs(g)
        return 0.0 * g

    program, pairs = trace(chain(rule("out", name=f"scalar_{word}")(body))), [*itertools.product(ODD, ODD)]
    found = []
    for held in [[pair] for pair in pairs[::7]] if alike else [pairs]:
        weights = [torch.zeros(2, dtype=torch.float64) for _ in held]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        slots = [{"out": torch.zeros_like(weight)} for weight in weights]
        members = [Member.of(f"w{i}", w, s) for i, (w, s) in enumerate(zip(weights, slots, strict=True))]
        update = Update([(program, range(len(held)))], members, [0] * len(held), executor=executor)
        active, values = update.gather(), {"a": 0, "b": 1}
        assert active is not None
        table = [[pair[values[key]] if key in values else 0.1 for pair in held] for key, _ in program.numbers]
        update.run([np.array(table)], np.ones(len(held), dtype=np.int64), 1, active)
        found += [slot["out"].numpy() for slot in slots]
    return np.stack(found)


@pytest.mark.parametrize("word", WANTED)
def test_compiled_code_folds_as_the_host_does(word: str) -> None:
    """Each pair in a row of its own, and each alone, which is one row for all."""
    rounded = word in ("pow", "exp", "log")  # libraries round these their own way
    want = told(word, "eager", alike=False)
    for got, known in ((told(word, "auto", alike=False), want), (told(word, "auto", alike=True), want[::7])):
        np.testing.assert_allclose(got, known, rtol=1e-15 if rounded else 0, atol=0)
        assert np.array_equal(np.signbit(got) | np.isnan(got), np.signbit(known) | np.isnan(known))
