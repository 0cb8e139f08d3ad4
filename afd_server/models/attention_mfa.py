"""Multi-matrix factorization attention (Step-3, arXiv 2507.19427; arXiv 2412.19255) over the paged cache.

Queries come from a normed low-rank vector; one key head and one value head serve them all, so that the cache is that of
grouped-query attention with one group. Shapes: T rows, H hidden, N query heads, C rank of the queries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import Operations
from afd_server.models.rope import RopeTable
from afd_server.models.spec import MFASpec


class FactorizedAttention:
    """One layer's attention. weights: slot -> tensor, as tensors.py lists them; q_down, k and v become one matrix."""

    def __init__(
        self, spec: MFASpec, weights: Mapping[str, Tensor], rms_norm_eps: float, operations: Operations
    ) -> None:
        self._spec = spec
        self._eps = rms_norm_eps
        self._operations = operations
        self._down = operations.linear([weights["q_down"], weights["k"], weights["v"]])
        self._q_norm = weights["q_norm"]
        self._q_up, self._o = operations.linear([weights["q_up"]]), operations.linear([weights["o"]])

    def tensors(self) -> list[Tensor]:
        return [*self._down.tensors(), self._q_norm, *self._q_up.tensors(), *self._o.tensors()]

    def forward(self, x_TH: Tensor, batch: AttentionBatch, rope: RopeTable, cache: Tensor) -> Tensor:
        """[T, H] for normed x. Writes the rows' keys and values into cache, [blocks, block_size, 2, 1, D]."""
        spec, operations = self._spec, self._operations
        query_TC, key_TD, value_TD = self._down.forward(x_TH).split(
            [spec.query_rank, spec.head_dim, spec.head_dim], dim=-1
        )
        query = self._q_up.forward(operations.rms_norm(query_TC, self._q_norm, self._eps))
        query_TND = operations.rotate_and_write(
            query.view(len(x_TH), spec.num_heads, spec.head_dim), key_TD[:, None], value_TD[:, None],
            None, self._eps, rope, cache, batch,
        )  # fmt: skip
        output = operations.attend(query_TND, cache, batch, spec.head_dim**-0.5, spec.head_dim)
        return self._o.forward(output.flatten(1))
