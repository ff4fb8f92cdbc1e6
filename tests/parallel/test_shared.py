"""A training on several ranks is that of one process: same losses, skips, stops and weights, to rounding.

All trials run once, in `ranks`; what they found is compared here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from parallel import ranks

pytestmark = [pytest.mark.xdist_group("shared"), pytest.mark.timeout(300)]

TRIED = [(size, name, shard) for size in ranks.SIZES for name, shard in ranks.labels(size)]


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world found, by trial; of one process under 1."""
    folder = tmp_path_factory.mktemp("shared")
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-X", "faulthandler", ranks.__file__, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=280, check=False)
    said = (folder / "log").read_text()
    assert done.returncode == 0, said
    ends = json.loads((folder / "ends.json").read_text())
    assert ends == {str(size): [0] * size for size in ranks.SIZES}, said
    return {
        size: [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
        for size in (1, *ranks.SIZES)
    }


def of(notes: Any, size: int, name: str, shard: bool) -> list[dict[str, Any]]:
    found = [rank[f"{name} {shard}"] for rank in notes[size]]
    for one in found:
        assert "error" not in one, one["error"]
        assert "refused" not in one, one["refused"]
    return found


@pytest.mark.parametrize(("size", "name", "shard"), TRIED)
def test_ranks_do_what_one_process_does(notes: Any, size: int, name: str, shard: bool) -> None:
    alone, (first, *_) = notes[1][0][name], of(notes, size, name, shard)
    assert "error" not in alone, alone
    assert first["step"] == alone["step"]
    assert first["skips"] == alone["skips"]
    near = ranks.CASES[name].near
    mine, theirs = (np.array(one["losses"], dtype=float) for one in (first, alone))
    if near is None:  # draws, and statistics of a batch, are a rank's own
        assert abs(mine - theirs).max() > 1e-6
        return
    np.testing.assert_allclose(mine, theirs, rtol=near, atol=near)
    for weight, values in alone["weights"].items():
        np.testing.assert_allclose(first["weights"][weight], values, rtol=0, atol=near, err_msg=weight)
    np.testing.assert_allclose(first["valid"], alone["valid"], rtol=near)


@pytest.mark.parametrize(("size", "name", "shard"), TRIED)
def test_all_ranks_hold_one_state(notes: Any, size: int, name: str, shard: bool) -> None:
    first, *others = of(notes, size, name, shard)
    for other in others:
        assert other == first


@pytest.mark.parametrize(("size", "name", "shard"), TRIED)
def test_a_resumed_training_ends_in_the_same_bits(notes: Any, size: int, name: str, shard: bool) -> None:
    for found in of(notes, size, name, shard):
        assert found["lost"] == []
        assert found["resumed"] == []


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize(("world", "shard"), [(1, False), (2, False), (2, True)])
def test_a_checkpoint_loads_on_other_ranks(notes: Any, size: int, world: int, shard: bool) -> None:
    """Bit for bit, sharded or not: what differs afterwards is only how sums are rounded."""
    saved = notes[1][0]["adamw"] if world == 1 else of(notes, world, "adamw", shard)[0]
    for rank in notes[size]:
        assert rank[f"resized adamw-{world}-{shard}"] == saved["read"]


def test_what_cannot_be_shared_is_refused_with_the_reason(notes: Any) -> None:
    for rank in notes[2]:
        assert rank["switch"]["refused"] == (
            "[switch] does not go with 2 ranks and --shard: it measures and keeps whole weights."
        )


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("how", ["one item", "one item, sharded"])
def test_a_piece_that_leaves_a_rank_one_item_for_batchnorm_is_refused(
    notes: Any, size: int, how: str
) -> None:
    assert notes[1][0]["one item"] is None, "it goes in one process"
    for rank in notes[size]:
        assert rank[how]["refused"] == (
            f"[micro] items = 3 leaves one of {size} ranks a piece of one item, of which the model's "
            "BatchNorm cannot take a variance: take more items, or [normalisation]."
        )


def test_ranks_that_drift_apart_are_told(notes: Any) -> None:
    for rank in (*notes[2], *notes[3]):
        assert "do not hold the same weights any more" in rank["drifting"]["refused"]


def test_a_planted_nan_skips_on_all(notes: Any) -> None:
    assert sum(notes[1][0]["not finite"]["skips"]) > 0


def test_early_stopping_stops_early(notes: Any) -> None:
    assert notes[1][0]["stop"]["step"] < ranks.STEPS
