"""A teacher's kept answers: exact where all are kept, a lower bound where not, and the same after saving."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from distill import papers
from safetensors.torch import load_file, save_file
from torch import Tensor

from downslope.distill import Teacher, TopK, remember
from downslope.errors import BadInput

distill = importlib.import_module("downslope.distill")  # `downslope.distill` itself is the function


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = drawn(3, 4, 9), drawn(3, 4, 9, seed=1)


def exact(k: int, temperature: float) -> TopK:
    return TopK.of(TEACHER, k, temperature=temperature, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_with_every_class_kept_it_is_the_whole_divergence(temperature: float) -> None:
    s = STUDENT.clone().requires_grad_()
    whole = distill.divergence(s, TEACHER, temperature=temperature)
    kept = distill.divergence(s, exact(9, temperature), temperature=temperature)
    torch.testing.assert_close(kept, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(kept, s)[0], torch.autograd.grad(whole, s)[0], rtol=1e-11, atol=1e-15
    )


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_tail_is_one_class_more(k: int, temperature: float) -> None:
    terms = []
    for s, t in zip(STUDENT.view(-1, 9).numpy(), TEACHER.view(-1, 9).numpy(), strict=True):
        p, q = papers.softmax(t, temperature), papers.softmax(s, temperature)
        top = np.argsort(-p)[:k]
        terms.append(papers.kl([*p[top], 1 - p[top].sum()], [*q[top], 1 - q[top].sum()]))
    found = distill.divergence(STUDENT, exact(k, temperature), temperature=temperature)
    assert float(found) == pytest.approx(temperature**2 * np.mean(terms), rel=1e-11)


def test_more_classes_never_tell_less_and_never_more_than_all() -> None:
    """Merging classes never raises a divergence."""
    found = [float(distill.divergence(STUDENT, exact(k, 4.0))) for k in range(1, 10)]
    assert found == sorted(found)
    assert found[0] < 0.9 * found[-1]
    assert found[-1] == pytest.approx(float(distill.divergence(STUDENT, TEACHER)), rel=1e-13)


def test_a_tail_without_mass_is_no_class() -> None:
    """A sure teacher: its tail underflows to a probability of 0, in float16 to log 0."""
    sure = torch.tensor([[900.0, 0.0, 0.0], [0.0, 900.0, -900.0]])
    for dtype in (torch.float16, torch.float32):
        s = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
        cache = TopK.of(sure, 1, dtype=dtype)
        found = distill.divergence(s, cache, temperature=1.0)
        (gradient,) = torch.autograd.grad(found, s)
        targets = torch.tensor([0, 1])
        torch.testing.assert_close(found, torch.nn.functional.cross_entropy(s, targets))
        assert gradient.isfinite().all()


def test_float16_costs_a_thousandth_of_the_loss() -> None:
    exactly = distill.divergence(STUDENT, exact(3, 4.0))
    halved = distill.divergence(STUDENT, TopK.of(TEACHER, 3, temperature=4.0, dtype=torch.float16))
    torch.testing.assert_close(halved, exactly, rtol=5e-3, atol=0)
    assert float(halved) != float(exactly)


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    cache = TopK.of(TEACHER, 3, temperature=0.1 + 0.2)
    cache.save(tmp_path / "teacher.safetensors")
    loaded = TopK.load(tmp_path / "teacher.safetensors")
    for name in ("values", "indices", "tail"):
        mine, theirs = getattr(cache, name), getattr(loaded, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert (loaded.temperature, loaded.vocabulary) == (0.1 + 0.2, 9)
    assert load_file(tmp_path / "teacher.safetensors").keys() == {"values", "indices", "tail"}
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_parts_join_and_rows_are_taken_in_any_order() -> None:
    parts = [TopK.of(TEACHER[rows], 3) for rows in (slice(0, 2), slice(2, 3))]
    joined, whole = TopK.join(parts), TopK.of(TEACHER, 3)
    assert torch.equal(joined.values, whole.values)
    rows = torch.tensor([2, 0])
    picked = whole[rows]
    assert torch.equal(picked.indices, TopK.of(TEACHER[rows], 3).indices)
    assert picked.tail.shape == (2, 4)
    assert torch.equal(whole[1:].tail, whole.tail[1:])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"at temperature 1\.0, and cannot be read at 4\.0"):
        distill.divergence(STUDENT, TopK.of(TEACHER, 3))
    with pytest.raises(BadInput, match="9 classes does not fit"):
        distill.divergence(STUDENT[..., :8], TopK.of(TEACHER, 3), temperature=1.0)
    with pytest.raises(BadInput, match="from 1 to the 9 classes there are, got 10"):
        TopK.of(TEACHER, 10)
    with pytest.raises(BadInput, match="one temperature"):
        TopK.join([TopK.of(TEACHER, 3), TopK.of(TEACHER, 3, temperature=2.0)])
    with pytest.raises(BadInput, match="cannot write"):
        TopK.of(TEACHER, 3).save(tmp_path / "nowhere" / "cache")


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    cache = TopK.of(TEACHER, 3)
    cache.save(path)
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    about = json.loads(good[8 : 8 + size])
    assert about["__metadata__"] == {"temperature": "1.0", "vocabulary": "9"}
    for damage in (good[:-5], b"", b"\x80\x04" + good):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="not a cache"):
            TopK.load(path)
    tensors = {"values": cache.values, "indices": cache.indices, "tail": cache.tail}
    for wrong in (
        {"indices": cache.indices + 7},
        {"tail": cache.tail[0]},
        {"values": cache.values[..., :2].contiguous()},
    ):
        save_file({**tensors, **wrong}, path, metadata=about["__metadata__"])
        with pytest.raises(BadInput, match="do not fit"):
            TopK.load(path)
    save_file(tensors, path)
    with pytest.raises(BadInput, match="not a cache"):
        TopK.load(path)
    with pytest.raises(BadInput, match="not a cache"):
        TopK.load(tmp_path / "missing")


INPUTS = {
    "numbers": drawn(40, 3, 2),
    "round": torch.randint(-4, 5, (40, 7), generator=torch.Generator().manual_seed(1)).float().cumsum(0),
    "half": drawn(40, 5).half(),
    "tokens": torch.randint(2**40, (40, 9), generator=torch.Generator().manual_seed(2)),
    "bits": torch.arange(40).unsqueeze(1).bitwise_right_shift(torch.arange(6)).bitwise_and(1).bool(),
    "scalars": torch.arange(40.0),
    "table": {"ids": torch.arange(40) // 7, "more": (torch.arange(40) % 7, drawn(40, 2).round())},
}


def at(inputs: object, rows: Tensor) -> object:
    if isinstance(inputs, dict):
        return {key: at(value, rows) for key, value in inputs.items()}
    return inputs[rows] if isinstance(inputs, Tensor) else tuple(at(one, rows) for one in inputs)


@pytest.mark.parametrize("kind", INPUTS)
def test_each_input_is_found_by_its_bits_in_whatever_batch_it_comes(kind: str) -> None:
    inputs, logits = INPUTS[kind], drawn(40, 9, seed=4)
    batches = [torch.arange(i, min(i + 7, 40)) for i in range(0, 40, 7)]
    asked = iter(batches)
    cache, places = remember(lambda _: logits[next(asked)], [at(inputs, rows) for rows in batches], k=3)
    for rows in (torch.arange(40).flip(0), torch.tensor([5]), torch.tensor([17, 3, 17, 39])):
        assert places(at(inputs, rows)).tolist() == rows.tolist()
        expected = TopK.of(logits[rows], 3)
        torch.testing.assert_close(cache[places(at(inputs, rows))].values, expected.values, rtol=0, atol=0)


def test_one_bit_more_or_less_is_another_input() -> None:
    inputs = torch.zeros(195, 65)
    for i in range(1, 195):  # the sign bit alone, and then the last one
        inputs[i, i // 3] = [-0.0, 2.0**-149, 1.0][i % 3]
    _, places = remember(lambda x: x[:, :4], [inputs], k=1)
    assert places(inputs).tolist() == list(range(195))
    for other in (inputs[:1] - 2.0**-149, 2 * inputs[5:6], torch.full((1, 65), torch.nan)):
        with pytest.raises(BadInput, match="hold none for an input of this batch"):
            places(other)


def test_equal_inputs_have_the_place_of_the_first() -> None:
    _, places = remember(lambda x: x, [torch.ones(3, 2), torch.eye(2), torch.ones(1, 2)], k=1)
    assert places(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [0, 4]


def test_a_loop_of_ones_own_may_ask_once() -> None:
    teacher, student = torch.nn.Linear(5, 9), torch.nn.Linear(5, 9)
    x, y = drawn(30, 5).float(), torch.arange(30) % 9
    cache, places = remember(Teacher(teacher), x.split(8), k=9, temperature=2.0)
    kept, asked = (distill.distill(student, who, temperature=2.0) for who in (cache, teacher))
    batch = torch.tensor([4, 29, 11])
    found = kept(student, (x[batch], y[batch], places(x[batch])))
    torch.testing.assert_close(found, asked(student, (x[batch], y[batch])), rtol=1e-5, atol=1e-6)


def test_what_is_no_tensor_has_no_bits() -> None:
    with pytest.raises(BadInput, match="made of tensors, got str"):
        remember(lambda x: x, [["a", "b"]], k=1)
