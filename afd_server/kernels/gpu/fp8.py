"""Weights and activations in float8_e4m3fn with scales, as DeepSeek-V3 has them (arXiv 2412.19437, section 3.3.2).

A weight has one scale for every block of 128 x 128, an activation one for every 128 columns of a row. What lives here: the
two types in plain torch. What does not: the products (experts.py) and FP8 on the wire (transport/wire.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# Of a block of zeros, whose scale would be 0. Squared, it is still a normal float32.
MIN_SCALE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class BlockScaledWeight:
    """values: [..., N, K] float8_e4m3fn; scales: [..., N / 128, K / 128] float32. The weight is their product."""

    values: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> BlockScaledWeight:
        """Raises ValueError unless both of the last dimensions are multiples of 128."""
        if weight.shape[-1] % BLOCK or weight.shape[-2] % BLOCK:
            raise ValueError(
                f"FP8 weights need multiples of {BLOCK} in both dimensions, not {tuple(weight.shape)}"
            )
        blocks = weight.to(torch.float32).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        scales = (blocks.abs().amax(dim=(-3, -1), keepdim=True) / FP8_MAX).clamp_(min=MIN_SCALE)
        values = (blocks / scales).to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2)
        return cls(values, scales[..., 0, :, 0])

    def dequantize(self) -> Tensor:
        """float32 [..., N, K]."""
        scales = self.scales.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
        return self.values.to(torch.float32) * scales

    def tensors(self) -> list[Tensor]:
        return [self.values, self.scales]


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """x as float8_e4m3fn [T, K] and scales, float32 [T, K / 128]."""
    groups = x_TK.to(torch.float32).unflatten(-1, (-1, BLOCK))
    scales = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_(min=MIN_SCALE)
    return (groups / scales).to(torch.float8_e4m3fn).flatten(-2), scales[..., 0]
