"""The table of strategies: its arithmetic, its verdicts, and that a stop loses nothing."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from downslope.errors import BadInput
from downslope.journal import read
from downslope.strategies import STRATEGIES

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "strategies.py"
T_9 = 2.2621571628  # Student's t, two-sided 95 %, 9 degrees of freedom
T_4_OF_2 = 3.4954059  # the same, 97.5 %, 4 degrees of freedom


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_strategies", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def known(bench: ModuleType, task: str, name: str, tests: list[float]) -> list[dict[str, Any]]:
    recipe = bench.Pair(task, name).ours.hash
    return [
        {"kind": "run", "task": task, "recipe": recipe, "seed": seed, "test": value}
        for seed, value in enumerate(tests)
    ]


def row(bench: ModuleType, task: str, without: list[float], ours: list[float]) -> Any:
    events = known(bench, task, bench.SAME, without) + known(bench, task, "cautious", ours)
    return bench.Row.of(bench.Table(tuple(events)), bench.Pair(task, "cautious"))


GAINS = [0.01, 0.02, 0.03, 0.02, 0.01, 0.02, 0.03, 0.02, 0.01, 0.03]


def test_the_interval_is_students_of_the_paired_differences(bench: ModuleType) -> None:
    without = [0.5 + 0.04 * seed for seed in range(10)]  # what seeds share drops out
    found = row(bench, "digits-cnn", without, [a + b for a, b in zip(without, GAINS, strict=True)])
    half = T_9 * math.sqrt(sum((gain - 0.02) ** 2 for gain in GAINS) / 9 / 10)
    assert found.gain.mean == pytest.approx(0.02)
    assert (found.gain.low, found.gain.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert found.sure.low < found.gain.low
    assert found.verdict == "better"


def test_the_verdict_is_widened_by_the_number_of_changes(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CHANGES", {name: bench.CHANGES[name] for name in ("cautious", "linear")})
    gains = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = row(bench, "digits-cnn", [0.0] * 5, gains)
    half = T_4_OF_2 * math.sqrt(2.5 / 5)
    assert found.sure.low == pytest.approx(3 - half, rel=1e-6)


def test_a_lower_loss_is_a_gain(bench: ModuleType) -> None:
    assert row(bench, "chars-transformer", [1.5 + gain for gain in GAINS], [1.5] * 10).verdict == "better"
    assert row(bench, "chars-transformer", [1.5] * 10, [1.5 + gain for gain in GAINS]).verdict == "worse"


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.9] * 10, "no effect shown"),  # to the bit
        ([0.9 + 0.01 * (-1) ** seed for seed in range(10)], "no effect shown"),
        ([0.93, 0.89, 0.93, 0.89, 0.94, 0.90, 0.93, 0.90, 0.93, 0.90], "perhaps better"),
        ([0.91] * 4, "too few seeds"),
        ([], "not run"),
    ],
)
def test_what_is_not_shown_is_not_claimed(bench: ModuleType, ours: list[float], verdict: str) -> None:
    assert row(bench, "digits-cnn", [0.9] * 10, ours).verdict == verdict


def test_a_training_that_failed_is_told(bench: ModuleType) -> None:
    events = known(bench, "digits-cnn", bench.SAME, [0.9] * 10) + known(
        bench, "digits-cnn", "cautious", [0.9] * 10
    )
    events[-1] = {**events[-1], "failed": "diverged"}
    assert (
        "diverged" in bench.Row.of(bench.Table(tuple(events)), bench.Pair("digits-cnn", "cautious")).verdict
    )


def test_every_change_makes_another_recipe_and_every_strategy_has_one(bench: ModuleType) -> None:
    seen = set()
    for task in bench.TASKS:
        pairs = [bench.Pair(task, name) for name in (bench.SAME, *bench.changes(task))]
        recipes = [pair.ours for pair in pairs]
        assert len({recipe.hash for recipe in recipes}) == len(pairs)
        seen |= {name for recipe in recipes for name in recipe.strategies}
    assert seen == STRATEGIES.keys() - bench.ELSEWHERE.keys()


def test_a_stop_loses_one_training_and_a_changed_recipe_is_trained_anew(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(bench.TASKS, "digits-cnn", 10)
    trained, begun = bench.trained, []

    def interrupted(pair: Any, seed: int) -> Any:
        begun.append((pair.name, seed))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return trained(pair, seed)

    monkeypatch.setattr(bench, "trained", interrupted)
    asked = tmp_path / "curves.jsonl", ["digits-cnn"], ["cautious"], 2
    with pytest.raises(KeyboardInterrupt):
        bench.measure(*asked)
    bench.measure(*asked)
    lost = [(bench.SAME, 0), (bench.SAME, 1), ("cautious", 0)]
    assert begun == [*lost, ("cautious", 0), ("cautious", 1)]
    curves = [event["curve"] for event in read(asked[0]) if event["kind"] == "run"]
    assert [[step for step, _ in curve] for curve in curves] == [list(range(1, 11))] * 4
    begun.clear()
    bench.measure(*asked)
    assert begun == []
    monkeypatch.setitem(bench.TASKS, "digits-cnn", 11)
    begun += [("", 0)] * 3
    bench.measure(*asked)
    assert len(begun) == 3 + 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategies", "lookahed"], "there is no strategy 'lookahed'"),
        (["--tasks", "digits-cn"], "Did you mean 'digits-cnn'"),
        (["--seeds", "-1"], "--seeds must be a whole number from 0, got -1"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["strategies.py", "--out", str(tmp_path), *words])
    with pytest.raises(BadInput, match=said):
        bench.main()
