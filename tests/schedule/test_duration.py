"""Durations and their units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downslope.errors import BadInput
from downslope.schedule import constant, cosine, duration, in_steps, linear, multistep, one_cycle, step, wsd


@pytest.mark.parametrize(
    ("given_as", "spelt"),
    [
        (500, 500),
        ("500 steps", 500),
        ("1 step", 1),
        ("500.0steps", 500),
        ("1e3 steps", 1000),
        ("10_000 steps", 10_000),
        ("1.5e3 steps", 1500),
        ("3 epochs", "3 epochs"),
        ("3 epoch", "3 epochs"),
        ("01 epochs", "1 epoch"),
        (" 0.50 epochs ", "0.5 epochs"),
        ("64000 samples", "64000 samples"),
        ("1_000_000 samples", "1000000 samples"),
        ("1.2E+6 samples", "1200000 samples"),
        ("2000000 tokens", "2000000 tokens"),
        ("2e6 tokens", "2000000 tokens"),
        ("1 token", "1 token"),
        ("15e12 tokens", "15000000000000 tokens"),
        ("10%", "10 %"),
        ("100 %", "100 %"),
        ("12.50 %", "12.5 %"),
        ("1e1 %", "10 %"),
        (torch.tensor(7).item(), 7),
    ],
)
def test_a_duration_has_one_spelling(given_as: object, spelt: object) -> None:
    assert duration(given_as) == spelt
    assert duration(duration(given_as)) == spelt


@pytest.mark.parametrize(
    "wrong",
    [-1, 0.05, 500.0, True, None, "", "500", "ten steps", "1.5 steps", "-3 epochs", "10 percent", "3 tokenz",
     "1e-3 epochs", "1e400 tokens", "1e16 samples", "1,000 steps", "1.000.000 samples", "1 000 steps",
     "1__0 steps", "_1 steps", "1_ steps", "e6 tokens", "2M tokens", "5k steps", "٣ epochs", "nan %",
     "9" * 40 + " steps", "1_" * 40 + "1 steps", 10**400, [1], "10 % of it"],
)  # fmt: skip
def test_units_are_never_guessed(wrong: object) -> None:
    with pytest.raises(BadInput, match="warmup must be a whole number of steps from 0 or text such as"):
        cosine(0.1, steps=100, warmup=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("3 epoches", "epochs"), ("10 percent", "%"), ("5 iterations", "steps"), ("3 tokenz", "tokens"),
     ("8 Sample", "samples"), ("9 step_s", None), ("2 days", None)],
)  # fmt: skip
def test_the_nearest_unit_is_named(wrong: str, meant: str | None) -> None:
    with pytest.raises(BadInput) as caught:
        duration(wrong)
    hint = f"Did you mean {meant!r}?"
    assert str(caught.value).endswith(hint if meant else f"got {wrong!r}.")


def test_percentages_epochs_samples_and_tokens_become_steps() -> None:
    given_as = cosine(0.1, steps="100 %", warmup="5 %")
    assert given_as.resolve(run_steps=200) == cosine(0.1, steps=200, warmup=10)
    short = linear(0.1, "3 epochs", warmup="0.5 epochs")
    assert short.resolve(steps_per_epoch=20) == linear(0.1, 60, warmup=10)
    assert step(0.1, every="640 samples").resolve(batch_size=64) == step(0.1, every=10)
    assert step(0.1, every="2e6 tokens").resolve(tokens_per_step=2**15) == step(0.1, every=61)
    assert constant(0.1, warmup="5 %").resolve(run_steps=200) == constant(0.1, warmup=10)
    assert cosine(0.1, 50).resolve() == cosine(0.1, 50)
    trunk = constant(0.1, warmup="1 epoch").cooldown("80 %", "20 %")
    assert trunk.resolve(run_steps=100, steps_per_epoch=9) == constant(0.1, warmup=9).cooldown(80, 20)
    stairs = multistep(0.1, at=("1 epoch", "50 %", 90), warmup="5 %")
    assert stairs.resolve(run_steps=100, steps_per_epoch=9) == multistep(0.1, at=(9, 50, 90), warmup=5)


def test_a_percentage_is_of_the_schedules_own_length_and_of_the_run_where_there_is_none() -> None:
    assert wsd(0.1, steps=1000) == wsd(0.1, steps=1000, cooldown=200)
    assert one_cycle(0.1, steps=1000) == one_cycle(0.1, steps=1000, rise=300)
    assert cosine(0.1, "50 %", warmup="10 %").resolve(run_steps=1000) == cosine(0.1, 500, warmup=50)
    assert one_cycle(0.1, "50 %").resolve(run_steps=1000) == one_cycle(0.1, 500, rise=150)
    assert step(0.1, every="10 %", warmup="5 %").resolve(run_steps=1000) == step(0.1, every=100, warmup=50)


def test_percentages_are_exact_and_rounded_down() -> None:
    assert in_steps("7 %", run_steps=100) == 7  # 0.07 · 100 is 7.000000000000001 in floats
    assert in_steps("29 %", run_steps=100) == 29  # and 0.29 · 100 is 28.999999999999996
    assert [in_steps("5 %", run_steps=n) for n in (1, 19, 20, 39)] == [0, 0, 1, 1]
    assert cosine(0.1, "10 %").resolve(run_steps=2) == cosine(0.1, 1)


@given(st.integers(1, 10**12), st.integers(1, 10**7))
def test_tokens_and_samples_are_whole_steps_that_fit(amount: int, rate: int) -> None:
    for unit, name in (("tokens", "tokens_per_step"), ("samples", "batch_size")):
        assert in_steps(f"{amount} {unit}", **{name: rate}) == amount // rate


@pytest.mark.parametrize(
    ("unit", "missing"),
    [
        ("3 epochs", "steps_per_epoch"),
        ("64 samples", "batch_size"),
        ("64 tokens", "tokens_per_step"),
        ("10 %", "run_steps"),
    ],
)
def test_an_unknown_exchange_rate_is_named(unit: str, missing: str) -> None:
    rates = {"run_steps": 10, "steps_per_epoch": 10, "batch_size": 10, "tokens_per_step": 10}
    del rates[missing]
    with pytest.raises(BadInput, match=f"linear: steps is '{unit}'.*{missing} must be given"):
        linear(0.1, steps=unit).resolve(**rates)
    with pytest.raises(BadInput, match=missing):
        linear(0.1, steps=unit).resolve(**{**rates, missing: 0})
    with pytest.raises(BadInput, match=r"call resolve\(...\) first"):
        linear(0.1, steps=unit)(0)


def test_a_run_too_long_to_count_is_refused() -> None:
    with pytest.raises(BadInput, match="linear: steps must be a whole number of steps"):
        linear(0.1, steps="9e15 epochs").resolve(steps_per_epoch=1000)
