"""The CPU's kernels behind the interface of operations.py: packed weights, float32 activations, one pass over each row.

Weights are stored in float32, bfloat16 or int8, and everything is computed in float32, so that a narrower model is as
exact as its weights. What the kernels do not know (grouped routing) falls to the torch operations they are compared with.
Shapes: as in operations.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.kernels import attention, rows
from afd_server.kernels.experts import PackedExperts, run_experts
from afd_server.kernels.matmul import Format, PackedMatrix, linear, packed_rows
from afd_server.models.attention_layer import AttentionLayer, AttentionSide, StepByStep
from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import Embedding, Experts, GatedMLP, Linear, TorchOperations
from afd_server.models.rope import RopeTable
from afd_server.models.spec import MoESpec

FORMATS: dict[torch.dtype, Format] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class PackedLinear:
    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], format: Format) -> None:
        self.weight = PackedMatrix.pack([torch.cat(list(weights))], format)
        self.bias = torch.cat(list(biases)).to(torch.float32) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def rows(self, ids_T: Tensor) -> Tensor:
        return packed_rows(ids_T, self.weight)

    def tensors(self) -> list[Tensor]:
        return [self.weight.memory] if self.bias is None else [self.weight.memory, self.bias]


class PackedMLP:
    """An expert that every row has chosen."""

    def __init__(self, weights: Mapping[str, Tensor], format: Format) -> None:
        gate_up = torch.cat([weights["gate"], weights["up"]])
        self.experts = PackedExperts.pack([gate_up], [weights["down"]], format)

    def forward(self, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
        ids_T1, weights_T1 = _everyone(len(x_TH))
        return run_experts(x_TH, self.experts, ids_T1, weights_T1, first_expert=0, num_experts=1, out=out)

    def tensors(self) -> list[Tensor]:
        return [self.experts.gate_up.memory, self.experts.down.memory]


class BiasedMLP:
    """The expert kernel knows no biases: two products, and what lies between them by torch."""

    def __init__(self, weights: Mapping[str, Tensor], format: Format) -> None:
        biases = [weights[name] for name in ("gate_bias", "up_bias") if name in weights]
        down_bias = [weights["down_bias"]] if "down_bias" in weights else []
        self._gate_up = PackedLinear([weights["gate"], weights["up"]], biases, format)
        self._down = PackedLinear([weights["down"]], down_bias, format)

    def forward(self, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
        gate, up = self._gate_up.forward(x_TH).chunk(2, dim=-1)
        y_TH = self._down.forward(F.silu(gate) * up)
        return y_TH if out is None else out.copy_(y_TH)

    def tensors(self) -> list[Tensor]:
        return self._gate_up.tensors() + self._down.tensors()


class KernelExperts:
    def __init__(self, gate_up: Tensor, down: Tensor, first_expert: int, format: Format) -> None:
        self.experts = PackedExperts.pack(list(gate_up), list(down), format)
        self.first_expert, self.num_experts = first_expert, len(down)

    def forward(
        self, x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return run_experts(
            x_TH, self.experts, topk_ids, topk_weights,
            first_expert=self.first_expert, num_experts=self.num_experts, out=out,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [self.experts.gate_up.memory, self.experts.down.memory]


class CPUOperations:
    """dtype: how weights are stored where they are not quantised. quantization: "int8", or None.

    The LM head, the embedding and the routers are never quantised.
    """

    activation_dtype = torch.float32
    capturable = False

    def __init__(self, dtype: torch.dtype, quantization: str | None = None) -> None:
        assert quantization in (None, "int8")
        self._exact: Format = FORMATS[dtype]
        self._format: Format = "int8" if quantization == "int8" else self._exact
        self._torch = TorchOperations(torch.float32)

    def linear(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, exact: bool = False
    ) -> Linear:
        if exact and any(weight.dtype is torch.float32 for weight in weights):
            return PackedLinear(weights, biases, "float32")
        return PackedLinear(weights, biases, self._exact if exact else self._format)

    def embedding(self, weight_VH: Tensor) -> Embedding:
        return PackedLinear([weight_VH], [], self._exact)

    def mlp(self, weights: Mapping[str, Tensor]) -> GatedMLP:
        kind = BiasedMLP if any("bias" in name for name in weights) else PackedMLP
        return kind(weights, self._format)

    def experts(self, gate_up: Tensor, down: Tensor, first_expert: int) -> Experts:
        return KernelExperts(gate_up, down, first_expert, self._format)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.add_rms_norm(x.contiguous(), None, weight, eps)

    def add_rms_norm(self, x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
        return rows.add_rms_norm(x_TH, delta_TH, weight_H, eps)

    def rotate_and_write(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
        rope: RopeTable, cache: Tensor, batch: AttentionBatch,
    ) -> Tensor:  # fmt: skip
        query_norm, key_norm = norms or (None, None)
        rows.rotate_and_write(
            query_TND, key_TGD, value_TGD, query_norm=query_norm, key_norm=key_norm, eps=eps, cos=rope.cos,
            sin=rope.sin, interleaved=rope.interleaved, cache=cache, slots=batch.slots,
        )  # fmt: skip
        return query_TND

    def attend(
        self, query_TNK: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, value_dim: int
    ) -> Tensor:
        return attention.paged_attention(
            query_TNK, cache, row_starts=batch.row_starts, lengths=batch.lengths, block_tables=batch.block_tables,
            scale=scale, value_dim=value_dim,
        )  # fmt: skip

    def route(self, spec: MoESpec, logits_TE: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        if spec.num_groups > 1:
            return self._torch.route(spec, logits_TE, correction)
        return rows.route(
            logits_TE, spec.top_k, softmax=spec.scoring == "softmax", renormalise=spec.renormalise,
            scaling=spec.scaling, correction=correction,
        )  # fmt: skip

    def attention_side(self, layer: AttentionLayer, eps: float) -> AttentionSide:
        from afd_server.models.attention_layer_cpu import kernel_layer

        return kernel_layer(layer, eps) or StepByStep(layer, self, eps)


@functools.lru_cache(maxsize=64)
def _everyone(num_rows: int) -> tuple[Tensor, Tensor]:
    """The choice of expert 0 with weight 1, for every row."""
    return torch.zeros(num_rows, 1, dtype=torch.int32), torch.ones(num_rows, 1)
