# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""The kernel of rows.py, one program a row, which calls it through launch_add_rms_norm."""

from __future__ import annotations

import triton
import triton.language as tl


def launch_add_rms_norm(x_TH, delta_TH, weight_H, eps, out_TH):
    rows, hidden = x_TH.shape
    columns = triton.next_power_of_2(hidden)
    delta = x_TH if delta_TH is None else delta_TH
    _add_rms_norm[(rows,)](
        x_TH, delta, weight_H, out_TH, eps, x_TH.stride(0), delta.stride(0),
        HIDDEN=hidden, COLUMNS=columns, ADDS=delta_TH is not None, num_warps=8 if columns > 2048 else 4,
    )  # fmt: skip


@triton.jit
def _add_rms_norm(
    x, delta, weight, out, eps, x_row_stride, delta_row_stride,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    numbers = tl.load(x + row * x_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(delta + row * delta_row_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (numbers + added).to(x.dtype.element_ty)
        tl.store(x + row * x_row_stride + column, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    normed = numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) / HIDDEN + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    weighted = normed.to(out.dtype.element_ty).to(tl.float32) * weights
    tl.store(out + row * HIDDEN + column, weighted.to(out.dtype.element_ty), mask=inside)
