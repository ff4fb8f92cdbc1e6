"""Loading that resumes: the order on any number of ranks, what was delivered, augmentation, lost workers."""

import copy
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from downslope.errors import BadInput, UserCodeError
from downslope.train.batches import Batches, BatchLost
from downslope.train.order import order
from downslope.train.sampler import Index, Sampler
from downslope.train.seeded import Seeded

FEEDING = Path(__file__).with_name("feeding.py")
WORKERS = [(0, False), (1, False), (2, False), (2, True)]  # number, persistent
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # fewer cores than workers


class Noisy(Dataset[Any]):
    """Each sample: its index, and a number from each global generator."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[int, Any]:
        drawn = [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()]
        return int(index), torch.tensor(drawn, dtype=torch.float64)


def loader(
    workers: int = 0, persistent: bool = False, batch_size: int = 4, **sampler: Any
) -> "DataLoader[Any]":
    return DataLoader(
        Seeded(Noisy()),
        batch_sampler=Sampler(23, batch_size, seed=5, **sampler),
        num_workers=workers,
        persistent_workers=persistent,
    )


def plain(batch: Any) -> Any:
    return [part.tolist() for part in batch] if isinstance(batch, list | tuple) else batch.tolist()


def saved(batches: Any) -> Any:
    """The state as a checkpoint brings it back: through JSON."""
    return json.loads(json.dumps(batches.state_dict(), allow_nan=False))


def joined(batches: Iterable[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


# The order


@given(st.data())
def test_the_pieces_of_all_ranks_are_the_same_batches_whatever_the_world(draw: st.DataObject) -> None:
    samples, seed, epoch = (draw.draw(st.integers(0, most)) for most in (60, 2**32 - 1, 1000))
    samples += 1
    size = draw.draw(st.integers(1, 70))
    world = draw.draw(st.integers(1, min(size, samples)))
    ranks = [Sampler(samples, size, seed, rank=rank, world=world) for rank in range(world)]
    for sampler in ranks:
        sampler.seek(epoch)
    pieces = [list(sampler) for sampler in ranks]
    whole = order(samples, seed, epoch).tolist()
    size = min(size, samples)
    expected = [whole[start : start + size] for start in range(0, samples - size + 1, size)]
    assert [joined(parts) for parts in zip(*pieces, strict=True)] == expected
    assert {len(own) for own in pieces} == {len(expected)} == {len(sampler) for sampler in ranks}
    lengths = [len(piece) for own in pieces for piece in own]
    assert max(lengths) - min(lengths) <= 1
    assert all(sampler.epoch == epoch + 1 and sampler.used == 0 for sampler in ranks)


def test_what_is_left_over_is_a_smaller_batch_if_asked_for() -> None:
    assert [len(batch) for batch in Sampler(10, 4, drop_last=False)] == [4, 4, 2]
    assert sorted(joined(Sampler(10, 4, drop_last=False))) == list(range(10))
    assert len(Sampler(10, 4, drop_last=False)) == 3
    assert list(Sampler(5, 2, shuffle=False)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("at", range(6))
def test_a_sampler_goes_on_where_it_was_on_another_number_of_ranks(at: int, drop_last: bool) -> None:
    first = Sampler(22, 4, 7, drop_last=drop_last)
    first.seek(3)
    whole = list(first)
    first.seek(3)
    for _ in islice(first, at):
        pass
    state = saved(first)
    ranks = [Sampler(22, 4, 7, drop_last=drop_last, rank=rank, world=2) for rank in range(2)]
    for sampler in ranks:
        sampler.load_state_dict(state)
        assert sampler.state_dict() == state  # every rank saves the same
        assert sampler.position == min(at, len(whole))
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole[at:]
    assert all(sampler.epoch == 4 for sampler in ranks)


def test_another_batch_size_goes_on_with_the_next_sample_and_says_so() -> None:
    first = Sampler(50, 6, 7)
    used = joined(islice(first, 3))
    second = Sampler(50, 4, 7)
    with pytest.warns(
        UserWarning, match=r"batch_size was 6 and is 4: epoch 0 goes on after 18 of 50 samples"
    ):
        second.load_state_dict(saved(first))
    rest = list(second)
    assert used + joined(rest) == order(50, 7, 0).tolist()
    assert [len(batch) for batch in rest] == [4] * 8
    assert len(list(second)) == 12


@pytest.mark.parametrize(
    ("name", "value"), [("samples", 51), ("data", "b"), ("seed", 8), ("shuffle", False), ("drop_last", False)]
)
def test_other_data_or_another_order_is_refused_with_the_difference(name: str, value: Any) -> None:
    given: dict[str, Any] = {"samples": 50, "seed": 7, "data": "a", "shuffle": True, "drop_last": True}
    first = Sampler(batch_size=4, **given)
    next(iter(first))
    second = Sampler(batch_size=4, **given | {name: value})
    before = second.state_dict()
    with pytest.raises(BadInput, match=rf"{name} {given[name]!r} then and {value!r} now.*seek\(1\)"):
        second.load_state_dict(saved(first))
    assert second.state_dict() == before


@pytest.mark.parametrize("state", [{}, {"epoch": 0}, "x", None])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(BadInput, match="not the state of a Sampler"):
        Sampler(5, 2).load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch_size": 0}, "batch_size is a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size is a whole number of at least 1, got 2.5"),
        ({"batch_size": True}, "got True"),
        ({"samples": 0}, "number of samples is a whole number of at least 1"),
        ({"seed": -1}, "seed is a whole number from 0 to 4294967295, got -1"),
        ({"data": [1]}, "data names the data by a text, such as a hash, got list"),
        ({"rank": 1}, "rank and world belong together"),
        ({"rank": 2, "world": 2}, "rank of one of 2 is a whole number from 0 to 1, got 2"),
        ({"rank": 0, "world": 5}, "a batch of 4 cannot be shared by 5 ranks"),
        (
            {"rank": 0, "world": 2, "drop_last": False},
            "a batch of 1 cannot be shared by 2 ranks.*drop_last=True",
        ),
    ],
)
def test_what_a_sampler_cannot_do_is_said(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Sampler(**{"samples": 9, "batch_size": 4} | wrong)


RANKS = """
import json, sys, torch.distributed as dist
from downslope.train.sampler import Sampler
sampler = Sampler(11, 4, 3)  # before there are ranks
for rank in (int(sys.argv[1]),):
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
print(json.dumps([[int(i) for i in batch] for batch in sampler]))
dist.destroy_process_group()
"""


def test_the_ranks_are_those_of_torch_distributed(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", RANKS, str(rank), str(tmp_path / "store")] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    mine = [json.loads(process.communicate(timeout=120)[0]) for process in ranks]
    assert [a + b for a, b in zip(*mine, strict=True)] == list(Sampler(11, 4, 3))


def test_an_index_is_an_int_that_carries_its_epoch_through_a_copy() -> None:
    index = Index(3, 1, 2)
    copied = copy.deepcopy(index)  # by __reduce__, as on the way to a worker
    assert (copied, copied.seed, copied.epoch, copied.key()) == (3, 1, 2, index.key())
    assert torch.arange(5)[index] == np.arange(5)[index] == list(range(5))[index] == 3
    assert len({Index(i, s, e).key() for i in range(9) for s in range(9) for e in range(9)}) == 729


# Augmentation


def test_a_sample_is_drawn_from_the_hash_of_seed_epoch_and_index() -> None:
    index, drawn = Seeded(Noisy())[Index(4, seed=11, epoch=2)]
    words = np.frombuffer(blake2b(b"11 2 4", digest_size=24).digest(), "<u8")
    by_torch = torch.Generator().manual_seed(int(words[2]))
    low, high = int(words[1]) % 2**32, int(words[1]) >> 32
    assert index == 4
    assert drawn.tolist() == [
        random.Random(int(words[0])).random(),
        np.random.RandomState([low, high]).rand(),
        torch.rand((), dtype=torch.float64, generator=by_torch).item(),
    ]


def test_drawing_a_sample_leaves_the_generators_of_the_training_alone() -> None:
    def draws() -> list[Any]:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        np.random.randn()  # leaves half a pair behind
        torch.manual_seed(1)

    seeded()
    expected = draws()
    seeded()
    data = Seeded(Noisy())
    one, many = data[Index(4, 0, 0)], data.__getitems__([Index(3, 0, 0), Index(4, 0, 0)])
    assert draws() == expected
    assert plain(one[1]) == plain(many[1][1])


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_augmentation_is_the_same_in_any_workers_and_another_in_every_epoch(
    workers: int, persistent: bool
) -> None:
    torch.manual_seed(workers)
    batches = Batches(loader(workers, persistent))
    epochs = [[plain(batch) for batch in batches] for _ in range(3)]
    by_hand = Seeded(Noisy())
    for epoch, found in enumerate(epochs):
        for place, (indices, drawn) in enumerate(found):
            assert indices == order(23, 5, epoch)[place * 4 : place * 4 + 4].tolist()
            assert drawn == [by_hand[Index(i, 5, epoch)][1].tolist() for i in indices]
    assert epochs[0][0][1] != epochs[1][0][1]


def test_ranks_draw_what_one_process_draws() -> None:
    alone = [plain(batch) for batch in loader()]
    ranks = [[plain(batch) for batch in loader(rank=rank, world=2)] for rank in range(2)]
    assert [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(*ranks, strict=True)] == alone


def test_a_generator_of_ones_own_takes_the_key() -> None:
    class Own(Noisy):
        def __getitem__(self, index: Any) -> Any:
            return np.random.default_rng(index.key()).random()

    data = Seeded(Own())
    drawn = [data[Index(i, 0, e)] for i in range(3) for e in range(3)]
    assert len({*drawn}) == 9
    assert drawn[4] == data[Index(1, 0, 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_without_an_epoch_is_refused_with_the_cure(workers: int) -> None:
    inner = Subset(Seeded(Noisy()), range(8))
    with pytest.raises(BadInput, match=r"^sample \d does not know its epoch: .*batch_sampler=Sampler"):
        list(Batches(DataLoader(inner, batch_sampler=Sampler(8, 2), num_workers=workers)))


def test_an_iterable_dataset_has_nothing_to_seed() -> None:
    with pytest.raises(BadInput, match="Counting, whose samples have no index"):
        Seeded(Counting(3))


# What was delivered


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_what_counts_is_what_was_delivered(workers: int, persistent: bool) -> None:
    batches = Batches(loader(workers, persistent))
    states = []
    for taken, _ in enumerate(batches, 1):
        assert (batches.epoch, batches.position) == (0, taken)
        states.append(saved(batches))
    assert (batches.epoch, batches.position) == (1, 0)
    assert (
        [state["used"] for state in states]
        == [4, 8, 12, 16, 20]
        == [4 * i for i in range(1, len(batches) + 1)]
    )


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_a_loop_that_counts_by_itself_gets_whole_epochs(workers: int, persistent: bool) -> None:
    """As Lightning's, it never asks for the end of an epoch."""
    counted, plainly = Batches(loader(workers, persistent)), Batches(loader())
    for epoch in range(3):
        assert counted.epoch == max(0, epoch - 1)
        seen = [plain(batch) for batch in islice(counted, len(counted))]
        assert seen == [plain(batch) for batch in plainly]
    assert (counted.epoch, counted.position) == (2, 5)


