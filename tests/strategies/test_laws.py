"""What holds for every strategy: one text, one hash, clear refusals, and the same bits after any stop."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from strategies import problem
from strategies.rows import ROWS

import downslope as ds
from downslope import strategies as st
from downslope.errors import BadInput
from downslope.journal import read
from downslope.strategies import STRATEGIES, Strategy
from downslope.train import Training, history

Make = Callable[[Path], Strategy]
STEPS, HALF = 24, 11
CASES = [pytest.param(make, id=f"{name}-{i}") for name, made in ROWS.items() for i, make in enumerate(made)]
every_setting = pytest.mark.parametrize("make", CASES)
every_strategy = pytest.mark.parametrize("name", STRATEGIES)
HEAD = 'steps = 24\nbatch_size = 16\n[[chain]]\npart = "adamw"\n'


def test_every_strategy_has_a_row() -> None:
    assert ROWS.keys() == STRATEGIES.keys()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of finished runs that the rows need."""
    folder = tmp_path_factory.mktemp("runs")
    address = f"{problem.__file__}:residual"
    ds.train(address, problem.recipe(steps=6), out=folder / "teacher", seed=3, quiet=True)
    return folder


# As text


@every_setting
def test_a_recipe_writes_and_reads_it(make: Make, runs: Path) -> None:
    strategy = make(runs)
    recipe = problem.recipe(strategy)
    again = ds.Recipe.parse(recipe.text())
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.strategies == {strategy.name: strategy}
    assert f"\n[{strategy.name}]\n" in recipe.text()
    bare = problem.recipe()
    assert bare.hash != recipe.hash
    assert [change.key for change in bare.diff(recipe)] == [strategy.name]


