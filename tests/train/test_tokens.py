"""Durations in tokens: a recipe that is given in them is the same training as in samples, or in updates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from strategies import problem
from strategies.test_laws import resumes
from train import problems
from train.test_players import duel

import downslope as ds
from downslope import strategies as st
from downslope.cli import run as command
from downslope.errors import BadInput
from downslope.race.candidates import Candidate, trials
from downslope.schedule import cosine, linear, multistep
from downslope.strategies import Strategy
from downslope.tasks import Task, task
from downslope.train import Training

EACH = 3  # tokens of a sample, where a task has no text


def worth(items: int, unit: str, each: int = EACH) -> str:
    """So many samples, in another unit."""
    return f"{items} samples" if unit == "samples" else f"{items * each} tokens"


def fields(task: Task, recipe: ds.Recipe, steps: int | None = None) -> dict[str, str]:
    state = Training(task, recipe, seed=1)
    state.advance(steps)
    assert state.step == steps or state.done
    return state.fields()


def test_the_language_model_takes_every_length_in_tokens_to_the_bit_of_one_in_updates() -> None:
    """32 windows of 64 characters an update: 2 048 tokens."""
    text = task("chars-transformer")
    assert text.tokens == text.train[1].shape[1] == 64  # type: ignore[index]

    def recipe(*updates: int | str) -> ds.Recipe:
        whole, warmup, thaw, every = updates
        chosen = [st.freeze(until={"norm": thaw}), st.average(decay=0.5, every=every)]
        rate = cosine(1e-2, whole, warmup=warmup)
        return ds.Recipe(ds.chain(ds.clip_norm(1.0), ds.adamw(lr=rate)), whole, 32, strategies=chosen)

    assert fields(text, recipe("12_288 tokens", "4096 tokens", "6.2e3 tokens", "4095.5 tokens")) == fields(
        text, recipe(6, 2, 3, 1)
    )


def given(unit: str, *strategies: Strategy) -> ds.Recipe:
    """500 samples in batches of 16: 31 updates."""
    rate = cosine(3e-3, steps="100 %", warmup=worth(100, unit))
    decay = linear(0.1, worth(300, unit))
    chosen = [*strategies, st.stop(patience=2, restore=False, warmup=worth(16, unit))]
    chain = ds.chain(ds.clip_norm(1.0), ds.adamw(lr=rate, weight_decay=decay))
    return ds.Recipe(chain, worth(500, unit), 16, strategies=chosen, observe=worth(80, unit))


def test_a_run_of_tokens_goes_on_from_its_middle(tmp_path_factory: pytest.TempPathFactory) -> None:
    data, ends = problem.residual(tokens=EACH), []
    for unit in ("tokens", "samples"):
        freeze = st.freeze(until={"stem.*": worth(48, unit)})
        ends.append(resumes(data, given(unit, freeze), tmp_path_factory.mktemp(unit)).fields())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("times", [[], [700, 900]], ids=["one number", "a schedule"])
def test_batches_that_grow_have_more_tokens_each(
    times: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where all updates have as many, the rate may be in tokens too; one of 2 batches has twice as many."""
    data, ends = problem.plain(tokens=EACH), []
    for unit in ("tokens", "samples"):
        growth = st.growth(times=multistep(1, [worth(at, unit) for at in times], 2) if times else 2)
        rate = linear(0.1, "100 %" if times else worth(960, unit))
        recipe = ds.Recipe(ds.momentum(lr=rate), worth(1600, unit), 16, strategies=[growth])
        ends.append(resumes(data, recipe, tmp_path_factory.mktemp(unit)))
    assert ends[0].fields() == ends[1].fields()
    assert ends[0].step == (43 + 7 + 10 if times else 50)
    assert ends[0].pace.rates(recipe.per_batch(12, EACH))["tokens_per_step"] == (None if times else 96)


def test_a_player_that_moves_every_second_round_counts_the_tokens_of_both() -> None:
    ends = []
    for unit in ("tokens", "samples"):
        falling = ds.chain(ds.momentum(lr=linear(0.05, worth(320, unit), end=0.01)))
        players = {"critic": falling, "maker": falling}
        recipe = ds.Recipe(falling, worth(400, unit), 8, players=players)
        state = Training(replace(duel(every=2), tokens=EACH), recipe)
        state.advance()
        ends.append(state)
    assert ends[0].fields() == ends[1].fields()
    plans = [side.optimizer.state_dict()["schedules"][0] for side in ends[0].sides]
    assert [data["steps"] for ((_, _, data),) in plans] == [40, 20]


@pytest.mark.parametrize("asked", [{}, {"batch_size": 32}])
def test_a_branch_is_as_long_as_its_tokens(asked: dict[str, Any], tmp_path: Path) -> None:
    data = problems.task(tokens=EACH)
    recipe = problems.recipe(steps=worth(320, "tokens"))
    ds.train(data, recipe, out=tmp_path / "old", seed=1, save_every=8, quiet=True)
    found = [
        ds.branch(
            tmp_path / "old", None, data, at=16, steps=worth(640, u), then="rewarm", quiet=True, **asked
        )
        for u in ("tokens", "samples")
    ]
    assert found[0].steps == found[1].steps == (20, 28 if asked else 40)
    assert found[0].data()["rates"] == found[1].data()["rates"]


def test_a_race_takes_them_too() -> None:
    data = problem.residual(tokens=EACH)
    one, other = (
        trials([Candidate("mine", "adamw", "given", given(unit))], data)[0] for unit in ("tokens", "samples")
    )
    assert replace(one, recipe="", hash="") == replace(other, recipe="", hash="")
    assert (one.steps, one.warmup) == (31, 6)


def test_a_loop_of_ones_own_says_how_many_a_sample_has() -> None:
    model = problem.Plain()
    made = [
        given(unit).build(model, steps_per_epoch=12, tokens_per_sample=EACH) for unit in ("tokens", "samples")
    ]
    assert made[0].state_dict()["schedules"] == made[1].state_dict()["schedules"]


REFUSED = (
    "steps is '1500 tokens': to turn it into steps, tokens_per_step must be given, got None; a recipe has it "
    "from its task's field 'tokens': without that, say samples."
)


def test_a_task_that_does_not_say_how_many_refuses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given("tokens").save(tmp_path / "mine.toml")
    asked = ["train", "digits-mlp", "--recipe", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run")]
    assert command(asked) == 2
    assert capsys.readouterr().err == f"downslope: {REFUSED}\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="cosine: warmup is '300 tokens'.*its task's field 'tokens'"):
        Training(problem.residual(), given("tokens").with_(steps=31))


def test_a_run_whose_task_now_says_another_number_is_not_gone_on_with(tmp_path: Path) -> None:
    ds.train(problems.task(tokens=EACH), problems.recipe(steps=4), out=tmp_path, quiet=True)
    with pytest.raises(
        BadInput, match=r"had 3 tokens when the run began, and the task now says 4: go on with"
    ):
        ds.resume(tmp_path, problems.task(tokens=4), quiet=True)
    ds.resume(tmp_path, problems.task(tokens=EACH), quiet=True)
