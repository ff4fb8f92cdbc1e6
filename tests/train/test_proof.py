"""The proof of resume: it passes what is exact, and fails, by name, what is not."""

import sys
from pathlib import Path

import pytest
from train import problems

import downslope as ds
from downslope.errors import BadInput, DownslopeError


def proof(function: str, steps: int = 14) -> ds.Proof:
    return ds.verify_resume(f"{problems.__file__}:{function}", problems.recipe(), steps=steps, seed=2)


@pytest.mark.parametrize("function", ["rich", "samples"])
def test_an_exact_resume_is_proved(function: str) -> None:
    found = proof(function)
    assert found, str(found)
    assert found.first is None
    assert "are equal bit for bit" in str(found)


@pytest.mark.parametrize(
    ("function", "first", "hint"),
    [
        ("counting", "the loss of batch 7 (step 7)", "attribute 'calls' of the model, a Counting was 7"),
        (
            "own_generator",
            "the loss of batch 7 (step 7)",
            "attribute 'rng' of the train data was a generator",
        ),
        ("global_generator", "the loss of batch 7 (step 7)", "global 'own' of problems.py was a generator"),
        ("other_data", "the train data when loaded", "other data each time"),
        ("clock", "the loss of batch 7 (step 7)", "the clock"),
    ],
)
def test_a_loss_of_state_is_found_and_named(function: str, first: str, hint: str) -> None:
    found = proof(function)
    assert not found
    assert found.first == first
    assert hint in found.hint
    assert first in str(found)
    assert any(name.startswith("model head.weight") for name in found.differences) or first.startswith(
        "the train"
    )


def test_what_a_checkpoint_loses_is_found_when_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two planted faults of ours: a buffer is saved with another value, and one is not saved at all."""
    save = ds.Training.save

    def shifted(state: ds.Training, folder: Path) -> str:
        state.model.mean += 1
        sha = save(state, folder)
        state.model.mean -= 1
        return sha

    with monkeypatch.context() as patch:
        patch.setattr(ds.Training, "save", shifted)
        assert proof("rich").first == "model mean when loaded"
    monkeypatch.setattr(sys.modules["downslope.train.part"], "hidden_buffers", lambda model: {})
    with pytest.raises(DownslopeError, match=r"does not fit: model: the checkpoint lacks mean"):
        proof("rich")


def test_a_task_that_no_other_process_can_find_is_refused() -> None:
    with pytest.raises(BadInput, match=r"path/to/file\.py:function, not a Task made in this program"):
        ds.verify_resume(problems.rich())


@pytest.mark.parametrize("steps", [1, 0, -4, 2.0])
def test_too_few_steps_are_refused(steps: int) -> None:
    with pytest.raises(BadInput, match="whole number from 2"):
        ds.verify_resume("cancer-logistic", steps=steps)


def test_a_fresh_process_that_fails_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "shy.py"
    file.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(problems.__file__).parents[1])!r})\n"
        "from train.problems import rich\n"
        "def task():\n"
        "    if os.environ.get('SHY') == str(os.getpid()):\n"
        "        return rich()\n"
        "    raise RuntimeError('not in this process')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        import os

        patch.setenv("SHY", str(os.getpid()))
        with pytest.raises(DownslopeError, match="the fresh process could not go on: .*not in this process"):
            ds.verify_resume(f"{file}:task", steps=2)


def loop(function: str, steps: int = 16) -> ds.Proof:
    return ds.verify_resume(f"{Path(__file__).with_name('loops.py')}:{function}", steps=steps)


@pytest.mark.parametrize("function", ["plain", "ours", "Framework"])
def test_a_loop_of_ones_own_is_proven(function: str) -> None:
    assert loop(function)


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (
            "shuffled",
            "from 'samples', a _SingleProcessDataLoaderIter, which knows no place",
        ),
        ("forgotten_counter", "variable 'count' of the step function was 8 when saved and is 0 when loaded"),
        ("forgotten_global", "global 'counted' of loops.py was 8 when saved and is 0 when loaded"),
        ("forgotten_scheduler", "a counter, a cache or an iterator that is not in the state"),
        ("own_generator", "variable 'rng' of the step function was a generator at"),
        ("unseeded", "Two processes that go on from the same checkpoint differ too"),
    ],
)
def test_the_fault_of_a_loop_is_named_with_its_usual_cause(function: str, hint: str) -> None:
    found = loop(function)
    assert not found
    assert str(found.first).startswith("the loss of update")  # 8, or later where BatchNorm hides it at first
    assert hint in str(found)
    assert repr(found) == str(found)


def test_what_is_no_loop_is_refused() -> None:
    with pytest.raises(BadInput, match=r"loops\.py:nothing must return a Task, a pair .* got int"):
        loop("nothing")
    with pytest.raises(BadInput, match="nproc is for tasks"):
        ds.verify_resume(f"{Path(__file__).with_name('loops.py')}:ours", nproc=2)


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_are_proven(shard: bool) -> None:
    found = ds.verify_resume("cancer-logistic", steps=6, nproc=2, shard=shard)
    assert found, str(found)
    assert "on 2 ranks" in str(found)
