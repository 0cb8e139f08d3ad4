# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""The matrix product within a kernel, for attention_triton.py and experts_triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from afd_server.kernels.gpu.device import interpreted


def how_to_multiply(dtype):
    """The constexpr arguments of a kernel that calls `product` on tiles of this type.

    TensorFloat-32 would make float32 as exact as float16. The interpreter stores bfloat16 as integers, and multiplies them as
    such; widened they are multiplied as a tensor core does it: exactly, and summed in float32.
    """
    return {
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        "WIDEN": interpreted() and dtype is torch.bfloat16,
    }


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a b, in float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
