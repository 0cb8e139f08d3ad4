"""Between the projections and the attention of a layer on a GPU, in one launch: heads normed and rotated, entries written.

What does not live here: the kernel (heads_triton.py), and the angles (models/rope.py). Shapes: T rows, N query heads, G key
heads, D head dimension, all of it rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_and_write(
    query_TND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """[T, N, D], the rotated queries. Row t's rotated keys and its values go to slots[t] of the cache.

    norms: weights [D] of the queries' and the keys' RMS norm, before the rotation. cos, sin: [T, D / 2]; interleaved pairs
    (2i, 2i + 1) come out as (i, i + D / 2). cache: [blocks, block_size, 2, G, D], slots: [T] int64. What lies between the
    norm and the result is rounded once, at its end.
    """
    from afd_server.kernels.gpu import heads_triton

    rows, _, dim = query_TND.shape
    assert key_TGD.shape == value_TGD.shape and cache.shape[2:] == (2, *key_TGD.shape[1:]) and dim % 2 == 0
    assert all(tensor.stride(2) == 1 for tensor in (query_TND, key_TGD, value_TGD)) and cache.is_contiguous()
    assert cos.shape == sin.shape == (rows, dim // 2) and cos.is_contiguous() and sin.is_contiguous()
    out = torch.empty(query_TND.shape, dtype=query_TND.dtype, device=query_TND.device)
    if rows:
        heads_triton.launch_rotate_and_write(
            query_TND, key_TGD, value_TGD, norms, eps, cos, sin, interleaved, cache, slots, out
        )
    return out
