"""Routed experts and the shared expert, whole or one shard of them.

What lives here: which rows a shard computes. What does not: the arithmetic (operations.py), the choice of experts (router.py),
and which part of the weights a shard holds (checkpoint.py). A shard's result is a partial sum: those of all shards add up to
the layer's. Shapes: T rows, H hidden, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd_server.models.graphs import MAX_ROWS
from afd_server.models.operations import Experts, GatedMLP
from afd_server.models.router import ExpertRouter


class MoEFFN:
    """experts: those with ids in `held`. shared: the shared expert, which every expert shard holds.

    router: None where calls name their experts. capturable: a graph may hold what is done for few rows (graphs.py).
    """

    def __init__(
        self,
        experts: Experts,
        held: range,
        *,
        shared: GatedMLP | None,
        router: ExpertRouter | None,
        capturable: bool = False,
    ) -> None:
        self.experts = experts
        self.held = held
        self.shared = shared
        self.router = router
        self._capturable = capturable

    def tensors(self) -> list[Tensor]:
        parts = (self.experts, self.shared, self.router)
        return [tensor for part in parts if part is not None for tensor in part.tensors()]

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights, [T, K] each, by the shard's own router."""
        assert self.router is not None, "calls must name their experts: the router is not on this side"
        return self.router.forward(x_TH)

    def forward(
        self, x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """[T, H] float32. topk_ids [T, K] int32, topk_weights [T, K] float32; out, float32, is where it is written.

        The ids of other shards' experts are passed over, so rows may come that this shard does nothing for.
        """
        y_TH = self.experts.forward(x_TH, topk_ids, topk_weights, out)
        if self.shared is not None:
            self._add_shared(y_TH, x_TH, topk_ids, self.shared)
        return y_TH

    def _add_shared(self, y_TH: Tensor, x_TH: Tensor, topk_ids: Tensor, shared: GatedMLP) -> None:
        """A row's shared expert is computed where its first expert is: by one shard, which is sent the row anyway."""
        first_T = topk_ids[:, 0]
        own_T = (first_T >= self.held.start) & (first_T < self.held.stop)
        if self._capturable and len(x_TH) <= MAX_ROWS:
            # For every row: which ones need it the device alone knows. While they are few, what takes time is to read the
            # weights, and a shard that holds all experts has no other rows.
            y_TH += shared.forward(x_TH) * own_T[:, None]
            return
        rows = own_T.nonzero()[:, 0]
        if len(rows) == len(x_TH):
            y_TH += shared.forward(x_TH)
        elif len(rows):
            y_TH.index_add_(0, rows, shared.forward(x_TH[rows]).to(torch.float32))
