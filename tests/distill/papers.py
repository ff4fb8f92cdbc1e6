"""The losses as their papers print them, in NumPy float64, one position, pair or triplet at a time."""

import math

import numpy as np


def softmax(z, temperature=1.0):
    e = np.exp(np.asarray(z, dtype=np.float64) / temperature)
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def hinton(student, teacher, targets, temperature, alpha, ignored=-100):
    """Section 2 of arXiv:1503.02531: soft targets times T², mixed with the true ones; over what counts."""
    terms = []
    for s, t, y in zip(student, teacher, targets, strict=True):
        if y != ignored:
            soft = temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))
            terms.append((1 - alpha) * -math.log(softmax(s)[y]) + alpha * soft)
    return sum(terms) / len(terms)


def decoupled(student, teacher, targets, temperature, alpha, beta):
    """Equation 7 of arXiv:2203.08679, with the probabilities of its section 3.1."""
    terms = []
    for s, t, y in zip(student, teacher, targets, strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        target = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        rest = [i for i in range(len(p)) if i != y]
        others = kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
        terms.append(temperature**2 * (alpha * target + beta * others))
    return sum(terms) / len(terms)


def attention(student, teacher):
    """Section 3.1 of arXiv:1612.03928 with F(A) = Σ|A|², and the mean of squares of its published code."""

    def maps(a):
        found = []
        for item in a:
            total = np.zeros(item.shape[1:])
            for channel in item:
                total += np.abs(channel) ** 2
            found.append(total.ravel() / np.linalg.norm(total))
        return np.stack(found)

    return ((maps(student) - maps(teacher)) ** 2).mean()


def huber(x, y):
    gap = abs(x - y)
    return 0.5 * gap**2 if gap <= 1 else gap - 0.5


def distance(student, teacher):
    """Equations 4 to 6 of arXiv:1904.05068, mean over ordered pairs."""
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student)) if i != j]

    def psi(x):
        lengths = {(i, j): np.linalg.norm(x[i] - x[j]) for i, j in pairs}
        mean = sum(lengths.values()) / len(pairs)
        return {pair: length / mean for pair, length in lengths.items()}

    s, t = psi(student), psi(teacher)
    return sum(huber(t[pair], s[pair]) for pair in pairs) / len(pairs)


def angle(student, teacher):
    """Equations 7 and 8 of arXiv:1904.05068, mean over ordered triplets."""
    n = range(len(student))
    triplets = [(i, j, k) for i in n for j in n for k in n if len({i, j, k}) == 3]

    def psi(x, i, j, k):
        e, f = x[i] - x[j], x[k] - x[j]
        return (e / np.linalg.norm(e)) @ (f / np.linalg.norm(f))

    return sum(huber(psi(teacher, *t), psi(student, *t)) for t in triplets) / len(triplets)