def trained(batches: Batches, start: Any = None) -> tuple[list[Any], list[Any]]:
    """What a training of two epochs sees, drops out and saves, from the state it starts with."""
    seen, states = [], []
    torch.manual_seed(1)
    if start is not None:
        batches.load_state_dict(start[0])
        torch.set_rng_state(start[1])
    while batches.epoch < 2:
        for batch in batches:
            seen.append((plain(batch), torch.rand(()).item()))
            states.append((saved(batches), torch.get_rng_state()))
        seen.append(("the end of an epoch", torch.rand(()).item()))  # as scheduler.step()
        states.append((saved(batches), torch.get_rng_state()))
    return seen, states


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_a_training_goes_on_from_any_batch_with_the_same_bits(workers: int, persistent: bool) -> None:
    straight, states = trained(Batches(loader()))
    every = range(len(states)) if not workers else (0, 3, 4, 5, 8)
    for at in every:
        resumed, _ = trained(Batches(loader(workers, persistent)), states[at])
        assert resumed == straight[at + 1 :]


def test_the_end_of_an_epoch_comes_after_a_resume_from_its_last_batch() -> None:
    batches = Batches(loader())
    states = [saved(batches) for _ in batches]
    again = Batches(loader())
    again.load_state_dict(states[-1])
    assert (again.epoch, again.position, list(again)) == (0, 5, [])
    assert again.epoch == 1


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_a_loop_that_is_left_goes_on_and_a_state_loaded_inside_takes_effect(
    workers: int, persistent: bool
) -> None:
    whole = [plain(batch) for batch in loader()]
    batches = Batches(loader(workers, persistent))
    seen = [plain(batch) for batch in islice(batches, 2)]
    state = saved(batches)
    seen += [plain(batch) for batch in islice(batches, 1)]
    for batch in batches:
        seen.append(plain(batch))
        if len(seen) == 4:
            batches.load_state_dict(state)  # roll back
    assert seen == [*whole[:4], *whole[2:]]


