"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a paged cache of latents.

What lives here: the absorbed form. A head's key is (K_up latent, rotated part), so its score is the product of
(K_up^T query, rotated query) with the cache entry itself, and its output V_up (the attended latent): one key head of
rank + rope dimensions serves all query heads, and the latent is never expanded.
Shapes: T rows, H hidden, N heads, R latent rank, P rotated dimensions, U unrotated dimensions, V value dimensions.
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
from afd_server.models.spec import MLASpec


class LatentAttention:
    """One layer's attention. weights: slot -> tensor, as tensors.py lists them."""

    def __init__(self, spec: MLASpec, weights: Mapping[str, Tensor]) -> None:
        self._spec = spec
        self._q = weights.get("q")
        self._q_down, self._q_down_bias = weights.get("q_down"), weights.get("q_down_bias")
        self._q_norm, self._q_up = weights.get("q_norm"), weights.get("q_up")
        self._kv_down, self._kv_down_bias = weights["kv_down"], weights.get("kv_down_bias")
        self._kv_norm = weights["kv_norm"]
        up_NDR = weights["kv_up"].view(spec.num_heads, -1, spec.kv_rank)
        self._k_up_NUR = up_NDR[:, : spec.nope_head_dim].contiguous()
        self._v_up_NRV = up_NDR[:, spec.nope_head_dim :].transpose(1, 2).contiguous()
        self._o, self._o_bias = weights["o"], weights.get("o_bias")

    def tensors(self) -> list[Tensor]:
        held = [
            self._q, self._q_down, self._q_down_bias, self._q_norm, self._q_up, self._kv_down, self._kv_down_bias,
            self._kv_norm, self._k_up_NUR, self._v_up_NRV, self._o, self._o_bias,
        ]  # fmt: skip
        return [tensor for tensor in held if tensor is not None]

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x. Writes the rows' latents into cache, [blocks, block_size, R + P]."""
        spec = self._spec
        down = F.linear(x_TH, self._kv_down, self._kv_down_bias)
        latent_TR, key_TP = down.split([spec.kv_rank, spec.rope_head_dim], dim=-1)
        latent_TR = rms_norm(latent_TR, self._kv_norm, spec.norm_eps)
        write_entries(cache, batch, torch.cat((latent_TR, rope.rotate(key_TP[:, None])[:, 0]), dim=-1))

        query = self._queries(x_TH).view(len(x_TH), spec.num_heads, -1)
        query_TNU, query_TNP = query.split([spec.nope_head_dim, spec.rope_head_dim], dim=-1)
        query_TNR = torch.bmm(query_TNU.transpose(0, 1), self._k_up_NUR).transpose(0, 1)
        query = torch.cat((query_TNR, rope.rotate(query_TNP)), dim=-1)
        attended = paged_attention(query, cache, batch, whole_entries, spec.softmax_scale)
        latent_TNR = attended[..., : spec.kv_rank]
        output_TNV = torch.bmm(latent_TNR.transpose(0, 1), self._v_up_NRV).transpose(0, 1)
        return F.linear(output_TNV.flatten(1), self._o, self._o_bias)

    def _queries(self, x_TH: Tensor) -> Tensor:
        if self._q is not None:
            return F.linear(x_TH, self._q)
        assert self._q_down is not None and self._q_norm is not None and self._q_up is not None
        down = F.linear(x_TH, self._q_down, self._q_down_bias)
        return F.linear(rms_norm(down, self._q_norm, self._spec.norm_eps), self._q_up)


def whole_entries(entries: Tensor) -> tuple[Tensor, Tensor]:
    """[requests, L, R + P] -> the one key head and the one value head, [requests, L, 1, R + P] each.

    A value is the latent part alone, but attending to whole entries, P columns of the result unused, is far cheaper than
    to values of another width than the keys (see Split in paged_attention.py).
    """
    heads = entries[:, :, None]
    return heads, heads
