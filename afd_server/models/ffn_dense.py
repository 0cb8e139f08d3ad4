"""The gated MLP, whole or one slice of its intermediate dimension.

What lives here: the arithmetic. What does not: which slice a shard holds (checkpoint.py). A slice's result is a partial
sum over the intermediate dimension: the slices' results add up to the whole. Shapes: T rows, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseFFN:
    """down(silu(gate x) * up x). weights: gate, up [I, H], down [H, I], and their biases under the same names.

    The bias of down belongs to one slice only, so that it is added once; the others are loaded without it.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._gate_up = torch.cat([weights["gate"], weights["up"]])
        self._gate_up_bias = (
            torch.cat([weights["gate_bias"], weights["up_bias"]]) if "gate_bias" in weights else None
        )
        self._down = weights["down"]
        self._down_bias = weights.get("down_bias")

    def tensors(self) -> list[Tensor]:
        held = [self._gate_up, self._gate_up_bias, self._down, self._down_bias]
        return [tensor for tensor in held if tensor is not None]

    def forward(self, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, H] in x's dtype. out, of that dtype and device, is written by the last product itself."""
        gate, up = F.linear(x_TH, self._gate_up, self._gate_up_bias).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        if out is None:
            return F.linear(inner, self._down, self._down_bias)
        if self._down_bias is None:
            return torch.mm(inner, self._down.T, out=out)
        return torch.addmm(self._down_bias, inner, self._down.T, out=out)
