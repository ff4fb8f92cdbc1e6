"""What several ranks save in parts is what they held, bit for bit, on as many ranks or others; and whatever
goes wrong on one of them is told by all, and leaves the checkpoint before it.

All trials run once, in `parts`; what they found is compared here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import parts
from safetensors import safe_open

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded"), pytest.mark.timeout(600)]

SAVED = (1, *parts.WORLDS)
FIRST, SECOND, LAST = (f"step-{parts.EVERY * n:09d}" for n in (1, 2, 3))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what all trials saved and noted."""
    folder = tmp_path_factory.mktemp("parts")
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-X", "faulthandler", parts.__file__, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=580, check=False)
    assert done.returncode == 0, (folder / "log").read_text()
    return folder


@pytest.fixture(scope="session")
def notes(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "notes.json").read_text())
    return found


def said(ends: list[dict[str, Any]]) -> list[Any]:
    """What each rank noted; all must have come to their end."""
    assert [end["code"] for end in ends] == [0] * len(ends), ends
    return [end["note"] for end in ends]


@pytest.mark.parametrize("rule", parts.RULES)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("loaded", ["loaded 1", "loaded 2", "loaded 3", "whole 2"])
def test_it_loads_on_any_ranks_bit_for_bit(notes: Any, rule: str, saved: int, loaded: str) -> None:
    was = said(notes[f"saved {saved}"])[0][rule]
    assert any(name.startswith("optimizer") for name in was)
    assert any(name.startswith("average") for name in was)
    for held in said(notes[loaded]):
        assert held[f"{rule} {saved}"] == was


@pytest.mark.parametrize("rule", parts.RULES)
@pytest.mark.parametrize("world", SAVED)
def test_on_the_same_ranks_it_goes_on_to_the_same_bits(notes: Any, rule: str, world: int) -> None:
    saved, loaded = said(notes[f"saved {world}"])[0], said(notes[f"loaded {world}"])[0]
    assert loaded[f"{rule} later"] == saved[f"{rule} later"]
    assert loaded[f"{rule} later"] != saved[rule]


@pytest.mark.parametrize("world", parts.WORLDS)
def test_the_files_hold_the_rows_of_their_ranks(place: Path, notes: Any, world: int) -> None:
    """Read by the library alone: one after another they are the weights that torch gathered."""
    was = said(notes[f"saved {world}"])[0]["adamw"]
    rows: dict[str, list[torch.Tensor]] = {}
    for rank in range(world):
        with safe_open(place / f"adamw-{world}" / f"model.rank-{rank}.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                rows.setdefault(name, []).append(file.get_tensor(name))
    assert {f"model {name}": parts.sha(torch.cat(held)) for name, held in rows.items()} == {
        name: text for name, text in was.items() if name.startswith("model") and name != "model seen"
    }
    assert any(len({part.shape for part in held}) > 1 for held in rows.values()), "uneven parts"
    assert any(part.numel() == 0 for held in rows.values() for part in held), "empty parts"


@pytest.mark.parametrize("world", parts.WORLDS)
def test_no_number_is_written_twice(place: Path, world: int) -> None:
    """All files of the sharded state together have as many bytes of numbers as those of one process."""

    def size(folder: Path) -> int:
        found = 0
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        return found

    for rule in parts.RULES:
        assert size(place / f"{rule}-{world}") == size(place / f"{rule}-1")


@pytest.mark.parametrize("world", parts.WORLDS)
def test_a_rank_saves_the_part_that_torch_says_it_has(notes: Any, world: int) -> None:
    for found in said(notes[f"boxes {world}"]):
        for name, (ours, torchs) in found.items():
            assert ours == torchs, name


def test_a_snapshot_of_parts_is_the_state_of_its_moment(notes: Any) -> None:
    for found in said(notes["snapshots"]):
        assert found == [True, True, True]


def test_of_copies_one_is_saved(place: Path, notes: Any) -> None:
    assert said(notes["copies"])[0] == notes["copies loaded"]
    names = sorted(path.name for path in (place / "copies").glob("model.rank*"))
    assert names == ["model.rank-0.safetensors", "model.rank-1.safetensors"]


def test_a_run_saved_in_the_background_is_the_same_run(notes: Any) -> None:
    for shard in (False, True):
        (ends, plain), (ends_too, background) = (notes[f"run {shard} {way}"] for way in (False, True))
        assert said(ends) == said(ends_too) == [parts.STEPS] * 2
        assert len(set(plain["shas"])) == 3
        assert background == plain


KILLED = [
    (rank, name, stage, background)
    for rank, names in parts.FILES.items()
    for name in names
    for stage in parts.STAGES
    for background in (False, True)
]


@pytest.mark.parametrize(("rank", "name", "stage", "background"), KILLED)
def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(
    notes: Any, rank: int, name: str, stage: str, background: bool
) -> None:
    expected = notes["run True False"][1]
    found = notes[f"killed {rank} {name} {stage} {background}"]
    assert found["ends"][rank]["code"] == -9
    assert found["ends"][1 - rank]["note"].startswith("Lost: ")
    assert found["left"]["shas"] == expected["shas"][:1]
    assert [name for name in found["left"]["files"] if not name.startswith(".")] == [FIRST]
    assert said(found["again"]) == [parts.STEPS] * 2
    assert found["in the end"] == {**expected, "from": [parts.EVERY]}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("rank", "shard"), [(0, False), (0, True), (1, True)])
def test_a_full_disk_of_one_rank_is_told_by_all(notes: Any, rank: int, shard: bool, background: bool) -> None:
    expected = notes[f"run {shard} False"][1]
    found = notes[f"refused {rank} {shard} {background}"]
    for end in found["ends"]:
        assert end["note"].startswith("BadInput: ")
        assert f"ckpt/{SECOND}: No space left on device." in end["note"]
    assert f"rank {rank}: " in found["ends"][1 - rank]["note"]
    assert found["left"] == {"shas": expected["shas"][:1], "damaged": [], "from": [], "files": [FIRST]}
    assert said(found["again"]) == [parts.STEPS] * 2
    assert found["in the end"] == {**expected, "from": [parts.EVERY]}


@pytest.mark.parametrize("world", SAVED)
@pytest.mark.parametrize(
    ("flip", "how"), [(True, "the SHA-256 of {} is not that of its manifest"), (False, "{} cannot be read")]
)
def test_a_file_of_a_rank_that_is_bad_is_named_and_all_use_the_one_before(
    notes: Any, flip: bool, how: str, world: int
) -> None:
    found, expected = notes[f"damaged {flip} {world}"], notes["run True False"][1]
    assert said(found["ends"]) == [parts.STEPS] * world
    (sentence,) = found["in the end"]["damaged"]
    assert LAST in sentence
    assert how.format("optimizer.rank-1.safetensors") in sentence
    assert found["in the end"]["from"] == [2 * parts.EVERY]
    assert f"{LAST}.damaged" in found["in the end"]["files"]
    if world == 2:
        assert found["in the end"]["shas"] == expected["shas"]


def test_what_one_rank_cannot_read_no_rank_goes_on_from(notes: Any) -> None:
    found, expected = notes["misread"], notes["run True False"][1]
    assert said(found["ends"]) == [parts.STEPS] * 2
    assert found["in the end"]["damaged"] == ["model.rank-0.safetensors cannot be read"]
    assert found["in the end"]["from"] == [2 * parts.EVERY]
    assert found["in the end"]["shas"] == expected["shas"]
