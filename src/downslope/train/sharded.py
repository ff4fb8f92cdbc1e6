"""Tensors that lie in parts on several ranks: each rank saves the part that it holds, and of what others
saved it reads the part that it needs, however many there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from downslope.kernels.collective import Parted, Share, is_shared, local


def is_cut(name: str, tensor: Tensor) -> bool:
    """Whether each rank saves a part of its own: not of what is replicated, summed, or cut into other parts
    than boxes.
    """
    placed: Any = tensor
    if not is_shared(tensor) or any(one.is_partial() for one in placed.placements):
        return False
    share = Share(name, tensor)
    return bool(share.sharded) and share.box is not None


def start_of(name: str, tensor: Any) -> list[int] | None:
    """Where in a tensor that is cut this rank's part starts; None if another saves the same part."""
    share = Share(name, tensor)
    if share.box is None or any(
        place for axis, place in enumerate(share.mesh.get_coordinate()) if axis not in share.sharded
    ):
        return None
    return [side.start for side in share.box]


def whole(tensor: Tensor) -> Tensor:
    """The tensor, of a sharded one all of it: then every rank must ask."""
    sharded: Any = tensor
    found: Tensor = sharded.full_tensor() if is_shared(tensor) else tensor
    return found.detach()


def put(tensor: Tensor, saved: Tensor | Parted) -> None:
    """Copy what was saved into a tensor, of a sharded one its part."""
    with torch.no_grad():
        if isinstance(saved, Parted) and not is_shared(tensor):
            saved.copy(tensor)
        else:
            local(tensor).copy_(local(placed(saved, tensor)))


def placed(saved: Tensor | Parted, like: Any) -> Tensor:
    """What was saved as it lies in a tensor of its shape: sharded as that is, or whole. It may be the file's
    own memory, or another tensor's.
    """
    if not is_shared(like):
        return saved.part() if isinstance(saved, Parted) else whole(saved)
    if is_shared(saved):
        there: Any = saved
        found: Tensor = there.redistribute(placements=like.placements)
        return found
    from torch.distributed.tensor import DTensor

    mine = Share("a tensor", like).part(saved)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def placed_all(parted: Mapping[str, Parted], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each as the tensor of its name and shape lies, and whole where there is none."""
    fits = {
        name: like[name] for name, one in parted.items() if name in like and like[name].shape == one.shape
    }
    return {name: placed(one, fits.get(name)) for name, one in parted.items()}
