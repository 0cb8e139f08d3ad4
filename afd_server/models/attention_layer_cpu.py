"""A layer of grouped-query attention as one kernel call on a CPU.

What lives here: from a layer's weights to the kernel's arguments. What does not: the kernel (kernels/layer.py), and the same
steps one by one (attention_layer.py), which layers of other kinds take.
"""

from __future__ import annotations

from torch import Tensor

from afd_server.kernels.layer import AttentionKernel, AttentionNumbers, Routing
from afd_server.models.attention_gqa import GQAttention
from afd_server.models.attention_layer import AttentionLayer
from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import Linear
from afd_server.models.operations_cpu import PackedLinear
from afd_server.models.rope import RopeTable
from afd_server.models.router import ExpertRouter


class KernelLayer:
    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel = kernel

    def forward(
        self, x_TH: Tensor, answer_TH: Tensor | None, batch: AttentionBatch, rope: RopeTable, cache: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.kernel(
            x_TH, answer_TH, cos=rope.cos, sin=rope.sin, interleaved=rope.interleaved, slots=batch.slots,
            row_starts=batch.row_starts, lengths=batch.lengths, block_tables=batch.block_tables, cache=cache,
        )  # fmt: skip


def kernel_layer(layer: AttentionLayer, eps: float) -> KernelLayer | None:
    """None for what the kernel does not know: other attention than grouped-query, experts in groups."""
    attention, router = layer.attention, layer.router
    if not isinstance(attention, GQAttention) or (router is not None and router.spec.num_groups > 1):
        return None
    spec = attention.spec
    numbers = AttentionNumbers(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, scale=spec.head_dim**-0.5, eps=eps
    )
    return KernelLayer(AttentionKernel(
        numbers, _packed(attention.qkv), _packed(attention.output), (layer.attention_norm, layer.ffn_norm),
        attention.norms, None if router is None else _routing(router),
    ))  # fmt: skip


def _routing(router: ExpertRouter) -> Routing:
    spec = router.spec
    weight, bias = _packed(router.gate)
    return Routing(
        weight, bias, spec.top_k, spec.scoring == "softmax", spec.renormalise, spec.scaling, router.correction
    )


def _packed(linear: Linear) -> tuple:
    assert isinstance(linear, PackedLinear)
    return linear.weight, linear.bias
