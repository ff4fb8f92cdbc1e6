"""Trainings by frameworks' own trainers under `verify_resume`: exact ones, and what is lost named."""

from pathlib import Path

import pytest

import downslope as ds

pytestmark = [
    pytest.mark.xdist_group("transformers"),
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning"),
    # Advice on speed, where the machine has more cores than these loaders have workers.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

FITS = Path(__file__).with_name("fits.py")


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("lightning", 20),
        ("lightning", 6),
        pytest.param("lightning_ours", 20, marks=pytest.mark.deep),
        ("hugging_face", 20),
        ("hugging_face", 6),
        pytest.param("hugging_face_accumulating", 10, marks=pytest.mark.deep),
    ],
)
def test_a_trainers_own_checkpoints_go_on_to_the_bit(name: str, steps: int) -> None:
    """Saved at the end of a pass over the data (after 3 updates of 3 batches), and within one."""
    assert ds.verify_resume(f"{FITS}:{name}", steps=steps)


@pytest.mark.parametrize(
    ("name", "first", "hint"),
    [
        ("lightning_forgotten", "generator python when loaded", "callback keep_generators()"),
        ("lightning_counter", "at the end", "'seen' of the model"),
        ("lightning_callback", "lr when loaded", "'told' of the callback Told"),
        ("lightning_shuffled", "generator torch", "a DataLoader, which knows no place"),
        ("hugging_face_bare", "when loaded", "save_only_model"),
        ("hugging_face_noisy", "at the end", "'draws' of the train data"),
        ("hugging_face_restless", "generator torch", "ignore_data_skip"),
    ],
)
def test_what_is_lost_is_named(name: str, first: str, hint: str) -> None:
    proof = ds.verify_resume(f"{FITS}:{name}")
    assert not proof
    assert first in str(proof.first)
    assert hint in proof.hint


def test_a_trainer_that_ends_too_early_is_refused() -> None:
    with pytest.raises(ds.BadInput, match="ended after 4 updates"):
        ds.verify_resume(f"{FITS}:lightning_short")


def test_what_a_trainer_raises_is_raised() -> None:
    with pytest.raises(ds.UserCodeError, match="ValueError: no loss today"):
        ds.verify_resume(f"{FITS}:lightning_raising")
