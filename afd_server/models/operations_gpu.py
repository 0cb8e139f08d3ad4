"""The GPU's Triton kernels behind the interface of operations.py, for decoding rows and for experts; the rest is torch's.

What lives here: which calls the kernels take. What does not: the kernels (kernels/gpu/). Shapes: as in operations.py.
"""

from __future__ import annotations

from torch import Tensor

from afd_server.kernels.gpu.attention import paged_decode_attention
from afd_server.kernels.gpu.choice import choose_experts
from afd_server.kernels.gpu.experts import grouped_expert_ffn
from afd_server.kernels.gpu.heads import rotate_and_write
from afd_server.kernels.gpu.rows import add_rms_norm
from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import Experts, TorchOperations
from afd_server.models.rope import RopeTable
from afd_server.models.spec import MoESpec


class GroupedExperts:
    def __init__(self, gate_up: Tensor, down: Tensor, first_expert: int) -> None:
        self._gate_up, self._down, self._first_expert = gate_up, down, first_expert

    def forward(
        self, x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return grouped_expert_ffn(
            x_TH, self._gate_up, self._down, topk_ids, topk_weights, first_expert=self._first_expert, out=out
        )

    def tensors(self) -> list[Tensor]:
        return [self._gate_up, self._down]


class GPUOperations(TorchOperations):
    """Weights and activations of one type. Prompt chunks, several rows of a request, are attended to by torch."""

    capturable = True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x, None, weight, eps) if x.dim() == 2 else super().rms_norm(x, weight, eps)

    def add_rms_norm(self, x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x_TH, delta_TH, weight_H, eps)

    def rotate_and_write(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
        rope: RopeTable, cache: Tensor, batch: AttentionBatch,
    ) -> Tensor:  # fmt: skip
        return rotate_and_write(
            query_TND, key_TGD, value_TGD, norms, eps, rope.cos, rope.sin, rope.interleaved, cache, batch.slots
        )

    def attend(
        self, query_TNK: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, value_dim: int
    ) -> Tensor:
        if len(batch.lengths) != len(query_TNK):
            return super().attend(query_TNK, cache, batch, scale, value_dim)
        return paged_decode_attention(
            query_TNK, cache, batch.block_tables, batch.lengths, scale, value_dim=value_dim
        )

    def route(self, spec: MoESpec, logits_TE: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        if spec.num_groups > 1:
            return super().route(spec, logits_TE, correction)
        return choose_experts(
            logits_TE, spec.top_k, sigmoid=spec.scoring != "softmax", correction=correction,
            renormalise=spec.renormalise, scaling=spec.scaling,
        )  # fmt: skip

    def experts(self, gate_up: Tensor, down: Tensor, first_expert: int) -> Experts:
        return GroupedExperts(gate_up, down, first_expert)
