"""The router of a MoE layer: which experts each token gets, and with what weight.

Either side may run it: the attention half, so that a call names its experts, or every FFN shard for itself (see
FFNHalf.routed). What does not live here: the experts (ffn_moe.py). Shapes: T rows, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd_server.models.operations import Operations
from afd_server.models.spec import MoESpec


class ExpertRouter:
    """weight: [E, H]. correction: [E] float32, where the spec has a correction bias."""

    def __init__(
        self, spec: MoESpec, weight: Tensor, correction: Tensor | None, operations: Operations
    ) -> None:
        assert (correction is not None) == spec.correction_bias
        self.spec = spec
        self._operations = operations
        self._input_dtype = torch.float32 if spec.float32_router else operations.activation_dtype
        self.gate = operations.linear([weight.to(torch.float32) if spec.float32_router else weight], exact=True)
        self.correction = correction

    def tensors(self) -> list[Tensor]:
        return [*self.gate.tensors(), *([] if self.correction is None else [self.correction])]

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [T, K] int32 and their weights [T, K] float32, for normed x."""
        logits_TE = self.gate.forward(x_TH.to(self._input_dtype))
        return self._operations.route(self.spec, logits_TE, self.correction)
