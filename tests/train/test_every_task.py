"""Every task of the project goes on to the bit: alone, on two ranks, and there with sharded weights."""

import pytest

import downslope as ds
from downslope.errors import DownslopeError

TASKS = sorted(ds.tasks())
WHOLE_ONLY = {"clicks-deepfm": "row-sparse gradients", "digits-gan": "several players"}
"""What FSDP2 cannot cut, and why."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_alone(name: str) -> None:
    found = ds.verify_resume(name, steps=6)
    assert found, str(found)


SOME = ("cancer-logistic", "digits-gan")  # every day; all of them by `make faults`
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SOME else pytest.mark.faults) for name in TASKS]


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("name", EACH)
def test_on_two_ranks(name: str, shard: bool) -> None:
    if shard and name in WHOLE_ONLY:
        with pytest.raises(DownslopeError, match=f"{WHOLE_ONLY[name]}.* leave out --shard"):
            ds.verify_resume(name, steps=4, nproc=2, shard=True)
        return
    found = ds.verify_resume(name, steps=4, nproc=2, shard=shard)
    assert found, str(found)
