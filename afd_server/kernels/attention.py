"""Attention over a paged cache on a CPU, without gathering it: decoding rows and prompt chunks in one call.

Reference: models/paged_attention.py. Shapes: T rows, N query heads, G key heads, R requests, B blocks of the longest.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from afd_server.kernels.library import library


def paged_attention(
    query_TNK: Tensor,
    cache: Tensor,
    *,
    row_starts: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    scale: float,
    value_dim: int,
    instruction_set: str | None = None,
) -> Tensor:
    """[T, N, value_dim] float32: each row's heads over its request's entries up to its own.

    query: float32, its heads side by side. cache: [blocks, block_size, 2, G, D] keys and values, or [blocks, block_size, W]
    entries that are key and, in their first value_dim elements, value of one head; float32 or bfloat16. Request r has the rows
    row_starts[r] to row_starts[r + 1] - 1, the last of its lengths[r] tokens; row_starts [R + 1], lengths [R] and
    block_tables [R, B] are int32.
    """
    rows, num_heads, key_dim = query_TNK.shape
    assert query_TNK.stride()[1:] == (key_dim, 1) and query_TNK.dtype is torch.float32 and cache.is_contiguous()
    assert (
        row_starts.dtype is lengths.dtype is block_tables.dtype is torch.int32 and block_tables.is_contiguous()
    )
    out = torch.empty(rows, num_heads, value_dim)
    layout = cache_layout(tuple(cache.shape), cache.stride())
    library(instruction_set).afd_paged_attention(
        query_TNK.data_ptr(), query_TNK.stride(0), num_heads, cache.shape[3] if cache.dim() == 5 else 1, key_dim,
        value_dim, cache.data_ptr(), cache.dtype is torch.bfloat16, layout, len(lengths),
        row_starts.data_ptr(), lengths.data_ptr(), block_tables.data_ptr(), block_tables.shape[1], scale,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


@functools.cache
def cache_layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    """CacheLayout of native/attention.h, in elements."""
    block_stride, token_stride = strides[:2]
    heads = (0, strides[3], strides[2], strides[3]) if len(shape) == 5 else (0, 0, 0, 0)
    return (ctypes.c_long * 7)(shape[1], block_stride, token_stride, *heads)