def test_seeking_and_peeking() -> None:
    data = loader()
    whole = [plain(batch) for batch in data]
    batches = Batches(data)
    data.batch_sampler.seek(0)
    next(iter(batches))
    assert plain(next(iter(data))) == whole[1]  # a look at the loader moves nothing
    assert batches.position == 1
    data.batch_sampler.seek(0, 3)
    assert [plain(batch) for batch in batches] == whole[3:]


# Loaders that know their place themselves


class Counting(IterableDataset[int]):
    """Whole numbers, with a place that goes on; ends at `count`."""

    def __init__(self, count: int) -> None:
        self.count, self.at = count, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.count:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "extra": (1, torch.arange(3))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["extra"][0] == 1
        assert torch.equal(state["extra"][1], torch.arange(3))
        self.at = state["at"]


class Duck:
    """A loader with a state, which draws from the training's generator as torch's do."""

    def __init__(self) -> None:
        self.data = Counting(5)

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.rand(3)
        return (torch.tensor(number) for number in self.data)

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.load_state_dict(state)


@pytest.mark.parametrize(
    "make", [Duck, lambda: DataLoader(Counting(10), batch_size=2)], ids=["duck", "dataset"]
)
def test_a_state_of_the_loaders_own_is_used(make: Callable[[], Any]) -> None:
    straight, states = trained(Batches(make()))
    assert len(straight) == 12
    for at, state in enumerate(states):
        resumed, _ = trained(Batches(make()), state)
        assert resumed == straight[at + 1 :]


