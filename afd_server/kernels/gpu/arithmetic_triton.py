# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""Arithmetic within a kernel that Triton's interpreter needs to be helped with, for the other *_triton.py.

The interpreter stores bfloat16 as integers and multiplies them as such, and its conversion to FP8 loses the carry where rounding
reaches the next power of two (both Triton 3.7). INTERPRETED asks for what comes to the same and is right there too; compiled
kernels have it False, and nothing of it in them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from afd_server.kernels.gpu.device import interpreted


def how_to_multiply(dtype):
    """The constexpr arguments of a kernel that calls `product` on tiles of this type."""
    # TensorFloat-32 would make float32 as exact as float16.
    return {"PRECISION": "ieee" if dtype is torch.float32 else "tf32", "INTERPRETED": interpreted()}


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a b, in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def to_fp8(x, INTERPRETED: tl.constexpr):
    """float32 x, of magnitudes up to 448, as float8e4nv: to the nearest, ties to even."""
    if (
        INTERPRETED
    ):  # round here, to 3 bits of mantissa and to multiples of 2^-9: what is left to convert is exact
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = ((x * 512.0 + 12582912.0) - 12582912.0) / 512.0
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)
