"""What each shard is sent of a call, and one answer of what they gave: the only place where shards meet.

What lives here: rows and sums. What does not: which worker of a shard is asked, and links (ffn_group.py, the only caller).
Shapes: T rows of the micro-batch, H hidden size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.config import SPARSE_DISPATCH_FROM
from afd_server.models.ffn_call import FFNCall
from afd_server.models.halves import bounds
from afd_server.transport.base import Answer, CallTag


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """How the FFN workers of a replica divide the model. Worker index = (replica * ep + expert shard) * tp + tensor shard."""

    ep: int
    tp: int
    num_experts: int  # 0 for a model without routed experts

    @property
    def shards(self) -> int:
        return self.ep * self.tp


@dataclass(slots=True)
class Part:
    """One shard's share of a call. rows_T is None when the shard is sent every row."""

    call: FFNCall
    rows_T: Tensor | None


def divide(call: FFNCall, layout: GroupLayout) -> dict[int, Part]:
    """The parts, by shard. A shard that owns none of the call's experts has none."""
    ep, tp = layout.ep, layout.tp
    if call.topk_ids is None or ep < SPARSE_DISPATCH_FROM:
        return dict.fromkeys(range(ep * tp), Part(call, None))
    parts = {}
    for rank in range(ep):
        first, last = bounds(layout.num_experts, rank, ep)
        rows_T = ((call.topk_ids >= first) & (call.topk_ids < last)).any(dim=1).nonzero()[:, 0]
        if len(rows_T) == 0:
            continue
        assert call.topk_weights is not None
        mine = FFNCall(call.layer, call.x[rows_T], call.topk_ids[rows_T], call.topk_weights[rows_T])
        for shard in range(rank * tp, (rank + 1) * tp):
            parts[shard] = Part(mine, rows_T)
    return parts


def in_turn(parts: Mapping[int, Part], tag: CallTag) -> list[int]:
    """The shards in the order in which their answers are waited for, another one first in each layer: who is first has the way of all
    in his time, and that would tell against him."""
    shards = list(parts)
    first = (tag.step + tag.layer) % max(1, len(shards))
    return shards[first:] + shards[:first]


def summed(
    call: FFNCall, parts: Mapping[int, Part], answers: Mapping[int, Answer], dtype: torch.dtype
) -> Tensor:
    """The sum of the shards' partial results, [T, H] in `dtype`; in the order of the parts, whoever answered first."""
    device = call.x.device
    if len(answers) == 1:
        ((shard, answer),) = answers.items()
        if parts[shard].rows_T is None:
            return answer.y.to(device=device, dtype=dtype)
    total_TH = torch.zeros(call.x.shape, dtype=torch.float32, device=device)
    for shard, part in parts.items():
        partial = answers[shard].y.to(device=device, dtype=torch.float32)
        rows_T = part.rows_T
        if rows_T is None:
            total_TH += partial
        else:
            total_TH.index_add_(0, rows_T, partial)
    return total_TH.to(dtype)
