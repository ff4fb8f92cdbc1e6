"""Sharded tensors: the part of a DTensor that lies here, and what all ranks must agree on.

Every rank of a mesh must call what talks to the others, in the same order; an optimizer's step does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from downslope.errors import BadInput

Box: TypeAlias = tuple[slice, ...]
"""Part of a tensor: from where to where along each dimension."""


class Parted:
    """A tensor of which each piece was saved by another rank: where it starts, and its numbers. They lie in
    files, and only what is asked for is read. ValueError unless the pieces are as large as the whole.

    >>> saved = Parted((3, 1), [((0, 0), torch.zeros(2, 1)), ((2, 0), torch.ones(1, 1))])
    >>> saved.part((slice(1, 3), slice(0, 1))).tolist()
    [[0.0], [1.0]]
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Tensor]]) -> None:
        self.shape, self.dtype = torch.Size(shape), pieces[0][1].dtype
        self._whole = tuple(slice(0, n) for n in shape)
        self._pieces: list[tuple[Box, Tensor]] = []
        for start, piece in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(start, piece.shape, strict=True))
            if piece.dtype != self.dtype or any(
                side.stop > n for side, n in zip(box, self.shape, strict=True)
            ):
                raise ValueError(f"a piece {box} of {piece.dtype} in a tensor {list(shape)} of {self.dtype}")
            self._pieces.append((box, piece))
        if sum(piece.numel() for _, piece in self._pieces) != math.prod(self.shape):
            raise ValueError(f"the pieces of a tensor {list(shape)} are not all there")

    def part(self, box: Box | None = None) -> Tensor:
        """The numbers in a box, or all: those of the file where one has them, else put together."""
        box = self._whole if box is None else box
        for theirs, piece in self._pieces:
            if all(a.start <= b.start and b.stop <= a.stop for a, b in zip(theirs, box, strict=True)):
                return piece[_within(box, theirs)]
        made = torch.empty([side.stop - side.start for side in box], dtype=self.dtype)
        self.copy(made, box)
        return made

    def copy(self, into: Tensor, box: Box | None = None) -> None:
        """Copy the numbers in a box, or all, into a tensor of its shape, piece by piece."""
        box = self._whole if box is None else box
        for theirs, piece in self._pieces:
            both = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(theirs, box, strict=True)
            )
            if all(side.start < side.stop for side in both):
                into[_within(both, box)].copy_(piece[_within(both, theirs)])


class Share:
    """One DTensor parameter: which part of the whole lies here, and how parts become whole."""

    def __init__(self, name: str, tensor: Any) -> None:
        self.name, self.shape, self.mesh = name, tensor.shape, tensor.device_mesh
        self.placements = tuple(tensor.placements)
        if partial := [p for p in self.placements if p.is_partial()]:
            raise BadInput(
                f"{name} is placed as {partial[0]!r}, where no rank holds its numbers; redistribute it, as "
                "Replicate() or Shard(0)."
            )
        self.sharded = [axis for axis, p in enumerate(self.placements) if not p.is_replicate()]
        self.box = self._box(tuple(local(tensor).shape))

    def _box(self, held: tuple[int, ...]) -> Box | None:
        """Which part of the whole lies here, `held` being its shape: each mesh axis cuts as torch.chunk does
        what those before it left. None for placements that cut otherwise (FSDP2 over tensor parallelism).
        """
        from torch.distributed.tensor import Shard

        here = self.mesh.get_coordinate()
        starts, sizes = [0] * len(self.shape), list(self.shape)
        for axis in self.sharded:
            placed = self.placements[axis]
            if type(placed) is not Shard or here is None:
                return None
            chunk = -(-sizes[placed.dim] // self.mesh.size(axis))
            before = min(chunk * here[axis], sizes[placed.dim])
            starts[placed.dim] += before
            sizes[placed.dim] = min(chunk, sizes[placed.dim] - before)
        fits = tuple(sizes) == held
        return tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)) if fits else None

    @property
    def offset(self) -> int:
        """How many elements of the whole lie before the part of this rank, which is a run of them. BadInput
        if it is none, as numbers drawn for the whole are then not drawn in order here.
        """
        whole = [slice(0, n) for n in self.shape]
        if self.box is None or list(self.box[1:]) != whole[1:]:
            raise BadInput(
                f"{self.name} is placed as {', '.join(map(repr, self.placements))}; random numbers are drawn "
                "only for parameters that are replicated, or sharded by their rows: Shard(0)."
            )
        return int(self.box[0].start) * int(np.prod(self.shape[1:])) if self.box else 0

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor, from the parts of all ranks."""
        return self.wholes([part])[0]

    def wholes(self, parts: Sequence[Tensor]) -> Tensor:
        """Whole tensors, stacked, from the parts of parameters placed as this one is, by one exchange."""
        from torch.distributed.tensor import DTensor

        # stacked behind the last dimension that is cut, so that the placements hold for the stack too
        behind = 1 + max((self.placements[axis].dim for axis in self.sharded), default=-1)
        size = torch.empty((*self.shape[:behind], len(parts), *self.shape[behind:]), device="meta")
        found: Tensor = DTensor.from_local(
            torch.stack(list(parts), dim=behind),
            self.mesh,
            self.placements,
            run_check=False,
            shape=size.shape,
            stride=size.stride(),
        ).full_tensor()
        return found.movedim(behind, 0)

    def part(self, whole: Tensor | Parted) -> Tensor:
        """The part of this rank, of a tensor that every rank has whole or can read; contiguous."""
        from torch.distributed.tensor import DTensor, Replicate

        if self.box is not None:
            return (whole.part(self.box) if isinstance(whole, Parted) else whole[self.box]).contiguous()
        whole = whole.part() if isinstance(whole, Parted) else whole
        made = DTensor.from_local(whole, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return local(made.redistribute(placements=self.placements)).contiguous()


def gathered(parts: Sequence[Tensor], shares: Sequence[Share | None]) -> Tensor:
    """Weights of one shape, whole and stacked, from the parts that lie here; None: all of it lies here. What
    is sharded alike is exchanged at once.
    """
    alike: dict[Any, list[int]] = {}
    for place, share in enumerate(shares):
        alike.setdefault(share and (share.mesh, share.placements), []).append(place)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        held, share = [parts[place] for place in places], shares[places[0]]
        stack = torch.stack(held) if share is None else share.wholes(held)
        if len(alike) == 1:
            return stack.contiguous()
        found.update(zip(places, stack.unbind(), strict=True))
    return torch.stack([found[place] for place in range(len(parts))])


def local(tensor: Any) -> Tensor:
    """The memory of this rank: a DTensor's local tensor, or the tensor itself."""
    if not is_shared(tensor):
        whole: Tensor = tensor
        return whole
    found: Any = tensor.to_local()
    part: Tensor = found.wait() if hasattr(found, "wait") else found  # it may be on its way from another rank
    return part


