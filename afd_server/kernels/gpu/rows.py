"""What is done to every row of activations between two products on a GPU, in one launch.

What does not live here: the kernel (rows_triton.py). Shapes: T rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    """Adds delta to x in place, rounding to x's dtype, and returns weight * x / rms(x), the same shape and dtype.

    The mean is taken in float32, and the quotient rounded to x's dtype before it is weighted (models/norm.py).
    """
    from afd_server.kernels.gpu import rows_triton

    assert x_TH.stride(1) == 1 and weight_H.is_contiguous() and weight_H.dtype is x_TH.dtype
    assert delta_TH is None or (delta_TH.shape == x_TH.shape and delta_TH.stride(1) == 1)
    out_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    if len(x_TH):
        rows_triton.launch_add_rms_norm(x_TH, delta_TH, weight_H, eps, out_TH)
    return out_TH


def add_rms_norm_reference(x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    if delta_TH is not None:
        x_TH += delta_TH
    wide_TH = x_TH.to(torch.float32)
    wide_TH = wide_TH * torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H * wide_TH.to(x_TH.dtype)
