"""Losses on logits [..., classes]: items of a classifier, or [batch, positions, classes] of a token model.

The teacher's side is always detached. Token targets are those of the same position: shift them first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from downslope.distill.cache import TopK, checked_temperature
from downslope.distill.position import Count, blank, counted, mean
from downslope.errors import BadInput


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, count: Count = None
) -> Tensor:
    """Cross entropy (nats) to whole-number targets [...] or to probabilities [..., classes], over `count`.

    `count` None is the number of counted positions; where none is counted the loss is 0, and so its gradient
    (torch's is NaN).

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    mask = counted(targets, logits.shape[:-1], ignore_index)
    logs = torch.log_softmax(blank(logits, mask), dim=-1)
    if mask is None:
        if targets.shape != logits.shape:
            raise BadInput(
                f"Probabilities of shape {list(targets.shape)} do not fit logits of {list(logits.shape)}."
            )
        return mean(-(targets * logs).sum(-1), None, count)
    classes = torch.where(mask, targets, 0).long().unsqueeze(-1)
    return mean(-logs.gather(-1, classes).squeeze(-1), mask, count)


def divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    targets: Tensor | None = None,
    *,
    temperature: float = 4.0,
    ignore_index: int = -100,
    count: Count = None,
) -> Tensor:
    """T²·KL(teacher ‖ student), both softened by T, in nats per counted position (arXiv:1503.02531).

    Gradients of the softened KL shrink as 1/T²; the factor keeps them comparable as T changes (section 2).
    `teacher` is logits, or a cache of them at this temperature: its tail is one class, so the result is at
    most the whole KL, and equal to it with k = vocabulary. `targets`, if given, only say which positions
    count.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> float(divergence(logits, logits + 5))
    0.0
    """
    checked_temperature(temperature)
    mask = counted(targets, student.shape[:-1], ignore_index)
    softened = blank(student, mask) / temperature
    if isinstance(teacher, TopK):
        terms = _bucketed(softened, _fitting(teacher, student, temperature))
    else:
        terms = _relative(_soft(teacher, student, temperature), torch.log_softmax(softened, dim=-1))
    return temperature**2 * mean(terms, mask, count)


def logits(
    student: Tensor,
    teacher: Tensor | TopK,
    targets: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    count: Count = None,
) -> Tensor:
    """(1 − alpha)·cross entropy to `targets` + alpha·T²·KL to the teacher (arXiv:1503.02531, section 2).

    `alpha` is the share of the teacher, 0 to 1. Not for a teacher that is worse than what its student
    becomes: lower alpha as the training goes on.

    >>> z = torch.tensor([[2.0, 0.0]])
    >>> float(logits(z, z, torch.tensor([0]), alpha=0.5)), float(cross_entropy(z, torch.tensor([0]))) / 2
    (0.0634640..., 0.0634640...)
    """
    checked_share(alpha)
    soft = divergence(
        student, teacher, targets, temperature=temperature, ignore_index=ignore_index, count=count
    )
    hard = cross_entropy(student, targets, ignore_index=ignore_index, count=count)
    return (1 - alpha) * hard + alpha * soft


def decoupled(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    ignore_index: int = -100,
    count: Count = None,
) -> Tensor:
    """T²·(alpha·TCKD + beta·NCKD): target against the rest, the rest among themselves (arXiv:2203.08679).

    Equation 7. Hinton's KL has beta = 1 − the teacher's probability of the target, so that what a sure
    teacher knows of the other classes is lost; here beta is a number of its own (the paper: alpha 1, beta 8
    on CIFAR-100, to be chosen by the teacher's gap between its first two logits). Whole-number targets only.
    Add the cross entropy yourself; beta 8 wants a warmup of some epochs, as in the paper.
    """
    checked_temperature(temperature)
    mask = counted(targets, student.shape[:-1], ignore_index)
    if mask is None or student.shape[-1] < 2:
        raise BadInput("Decoupled distillation needs whole-number targets and two classes or more.")
    classes = torch.where(mask, targets, 0).long().unsqueeze(-1)
    own = _parted(blank(student, mask) / temperature, classes)
    theirs = _parted(_soft(teacher, student, temperature), classes)
    target, others = (_relative(log_p, log_q) for log_p, log_q in zip(theirs, own, strict=True))
    return temperature**2 * mean(alpha * target + beta * others, mask, count)