@every_setting
def test_what_says_the_same_has_one_hash(make: Make, tmp_path: Path) -> None:
    """5 and 5.0, a list and a tuple, a default left out and written."""
    strategy = make(tmp_path)

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(one) for key, one in value.items()}
        if isinstance(value, list):
            return [whole(one) for one in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    again = type(strategy).from_data(whole(strategy.data()))
    assert problem.recipe(again).hash == problem.recipe(strategy).hash
    copied = replace(strategy)
    assert copied == strategy


@every_strategy
def test_a_wrong_key_is_refused_with_its_table_its_line_and_the_nearest_right_one(name: str) -> None:
    right = fields(STRATEGIES[name])[0].name
    wrong = right + "x"
    with pytest.raises(BadInput) as caught:
        ds.Recipe.parse(f"{HEAD}\n[{name}]\n{wrong} = 1\n", "mine.toml")
    assert str(caught.value).startswith(
        f"mine.toml:7: [{name}] has no key {wrong!r}. Did you mean {right!r}? Allowed: "
    )


@every_strategy
def test_a_wrong_table_is_refused_with_its_line_and_the_nearest_right_one(name: str) -> None:
    with pytest.raises(BadInput, match=rf"^mine\.toml:6: unknown key '{name}x'\. Did you mean '{name}'\?"):
        ds.Recipe.parse(f"{HEAD}\n[{name}x]\n", "mine.toml")
    with pytest.raises(BadInput, match=rf"^mine\.toml:6: {name}: "):
        ds.Recipe.parse(f"{HEAD}\n[[{name}]]\n", "mine.toml")


@pytest.mark.parametrize(
    ("name", "key"), [(name, item.name) for name, kind in STRATEGIES.items() for item in fields(kind)]
)
def test_a_value_of_a_wrong_type_is_refused_with_table_key_and_line(name: str, key: str) -> None:
    with pytest.raises(BadInput) as caught:
        ds.Recipe.parse(f"{HEAD}\n[{name}]\n{key} = 1979-05-27\n", "mine.toml")
    assert re.match(rf"mine\.toml:7: \[{name}\] {key} (is|must be) ", str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("table", "line", "said"),
    [
        ('[average]\nkind = "emaa"', 2, "[average] kind is one of ema, swa, tail, polynomial_average, got"),
        ('[average]\nkind = "ema"\ndecay = 2', 3, "[average] ema: decay must be a number from 0 to below 1"),
        ('[average]\neta = 2', 2, "[average] a number of ema is one of decay, warmup"),
        ('[average]\nbuffers = "cpy"', 2, "got 'cpy'. Did you mean 'copy'?"),
        ('[average]\nstart = "3 ephocs"', 2, "got '3 ephocs'. Did you mean 'epochs'?"),
        ("[mix]\nmixup = -1", 2, "[mix] mixup is the alpha of a Beta, a number from 0, got -1.0."),
        ("[mix]\nmixup = 0", 2, "Neither mixup nor cutmix is on"),
        ("[mix]\ncutmix = nan", 2, "[mix] cutmix is a number, got nan."),
        ("[smoothing]\nshare = 1", 2, "share must be from 0 to below 1"),
        ("[smoothing]\n[mix]", 1, "[smoothing] beside [mix] would smooth twice: give [mix] its own"),
        ("[micro]", 1, "[micro] needs a key 'items'."),
        ("[micro]\nitems = 0", 2, "[micro] items must be at least 1, got 0."),
        ("[micro]\nitems = 4.0", 2, "[micro] items is a whole number, got 4.0."),
        ("[stop]\npatience = 0", 2, "patience is a number of validations, at least 1, got 0."),
        ("[stop]\npatience = true", 2, "[stop] patience is a whole number, got True."),
        ('[stop]\non = "los"', 2, "on is one of loss, metric, got 'los'. Did you mean 'loss'?"),
        ("[rates]\nof = { stem = 'a' }", 2, "[rates] of.stem is a number, got 'a'."),
        ("[rates]", 1, "[rates] does nothing: give decay or of."),
        ("[freeze]", 1, "[freeze] takes either until = { pattern = duration } or every = duration."),
        ("[freeze]\nuntil = { bias = 'nevr' }", 2, "Did you mean 'never'?"),
        ("[freeze]\nuntil = { bias = 3 }\nblocks = ['a']", 3, "blocks belong to every = duration"),
        ("[start]", 1, "[start] does nothing: give a method, lsuv = true or zero_residual = true."),
        ('[start]\nmethod = "kaming_normal"', 2, "Did you mean 'kaiming_normal'?"),
        ("[dropout]\nrate = 2", 2, "rate is the share that is left out, from 0 to 1, got 2."),
        ("[dropout]\nrate = { schedule = 'cosin', peak = 1 }", 2, "Did you mean 'cosine'?"),
        ("[dropout]\nrate = { schedule = 'plateau', peak = 0.5 }", 2, "goes by validations, as plateau does"),
        ("[depth]\nrate = 0.1", 1, "[depth] needs a key 'branches'."),
        ("[depth]\nbranches = 'a'", 2, "[depth] branches is a list, got 'a'."),
        ('[normalisation]\nto = "grup"', 2, "Did you mean 'group'?"),
        ('[normalisation]\nto = "ghost"\nsize = 1', 3, "[normalisation] size must be at least 2, got 1."),
        ('[normalisation]\nto = "group"\ngroups = 0', 3, "[normalisation] groups must be at least 1, got 0."),
        ('[normalisation]\nto = "ghost"\ngroups = 4', 3, "groups belongs to to = 'group', not to 'ghost'."),
        ('[normalisation]\nto = "frozen"\nsize = 4', 3, "size belongs to to = 'ghost', not to 'frozen'."),
        ("[rates]\ndecay = -1", 2, "[rates] decay is above 0 and at most 1, got -1; [freeze] holds a layer"),
        ("[rates]\ndecay = 2", 2, "[rates] decay is above 0 and at most 1, got 2;"),
        ("[rates]\nof = { stem = -1 }", 2, "[rates] of.stem multiplies a rate, a number from 0, got -1."),
        ("[freeze]\nevery = 0", 2, "[freeze] every is at least 1 update, got 0, which freezes nothing."),
        ("[depth]\nbranches = []", 2, "[depth] branches names residual branches, each once, got []."),
        ("[depth]\nbranches = ['a', 'a']", 2, "each once, got ['a', 'a']."),
        ("[dropout]\nrate = { schedule = 'linear', peak = 0.1, steps = 9, end = 2 }", 2, "to 1, got 2."),
        ("[mix]\nclasses = 0", 2, "[mix] classes must be at least 2, got 0."),
        ("[smoothing]\nclasses = 99999999999", 2, "[smoothing] classes must be at least 2, got 99999999999."),
        ("[switch]\nat = 0", 2, "[switch] at must be at least 1, got 0."),
        ("[switch]\npatience = 0", 2, "[switch] patience must be at least 1, got 0."),
        ("[switch]\ntolerance = 0", 2, "[switch] tolerance must be above 0, got 0.0."),
        ("[switch]\nrise = -1", 2, "[switch] rise must be at least 0, got -1.0."),
        ("[teacher]\nrun = 'x'\nbeta = -1", 3, "[teacher] beta must be a number from 0, got -1."),
        ("[teacher]\nrun = 'x'\naverage = 'logit'", 3, "one of probabilities, logits, got 'logit'"),
        ("[teacher]\nrun = 'x'\nmethod = { logits = -1 }", 3, "weights of methods are numbers from 0."),
        (
            "[teacher]\nrun = 'x'\nalpha = { schedule = 'linear', peak = 3, steps = 9 }",
            3,
            "[teacher] alpha is the teacher's share, from 0 to 1, got 3.",
        ),
        (
            "[teacher]\nrun = 'x'\ntemperature = { schedule = 'linear', peak = 4, steps = 9 }",
            3,
            "[teacher] temperature must stay above 0, got 0.",
        ),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_where_it_stands(table: str, line: int, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        ds.Recipe.parse(f"{HEAD}\n{table}\n", "mine.toml")
    assert str(caught.value).startswith(f"mine.toml:{5 + line}: "), caught.value
    assert said in str(caught.value)


NEEDED = {
    "rates": "does nothing: give decay or of.",
    "freeze": "takes either until = { pattern = duration } or every = duration.",
    "start": "does nothing: give a method, lsuv = true or zero_residual = true.",
    "normalisation": "needs a key 'to'.",
    "dropout": "needs a key 'rate'.",
    "depth": "needs a key 'branches'.",
    "micro": "needs a key 'items'.",
    "growth": "needs a key 'times'.",
    "teacher": "needs a key 'run'.",
}
"""What an empty table lacks; the others have a default for everything."""


@every_strategy
def test_what_is_needed_is_named(name: str) -> None:
    kind = STRATEGIES[name]
    if name in NEEDED:
        with pytest.raises(BadInput) as caught:
            kind.from_data({})
        assert str(caught.value) == f"[{name}] {NEEDED[name]}"
    else:
        assert kind.from_data({}).data().keys() <= {item.name for item in fields(kind)}


def test_one_of_each_and_nothing_else() -> None:
    with pytest.raises(BadInput, match="micro stands twice; a recipe has one of each"):
        problem.recipe(st.micro(items=2), st.micro(items=3))
    with pytest.raises(BadInput, match=r"a strategy is one of rates, .* got 3"):
        problem.recipe(3)


# In a training


def company(make: Make, folder: Path, under: str) -> list[Strategy]:
    strategy = make(folder)
    return [strategy] if under == "alone" or strategy.name == "micro" else [strategy, st.micro(items=6)]


def unequal(one: Training, other: Training) -> list[str]:
    mine, theirs = one.fields(), other.fields()
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


@pytest.mark.parametrize("under", ["alone", "in pieces"])
@every_setting
def test_saved_and_loaded_it_goes_on_to_the_bit(make: Make, under: str, runs: Path, tmp_path: Path) -> None:
    recipe = problem.recipe(*company(make, runs, under))
    resumes(problem.residual(), recipe, tmp_path)


def told(state: Training, until: int | None = None) -> list[Any]:
    """What its strategies do on the way, as the journal has it."""
    found: list[Any] = []
    state.advance(until, lambda attempt: found.extend(attempt.told))
    return found


def resumes(task: ds.Task, recipe: ds.Recipe, folder: Path) -> Training:
    straight, stopped = (Training(task, recipe, seed=1) for _ in range(2))
    said, first = told(straight), told(stopped, HALF)
    resumed = Training.load(folder / "half", task, recipe, stopped.save(folder / "half"))
    assert not unequal(stopped, resumed)
    assert resumed.evaluate() == stopped.evaluate()
    assert json.dumps(said) == json.dumps(first + told(resumed))
    assert all(note["did"] in STRATEGIES[note["by"]].deeds for note in said)
    assert not unequal(straight, resumed)
    assert resumed.evaluate() == straight.evaluate()
    assert resumed.step == straight.step > HALF
    assert resumed.finish() == straight.finish()
    assert not unequal(straight, resumed)
    return straight


ALL = [
    st.rates(decay=0.8),
    st.freeze(every=5),
    st.start(method="orthogonal", zero_residual=True),
    st.normalisation(to="ghost", size=4),
    st.dropout(rate=ds.linear(0.3, "100 %")),
    st.depth(branches=("blocks.0.branch", "blocks.1.branch"), rate=0.1),
    st.mix(mixup=0.4, cutmix=1.0),
    st.micro(items=6),
    st.average(decay=0.8),
    st.stop(patience=4),
]


def test_all_of_them_together_too(tmp_path: Path) -> None:
    state = resumes(problem.residual(), problem.recipe(*ALL), tmp_path)
    assert state.company.lives.keys() == {strategy.name for strategy in ALL}


def test_every_part_of_a_run_is_saved_by_a_strategy_that_has_any(tmp_path: Path) -> None:
    state = Training(problem.residual(), problem.recipe(*ALL), seed=1)
    state.advance(HALF)
    names = {name.split("/")[0] for name in state.company.tensors()} | state.company.data().keys()
    assert names == {"average", "stop"}
    assert {file.name for file in saved(state, tmp_path)} >= {"strategies.safetensors"}


def saved(state: Training, folder: Path) -> Iterator[Path]:
    state.save(folder / "x")
    return (folder / "x").iterdir()


@pytest.mark.parametrize("name", ["digits-mlp", "cancer-logistic"])
def test_on_tasks_of_the_catalogue(name: str, tmp_path: Path) -> None:
    strategies = [
        *(st.freeze(until={"bias": "25 %"}), st.start(method="xavier_normal"), st.micro(items=5)),
        *(st.average(kind="tail"), st.stop(patience=5, on="metric")),
    ]
    resumes(
        ds.task(name), replace(ds.task(name).recipe, steps=STEPS, strategies=strategies, observe=4), tmp_path
    )


def test_a_fresh_process_goes_on_with_all_of_them() -> None:
    proof = ds.verify_resume(f"{problem.__file__}:residual", problem.recipe(*ALL), steps=STEPS, seed=1)
    assert proof, proof


MORTAL = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import downslope as ds
from strategies import problem
from strategies.test_laws import train

left = 3 * 8 + 2  # a batch of 16 in pieces of 6 calls the loss three times

def loss(model, batch):
    global left
    left -= model.training
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return ds.cross_entropy(model, batch)

train(sys.argv[2], loss)
"""


def train(out: Path, loss: Any = ds.cross_entropy) -> None:
    task = problem.residual(loss=loss, metric=ds.accuracy)
    ds.train(task, problem.recipe(*ALL), out=out, seed=1, save_every=3, valid_every=8, quiet=True)


def test_a_run_that_is_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-c", MORTAL, str(Path(__file__).parents[1]), str(killed)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (killed / "ckpt" / "step-000000006").exists()
    assert not (killed / "result.json").exists()
    train(killed)
    train(straight)

    def outcome(out: Path) -> tuple[Any, ...]:
        counting = history(read(out / "journal.jsonl"))
        losses = [(e["step"], e["loss"].hex()) for e in counting if e["kind"] in ("step", "valid")]
        state = [e["sha"] for e in counting if e["kind"] == "checkpoint"][-1]
        return losses, state, json.loads((out / "result.json").read_text())["valid"]

    assert outcome(killed) == outcome(straight)


# Refused together


def test_an_average_beside_a_rule_that_averages_is_refused() -> None:
    recipe = ds.Recipe(ds.schedule_free_adamw(), 10, 16, strategies=[st.average()])
    with pytest.raises(BadInput, match=r"schedule_free_adamw has evaluation weights of its own.*\[average\]"):
        Training(problem.residual(), recipe)


def test_what_a_model_does_not_have_is_named() -> None:
    for strategy, said in [
        (st.dropout(rate=0.1), "no module of DropoutNd whose rate"),
        (st.depth(branches=("blocks.0",)), "no module 'blocks.0'"),
        (st.rates(of={"heat.*": 2.0}), "'heat.*'"),
        (st.freeze(until={"lo.*": 3}), "'lo.*'"),
    ]:
        with pytest.raises(BadInput, match=re.escape(said)):
            Training(problem.plain(), problem.recipe(strategy))


@pytest.mark.parametrize("strategy", [st.mix(classes=3), st.smoothing(classes=9)])
def test_fewer_classes_than_the_targets_name_are_refused_before_it_begins(strategy: Strategy) -> None:
    with pytest.raises(BadInput, match=r"classes = \d, and the training targets name 10\.") as caught:
        Training(problem.plain(), problem.recipe(strategy))
    assert str(caught.value).startswith(f"[{strategy.name}] ")


def test_targets_that_name_no_classes_cannot_be_mixed_or_smoothed() -> None:
    whole = problem.plain()
    made = {
        part: (vars(whole)[part][0], vars(whole)[part][0].flatten(1)[:, :10]) for part in ("train", "valid")
    }
    task = problem.plain(**made, loss=ds.squared_error, metric=None)
    with pytest.raises(BadInput, match=r"\[smoothing\] needs classes="):
        Training(task, problem.recipe(st.smoothing()))
    Training(task, problem.recipe(st.mix())).advance(2)  # a regression can be mixed
