"""Sums along lines of large tensors, and the way back: what an element reads of an array of lines."""

import numpy as np
import pytest
import torch

from downslope.kernels import sums
from downslope.kernels.compiled import unroll
from downslope.kernels.words import reduced
from downslope.rules.shape import lines, spanned, view

SHAPES = [
    ((3, 41, 700), (1,)),
    ((3, 41, 700), (2,)),
    ((2, 9, 5, 400), (2, 3)),
    ((40_000, 1), (0,)),
    ((1, 40_000), (1,)),
]


@pytest.mark.parametrize("name", ["total", "squares"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_sums_are_those_of_float64_whatever_the_threads(
    shape: tuple[int, ...], axes: tuple[int, ...], dtype: torch.dtype, name: str
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert sums.takes(name, values, axes)
    wide = values.numpy().astype(np.float64)
    want = (wide**2 if name == "squares" else wide).sum(axes, keepdims=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sums.reduce(name, values, axes).numpy())
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, found[0]) for one in found)
    np.testing.assert_allclose(found[0], want, rtol=1e-12, atol=1e-12 * np.abs(wide).max() * len(wide))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_one_odd_number_shows_in_its_line_alone(odd: float) -> None:
    values = torch.ones(200, 300)
    values[7, 5] = odd
    along, across = sums.reduce("total", values, (1,)).flatten(), sums.reduce("total", values, (0,)).flatten()
    assert not torch.isfinite(along[7])
    assert not torch.isfinite(across[5])
    assert torch.isfinite(along).sum() == 199
    assert torch.isfinite(across).sum() == 299


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(300, 300).T,
        torch.ones(300, 1).expand(300, 300),
        torch._neg_view(torch.ones(300, 300)),
        torch.ones(3),
    ],
    ids=["transposed", "expanded", "negated", "small"],
)
def test_what_is_not_plain_and_large_is_left_to_torch(values: torch.Tensor) -> None:
    assert not sums.takes("total", values, (0,))
    want = values.double().sum((0,), keepdim=True)
    assert torch.equal(reduced("total", values, (0,)), want)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 6), (9,), (), (1, 8), (8, 1)])
@pytest.mark.parametrize("over", ["row", "column", "unit"])
def test_an_element_reads_the_number_of_its_line(shape: tuple[int, ...], over: str) -> None:
    seen = view(shape)
    part = tuple(1 if axis in lines(over, shape) else size for axis, size in enumerate(seen))
    compact = np.random.default_rng(0).normal(size=part)
    whole = np.broadcast_to(compact, seen).ravel()
    numbers = spanned(part, seen)
    assert numbers is not None
    for begin in {0, min(3, whole.size - 1)}:
        out = np.empty(whole.size - begin)
        unroll(out, compact.ctypes.data, begin, len(out), *numbers)
        assert np.array_equal(out, whole[begin:])


def test_lines_that_no_two_numbers_describe_are_not_shortened() -> None:
    assert spanned((1, 5, 6), (4, 5, 6)) is None
