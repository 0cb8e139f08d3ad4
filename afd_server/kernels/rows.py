"""What a CPU does row by row between the products of a layer, each in one pass over the row.

Reference: models/norm.py, models/rope.py with paged_attention.write_entries, and the torch code of models/router.py.
All activations are float32. Shapes: T rows, H hidden, N query heads, G key and value heads, D head dimension, E experts, K
experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd_server.kernels.library import library


def add_rms_norm(
    x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, instruction_set: str | None = None
) -> Tensor:
    """Adds delta to x in place, and gives weight * x / rms(x), [T, H]."""
    assert x_TH.is_contiguous() and (delta_TH is None or delta_TH.is_contiguous())
    normed_TH = torch.empty_like(x_TH)
    library(instruction_set).afd_add_rms_norm(
        x_TH.data_ptr(), None if delta_TH is None else delta_TH.data_ptr(), weight_H.data_ptr(), eps,
        normed_TH.data_ptr(), x_TH.shape[0], x_TH.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return normed_TH


def rotate_and_write(
    query_TND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    *,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    slots: Tensor,
    instruction_set: str | None = None,
) -> None:
    """Norms (where there are norms, [D]) and rotates the queries in place; keys likewise, and writes keys and values.

    The heads of a row lie side by side; keys and values may be parts of one wider row, and keys are overwritten. cos, sin:
    [T, D / 2]. cache: [blocks, block_size, 2, G, D], float32 or bfloat16; slots: [T] int64, block * block_size + offset.
    """
    rows, num_heads, dim = query_TND.shape
    assert key_TGD.stride(0) == value_TGD.stride(0) and cos.is_contiguous() and sin.is_contiguous()
    assert all(heads.stride()[1:] == (dim, 1) for heads in (query_TND, key_TGD, value_TGD)) and dim <= 1024
    library(instruction_set).afd_rotate_and_write(
        query_TND.data_ptr(), query_TND.stride(0), num_heads, _pointer(query_norm), key_TGD.data_ptr(),
        value_TGD.data_ptr(), key_TGD.stride(0), key_TGD.shape[1], _pointer(key_norm), rows, dim, cos.data_ptr(),
        sin.data_ptr(), interleaved, eps, cache.data_ptr(), cache.dtype is torch.bfloat16, slots.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    softmax: bool,
    renormalise: bool,
    scaling: float,
    correction: Tensor | None,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids [T, K] int32 and weights [T, K] float32 of each row's experts; scores are softmaxes, or else sigmoids."""
    rows, num_experts = logits_TE.shape
    ids_TK, weights_TK = torch.empty(rows, top_k, dtype=torch.int32), torch.empty(rows, top_k)
    assert logits_TE.is_contiguous() and logits_TE.dtype is torch.float32
    library(instruction_set).afd_route(
        logits_TE.data_ptr(), rows, num_experts, top_k, softmax, renormalise, scaling, _pointer(correction),
        ids_TK.data_ptr(), weights_TK.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return ids_TK, weights_TK


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
