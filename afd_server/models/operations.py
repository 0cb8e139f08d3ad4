"""What the halves of a model compute with, in plain torch: the reference for every fast path, and what a GPU runs.

What lives here: the interface (Operations and what it makes of weights) and its implementation by torch's own operations.
What does not: the CPU's kernels behind the same interface (operations_cpu.py), and what a model is made of (attention_*.py,
ffn_*.py). Which one a worker uses is decided where it loads (checkpoint.py).

Shapes: T rows, H hidden, I intermediate, V vocabulary, E experts held, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.attention_layer import AttentionLayer, AttentionSide, StepByStep
from afd_server.models.batch import AttentionBatch
from afd_server.models.norm import rms_norm
from afd_server.models.paged_attention import paged_attention, write_entries
from afd_server.models.rope import RopeTable
from afd_server.models.spec import MoESpec


class Linear(Protocol):
    """x W^T + bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, out] for x [T, in], whose rows are contiguous."""

    def tensors(self) -> list[Tensor]:
        """Everything held."""


class Embedding(Linear, Protocol):
    """A matrix [V, H] that is looked up by rows; as a Linear it is the LM head of a model that ties the two."""

    def rows(self, ids_T: Tensor) -> Tensor:
        """[T, H]."""


class GatedMLP(Protocol):
    """down(silu(gate x) * up x)."""

    def forward(self, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, H]; out, of the activations' type and on their device, is where it is written."""

    def tensors(self) -> list[Tensor]: ...


