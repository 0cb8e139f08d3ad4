"""Multi-matrix factorization attention (Step-3, arXiv 2507.19427; arXiv 2412.19255) over the paged cache.

Queries come from a normed low-rank vector; one key head and one value head serve them all, so that the cache is that of
grouped-query attention with one group. Shapes: T rows, H hidden, N query heads, C rank of the queries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.attention_gqa import keys_and_values
from afd_server.models.batch import AttentionBatch
from afd_server.models.norm import rms_norm
from afd_server.models.paged_attention import paged_attention, write_entries
from afd_server.models.rope import RopeTable
from afd_server.models.spec import MFASpec


class FactorizedAttention:
    """One layer's attention. weights: slot -> tensor, as tensors.py lists them; q_down, k and v become one matrix."""

    def __init__(self, spec: MFASpec, weights: Mapping[str, Tensor], rms_norm_eps: float) -> None:
        self._spec = spec
        self._eps = rms_norm_eps
        self._down = torch.cat([weights["q_down"], weights["k"], weights["v"]])
        self._q_norm, self._q_up, self._o = weights["q_norm"], weights["q_up"], weights["o"]

    def tensors(self) -> list[Tensor]:
        return [self._down, self._q_norm, self._q_up, self._o]

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x. Writes the rows' keys and values into cache, [blocks, block_size, 2, 1, D]."""
        spec = self._spec
        query_TC, key_TD, value_TD = F.linear(x_TH, self._down).split(
            [spec.query_rank, spec.head_dim, spec.head_dim], dim=-1
        )
        write_entries(cache, batch, torch.stack((rope.rotate(key_TD[:, None]), value_TD[:, None]), dim=1))
        query = F.linear(rms_norm(query_TC, self._q_norm, self._eps), self._q_up)
        query_TND = rope.rotate(query.view(len(x_TH), spec.num_heads, spec.head_dim))
        output = paged_attention(query_TND, cache, batch, keys_and_values, spec.head_dim**-0.5)
        return F.linear(output.flatten(1), self._o)
