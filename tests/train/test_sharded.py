"""Tensors that were saved in pieces: any part of them, from whatever pieces, and nothing more is read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downslope.kernels.collective import Parted


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, list[int], int, tuple[slice, slice]]:
    """A matrix, the rows or columns where it is cut (an empty piece where one is twice), and a box."""
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 4))
    whole, dim = torch.arange(rows * columns).view(rows, columns), draw(st.integers(0, 1))
    cuts = sorted(draw(st.lists(st.integers(0, whole.shape[dim]), max_size=4)))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
    box = (slice(*ends[0]), slice(*ends[1]))
    return whole, [0, *cuts, whole.shape[dim]], dim, box


@given(cases())
def test_any_box_is_read_from_any_pieces(
    case: tuple[torch.Tensor, list[int], int, tuple[slice, slice]],
) -> None:
    whole, cuts, dim, box = case
    pieces = [
        ([a if axis == dim else 0 for axis in range(2)], whole.narrow(dim, a, b - a))
        for a, b in pairwise(cuts)
    ]
    saved = Parted(whole.shape, pieces)
    assert torch.equal(saved.part(box), whole[box])
    assert torch.equal(saved.part(), whole)
    into = torch.full_like(whole[box], -1)
    saved.copy(into, box)
    assert torch.equal(into, whole[box])


def test_what_one_piece_has_is_not_copied() -> None:
    piece = torch.arange(6.0).view(3, 2)
    saved = Parted((5, 2), [((0, 0), torch.zeros(2, 2)), ((2, 0), piece)])
    assert saved.part((slice(3, 5), slice(0, 2))).data_ptr() == piece[1:].data_ptr()


def test_pieces_that_are_no_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="not all there"):
        Parted((3, 2), [((0, 0), torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="a piece"):
        Parted((3, 2), [((2, 0), torch.zeros(2, 2)), ((0, 0), torch.zeros(1, 2))])
    with pytest.raises(ValueError, match="a piece"):
        Parted((2, 2), [((0, 0), torch.zeros(1, 2)), ((1, 0), torch.zeros(1, 2).double())])
