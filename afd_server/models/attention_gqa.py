"""Grouped-query attention (arXiv 2305.13245) over the paged cache: Llama, Qwen, Mixtral.

Shapes: T rows, H hidden, N query heads, G key and value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import Operations
from afd_server.models.rope import RopeTable
from afd_server.models.spec import GQASpec


class GQAttention:
    """One layer's attention. weights: slot -> tensor, as tensors.py lists them; q, k and v become one matrix."""

    def __init__(
        self, spec: GQASpec, weights: Mapping[str, Tensor], rms_norm_eps: float, operations: Operations
    ) -> None:
        self.spec = spec
        self._eps = rms_norm_eps
        self._operations = operations
        biases = [weights[name] for name in ("q_bias", "k_bias", "v_bias") if spec.qkv_bias]
        self.qkv = operations.linear([weights["q"], weights["k"], weights["v"]], biases)
        self.output = operations.linear([weights["o"]], [weights["o_bias"]] if "o_bias" in weights else [])
        self.norms = (weights["q_norm"], weights["k_norm"]) if spec.qk_norm else None

    def tensors(self) -> list[Tensor]:
        return [*self.qkv.tensors(), *self.output.tensors(), *(self.norms or ())]

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x. Writes the rows' keys and values into cache, [blocks, block_size, 2, G, D]."""
        spec, operations = self.spec, self._operations
        heads = self.qkv.forward(x_TH).view(len(x_TH), -1, spec.head_dim)
        query, key, value = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        query = operations.rotate_and_write(query, key, value, self.norms, self._eps, rope, cache, batch)
        output = operations.attend(query, cache, batch, spec.head_dim**-0.5, spec.head_dim)
        return self.output.forward(output.flatten(1))
