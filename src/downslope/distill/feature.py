"""Losses on what layers put out. The teacher's side is always detached."""

import torch
from torch import Tensor, nn

from downslope.distill.position import Count, blank, counted, mean
from downslope.errors import BadInput


def hints(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    *,
    ignore_index: int = -100,
    count: Count = None,
) -> Tensor:
    """Mean squared difference per counted position and element (FitNets, arXiv:1412.6550, equation 3).

    Features [items, ...], or [*targets.shape, ...] where whole-number targets are given: [batch, positions,
    width] of a token model then counts its tokens. The paper's ½‖·‖² is half of this times the elements of a
    position. Widths that differ need a regressor: `distill` makes one.
    """
    if student.shape != teacher.shape:
        raise BadInput(
            f"Hints compare features of one shape, got the student's {list(student.shape)} and the teacher's "
            f"{list(teacher.shape)}: distill(..., sample=inputs) makes a regressor."
        )
    labelled = targets is not None and not targets.is_floating_point()
    places = targets.ndim if targets is not None and labelled else 1
    if student.ndim < places:
        raise BadInput(f"Features of shape {list(student.shape)} have no place for each of the targets.")
    mask = counted(targets, student.shape[:places], ignore_index)
    squares = (blank(student, mask) - blank(teacher.detach(), mask)).square()
    return mean(squares.reshape(*student.shape[:places], -1).mean(-1), mask, count)


def attention(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    *,
    power: float = 2.0,
    ignore_index: int = -100,
    count: Count = None,
) -> Tensor:
    """Mean squared difference of attention maps of [items, channels, *space] (arXiv:1612.03928, section 3.1).

    A map is Σ over channels of |activation|^power, scaled to norm 1; so channels may differ, space may not.
    The paper prints the norm of the difference; this is its published code's mean of squares, with a gradient
    that vanishes as maps agree. It is small: the paper weighs it 1000 against the cross entropy.
    """
    if student.ndim < 3 or student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise BadInput(
            "Attention maps are compared over one space [items, channels, *space], got the student's "
            f"{list(student.shape)} and the teacher's {list(teacher.shape)}."
        )
    mask = counted(targets, student.shape[:1], ignore_index)
    own, theirs = (
        nn.functional.normalize(blank(maps, mask).abs().pow(power).sum(1).flatten(1))
        for maps in (student, teacher.detach())
    )
    return mean((own - theirs).square().mean(1), mask, count)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of distances within a batch, each side over its own mean (RKD-D, arXiv:1904.05068).

    Equations 4 to 6, mean over the ordered pairs of [items, ...]; widths may differ. 0 for a single item. It
    relates the items of one batch: micro-batches do not add up to the big batch.
    """
    own, theirs = (_distances(side) for side in _rows(student, teacher))
    return nn.functional.smooth_l1_loss(own, theirs, reduction="sum") / max(_ordered(len(student), 2), 1)


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles in every triplet of a batch (RKD-A, arXiv:1904.05068).

    Equations 7 and 8, mean over the ordered triplets of [items, ...]; widths may differ. 0 below three items.
    Memory grows with items³ (2 MB of float32 at 80, 0.5 GB at 512) and with items²·width. Micro-batches do
    not add up.
    """
    own, theirs = (_cosines(side) for side in _rows(student, teacher))
    return nn.functional.smooth_l1_loss(own, theirs, reduction="sum") / max(_ordered(len(student), 3), 1)


def relational(student: Tensor, teacher: Tensor) -> Tensor:
    """`distance` + 2·`angle`, the paper's RKD-DA (arXiv:1904.05068, section 4, in the ratio it uses)."""
    return distance(student, teacher) + 2 * angle(student, teacher)


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise BadInput(
            "Relations are those of one batch of features [items, ...], got the student's "
            f"{list(student.shape)} and the teacher's {list(teacher.shape)}."
        )
    return blank(student, None).flatten(1), blank(teacher.detach(), None).flatten(1)


def _ordered(items: int, of: int) -> int:
    """Ordered pairs or triplets of distinct items; those that are not distinct add 0 to the sum."""
    return items * (items - 1) * (items - 2 if of == 3 else 1)


def _distances(rows: Tensor) -> Tensor:
    # Without matrix products: their cancellation makes the distance of near items noise.
    found = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    typical = found.sum() / max(_ordered(len(rows), 2), 1)
    return found / torch.where(typical > 0, typical, 1)


def _cosines(rows: Tensor) -> Tensor:
    """[j, i, k]: the cosine at j between the directions to i and to k; 0 where two of the three are one."""
    directions = nn.functional.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=2)
    same = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (directions @ directions.transpose(1, 2)).masked_fill(same, 0)
