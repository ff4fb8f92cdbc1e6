"""Every built-in task: split by seed, solvable, resumable; and what happens where an extra is missing."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tasks.parts import columns

import downslope as ds
from downslope.errors import BadInput
from downslope.tasks import Entry, Task, reopen, task, tasks
from downslope.train import Training

FITS = {"diabetes-linear", "diabetes-lasso", "cancer-svm", "digits-factorisation"}
AMBITIOUS = {"digits-mlp", "digits-cnn", "cancer-logistic"}  # their target is for a race to reach

made = cache(task)


@pytest.fixture(params=tasks())
def built_in(request: pytest.FixtureRequest) -> Task:
    return made(request.param)


def test_a_fit_is_judged_on_what_it_fits_and_everything_else_on_what_it_never_saw(built_in: Task) -> None:
    train, valid = columns(built_in.train), columns(built_in.valid)
    same = len(train[0]) == len(valid[0]) and torch.equal(train[0], valid[0])
    assert same == (built_in.name in FITS)
    assert (built_in.test is None) == (built_in.name in FITS)


def test_a_seed_gives_one_split_and_another_seed_another(built_in: Task) -> None:
    again, other = task(built_in.name, 0), task(built_in.name, 4)
    for part in ("train", "valid", "test"):
        if built_in.test is None and part == "test":
            continue
        mine, same, differing = (columns(getattr(one, part)) for one in (built_in, again, other))
        assert all(torch.equal(a, b) for a, b in zip(mine, same, strict=True))
        assert torch.equal(mine[0], differing[0]) == (built_in.name in FITS)
        assert [column.shape for column in mine] == [column.shape for column in differing]


def test_making_a_task_draws_no_random_numbers(built_in: Task) -> None:
    before = torch.get_rng_state()
    task(built_in.name)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_task_states_metric_target_reference_and_recipe(built_in: Task) -> None:
    assert built_in.metric_name
    assert built_in.target is not None
    assert f"downslope train {built_in.name} --seed S" in built_in.reference
    assert built_in.recipe.steps
    assert built_in.entry == Entry(built_in.name, seed=0)


def test_a_model_is_fresh_each_time_and_gives_a_finite_loss(built_in: Task) -> None:
    first, second = built_in.model(), built_in.model()
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
    batch = tuple(column[:8] for column in columns(built_in.valid))
    assert torch.isfinite(built_in.loss(first, batch))


def test_it_goes_on_to_the_bit(built_in: Task, tmp_path: Path) -> None:
    straight, stopped = (Training(built_in, seed=5, threads=1) for _ in range(2))
    straight.advance(6)
    stopped.advance(3)
    sha = stopped.save(tmp_path / "half")
    resumed = Training.load(tmp_path / "half", task(built_in.name), built_in.recipe, sha)
    resumed.advance(6)
    assert resumed.fields() == straight.fields()


def reached(one: Task, state: Training) -> bool:
    value = state.evaluate().metric
    assert one.target is not None
    return value >= one.target if one.higher_is_better else value <= one.target


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tasks().keys() - AMBITIOUS))
def test_it_reaches_its_target_by_its_own_recipe_and_not_by_a_bad_one(name: str) -> None:
    one = made(name)
    state = Training(one, threads=1)
    state.advance()
    assert reached(one, state)
    slow = ds.Recipe(ds.chain(ds.sgd(lr=1e-4)), one.recipe.steps, one.recipe.batch_size)
    state = Training(one, slow, threads=1)
    state.advance()
    assert not reached(one, state)


def test_the_page_of_tasks_says_what_the_tasks_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text("utf-8")
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in page.splitlines() if "| `" in row]
    told = {name: (metric, target) for name, _, metric, target, *_ in rows}
    assert told == {name: (made(name).metric_name, f"{made(name).target:g}") for name in tasks()}


def test_an_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(
        BadInput, match=r"no task 'digit-cnn'\. Did you mean 'digits-cnn'\? There are: digits-mlp"
    ):
        task("digit-cnn")


def test_without_scikit_learn_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(BadInput, match=r"need scikit-learn: pip install 'downslope\[tasks\]'"):
        task("digits-cnn")


def test_without_pillow_the_photographs_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadInput, match=r"need scikit-learn and Pillow: pip install 'downslope\[tasks\]'"):
        task("photo-kmeans")


def test_a_built_in_task_reopens_as_itself() -> None:
    first = task("digits-mlp", 7)
    assert first.entry is not None
    again = reopen(Entry.from_data(first.entry.data()))
    assert torch.equal(columns(again.train)[0], columns(first.train)[0])


@pytest.mark.parametrize(
    "data", [None, {}, {"address": "x"}, {"address": "x", "seed": "0", "sha256": ""}, [1]]
)
def test_what_is_no_entry_is_refused(data: object) -> None:
    with pytest.raises(BadInput, match="address, seed and sha256"):
        Entry.from_data(data)
