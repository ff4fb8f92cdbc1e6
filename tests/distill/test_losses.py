"""Losses of distillation: equal to their papers, right under accumulation, finite where nothing counts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from distill import papers
from torch import Tensor

from downslope.distill import TopK
from downslope.errors import BadInput

distill = importlib.import_module("downslope.distill")  # `downslope.distill` itself is the function


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, below: int, seed: int = 9) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def kept(teacher: Tensor, k: int) -> TopK:
    return TopK.of(teacher, k, temperature=4.0, dtype=torch.float64)


STUDENT, TEACHER, TARGETS = drawn(7, 5), drawn(7, 5, seed=1), classes(7, below=5)
HOLED = torch.where(torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool(), TARGETS, -100)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("targets", [TARGETS, HOLED], ids=["all", "holed"])
def test_logits_equal_the_paper(temperature: float, alpha: float, targets: Tensor) -> None:
    expected = papers.hinton(STUDENT.numpy(), TEACHER.numpy(), targets.tolist(), temperature, alpha)
    found = distill.logits(STUDENT, TEACHER, targets, temperature=temperature, alpha=alpha)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_equals_torch(temperature: float) -> None:
    expected = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(STUDENT / temperature, 1),
        torch.softmax(TEACHER / temperature, 1),
        reduction="batchmean",
    )
    torch.testing.assert_close(
        distill.divergence(STUDENT, TEACHER, temperature=temperature), expected, rtol=1e-12, atol=0
    )


def test_cross_entropy_equals_torch() -> None:
    soft = torch.softmax(TEACHER, 1)
    for targets in (TARGETS, HOLED, soft):
        expected = torch.nn.functional.cross_entropy(STUDENT, targets)
        torch.testing.assert_close(distill.cross_entropy(STUDENT, targets), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_equals_the_paper(temperature: float) -> None:
    expected = papers.decoupled(STUDENT.numpy(), TEACHER.numpy(), TARGETS.tolist(), temperature, 1.5, 8.0)
    found = distill.decoupled(STUDENT, TEACHER, TARGETS, temperature=temperature, alpha=1.5, beta=8.0)
    assert found.item() == pytest.approx(expected, rel=1e-11)


def test_the_whole_divergence_is_the_decoupled_one_with_the_rest_weighed_by_its_mass() -> None:
    """KD = TCKD + (1 − p_t)·NCKD, equation 6 of arXiv:2203.08679, item by item."""
    for index in range(7):
        s, t, y = (x[index : index + 1] for x in (STUDENT, TEACHER, TARGETS))
        rest = 1 - float(torch.softmax(t / 4, 1)[0, y])
        parted = distill.decoupled(s, t, y, temperature=4.0, alpha=1.0, beta=rest)
        torch.testing.assert_close(parted, distill.divergence(s, t, temperature=4.0), rtol=1e-11, atol=0)


def test_decoupled_is_finite_for_a_sure_student() -> None:
    """With probabilities, 1 − q rounds to 0 and the loss to infinity; in logs it is what it is."""
    sure = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    unsure = torch.tensor([[1.0, 0.0, 0.5]])
    loss = distill.decoupled(sure, unsure, torch.tensor([0]), temperature=1.0, beta=0.0)
    p = papers.softmax([1.0, 0.0, 0.5])[0]
    expected = p * np.log(p) + (1 - p) * (np.log(1 - p) - (np.log(2) - 200))
    (gradient,) = torch.autograd.grad(loss, sure)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all()
    assert float(gradient[0, 0]) == pytest.approx(1 - p, rel=1e-6)  # q − p of the target


FEATURES = drawn(6, 3, 4, 2), drawn(6, 5, 4, 2, seed=1)


def test_features_equal_their_papers() -> None:
    s, t = FEATURES
    assert float(distill.attention(s, t)) == pytest.approx(papers.attention(s.numpy(), t.numpy()), rel=1e-12)
    rows = s.flatten(1).numpy(), t.flatten(1).numpy()
    assert float(distill.distance(s, t)) == pytest.approx(papers.distance(*rows), rel=1e-12)
    assert float(distill.angle(s, t)) == pytest.approx(papers.angle(*rows), rel=1e-12)
    assert float(distill.relational(s, t)) == pytest.approx(
        papers.distance(*rows) + 2 * papers.angle(*rows), rel=1e-12
    )
    wide = drawn(6, 3, 4, 2, seed=2)
    torch.testing.assert_close(distill.hints(s, wide), torch.nn.functional.mse_loss(s, wide))


def test_relations_know_neither_scale_nor_rotation() -> None:
    turn, _ = torch.linalg.qr(drawn(24, 24, seed=3))
    rows = FEATURES[0].flatten(1)
    assert float(distill.relational(rows, 3 * rows @ turn + 1)) == pytest.approx(0, abs=1e-20)


LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "logits": (lambda s, t: distill.logits(s, t, HOLED, temperature=3.0, alpha=0.4), STUDENT, TEACHER),
    "soft": (lambda s, t: distill.logits(s, t, torch.softmax(TEACHER, 1)), STUDENT, TEACHER),
    "top2": (lambda s, t: distill.divergence(s, kept(t, 2)), STUDENT, TEACHER),
    "top5": (lambda s, t: distill.divergence(s, kept(t, 5)), STUDENT, TEACHER),
    "decoupled": (lambda s, t: distill.decoupled(s, t, HOLED), STUDENT, TEACHER),
    "exits": (lambda s, t: distill.exits([s, t.detach()], HOLED), STUDENT, TEACHER),
    "mutual": (lambda s, t: distill.mutual([s, t], HOLED)[0], STUDENT, TEACHER),
    "hints": (distill.hints, FEATURES[0], drawn(6, 3, 4, 2, seed=2)),
    "attention": (distill.attention, *FEATURES),
    "distance": (distill.distance, *FEATURES),
    "angle": (distill.angle, *FEATURES),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences_and_none_reaches_the_teacher(name: str) -> None:
    loss, s, t = LOSSES[name]
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.clone().requires_grad_(), rtol=1e-5)
    teacher = t.clone().requires_grad_()
    loss(s.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_temperature_squared_keeps_gradients_comparable() -> None:
    """High T: the gradient tends to (z − v)/classes of centred logits (equation 4), not to 0 as 1/T²."""

    def size(temperature: float) -> float:
        s = STUDENT.clone().requires_grad_()
        loss = distill.divergence(s, TEACHER, temperature=temperature)
        return float(torch.autograd.grad(loss, s)[0].norm())

    centred = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    limit = float(centred.norm()) / 5 / 7
    sizes = {temperature: size(temperature) for temperature in (2.0, 8.0, 100.0)}
    assert sizes[100.0] == pytest.approx(limit, rel=0.02)
    assert all(0.5 < found / limit < 2 for found in sizes.values())
    assert sizes[100.0] / sizes[8.0] > 50 * (8.0 / 100.0) ** 2  # what it would be without the factor


# Positions that count, and accumulation (traps 38, 52, 63)

TOKENS = drawn(4, 6, 5), drawn(4, 6, 5, seed=1)
LABELS = torch.where(classes(4, 6, below=3, seed=4) > 0, classes(4, 6, below=5), -100)
WIDE = drawn(4, 6, 8), drawn(4, 6, 8, seed=1)

BY_TOKEN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, Tensor]]] = {
    "logits": (distill.logits, TOKENS),
    "divergence": (distill.divergence, TOKENS),
    "decoupled": (distill.decoupled, TOKENS),
    "mutual": (lambda s, t, y, **o: distill.mutual([s, t], y, **o)[0], TOKENS),
    "exits": (lambda s, t, y, **o: distill.exits([s, t], y, **o), TOKENS),
    "cross_entropy": (lambda s, _, y, **o: distill.cross_entropy(s, y, **o), TOKENS),
    "top3": (
        lambda s, t, y, **o: distill.divergence(s, TopK.of(t, 3, temperature=4.0), y, **o),
        TOKENS,
    ),
    "hints": (distill.hints, WIDE),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_ragged_micro_batches_add_up_to_the_big_batch(name: str) -> None:
    loss, (s, t) = BY_TOKEN[name]
    whole = s.clone().requires_grad_()
    big = loss(whole, t, LABELS)
    big.backward()
    count = (LABELS != -100).sum()
    assert 0 < count < LABELS.numel()
    parts = s.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 1), slice(1, 2), slice(2, 4)):
        own = loss(parts[part], t[part], LABELS[part], count=count)
        own.backward()
        total += own.item()
    assert total == pytest.approx(big.item(), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-15)
    means = sum(loss(s[i : i + 1], t[i : i + 1], LABELS[i : i + 1]).item() for i in range(4)) / 4
    assert means != pytest.approx(big.item(), rel=1e-3)  # the mean of means, which it must not be


@pytest.mark.parametrize("name", BY_TOKEN)
def test_what_is_ignored_changes_nothing_even_where_it_is_nan(name: str) -> None:
    loss, (s, t) = BY_TOKEN[name]
    counted = LABELS != -100
    spoilt = s.masked_fill(~counted.unsqueeze(-1), torch.nan).requires_grad_()
    teacher = t.masked_fill(~counted.unsqueeze(-1), 1e9)
    found = loss(spoilt, teacher, LABELS)
    assert found.item() == loss(s, t, LABELS).item()
    (gradient,) = torch.autograd.grad(found, spoilt)
    assert (gradient[~counted] == 0).all()
    assert gradient[counted].isfinite().all()
    assert (gradient[counted] != 0).any()
    flat = loss(s[counted], t[counted], LABELS[counted])
    assert flat.item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 17], ids=str)
@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_batch_that_is_ignored_gives_zero_and_no_gradient(name: str, count: Any) -> None:
    loss, (s, t) = BY_TOKEN[name]
    s = s.clone().requires_grad_()
    found = loss(s, t, torch.full_like(LABELS, -100), count=count)
    found.backward()
    assert float(found.detach()) == 0
    assert s.grad is not None
    assert (s.grad == 0).all()
    assert torch.nn.functional.cross_entropy(s.flatten(0, 1), torch.full((24,), -100)).isnan()  # torch


def test_attention_counts_items() -> None:
    s, t = FEATURES
    labels = torch.tensor([1, -100, 2, 0, -100, 3])
    kept = labels != -100
    torch.testing.assert_close(distill.attention(s, t, labels), distill.attention(s[kept], t[kept]))
    parts = [distill.attention(s[i : i + 2], t[i : i + 2], labels[i : i + 2], count=4) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).sum(), distill.attention(s, t, labels))


def test_items_that_coincide_and_batches_too_small_have_finite_gradients() -> None:
    same = torch.ones(4, 3, requires_grad=True)
    for loss in (distill.distance, distill.angle):
        for batch in (same, same[:1], same[:2]):
            found = loss(batch, drawn(len(batch), 3).float())
            (gradient,) = torch.autograd.grad(found, same, allow_unused=True)
            assert found.isfinite()
            assert gradient is None or gradient.isfinite().all()
    assert float(distill.distance(same[:1], drawn(1, 3).float()).detach()) == 0
    assert float(distill.angle(same[:2], drawn(2, 3).float()).detach()) == 0


def test_classes_that_both_exclude_add_nothing() -> None:
    shut = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf], dtype=torch.float64)
    s = (STUDENT + shut).requires_grad_()
    found = distill.divergence(s, TEACHER + shut, temperature=2.0)
    torch.testing.assert_close(found, distill.divergence(STUDENT[:, :4], TEACHER[:, :4], temperature=2.0))
    (gradient,) = torch.autograd.grad(found, s)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    s, t = STUDENT.to(dtype), TEACHER.to(dtype)
    found = distill.logits(s, t, TARGETS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distill.logits(s.float(), t.float(), TARGETS), rtol=0, atol=0)


# Several learn from each other


def test_mutual_losses_are_each_others_detached_teachers() -> None:
    peers = [drawn(7, 5, seed=seed).requires_grad_() for seed in range(3)]
    found = distill.mutual(peers, TARGETS, temperature=2.0, alpha=0.4)
    for index, (own, loss) in enumerate(zip(peers, found, strict=True)):
        others = [peer for peer in peers if peer is not own]
        expected = np.mean(
            [
                papers.hinton(own.detach().numpy(), o.detach().numpy(), TARGETS.tolist(), 2.0, 0.4)
                for o in others
            ]
        )
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        gradients = torch.autograd.grad(loss, peers, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == [place == index for place in range(3)]


def test_exits_learn_from_the_deepest_which_learns_from_the_targets_alone() -> None:
    outputs = [drawn(7, 5, seed=seed).requires_grad_() for seed in range(3)]
    loss = distill.exits(outputs, TARGETS, temperature=3.0, alpha=0.3)
    plain = [output.detach().numpy() for output in outputs]
    expected = papers.hinton(plain[2], plain[2], TARGETS.tolist(), 3.0, 0.0) + sum(
        papers.hinton(own, plain[2], TARGETS.tolist(), 3.0, 0.3) for own in plain[:2]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    alone = torch.autograd.grad(torch.nn.functional.cross_entropy(outputs[2], TARGETS), outputs[2])[0]
    torch.testing.assert_close(torch.autograd.grad(loss, outputs[2])[0], alone)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "torch's layout": (
        partial(distill.logits, drawn(2, 5, 6), drawn(2, 5, 6), classes(2, 6, below=5)),
        "classes last",
    ),
    "other teacher": (partial(distill.divergence, STUDENT, TEACHER[:, :4]), r"shape \[7, 4\]"),
    "temperature": (partial(distill.divergence, STUDENT, TEACHER, temperature=0.0), "above 0, got 0.0"),
    "alpha": (partial(distill.logits, STUDENT, TEACHER, TARGETS, alpha=1.2), "from 0 to 1, got 1.2"),
    "count": (partial(distill.cross_entropy, STUDENT, TARGETS, count=-1), "at least 0, got -1"),
    "nan count": (partial(distill.cross_entropy, STUDENT, TARGETS, count=float("nan")), "got nan"),
    "soft decoupled": (partial(distill.decoupled, STUDENT, TEACHER, TEACHER), "whole-number targets"),
    "widths": (partial(distill.hints, drawn(2, 3), drawn(2, 4)), "sample=inputs"),
    "space": (partial(distill.attention, drawn(2, 3, 4, 4), drawn(2, 3, 2, 2)), "one space"),
    "batches": (partial(distill.distance, drawn(2, 3), drawn(3, 3)), "one batch"),
    "one peer": (lambda: distill.mutual([STUDENT], TARGETS)[0], "at least two, got 1"),
    "one exit": (partial(distill.exits, [STUDENT], TARGETS), "at least two exits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(BadInput, match=said):
        call()
