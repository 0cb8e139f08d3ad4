"""The choice of each row's experts on a GPU, in one launch: scores, the best K of them, their weights.

What does not live here: the kernel (choice_triton.py), the router's product, and choices within groups of experts
(models/operations.py). Shapes: T rows, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_experts(
    logits_TE: Tensor,
    top_k: int,
    *,
    sigmoid: bool,
    correction: Tensor | None,
    renormalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Ids [T, K] int32, best first, and weights [T, K] float32.

    Scores are the logits' softmax, or sigmoids; experts are ranked by score plus correction [E] float32, of equal ones the
    first is taken. A weight is the score, with renormalise a row's sum to 1, times scaling.
    """
    from afd_server.kernels.gpu import choice_triton

    rows, num_experts = logits_TE.shape
    assert 0 < top_k <= num_experts and logits_TE.stride(1) == 1
    assert correction is None or (correction.dtype is torch.float32 and correction.is_contiguous())
    ids_TK = torch.empty(rows, top_k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(rows, top_k, dtype=torch.float32, device=logits_TE.device)
    if rows:
        choice_triton.launch_choose_experts(
            logits_TE, correction, sigmoid, renormalise, scaling, ids_TK, weights_TK
        )
    return ids_TK, weights_TK
