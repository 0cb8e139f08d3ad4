# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""The kernel of choice.py, one program a row, which calls it through launch_choose_experts."""

from __future__ import annotations

import triton
import triton.language as tl


def launch_choose_experts(logits_TE, correction, sigmoid, renormalise, scaling, ids_TK, weights_TK):
    (rows, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    _choose_experts[(rows,)](
        logits_TE, logits_TE if correction is None else correction, ids_TK, weights_TK, scaling, logits_TE.stride(0),
        EXPERTS=num_experts, EXPERTS_POWER=triton.next_power_of_2(num_experts),
        TOP_K=top_k, TOP_K_POWER=triton.next_power_of_2(top_k),
        SIGMOID=sigmoid, CORRECTED=correction is not None, RENORMALISE=renormalise, num_warps=1,
    )  # fmt: skip


@triton.jit
def _choose_experts(
    logits, correction, ids, weights, scaling, row_stride,
    EXPERTS: tl.constexpr, EXPERTS_POWER: tl.constexpr, TOP_K: tl.constexpr, TOP_K_POWER: tl.constexpr,
    SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_POWER)
    held = expert < EXPERTS
    scores = tl.load(logits + row * row_stride + expert, mask=held, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-scores))
    else:
        scores = tl.exp(scores - tl.max(scores, 0))
        scores = scores / tl.sum(scores, 0)
    ranking = scores
    if CORRECTED:
        ranking += tl.load(correction + expert, mask=held, other=0.0)
    ranking = tl.where(held, ranking, float("-inf"))
    rank = tl.arange(0, TOP_K_POWER)
    chosen_ids, chosen = tl.full([TOP_K_POWER], 0, tl.int32), tl.full([TOP_K_POWER], 0.0, tl.float32)
    for place in range(TOP_K):
        # Of a row of NaN something is chosen too, but no expert that does not exist.
        best = tl.minimum(tl.argmax(ranking, 0), EXPERTS - 1)
        chosen_ids = tl.where(rank == place, best, chosen_ids)
        chosen = tl.where(rank == place, tl.sum(tl.where(expert == best, scores, 0.0), 0), chosen)
        ranking = tl.where(expert == best, float("-inf"), ranking)
    if RENORMALISE:  # sigmoids can all be 0 in float32
        chosen = chosen / tl.maximum(tl.sum(chosen, 0), 1e-20)
    tl.store(ids + row * TOP_K + rank, chosen_ids, mask=rank < TOP_K)
    tl.store(weights + row * TOP_K + rank, chosen * scaling, mask=rank < TOP_K)