def mutual(
    peers: Sequence[Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    count: Count = None,
) -> tuple[Tensor, ...]:
    """The loss of each of two or more peers that learn from each other (arXiv:1706.00384, equation 8).

    `peers` are the logits of one batch. Each learns from `targets` and, with share `alpha`, from the mean KL
    to the others, which are detached: no gradient of one loss reaches another's model, so the losses may be
    added, or each stepped by its own optimizer. alpha 0.5 and T 1 are half of the paper's sum. Not for: a
    student whose teacher is trained already, which `distill` uses at the cost of one training.
    """
    if len(peers) < 2:
        raise BadInput(f"Peers that learn from each other are at least two, got {len(peers)}.")
    checked_share(alpha)
    found = []
    for index, own in enumerate(peers):
        others = [peer for place, peer in enumerate(peers) if place != index]
        soft = sum(
            divergence(own, peer, targets, temperature=temperature, ignore_index=ignore_index, count=count)
            for peer in others
        )
        hard = cross_entropy(own, targets, ignore_index=ignore_index, count=count)
        found.append((1 - alpha) * hard + alpha * soft / len(others))
    return tuple(found)


def exits(
    outputs: Sequence[Tensor],
    targets: Tensor,
    *,
    temperature: float = 3.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    count: Count = None,
) -> Tensor:
    """The loss of a model with early exits whose last one teaches the others (arXiv:1905.08094, section 3).

    `outputs` are the logits of the exits, the deepest last: it learns from `targets` alone, and each other
    one with share `alpha` from the deepest, detached. Their sum; the paper's term on features is `hints`. Not
    for: regression, whose outputs are no logits.
    """
    if len(outputs) < 2:
        raise BadInput(f"A model that teaches itself has at least two exits, got {len(outputs)}.")
    *shallow, deepest = outputs
    loss = cross_entropy(deepest, targets, ignore_index=ignore_index, count=count)
    for own in shallow:
        loss = loss + logits(
            own,
            deepest,
            targets,
            temperature=temperature,
            alpha=alpha,
            ignore_index=ignore_index,
            count=count,
        )
    return loss


def checked_share(alpha: float) -> float:
    """The teacher's share, 0 to 1; else BadInput."""
    if not 0 <= alpha <= 1:
        raise BadInput(f"alpha is the teacher's share, from 0 to 1, got {alpha}.")
    return alpha


def _soft(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    if teacher.shape != student.shape:
        raise BadInput(
            f"The teacher's logits of shape {list(teacher.shape)} are not those of a student of "
            f"{list(student.shape)}: they must have the same positions and classes."
        )
    return torch.log_softmax(blank(teacher.detach(), None) / temperature, dim=-1)


def _fitting(teacher: TopK, student: Tensor, temperature: float) -> TopK:
    if teacher.temperature != temperature:
        raise BadInput(
            f"The cache was made at temperature {teacher.temperature}, and cannot be read at {temperature}."
        )
    if (*teacher.tail.shape, teacher.vocabulary) != student.shape:
        raise BadInput(
            f"A cache of positions {list(teacher.tail.shape)} and {teacher.vocabulary} classes does not fit "
            f"the student's logits of shape {list(student.shape)}."
        )
    return teacher


def _relative(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL over the last dimension; what has no probability adds nothing, even where log_q is −∞ too."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)


def _bucketed(softened: Tensor, teacher: TopK) -> Tensor:
    """KL between the k classes and the tail as one more; it never exceeds the whole KL."""
    indices = teacher.indices.long()
    log_p = teacher.values.to(softened.dtype)
    log_all = softened.logsumexp(-1, keepdim=True)
    log_q = softened.gather(-1, indices) - log_all
    if indices.shape[-1] < teacher.vocabulary:
        others = softened.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        log_p = torch.cat([log_p, teacher.tail.to(softened.dtype).unsqueeze(-1)], dim=-1)
        log_q = torch.cat([log_q, others - log_all], dim=-1)
    return _relative(log_p, log_q)


def _parted(softened: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., 2] of target and rest, and [..., classes] of the rest among themselves.

    In logs throughout: a sure student's rest is 1 − 1 = 0 in probabilities.
    """
    log_all = softened.logsumexp(-1, keepdim=True)
    others = softened.scatter(-1, classes, -torch.inf)
    log_others = others.logsumexp(-1, keepdim=True)
    pair = torch.cat([softened.gather(-1, classes) - log_all, log_others - log_all], dim=-1)
    return pair, others - log_others
