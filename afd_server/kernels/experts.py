"""The gated MLPs of a mixture of experts on a CPU, all of a call in one kernel.

What lives here: the packed experts and the call. What does not: the choice of experts (rows.py) and which of them a shard
holds (models/). Reference: MoEFFN with plain torch operations (models/ffn_moe.py).

Shapes: T rows, H hidden, I intermediate, E experts held, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.kernels.library import library
from afd_server.kernels.matmul import FORMAT_CODES, Format, PackedMatrix


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """gate_up: E interleaved [2 I, H]; down: E [H, I], of the same format."""

    gate_up: PackedMatrix
    down: PackedMatrix

    @classmethod
    def pack(
        cls,
        gate_up: Sequence[Tensor],
        down: Sequence[Tensor],
        format: Format,
        instruction_set: str | None = None,
    ) -> PackedExperts:
        """gate_up: [2 I, H] of each expert, the gate's rows first; down: [H, I] of each."""
        return cls(
            PackedMatrix.pack(gate_up, format, instruction_set, interleaved=True),
            PackedMatrix.pack(down, format, instruction_set),
        )


def run_experts(
    x_TH: Tensor,
    experts: PackedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    first_expert: int,
    num_experts: int,
    out: Tensor | None = None,
    instruction_set: str | None = None,
) -> Tensor:
    """[T, H] float32: the weighted sum over each row's experts; those outside first_expert to first_expert + num_experts - 1
    are passed over. x, out: float32, contiguous. topk_ids [T, K] int32, topk_weights [T, K] float32, contiguous.
    """
    rows, hidden = x_TH.shape
    y_TH = torch.empty(rows, hidden) if out is None else out
    assert x_TH.dtype is y_TH.dtype is topk_weights.dtype is torch.float32 and topk_ids.dtype is torch.int32
    assert (
        x_TH.is_contiguous()
        and y_TH.is_contiguous()
        and topk_ids.is_contiguous()
        and topk_weights.is_contiguous()
    )
    if rows:
        library(instruction_set).afd_experts(
            FORMAT_CODES[experts.down.format], x_TH.data_ptr(), rows, hidden, experts.down.k,
            experts.gate_up.memory.data_ptr(), experts.down.memory.data_ptr(), topk_ids.data_ptr(),
            topk_weights.data_ptr(), topk_ids.shape[1], first_expert, num_experts, y_TH.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return y_TH