def test_after_a_lost_batch_such_a_loader_asks_for_a_state() -> None:
    class Breaking(Counting):
        def __iter__(self) -> Iterator[int]:
            for number in super().__iter__():
                if number == 2:
                    raise OSError("gone")
                yield number

    batches = Batches(DataLoader(Breaking(6), batch_size=1))
    first = iter(batches)
    next(first)
    state = saved(batches)
    with pytest.raises(BatchLost, match="batch 2 of epoch 0 was not loaded: gone"):
        list(first)
    with pytest.raises(BadInput, match="goes on only from a saved state"):
        next(iter(batches))
    batches.load_state_dict(state)
    assert next(iter(batches)) == 1


# Loaders that do not


class ByPython(torch.utils.data.Sampler[int]):
    """A sampler as people write it: shuffles with python's generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(23), 23))

    def __len__(self) -> int:
        return 23


PLAIN: dict[str, Callable[[], Any]] = {
    "global": lambda: DataLoader(TensorDataset(torch.arange(23)), batch_size=4, shuffle=True),
    "workers": lambda: DataLoader(TensorDataset(torch.arange(23)), batch_size=4, shuffle=True, num_workers=1),
    "own": lambda: DataLoader(
        TensorDataset(torch.arange(23)),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    ),
    "python": lambda: DataLoader(TensorDataset(torch.arange(23)), batch_size=4, sampler=ByPython()),
}


@pytest.mark.filterwarnings("ignore:this loader does not know", "ignore:epoch . begins again")
@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_loader_begins_the_epoch_again_in_the_same_order(kind: str) -> None:
    random.seed(4)
    straight, states = trained(Batches(PLAIN[kind]()))
    for at in (0, 2, 9):
        random.seed(99)
        resumed, _ = trained(Batches(PLAIN[kind]()), states[at])
        began = 0 if at < 7 else 7  # six batches and the end of the epoch
        expected = [batch for batch, _ in straight[began : began + 6]]
        assert [batch for batch, _ in resumed[:6]] == expected
        assert len(resumed) == len(straight) - began


@pytest.mark.filterwarnings("ignore:this loader does not know")
@pytest.mark.parametrize("kind", ["global", "workers", "own"])
def test_a_plain_loader_goes_on_exactly_from_the_end_of_an_epoch(kind: str) -> None:
    straight, states = trained(Batches(PLAIN[kind]()))
    assert trained(Batches(PLAIN[kind]()), states[6])[0] == straight[7:]


def test_a_plain_loader_says_what_it_cannot_do_once_and_then_what_it_did() -> None:
    with pytest.warns(UserWarning, match=r"middle of an epoch.*batch_sampler=downslope.Sampler") as told:
        batches = Batches(PLAIN["global"]())
    assert len(told) == 1
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(batches))
        next(iter(batches))
        state = saved(batches)
    with pytest.warns(UserWarning, match="epoch 0 begins again: 2 batches of it are used a second time"):
        batches.load_state_dict(state)


class Reading(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


def test_an_iterable_dataset_without_a_state_says_what_it_needs() -> None:
    with pytest.warns(
        UserWarning, match="iterable dataset .*Give the dataset state_dict and load_state_dict"
    ):
        batches = Batches(DataLoader(Reading(), batch_size=2))
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    with pytest.warns(UserWarning, match="iterable dataset"):
        Batches(DataLoader(Counting(6), num_workers=1))  # each worker has a copy, which runs ahead


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: iter([1]), "can be read again and again"),
        (lambda: 3, "can be read again and again, which a int cannot"),
        (lambda: DataLoader(Noisy(), sampler=Sampler(23, 4)), "write batch_sampler="),
        (lambda: DataLoader(Noisy(), batch_sampler=Sampler(22, 4)), "of 22 samples and the dataset has 23"),
    ],
)
def test_what_cannot_be_read_is_refused(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Batches(wrong())


@pytest.mark.filterwarnings("ignore:this loader does not know")
def test_the_state_of_another_kind_of_loader_is_refused() -> None:
    state = saved(Batches(PLAIN["global"]()))
    with pytest.raises(BadInput, match="kept by nothing but the epoch then, and is by a Sampler now"):
        Batches(loader()).load_state_dict(state)
    with pytest.raises(BadInput, match="not the state of Batches: KeyError"):
        Batches(PLAIN["own"]()).load_state_dict({"kind": "epoch"})
    with pytest.raises(BadInput, match="had 0 generators of its own then, and has 1 now"):
        Batches(PLAIN["own"]()).load_state_dict(state)


# Faults


BROKEN = order(23, 5, 0)[13].item()


class Failing(Noisy):
    def __getitem__(self, index: int) -> Any:
        if index == BROKEN and not os.environ.get("MENDED"):
            raise ValueError("the image is broken")
        return super().__getitem__(index)


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_a_sample_that_raises_is_named_and_the_place_is_before_it(
    workers: int, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = loader(workers, persistent)
    batches = Batches(
        DataLoader(
            Seeded(Failing()),
            batch_sampler=data.batch_sampler,
            num_workers=workers,
            persistent_workers=persistent,
        )
    )
    words = f"sample {BROKEN} of epoch 0 raised ValueError: the image is broken"
    with pytest.raises(BatchLost, match=words) as caught:
        list(batches)
    assert "batch 3 of epoch 0 (samples " in str(caught.value)
    assert (caught.value.epoch, caught.value.batch, batches.position) == (0, 3, 3)
    assert isinstance(caught.value.__cause__, UserCodeError)
    monkeypatch.setenv("MENDED", "1")
    assert [plain(batch) for batch in batches] == [plain(batch) for batch in loader()][3:]


def test_without_seeded_the_batch_is_named() -> None:
    batches = Batches(DataLoader(Failing(), batch_sampler=Sampler(23, 4, shuffle=False)))
    first = BROKEN // 4 * 4
    samples = ", ".join(map(str, range(first, first + 4)))
    words = rf"batch {first // 4} of epoch 0 \(samples {samples}\) was not loaded: the image is broken"
    with pytest.raises(BatchLost, match=words):
        list(batches)


def feeding(count: int, seed: int, folder: Path, timeout: float) -> dict[str, Any]:
    command = [sys.executable, str(FEEDING), str(count), str(seed), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], (found, done.stderr)
    assert found["cases"] == count
    return found


def test_ten_faults_of_loading(tmp_path: Path) -> None:
    assert sum(feeding(10, 20261124, tmp_path, 280)["felt"].values()) >= 6


@pytest.mark.faults
def test_a_hundred_faults_of_loading(tmp_path: Path) -> None:
    felt = feeding(100, 23, tmp_path, 3600)["felt"]
    assert min(felt.values()) >= 10, felt
    assert sum(felt.values()) >= 70


def test_it_is_a_part_of_a_training_state(tmp_path: Path) -> None:
    state = pytest.importorskip("downslope.train.state")
    batches = Batches(loader())
    kept = state.TrainState(nn.Linear(1, 1), batches=batches)
    for _ in islice(batches, 2):
        pass
    shot = kept.snapshot()
    rest = [plain(batch) for batch in batches]
    kept.restore(shot)
    assert [plain(batch) for batch in batches] == rest
