"""Links: what they do to gradients before, to directions between, or to weights after an independent step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from judges.judge import Array
from judges.layerwise import norm
from judges.matrix import flat


@dataclass
class Moment:
    """One step as a link sees it: its number from 1, the rate, gradients as the chain received them, weights
    before the step, `metric(i)` after it; `memory` lasts as long as the run.
    """

    step: int
    lr: float
    raw: Sequence[Array]
    old: Sequence[Array]
    metric: Callable[[int], Any]
    memory: dict[Any, Any] = field(default_factory=dict)

    def effective(self, i: int) -> Any:
        return self.lr * self.metric(i)


def clip_value(gs: list[Array], at: Moment, max_value: float) -> list[Array]:
    """Mikolov 2012, section 3.2."""
    return [np.clip(g, -max_value, max_value) for g in gs]


def clip_norm(gs: list[Array], at: Moment, max_norm: float) -> list[Array]:
    """Pascanu et al. 2013, algorithm 1."""
    return [g * min(1.0, max_norm / norm(*gs)) for g in gs]


def clip_tensor(gs: list[Array], at: Moment, max_norm: float) -> list[Array]:
    """Pascanu et al. 2013, algorithm 1, for every tensor by itself."""
    return [g * min(1.0, max_norm / norm(g)) if g.size else g for g in gs]


def clip_history(
    gs: list[Array], at: Moment, norm_decay: float, deviations: float, settle: int
) -> list[Array]:
    """Kumar et al. 2025 (ZClip) with the reciprocal threshold, as printed: a list of norms, then two
    exponential averages.
    """
    found, size = at.memory, norm(*gs)
    first = found.setdefault("norms", [])
    if len(first) < settle:
        first.append(size)
        found["mean"], found["variance"] = np.mean(first), np.var(first)
        return gs
    bound, z = size, (size - found["mean"]) / np.sqrt(found["variance"])
    if z > deviations:
        bound = found["mean"] + deviations**2 / z * np.sqrt(found["variance"])
    found["mean"] = norm_decay * found["mean"] + (1 - norm_decay) * bound
    found["variance"] = norm_decay * found["variance"] + (1 - norm_decay) * (bound - found["mean"]) ** 2
    return [g * (bound / size) for g in gs]


def units(x: Array) -> Array:
    """One row a unit: all dimensions but the first; a vector is one unit."""
    return x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(1, -1)


def agc(gs: list[Array], at: Moment, clipping: float, eps: float) -> list[Array]:
    """Brock et al. 2021, eq. 3."""
    found = []
    for g, w in zip(gs, at.old, strict=True):
        bound = clipping * np.maximum(np.linalg.norm(units(w), axis=1, keepdims=True), eps)
        size = np.linalg.norm(units(g), axis=1, keepdims=True)
        found.append((units(g) * np.minimum(1.0, bound / size)).reshape(g.shape) if g.size else g)
    return found


def centralize(gs: list[Array], at: Moment) -> list[Array]:
    """Yong et al. 2020, eq. 1: weights of two dimensions or more."""
    return [g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 else g for g in gs]


def threefry(key: tuple[int, int], x: int, y: int) -> tuple[int, int]:
    """Threefry-2x32 with 20 rounds, Salmon et al. 2011, section 3.2 and table 2, on whole numbers."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)
    x, y = (x + keys[0]) % 2**32, (y + keys[1]) % 2**32
    for round in range(20):
        by = rotations[round % 8]
        x = (x + y) % 2**32
        y = (y << by) % 2**32 | y >> (32 - by)
        y ^= x
        if round % 4 == 3:
            turn = round // 4 + 1
            x = (x + keys[turn % 3]) % 2**32
            y = (y + keys[(turn + 1) % 3] + turn) % 2**32
    return x, y


def normal(seed: float, step: int, name: str, stream: int, shape: tuple[int, ...]) -> Array:
    """Box & Muller 1958 on the counter: the key is the BLAKE2b hash of what names the stream, a line each."""
    said = "\n".join([float(seed).hex(), str(step), name, str(stream)])
    digest = hashlib.blake2b(said.encode(), digest_size=8).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    drawn = [threefry(key, i, 0) for i in range(int(np.prod(shape)))]
    first, second = np.array(drawn, dtype=np.float64).reshape(-1, 2).T
    radius = np.sqrt(-2 * np.log((first + 0.5) / 2**32))
    return (radius * np.cos(2 * np.pi * second / 2**32)).reshape(shape)


def noise(gs: list[Array], at: Moment, scale: float, power: float, seed: int) -> list[Array]:
    """Neelakantan et al. 2015, eq. 1-2: a variance of η/(1 + t)^γ, t from 0."""
    spread = np.sqrt(scale / at.step**power)
    return [g + spread * normal(seed, at.step, f"parameter {i}", 0, g.shape) for i, g in enumerate(gs)]


def cautious(us: list[Array], at: Moment, eps: float) -> list[Array]:
    """Liang et al. 2024, algorithm 1, scaled as their code: what goes against the gradient is left out."""
    masks = [(u * g > 0).astype(float) for u, g in zip(us, at.raw, strict=True)]
    return [u * mask / max(mask.mean(), eps) if u.size else u for u, mask in zip(us, masks, strict=True)]


