"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a paged cache of latents.

What lives here: the absorbed form. A head's key is (K_up latent, rotated part), so its score is the product of
(K_up^T query, rotated query) with the cache entry itself, and its output V_up (the attended latent): one key head of
rank + rope dimensions serves all query heads, and the latent is never expanded.
Shapes: T rows, H hidden, N heads, R latent rank, P rotated dimensions, U unrotated dimensions, V value dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import Linear, Operations
from afd_server.models.paged_attention import write_entries
from afd_server.models.rope import RopeTable
from afd_server.models.spec import MLASpec


class LatentAttention:
    """One layer's attention. weights: slot -> tensor, as tensors.py lists them."""

    def __init__(self, spec: MLASpec, weights: Mapping[str, Tensor], operations: Operations) -> None:
        self._spec = spec
        self._operations = operations

        def linear(name: str) -> Linear | None:
            bias = [weights[f"{name}_bias"]] if f"{name}_bias" in weights else []
            return operations.linear([weights[name]], bias) if name in weights else None

        self._q, self._q_down, self._q_up = linear("q"), linear("q_down"), linear("q_up")
        self._kv_down, self._o = linear("kv_down"), linear("o")
        self._q_norm, self._kv_norm = weights.get("q_norm"), weights["kv_norm"]
        up_NDR = weights["kv_up"].view(spec.num_heads, -1, spec.kv_rank).to(operations.activation_dtype)
        self._k_up_NUR = up_NDR[:, : spec.nope_head_dim].contiguous()
        self._v_up_NRV = up_NDR[:, spec.nope_head_dim :].transpose(1, 2).contiguous()

    def tensors(self) -> list[Tensor]:
        linears = [self._q, self._q_down, self._q_up, self._kv_down, self._o]
        held = [tensor for linear in linears if linear is not None for tensor in linear.tensors()]
        norms = [norm for norm in (self._q_norm, self._kv_norm) if norm is not None]
        return [*held, *norms, self._k_up_NUR, self._v_up_NRV]

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x. Writes the rows' latents into cache, [blocks, block_size, R + P]."""
        spec, operations = self._spec, self._operations
        assert self._kv_down is not None and self._o is not None
        down = self._kv_down.forward(x_TH)
        latent_TR, key_TP = down.split([spec.kv_rank, spec.rope_head_dim], dim=-1)
        latent_TR = operations.rms_norm(latent_TR, self._kv_norm, spec.norm_eps)
        write_entries(cache, batch, torch.cat((latent_TR, rope.rotate(key_TP[:, None])[:, 0]), dim=-1))

        query = self._queries(x_TH).view(len(x_TH), spec.num_heads, -1)
        query_TNU, query_TNP = query.split([spec.nope_head_dim, spec.rope_head_dim], dim=-1)
        query_TNR = torch.bmm(query_TNU.transpose(0, 1), self._k_up_NUR).transpose(0, 1)
        query = torch.cat((query_TNR, rope.rotate(query_TNP)), dim=-1)
        latent_TNR = operations.attend(query, cache, batch, spec.softmax_scale, spec.kv_rank)
        output_TNV = torch.bmm(latent_TNR.transpose(0, 1), self._v_up_NRV).transpose(0, 1)
        return self._o.forward(output_TNV.flatten(1))

    def _queries(self, x_TH: Tensor) -> Tensor:
        if self._q is not None:
            return self._q.forward(x_TH)
        assert self._q_down is not None and self._q_norm is not None and self._q_up is not None
        down = self._q_down.forward(x_TH)
        return self._q_up.forward(self._operations.rms_norm(down, self._q_norm, self._spec.norm_eps))