def is_shared(tensor: Any) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_placed_alike(parameter: Any, gradient: Any) -> bool:
    """Whether a gradient lies on the ranks as its parameter does. Under sequence parallelism those of
    replicated weights are summands, one a rank.
    """
    return not is_shared(gradient) or tuple(gradient.placements) == tuple(parameter.placements)


def gradient_of(parameter: Any) -> Tensor | None:
    """This step's gradient as it lies here, redistributed where it does not lie as its parameter does."""
    gradient = parameter.grad
    if gradient is None or is_placed_alike(parameter, gradient):
        return gradient if gradient is None else local(gradient)
    return local(gradient.redistribute(placements=parameter.placements))


def agree(
    values: NDArray[np.float64], shares: Sequence[Share | None], largest: Sequence[bool]
) -> NDArray[np.float64]:
    """A table of reductions, a row a parameter, over the parts of all ranks: by column sums, or largest
    magnitudes. NaN on one rank is NaN on all.
    """
    import torch.distributed as dist

    groups: dict[Any, tuple[str, list[int]]] = {}
    for row, share in enumerate(shares):
        for axis in share.sharded if share else ():
            assert share is not None
            group = share.mesh.get_group(axis)
            groups.setdefault(group, (share.mesh.device_type, []))[1].append(row)
    ways = [(dist.ReduceOp.SUM, [i for i, flag in enumerate(largest) if not flag])]
    ways.append((dist.ReduceOp.MAX, [i for i, flag in enumerate(largest) if flag]))
    for group, (device, members) in groups.items():
        for way, columns in ways:
            if columns:
                held = np.ascontiguousarray(values[np.ix_(members, columns)])
                # Bits of magnitudes order as the numbers do, NaN above infinity; floats may lose a NaN.
                sent = np.abs(held).view(np.int64) if way is dist.ReduceOp.MAX else held
                table = torch.from_numpy(sent).to(device)
                dist.all_reduce(table, way, group=group)
                values[np.ix_(members, columns)] = table.cpu().numpy().view(np.float64)
    return values


def averaged(value: float, shares: Sequence[Share | None]) -> float:
    """The mean of a number, such as the loss of a rank's part of a batch, over the first mesh's ranks."""
    import torch.distributed as dist

    share = next((share for share in shares if share is not None), None)
    if share is None:
        return value
    mean = torch.tensor(value, dtype=torch.float64, device=share.mesh.device_type)
    for axis in range(share.mesh.ndim):
        dist.all_reduce(mean, group=share.mesh.get_group(axis))
        mean /= share.mesh.size(axis)
    return float(mean)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 forget gathered weights: it would go on with them, and miss what is written to the shards."""
    for module in model.modules():
        if callable(forget := getattr(module, "reshard", None)) and hasattr(module, "unshard"):
            forget()


def _within(box: Box, outer: Box) -> Box:
    """A box as counted from where another, around it, starts."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))
