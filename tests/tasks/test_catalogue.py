"""The built-in tasks: split once, never leaking, solvable; and what happens where scikit-learn is missing."""

import sys

import pytest
import torch

from downslope.errors import BadInput
from downslope.tasks import Entry, Task, reopen, size, task, tasks


def rows(part: object) -> set[bytes]:
    assert isinstance(part, tuple)
    return {row.numpy().tobytes() for row in part[0]}


@pytest.fixture(params=tasks())
def built_in(request: pytest.FixtureRequest) -> Task:
    return task(request.param)


def test_no_sample_is_in_two_parts(built_in: Task) -> None:
    train, valid, test = rows(built_in.train), rows(built_in.valid), rows(built_in.test)
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_the_parts_are_half_a_quarter_and_a_quarter_of_all_samples(built_in: Task) -> None:
    assert built_in.test is not None
    sizes = size(built_in.train), size(built_in.valid), size(built_in.test)
    assert sum(sizes) == {"digits": 1797, "cancer": 569}[built_in.name.split("-")[0]]
    assert sizes[0] / sum(sizes) == pytest.approx(0.5, abs=0.002)
    assert sizes[1] / sum(sizes) == pytest.approx(0.25, abs=0.002)


def test_every_class_has_the_same_share_in_each_part(built_in: Task) -> None:
    def shares(part: object) -> torch.Tensor:
        assert isinstance(part, tuple)
        return torch.bincount(part[1]) / len(part[1])

    torch.testing.assert_close(shares(built_in.train), shares(built_in.valid), atol=0.005, rtol=0)
    torch.testing.assert_close(shares(built_in.train), shares(built_in.test), atol=0.005, rtol=0)


def test_the_train_part_alone_sets_the_scale(built_in: Task) -> None:
    assert isinstance(built_in.train, tuple)
    assert isinstance(built_in.valid, tuple)
    by = (0,) if built_in.name == "cancer-logistic" else tuple(range(built_in.train[0].ndim))
    inputs = built_in.train[0].double()
    torch.testing.assert_close(inputs.mean(dim=by), torch.zeros_like(inputs.mean(dim=by)), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(dim=by), torch.ones_like(inputs.std(dim=by)), atol=1e-5, rtol=0)
    assert built_in.valid[0].mean(dim=by).abs().max() > 1e-4


def test_a_seed_gives_one_split_and_another_seed_another() -> None:
    first, again, other = task("digits-mlp", 3), task("digits-mlp", 3), task("digits-mlp", 4)
    assert rows(first.train) == rows(again.train)
    assert rows(first.train) != rows(other.train)


def test_making_a_task_draws_no_random_numbers(built_in: Task) -> None:
    before = torch.get_rng_state()
    task(built_in.name)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_task_states_metric_target_reference_and_recipe(built_in: Task) -> None:
    assert built_in.metric_name
    assert built_in.target is not None
    assert built_in.reference
    assert built_in.recipe.steps
    assert built_in.entry == Entry(built_in.name, seed=0)


def test_a_model_is_fresh_each_time_and_gives_a_finite_loss(built_in: Task) -> None:
    first, second = built_in.model(), built_in.model()
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
    assert torch.isfinite(built_in.loss(first, built_in.valid))


def test_the_logistic_loss_is_convex() -> None:
    """Along any chord of the weights the loss lies below the straight line between its ends."""
    convex = task("cancer-logistic")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, two, middle = convex.model(), convex.model(), convex.model()
        with torch.no_grad():
            for a, b, m in zip(one.parameters(), two.parameters(), middle.parameters(), strict=True):
                a.normal_(generator=generator)
                b.normal_(generator=generator)
                m.copy_((a + b) / 2)
            ends = (convex.loss(one, convex.train) + convex.loss(two, convex.train)) / 2
            assert convex.loss(middle, convex.train) <= ends + 1e-5


def test_an_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(
        BadInput, match=r"no task 'digit-cnn'\. Did you mean 'digits-cnn'\? There are: digits-mlp"
    ):
        task("digit-cnn")


def test_without_scikit_learn_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(BadInput, match=r"need scikit-learn: pip install 'downslope\[tasks\]'"):
        task("digits-cnn")


def test_a_built_in_task_reopens_as_itself() -> None:
    first = task("digits-mlp", 7)
    assert first.entry is not None
    assert rows(reopen(Entry.from_data(first.entry.data())).train) == rows(first.train)


@pytest.mark.parametrize(
    "data", [None, {}, {"address": "x"}, {"address": "x", "seed": "0", "sha256": ""}, [1]]
)
def test_what_is_no_entry_is_refused(data: object) -> None:
    with pytest.raises(BadInput, match="address, seed and sha256"):
        Entry.from_data(data)
