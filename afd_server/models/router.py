"""The router of a MoE layer: which experts each token gets, and with what weight.

Either side may run it: the attention half, so that a call names its experts, or every FFN shard for itself (see
FFNHalf.routed). What does not live here: the experts (ffn_moe.py). Shapes: T rows, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.spec import MoESpec


class ExpertRouter:
    """weight: [E, H]. correction: [E] float32, where the spec has a correction bias."""

    def __init__(self, spec: MoESpec, weight: Tensor, correction: Tensor | None) -> None:
        assert (correction is not None) == spec.correction_bias
        self._spec = spec
        self._weight = weight.to(torch.float32) if spec.float32_router else weight
        self._correction = correction

    def tensors(self) -> list[Tensor]:
        return [self._weight] if self._correction is None else [self._weight, self._correction]

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [T, K] int32 and their weights [T, K] float32, for normed x."""
        spec = self._spec
        logits_TE = F.linear(x_TH.to(self._weight.dtype), self._weight).to(torch.float32)
        scores_TE = logits_TE.softmax(dim=-1) if spec.scoring == "softmax" else logits_TE.sigmoid()
        ids_TK = self._choice_scores(scores_TE).topk(spec.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if spec.renormalise:
            # Sigmoid scores can all be 0 in float32; softmax's best one never is.
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return ids_TK.to(torch.int32), weights_TK * spec.scaling

    def _choice_scores(self, scores_TE: Tensor) -> Tensor:
        """What experts are ranked by (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): corrected scores, and minus
        infinity outside the best groups, a group being as good as the sum of its two best experts."""
        spec = self._spec
        if self._correction is not None:
            scores_TE = scores_TE + self._correction
        if spec.num_groups == 1:
            return scores_TE
        grouped = scores_TE.unflatten(1, (spec.num_groups, -1))
        best_groups = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(spec.top_groups, dim=-1).indices
        chosen = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores_TE.device)
        chosen.scatter_(1, best_groups, True)
        return grouped.masked_fill(~chosen[..., None], -torch.inf).flatten(1)
