"""Every task of the project goes on to the bit: alone, on two ranks, and on two ranks with sharded weights."""

import pytest

import downslope as ds

TASKS = sorted(ds.tasks())


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_alone(name: str) -> None:
    found = ds.verify_resume(name, steps=6)
    assert found, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("name", TASKS)
def test_on_two_ranks(name: str, shard: bool) -> None:
    found = ds.verify_resume(name, steps=4, nproc=2, shard=shard)
    assert found, str(found)