def cautious_decay(us: list[Array], at: Moment, weight_decay: float) -> list[Array]:
    """Chen et al. 2025, algorithm 1, strictly where the signs of update and weight agree."""
    return [u + weight_decay * np.where(u * p > 0, p, 0.0) for u, p in zip(us, at.old, strict=True)]


def l2(gs: list[Array], at: Moment, l2: float) -> list[Array]:
    """Krogh & Hertz 1991, eq. 2: the gradient of l2/2 ‖w‖²."""
    return [g + l2 * w for g, w in zip(gs, at.old, strict=True)]


def decay(us: list[Array], at: Moment, weight_decay: float) -> list[Array]:
    """Loshchilov & Hutter 2019, algorithm 2: beside the step, at its rate."""
    return [u + weight_decay * p for u, p in zip(us, at.old, strict=True)]


def decay_independent(ps: list[Array], at: Moment, weight_decay: float) -> list[Array]:
    """Loshchilov & Hutter 2019, algorithm 2, the rate being that of the schedule alone."""
    return [p - weight_decay * old for p, old in zip(ps, at.old, strict=True)]


def soft(x: Array, threshold: Array) -> Array:
    """Daubechies et al. 2004, eq. 2."""
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0)


def l1(ps: list[Array], at: Moment, l1: float) -> list[Array]:
    """The proximal point of l1 ‖w‖₁ in the diagonal metric of the step."""
    return [soft(p, at.effective(i) * l1) for i, p in enumerate(ps)]


def elastic_net(ps: list[Array], at: Moment, l1: float, l2: float) -> list[Array]:
    """Zou & Hastie 2005: the proximal point of l1 ‖w‖₁ + l2/2 ‖w‖²."""
    return [soft(p, at.effective(i) * l1) / (1 + at.effective(i) * l2) for i, p in enumerate(ps)]


def group_lasso(ps: list[Array], at: Moment, group_lasso: float) -> list[Array]:
    """Yuan & Lin 2006: the proximal point of λ √n ‖w‖₂ for every unit of n numbers, in a diagonal metric."""
    found = []
    for i, p in enumerate(ps):
        rates = units(np.broadcast_to(at.effective(i), p.shape))
        rows = [
            shrunk(row, rate, group_lasso * np.sqrt(row.size))
            for row, rate in zip(units(p), rates, strict=True)
        ]
        found.append(np.array(rows).reshape(p.shape))
    return found


def shrunk(p: Array, rate: Array, amount: float) -> Array:
    """The least of Σ (w - p)²/(2 rate) + amount ‖w‖. Where w is not 0, its norm solves one equation, here by
    Newton's method on 1/‖w(size)/size‖, which is nearly straight.
    """
    if not np.any(rate):
        return p
    if np.linalg.norm(p / rate) <= amount:
        return np.zeros_like(p)
    size = 0.0
    for _ in range(100):
        terms = p / (size + amount * rate)
        total = np.sum(terms**2)
        size += (np.sqrt(total) - 1) * total / np.sum(terms**2 / (size + amount * rate))
    return p * size / (size + amount * rate)


def nuclear(ps: list[Array], at: Moment, nuclear: float) -> list[Array]:
    """Cai, Candès & Shen 2010, theorem 2.1: singular values soft-thresholded, by the eigenvectors of Wᵀ W."""
    found = []
    for i, p in enumerate(ps):
        values, vectors = np.linalg.eigh(flat(p).T @ flat(p))
        roots = np.sqrt(np.maximum(values, 1e-300))
        kept = np.maximum(roots - at.effective(i) * nuclear, 0.0) / roots
        found.append((flat(p) @ (vectors * kept) @ vectors.T).reshape(p.shape))
    return found


def lookahead(ps: list[Array], at: Moment, every: int, blend: float) -> list[Array]:
    """Zhang et al. 2019, algorithm 1."""
    slow = at.memory.setdefault("slow", list(at.old))
    if at.step % every:
        return ps
    at.memory["slow"] = [s + blend * (p - s) for s, p in zip(slow, ps, strict=True)]
    return list(at.memory["slow"])


def stochastic_rounding(ps: list[Array], at: Moment, seed: int) -> list[Array]:
    """Zamirai et al. 2020: nothing is rounded where weights are as wide as the computation."""
    return ps


def sam(gs: list[Array], at: Moment, rho: float) -> list[Array]:
    """Foret et al. 2021, algorithm 1: where the second gradient is taken."""
    return [w + rho * g / norm(*gs) for w, g in zip(at.old, gs, strict=True)]


def asam(gs: list[Array], at: Moment, rho: float, eta: float) -> list[Array]:
    """Kwon et al. 2021, algorithm 1, with T = |w| + η for every weight."""
    scales = [np.abs(w) + eta for w in at.old]
    size = norm(*(t * g for t, g in zip(scales, gs, strict=True)))
    return [w + rho * t**2 * g / size for w, t, g in zip(at.old, scales, gs, strict=True)]
