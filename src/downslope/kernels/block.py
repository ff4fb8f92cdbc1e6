"""The words of the language on blocks of numbers, in Triton: those that Triton lacks or rounds loosely.

What a GPU has no exact float32 form of (powers, exponentials, logarithms) is computed in float64. Only words
that Triton's interpreter knows are used, so that a machine without a GPU checks the same source.
"""

from __future__ import annotations

import triton
import triton.language as tl

from downslope.rules.noise import PARITY, ROTATIONS

_PARITY: tl.constexpr = tl.constexpr(PARITY)
_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7 = (tl.constexpr(rotation) for rotation in ROTATIONS)


@triton.jit
def divided(a, b):  # type: ignore[no-untyped-def]
    """a / b, rounded once; Triton's own `/` of float32 is not."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def root(a):  # type: ignore[no-untyped-def]
    """The square root, rounded once; NaN below zero, and the root of -0 is -0."""
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@triton.jit
def exponential(a):  # type: ignore[no-untyped-def]
    """e to the power a."""
    return tl.exp(a.to(tl.float64)).to(a.dtype)


@triton.jit
def logarithm(a):  # type: ignore[no-untyped-def]
    """The natural logarithm; -inf at zero, NaN below."""
    return tl.log(a.to(tl.float64)).to(a.dtype)


@triton.jit
def sign(a):  # type: ignore[no-untyped-def]
    """-1, 0 or 1; NaN stays NaN and -0 stays -0."""
    return tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, a)).to(a.dtype)


@triton.jit
def maximum(a, b):  # type: ignore[no-untyped-def]
    """The larger; NaN if either is NaN, and the first of two equal ones."""
    return tl.where(a >= b, a, tl.where(a != a, a, b))


@triton.jit
def minimum(a, b):  # type: ignore[no-untyped-def]
    """The smaller; NaN if either is NaN, and the first of two equal ones."""
    return tl.where(a <= b, a, tl.where(a != a, a, b))


@triton.jit
def power(base, exponent):  # type: ignore[no-untyped-def]
    """base to the power exponent, with the cases of C's pow."""
    a, b = base.to(tl.float64), exponent.to(tl.float64)
    size = tl.abs(a)
    whole = tl.floor(b) == b  # infinities are, and are even
    half = b * 0.5
    odd = whole & (tl.floor(half) != half)
    found = tl.exp(b * tl.log(size))
    found = tl.where(size == 1.0, 1.0, found)  # 0 · inf of the exponent is no NaN here
    minus = (a < 0) | ((a == 0) & (1.0 / a < 0))
    found = tl.where(minus & odd, found * -1.0, found)
    finite = size < float("inf")
    found = tl.where((a < 0) & finite & (whole == 0), float("nan"), found)
    found = tl.where((a != a) | (b != b), float("nan"), found)
    return tl.where((b == 0) | (a == 1.0), 1.0, found).to(base.dtype)


@triton.jit
def from_bfloat16(bits):  # type: ignore[no-untyped-def]
    """The float32 that 16 bits of a bfloat16 mean."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bfloat16(a):  # type: ignore[no-untyped-def]
    """The 16 bits of the nearest bfloat16, ties to even; NaN stays NaN. Triton's interpreter only cuts."""
    bits = a.to(tl.uint32, bitcast=True)
    raised = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(a != a, bits | 0x400000, raised) >> 16).to(tl.uint16)


@triton.jit
def dither_bfloat16(a, chance):  # type: ignore[no-untyped-def]
    """a moved to a number that bfloat16 has, up with such a chance that the mean is a."""
    raised = a.to(tl.int32, bitcast=True) + (chance * 65536.0).to(tl.int32)
    return tl.where(tl.abs(a) <= 3.3895313892515355e38, (raised & -65536).to(tl.float32, bitcast=True), a)


@triton.jit
def dither_float16(a, chance):  # type: ignore[no-untyped-def]
    """a moved to a number that float16 has, up with such a chance that the mean is a."""
    raised = a.to(tl.int32, bitcast=True) + (chance * 8192.0).to(tl.int32)
    fine = tl.floor(a * 16777216.0 + chance) * 5.9604644775390625e-8  # below the least normal number
    found = tl.where(tl.abs(a) < 6.103515625e-05, fine, (raised & -8192).to(tl.float32, bitcast=True))
    return tl.where(tl.abs(a) <= 65504.0, found, a)


@triton.jit
def _turned(x, y, rotation):  # type: ignore[no-untyped-def]
    x = x + y
    return x, ((y << rotation) | (y >> (32 - rotation))) ^ x


@triton.jit
def words(key, index):  # type: ignore[no-untyped-def]
    """Two words of 32 random bits: Threefry-2x32 with 20 rounds, as in `downslope.rules.noise`."""
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    k2 = k0 ^ k1 ^ _PARITY
    x, y = index.to(tl.uint32) + k0, (index >> 32).to(tl.uint32) + k1
    for turn in tl.static_range(5):
        if turn % 2 == 0:
            x, y = _turned(x, y, _R0)
            x, y = _turned(x, y, _R1)
            x, y = _turned(x, y, _R2)
            x, y = _turned(x, y, _R3)
        else:
            x, y = _turned(x, y, _R4)
            x, y = _turned(x, y, _R5)
            x, y = _turned(x, y, _R6)
            x, y = _turned(x, y, _R7)
        k0, k1, k2 = k1, k2, k0
        x, y = x + k0, y + k1 + (turn + 1)
    return x, y


@triton.jit
def uniform(key, index):  # type: ignore[no-untyped-def]
    """Numbers in [0, 1), in float64."""
    x, _ = words(key, index)
    return x.to(tl.float64) * 2.3283064365386963e-10


@triton.jit
def normal(key, index):  # type: ignore[no-untyped-def]
    """Standard normal numbers in float64, by Box and Muller."""
    x, y = words(key, index)
    radius = tl.sqrt(-2.0 * tl.log((x.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    return radius * tl.cos(y.to(tl.float64) * (6.283185307179586 * 2.3283064365386963e-10))


@triton.jit
def largest(values):  # type: ignore[no-untyped-def]
    """The largest of a block of magnitudes; NaN if one is."""
    odd = values != values
    found = tl.max(tl.where(odd, 0.0, values))
    return tl.where(tl.max(odd.to(tl.int32)) > 0, float("nan"), found)


@triton.jit(do_not_specialize=["partials", "bounds", "kinds", "places", "found"])  # type: ignore[untyped-decorator]
def collect(partials, bounds, kinds, places, found, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One number a parameter of the partial results of its chunks, always in the same order.

    `partials` has a row a reduction and a column a chunk, `bounds` each parameter's chunks, `kinds` 1 for a
    reduction that takes the largest; `found` gets a row a place and a column a reduction.
    """
    row, which = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(bounds + row), tl.load(bounds + row + 1)
    chunks = tl.load(bounds + tl.num_programs(0))
    most = tl.load(kinds + which) != 0
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(partials + which * chunks + at, mask=at < last, other=0.0)
        sums = tl.where(most, maximum(sums, values), sums + values)
    whole = tl.where(most, largest(sums), tl.sum(sums))
    tl.store(found + tl.load(places + row) * tl.num_programs(1) + which, whole)
