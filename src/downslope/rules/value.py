"""The language in which rules are written: arithmetic and a small vocabulary over a `Value`.

A rule is an ordinary Python function. It never sees what it computes with: the same body runs on NumPy
arrays, is traced once into a program, and is printed as a formula, because each of these is a `Value` that
answers to the same words. What a word means, NaN, infinity, -0 and ties included, is defined once, by its
NumPy function in `WORDS`; every executor must agree with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Number: TypeAlias = float | int
Operand: TypeAlias = "Value | Number"

SCOPES = ("row", "column", "unit", "tensor", "group", "all")
"""What a reduction goes over: the last dimension, the last but one, all dimensions but the first (a vector is
one unit), the tensor, its param group, all tensors that are stepped.
"""

LINES = ("row", "column", "unit")


def _maximum(a: Any, b: Any) -> Any:
    return np.where((a >= b) | (a != a), a, b)


def _minimum(a: Any, b: Any) -> Any:
    return np.where((a <= b) | (a != a), a, b)


def _sign(a: Any) -> Any:
    return np.where(a > 0, 1.0, np.where(a < 0, -1.0, a))


WORDS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,  # x / 0 is an infinity with the sign of both, 0 / 0 is NaN; nothing raises
    "neg": np.negative,
    "pow": np.power,
    "abs": np.absolute,
    "sqrt": np.sqrt,  # NaN below zero, and sqrt(-0) is -0
    "exp": np.exp,
    "log": np.log,
    "mod": np.mod,  # with the sign of the divisor, as in Python; of counters and numbers only
    "lt": np.less,  # a comparison with NaN is false
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "isfinite": np.isfinite,
    "where": np.where,
    "sign": _sign,  # NaN stays NaN, -0 stays -0
    "maximum": _maximum,  # NaN on either side gives NaN; a tie, +0 with -0 too, gives the first
    "minimum": _minimum,
    "dither": lambda a, chance: a,  # float64 is not rounded
}
"""Elementwise words. NumPy says what they mean; torch, Numba and Triton forms are tested against it."""

REDUCTIONS = ("total", "squares", "largest")
"""Words that make one number of many: the sum, the sum of squares (taken in float64), the largest
magnitude.
"""


class Value(ABC):
    """A quantity inside a rule: an array, a node of a trace, a piece of a formula. Subclasses say what a word
    does.
    """

    __array_ufunc__ = None  # `numpy scalar * Value` must reach __rmul__, not be taken apart by NumPy

    @abstractmethod
    def word(self, name: str, *operands: Operand) -> Value:
        """The elementwise word `name` over `operands`, of which at least one is a Value of this class."""

    @abstractmethod
    def reduce(self, name: str, over: str) -> Value:
        """One number per `over` ("row", "column", "tensor", "group" or "all") of this value."""

    @abstractmethod
    def count(self, over: str) -> Operand:
        """How many elements `over` holds."""

    @abstractmethod
    def lend(self, name: str, *operands: Operand) -> Value:
        """A word of `downslope.rules.matrix_words` on whole matrices: executors lend it to a library."""

    @abstractmethod
    def noise(self, name: str, seed: Operand) -> Value:
        """Random numbers of this shape from a counter keyed by (seed, step, parameter name, index)."""

    @property
    def T(self) -> Value:  # noqa: N802  as in every library of arrays
        """The transposed matrix."""
        return self.lend("transpose", self)

    def __matmul__(self, other: Operand) -> Value:
        return self.lend("matmul", self, other)

    def __add__(self, other: Operand) -> Value:
        return self.word("add", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self.word("add", other, self)

    def __sub__(self, other: Operand) -> Value:
        return self.word("sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self.word("sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.word("mul", self, other)

    def __rmul__(self, other: Operand) -> Value:
        return self.word("mul", other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self.word("div", self, other)

    def __rtruediv__(self, other: Operand) -> Value:
        return self.word("div", other, self)

    def __pow__(self, other: Operand) -> Value:
        return self.word("pow", self, other)

    def __rpow__(self, other: Operand) -> Value:
        return self.word("pow", other, self)

    def __neg__(self) -> Value:
        return self.word("neg", self)

    def __abs__(self) -> Value:
        return self.word("abs", self)

    def __lt__(self, other: Operand) -> Value:
        return self.word("lt", self, other)

    def __le__(self, other: Operand) -> Value:
        return self.word("le", self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.word("gt", self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.word("ge", self, other)

    def __bool__(self) -> bool:
        raise TypeError(
            "a rule cannot branch on a value, which differs from element to element: use where(…)"
        )


def speak(name: str, *operands: Operand) -> Any:
    """Apply the word `name`: by whichever operand is a Value, or with NumPy where all are plain numbers."""
    for operand in operands:
        if isinstance(operand, Value):
            return operand.word(name, *operands)
    with np.errstate(all="ignore"):
        return float(WORDS[name](*(np.float64(operand) for operand in operands)))  # type: ignore[arg-type]


def sqrt(x: Operand) -> Any:
    """The square root; NaN below zero."""
    return speak("sqrt", x)


def exp(x: Operand) -> Any:
    """The exponential."""
    return speak("exp", x)


def log(x: Operand) -> Any:
    """The natural logarithm; -inf at zero, NaN below."""
    return speak("log", x)


def sign(x: Operand) -> Any:
    """-1, 0 or 1; NaN stays NaN and -0 stays -0."""
    return speak("sign", x)


def maximum(a: Operand, b: Operand) -> Any:
    """The larger; NaN if either is NaN, and the first of two equal ones."""
    return speak("maximum", a, b)


def minimum(a: Operand, b: Operand) -> Any:
    """The smaller; NaN if either is NaN, and the first of two equal ones."""
    return speak("minimum", a, b)


def where(condition: Operand, a: Operand, b: Operand) -> Any:
    """`a` where the condition holds, else `b`, which may be NaN there without harm."""
    return speak("where", condition, a, b)


def isfinite(x: Operand) -> Any:
    """Whether x is neither NaN nor an infinity."""
    return speak("isfinite", x)


def dither(x: Operand, chance: Operand) -> Any:
    """x rounded to the dtype of the weight, up with such a `chance` that the mean is x; float32 and float64
    weights take x as it is. What lies beyond the largest number of the dtype is rounded to the nearest.
    """
    return speak("dither", x, chance)


def mod(a: Operand, b: Operand) -> Any:
    """The remainder of a / b, with the sign of b."""
    return speak("mod", a, b)


def lerp(a: Operand, b: Operand, weight: Operand) -> Any:
    """(1 - weight) a + weight b."""
    return (1 - weight) * a + weight * b


def clip(x: Operand, low: Operand, high: Operand) -> Any:
    """x moved into [low, high]; NaN stays NaN."""
    return minimum(maximum(x, low), high)


def total(x: Value, over: str = "tensor") -> Any:
    """The sum of x over its row, column, tensor, group, or over all tensors."""
    return x.reduce("total", over)


def mean(x: Value, over: str = "tensor") -> Any:
    """The mean of x over its row, column, tensor, group, or over all tensors."""
    return x.reduce("total", over) / x.count(over)


def norm(x: Value, over: str = "tensor") -> Any:
    """The Euclidean norm of x, its squares summed in float64, over a row, column, tensor, group, or over
    all.
    """
    return sqrt(x.reduce("squares", over))


def largest(x: Value, over: str = "tensor") -> Any:
    """The largest magnitude in x: the infinity norm."""
    return x.reduce("largest", over)


def dimensions(x: Value) -> Any:
    """How many dimensions the weight has."""
    return x.count("dimensions")


def rows(x: Value) -> Any:
    """The rows of the weight as a matrix: its first dimension."""
    return x.count("rows")


def columns(x: Value) -> Any:
    """The columns of the weight as a matrix: the product of all dimensions but the first."""
    return x.count("columns")


def normal(x: Value, seed: Operand = 0) -> Any:
    """Standard normal numbers of the shape of x, from a counter: alike in every run, shard and executor."""
    return x.noise("normal", seed)


def uniform(x: Value, seed: Operand = 0) -> Any:
    """Uniform numbers in [0, 1) of the shape of x, from a counter as in `normal`."""
    return x.noise("uniform", seed)


def orthogonalise(x: Value) -> Any:
    """The nearest semi-orthogonal matrix, nearly: five steps of Muon's Newton-Schulz iteration."""
    return x.lend("orthogonalise", x)


def inverse_root(x: Value, order: int) -> Any:
    """A symmetric positive definite matrix to the power -1/order, by its eigenvalues."""
    return x.lend("inverse_root", x, order)


def eigenbasis(x: Value) -> Any:
    """The eigenvectors of a symmetric matrix, one a column, the largest eigenvalue first."""
    return x.lend("eigenbasis", x)


def orthonormal(x: Value) -> Any:
    """An orthonormal basis of the columns of a square matrix, in their order: Q of its QR decomposition."""
    return x.lend("orthonormal", x)


def trace_of(x: Value) -> Any:
    """The trace of a square matrix, one number a tensor."""
    return x.lend("trace", x)


def shrink_units(p: Value, rate: Operand, amount: Operand) -> Any:
    """The proximal step of amount · ‖unit‖₂ for every unit of p, exact where `rate` differs by element."""
    return p.lend("shrink_units", p, rate, amount)


def shrink_singular(p: Value, amount: Operand) -> Any:
    """The matrix with its singular values moved towards zero by `amount`, which is one number a tensor."""
    return p.lend("shrink_singular", p, amount)
