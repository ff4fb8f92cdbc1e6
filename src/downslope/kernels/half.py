"""Half-precision weights and random numbers in compiled code: what Numba has no words for."""

from __future__ import annotations

import math
from typing import no_type_check

import llvmlite.ir as ir
from numba import njit, types, uint64
from numba.extending import intrinsic

from downslope.rules.noise import PARITY, ROTATIONS

_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7 = ROTATIONS


@intrinsic
def bits_of(typing_context, x):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of(typing_context, x):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def from_float16(typing_context, x):  # type: ignore[no-untyped-def]
    """The float32 that 16 bits of a float16 mean."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def to_float16(typing_context, x):  # type: ignore[no-untyped-def]
    """The 16 bits of the nearest float16, ties to even."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def from_bfloat16(typing_context, x):  # type: ignore[no-untyped-def]
    """The float32 that 16 bits of a bfloat16 mean."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def to_bfloat16(typing_context, x):  # type: ignore[no-untyped-def]
    """The 16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        bits, sixteen = builder.bitcast(arguments[0], word), ir.Constant(word, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(word, 1))
        raised = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        quiet = builder.or_(bits, ir.Constant(word, 0x400000))
        kept = builder.select(nan, quiet, raised)
        return builder.trunc(builder.lshr(kept, sixteen), ir.IntType(16))

    return types.uint16(types.float32), generate


@njit(inline="always")
def dither_float32(x, chance):  # type: ignore[no-untyped-def]
    """A float32 weight holds every float32."""
    return x


@njit(inline="always")
def dither_float64(x, chance):  # type: ignore[no-untyped-def]
    """A float64 weight holds every float64."""
    return x


@njit(inline="always")
@no_type_check
def dither_bfloat16(x, chance):
    """x moved to a number that bfloat16 has, up with such a chance that the mean is x."""
    if not abs(x) <= types.float32(3.3895313892515355e38):
        return x
    raised = bits_of(x) + types.int32(chance * types.float32(65536.0))
    return float_of(raised & types.int32(-65536))


@njit(inline="always")
@no_type_check
def dither_float16(x, chance):
    """x moved to a number that float16 has, up with such a chance that the mean is x."""
    if not abs(x) <= types.float32(65504.0):
        return x
    if abs(x) < types.float32(2.0**-14):
        return types.float32(math.floor(x * types.float32(2.0**24) + chance)) * types.float32(2.0**-24)
    raised = bits_of(x) + types.int32(chance * types.float32(8192.0))
    return float_of(raised & types.int32(-8192))


@njit(inline="always")
def _mix(x, y, rotation):  # type: ignore[no-untyped-def]
    x = (x + y) & uint64(0xFFFFFFFF)
    y = ((y << uint64(rotation)) | (y >> uint64(32 - rotation))) & uint64(0xFFFFFFFF)
    return x, y ^ x


@njit
def words(key, index):  # type: ignore[no-untyped-def]
    """Two words of 32 random bits: Threefry-2x32 with 20 rounds, as in `downslope.rules.noise`."""
    low = uint64(0xFFFFFFFF)
    k0, k1 = uint64(key) & low, uint64(key) >> uint64(32)
    k2 = k0 ^ k1 ^ uint64(PARITY)
    x, y = ((uint64(index) & low) + k0) & low, ((uint64(index) >> uint64(32)) + k1) & low
    for turn in range(5):
        if turn % 2 == 0:
            x, y = _mix(x, y, _R0)
            x, y = _mix(x, y, _R1)
            x, y = _mix(x, y, _R2)
            x, y = _mix(x, y, _R3)
        else:
            x, y = _mix(x, y, _R4)
            x, y = _mix(x, y, _R5)
            x, y = _mix(x, y, _R6)
            x, y = _mix(x, y, _R7)
        k0, k1, k2 = k1, k2, k0
        x, y = (x + k0) & low, (y + k1 + uint64(turn + 1)) & low
    return x, y


@njit
def uniform(key, index):  # type: ignore[no-untyped-def]
    """A number in [0, 1)."""
    return float(words(key, index)[0]) / 2.0**32


@njit
def normal(key, index):  # type: ignore[no-untyped-def]
    """A standard normal number, by Box and Muller."""
    x, y = words(key, index)
    return math.sqrt(-2.0 * math.log((float(x) + 0.5) / 2.0**32)) * math.cos(
        2.0 * math.pi * (float(y) / 2.0**32)
    )
