"""Grouped-query attention (arXiv 2305.13245) over the paged cache: Llama, Qwen, Mixtral.

Shapes: T rows, H hidden, N query heads, G key and value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.batch import AttentionBatch
from afd_server.models.norm import rms_norm
from afd_server.models.paged_attention import paged_attention, write_entries
from afd_server.models.rope import RopeTable
from afd_server.models.spec import GQASpec


class GQAttention:
    """One layer's attention. weights: slot -> tensor, as tensors.py lists them; q, k and v become one matrix."""

    def __init__(self, spec: GQASpec, weights: Mapping[str, Tensor], rms_norm_eps: float) -> None:
        self._spec = spec
        self._eps = rms_norm_eps
        self._qkv = torch.cat([weights["q"], weights["k"], weights["v"]])
        self._qkv_bias = (
            torch.cat([weights["q_bias"], weights["k_bias"], weights["v_bias"]]) if spec.qkv_bias else None
        )
        self._o = weights["o"]
        self._o_bias = weights.get("o_bias")
        self._q_norm, self._k_norm = weights.get("q_norm"), weights.get("k_norm")

    def tensors(self) -> list[Tensor]:
        held = [self._qkv, self._qkv_bias, self._o, self._o_bias, self._q_norm, self._k_norm]
        return [tensor for tensor in held if tensor is not None]

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x. Writes the rows' keys and values into cache, [blocks, block_size, 2, G, D]."""
        spec = self._spec
        heads = F.linear(x_TH, self._qkv, self._qkv_bias).view(len(x_TH), -1, spec.head_dim)
        query, key, value = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            query = rms_norm(query, self._q_norm, self._eps)
            key = rms_norm(key, self._k_norm, self._eps)
        write_entries(cache, batch, torch.stack((rope.rotate(key), value), dim=1))
        output = paged_attention(rope.rotate(query), cache, batch, keys_and_values, spec.head_dim**-0.5)
        return F.linear(output.flatten(1), self._o, self._o_bias)


def keys_and_values(entries: Tensor) -> tuple[Tensor, Tensor]:
    """[R, L, 2, G, D] -> keys and values, [R, L, G, D] each."""
    keys, values = entries.unbind(2)
    return keys, values