class Experts(Protocol):
    """Gated MLPs first_expert to first_expert + E - 1, of which every row has its own choice."""

    def forward(
        self, x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """[T, H]: the weighted sum over a row's experts [T, K]; those that are not held are passed over. out as above."""

    def tensors(self) -> list[Tensor]: ...


class Operations(Protocol):
    """One way to compute. activation_dtype: of x wherever it is handed on.

    capturable: what is launched for a batch in decoding, and for experts, depends on shapes alone, and the device is not
    waited for: a CUDA graph can hold it (graphs.py).
    """

    activation_dtype: torch.dtype
    capturable: bool

    def linear(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, exact: bool = False
    ) -> Linear:
        """Of the weights one above the other. exact: not to be quantised."""

    def embedding(self, weight_VH: Tensor) -> Embedding: ...

    def mlp(self, weights: Mapping[str, Tensor]) -> GatedMLP:
        """weights: gate, up [I, H], down [H, I], and maybe gate_bias, up_bias, down_bias."""

    def experts(self, gate_up: Tensor, down: Tensor, first_expert: int) -> Experts:
        """gate_up: [E, 2 I, H], down: [E, H, I]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See norm.py."""

    def add_rms_norm(self, x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
        """Adds delta to x in place and norms the sum."""

    def rotate_and_write(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
        rope: RopeTable, cache: Tensor, batch: AttentionBatch,
    ) -> Tensor:  # fmt: skip
        """The rotated queries; the rotated keys and the values are written into cache [blocks, block_size, 2, G, D].

        norms: of queries and keys, [D] each, before the rotation. The arguments may be overwritten.
        """

    def attend(
        self, query_TNK: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, value_dim: int
    ) -> Tensor:
        """[T, N, value_dim]; see paged_attention.py."""

    def route(self, spec: MoESpec, logits_TE: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ExpertRouter.forward."""

    def attention_side(self, layer: AttentionLayer, eps: float) -> AttentionSide:
        """The whole course of a layer on the attention side."""


class TorchLinear:
    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        self._weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self._bias = torch.cat(list(biases)) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def forward_into(self, x: Tensor, out: Tensor) -> Tensor:
        """The same, written to out by the product itself."""
        if self._bias is None:
            return torch.mm(x, self._weight.T, out=out)
        return torch.addmm(self._bias, x, self._weight.T, out=out)

    def rows(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self._weight)

    def tensors(self) -> list[Tensor]:
        return [self._weight] if self._bias is None else [self._weight, self._bias]


class TorchMLP:
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        biases = [weights[name] for name in ("gate_bias", "up_bias") if name in weights]
        self._gate_up = TorchLinear([weights["gate"], weights["up"]], biases)
        self._down = TorchLinear([weights["down"]], [weights["down_bias"]] if "down_bias" in weights else [])

    def forward(self, x_TH: Tensor, out: Tensor | None = None) -> Tensor:
        gate, up = self._gate_up.forward(x_TH).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        return self._down.forward(inner) if out is None else self._down.forward_into(inner, out)

    def tensors(self) -> list[Tensor]:
        return self._gate_up.tensors() + self._down.tensors()


class TorchExperts:
    """Expert by expert, over the rows that chose it; experts without rows are never touched."""

    def __init__(self, gate_up: Tensor, down: Tensor, first_expert: int) -> None:
        self._gate_up, self._down, self._first_expert = gate_up, down, first_expert

    def forward(
        self, x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        num_experts, top_k = len(self._gate_up), topk_ids.shape[1]
        local = topk_ids.to(torch.int64).flatten() - self._first_expert
        local = torch.where((local >= 0) & (local < num_experts), local, num_experts)  # others': last of all
        order = local.argsort(stable=True)
        counts = local.bincount(minlength=num_experts + 1)[:num_experts].tolist()
        weights = topk_weights.flatten().to(torch.float32)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            chosen = order[start : start + count]
            start += count
            rows = chosen // top_k
            gate, up = F.linear(x_TH[rows], self._gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self._down[expert])
            y_TH.index_add_(0, rows, y.to(torch.float32) * weights[chosen, None])
        return y_TH if out is None else out.copy_(y_TH)

    def tensors(self) -> list[Tensor]:
        return [self._gate_up, self._down]


class TorchOperations:
    """Weights and activations of one type, as they are loaded."""

    capturable = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.activation_dtype = dtype

    def linear(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, exact: bool = False
    ) -> Linear:
        return TorchLinear(weights, biases)

    def embedding(self, weight_VH: Tensor) -> Embedding:
        return TorchLinear([weight_VH])

    def mlp(self, weights: Mapping[str, Tensor]) -> GatedMLP:
        return TorchMLP(weights)

    def experts(self, gate_up: Tensor, down: Tensor, first_expert: int) -> Experts:
        return TorchExperts(gate_up, down, first_expert)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
        if delta_TH is not None:
            x_TH += delta_TH
        return rms_norm(x_TH, weight_H, eps)

    def rotate_and_write(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
        rope: RopeTable, cache: Tensor, batch: AttentionBatch,
    ) -> Tensor:  # fmt: skip
        if norms is not None:
            query_TND, key_TGD = rms_norm(query_TND, norms[0], eps), rms_norm(key_TGD, norms[1], eps)
        write_entries(cache, batch, torch.stack((rope.rotate(key_TGD), value_TGD), dim=1))
        return rope.rotate(query_TND)

    def attend(
        self, query_TNK: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, value_dim: int
    ) -> Tensor:
        return paged_attention(query_TNK, cache, batch, scale)[..., :value_dim]

    def route(self, spec: MoESpec, logits_TE: Tensor, correction: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_TE = logits_TE.to(torch.float32)
        scores_TE = logits_TE.softmax(dim=-1) if spec.scoring == "softmax" else logits_TE.sigmoid()
        ids_TK = _choice_scores(spec, scores_TE, correction).topk(spec.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if spec.renormalise:
            # Sigmoid scores can all be 0 in float32; softmax's best one never is.
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return ids_TK.to(torch.int32), weights_TK * spec.scaling

    def attention_side(self, layer: AttentionLayer, eps: float) -> AttentionSide:
        return StepByStep(layer, self, eps)


def _choice_scores(spec: MoESpec, scores_TE: Tensor, correction: Tensor | None) -> Tensor:
    """What experts are ranked by (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): corrected scores, and minus
    infinity outside the best groups, a group being as good as the sum of its two best experts."""
    if correction is not None:
        scores_TE = scores_TE + correction
    if spec.num_groups == 1:
        return scores_TE
    grouped = scores_TE.unflatten(1, (spec.num_groups, -1))
    best_groups = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(spec.top_groups, dim=-1).indices
    chosen = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores_TE.device)
    chosen.scatter_(1, best_groups, True)
    return grouped.masked_fill(~chosen[..., None], -torch.inf).flatten(1)
