"""Routed experts and the shared expert, whole or one shard of them.

What lives here: the arithmetic of a shard. What does not: the choice of experts (router.py), which part of the weights
a shard holds (checkpoint.py). A shard's result is a partial sum: those of all shards add up to the layer's.
Shapes: T rows, H hidden, I intermediate (of the shard's slice), E experts held, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.ffn_dense import DenseFFN
from afd_server.models.router import ExpertRouter


class MoEFFN:
    """Experts first_expert to first_expert + E - 1. gate_up: [E, 2 I, H], down: [E, H, I].

    shared: the shared expert, which every expert shard holds. router: None where calls name their experts.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        *,
        first_expert: int,
        shared: DenseFFN | None,
        router: ExpertRouter | None,
    ) -> None:
        self._gate_up = gate_up
        self._down = down
        self._first_expert = first_expert
        self._shared = shared
        self._router = router

    def tensors(self) -> list[Tensor]:
        held = [self._gate_up, self._down]
        for part in (self._shared, self._router):
            held += part.tensors() if part is not None else []
        return held

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights, [T, K] each, by the shard's own router."""
        assert self._router is not None, "calls must name their experts: the router is not on this side"
        return self._router.forward(x_TH)

    def forward(self, x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] float32. topk_ids, topk_weights: [T, K].

        The ids of other shards' experts are passed over, so rows may come that this shard does nothing for.
        """
        local_TK = topk_ids.to(device=x_TH.device, dtype=torch.int64) - self._first_expert
        weights_TK = topk_weights.to(device=x_TH.device, dtype=torch.float32)
        y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        self._add_experts(y_TH, x_TH, local_TK, weights_TK)
        if self._shared is not None:
            self._add_shared(y_TH, x_TH, local_TK, self._shared)
        return y_TH

    def _add_experts(self, y_TH: Tensor, x_TH: Tensor, local_TK: Tensor, weights_TK: Tensor) -> None:
        """Expert by expert, over the rows that chose it; experts without rows are never touched."""
        num_experts, top_k = len(self._gate_up), local_TK.shape[1]
        flat = local_TK.flatten()
        flat = torch.where(
            (flat >= 0) & (flat < num_experts), flat, num_experts
        )  # others' experts: last of all
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=num_experts + 1)[:num_experts].tolist()
        flat_weights = weights_TK.flatten()
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            chosen = order[start : start + count]
            start += count
            rows = chosen // top_k
            gate, up = F.linear(x_TH[rows], self._gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self._down[expert])
            y_TH.index_add_(0, rows, y.to(torch.float32) * flat_weights[chosen, None])

    def _add_shared(self, y_TH: Tensor, x_TH: Tensor, local_TK: Tensor, shared: DenseFFN) -> None:
        """A row's shared expert is computed where its first expert is: by one shard, which is sent the row anyway."""
        owned_T = (local_TK[:, 0] >= 0) & (local_TK[:, 0] < len(self._gate_up))
        rows = owned_T.nonzero()[:, 0]
        if len(rows) == len(x_TH):
            y_TH += shared.forward(x_TH)
        elif len(rows):
            y_TH.index_add_(0, rows, shared.forward(x_TH[rows]).to(torch.float32))
