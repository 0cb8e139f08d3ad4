"""Decode attention over a paged cache on a GPU: one row per request, split over its context, nothing gathered.

What lives here: the call, how the work is cut, and the plain torch that it equals. What does not: the kernels
(attention_triton.py), prompt chunks (several rows of a request: models/paged_attention.py), and who writes the cache.

Shapes: T rows, each of a request of its own; N query heads, G key heads, K width of a key, V of a value, B blocks of the
longest request, S splits of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afd_server.kernels.gpu.device import num_multiprocessors

# Fewer entries than this are not worth a program of their own: writing and combining its part costs as much.
_MIN_ENTRIES_PER_SPLIT = 256
_MAX_SPLITS = 128


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """What one program holds: query heads of one key head, and entries it reads at a time."""

    heads: int
    entries: int
    num_warps: int
    num_stages: int


def paged_decode_attention(
    query_TNK: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    value_dim: int | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """[T, N, V]: row t's heads over the first lengths[t] entries of its request, in the query's dtype.

    cache: [blocks, block_size, 2, G, K] keys and values, or [blocks, block_size, K] entries that are the key and, in their
    first value_dim elements, the value of one head; float32 or bfloat16. block_tables: [T, B] int32, lengths: [T] int32. A
    length of 0 gives zeros, so that the rows which fill up a CUDA graph's batch cost nothing. Softmax is done in float32; the
    query and the probabilities are rounded to the cache's dtype before they are multiplied. splits and tile are chosen
    from the shapes where they are not given. The same shapes give the same bits.
    """
    from afd_server.kernels.gpu import attention_triton

    rows, num_heads, key_dim = query_TNK.shape
    latent = cache.dim() == 3
    value_dim = value_dim or key_dim
    num_key_heads = 1 if latent else cache.shape[3]
    assert cache.shape[-1] == key_dim and cache.stride(-1) == 1 and query_TNK.stride(-1) == 1
    assert latent or value_dim == key_dim, "only latent entries have values narrower than their keys"
    assert num_heads % num_key_heads == 0 and len(block_tables) == len(lengths) == rows
    assert block_tables.dtype is lengths.dtype is torch.int32 and block_tables.stride(1) == 1
    if out is None:
        out = torch.empty(rows, num_heads, value_dim, dtype=query_TNK.dtype, device=query_TNK.device)
    assert out.shape == (rows, num_heads, value_dim) and out.stride(-1) == 1
    splits, tile = _cut(query_TNK, cache, block_tables, value_dim, splits, tile)
    if rows:
        attention_triton.launch(query_TNK, cache, block_tables, lengths, scale, value_dim, out, splits, tile)
    return out


def _cut(
    query_TNK: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    value_dim: int,
    splits: int | None,
    tile: AttentionTile | None,
) -> tuple[int, AttentionTile]:
    """What is not given, chosen from the shapes alone, so that a CUDA graph may hold it."""
    rows, num_heads, key_dim = query_TNK.shape
    latent = cache.dim() == 3
    num_key_heads = 1 if latent else cache.shape[3]
    heads_per_key = num_heads // num_key_heads
    if splits is None:
        heads = tile.heads if tile else tile_heads(heads_per_key, cache.dtype)
        programs = rows * num_key_heads * -(-heads_per_key // heads)
        max_length = block_tables.shape[1] * cache.shape[1]
        # A part is written and read in float32; so many entries of the cache are read in the time.
        part_entries = heads_per_key * value_dim * 4 / ((1 if latent else 2) * key_dim * cache.element_size())
        splits = choose_splits(programs, max_length, part_entries, num_multiprocessors(query_TNK.device))
    return splits, tile or choose_tile(heads_per_key, key_dim, cache.dtype, splits)


def choose_splits(programs: int, max_length: int, part_entries: float, multiprocessors: int) -> int:
    """Parts of every context, so that `programs` times as many keep the device busy; 1 where they do so alone.

    The device is done when its fullest multiprocessor is, and a part costs the time of part_entries. Fewer parts
    are taken where more would hardly be faster.
    """

    def cost(splits: int) -> float:
        fullest = -(-programs * splits // multiprocessors)
        return fullest * (max_length / splits + (part_entries if splits > 1 else 0))

    most = max(1, min(max_length // _MIN_ENTRIES_PER_SPLIT, _MAX_SPLITS))
    enough = 1.05 * min(map(cost, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if cost(splits) <= enough)


def tile_heads(heads_per_key: int, dtype: torch.dtype) -> int:
    """Query heads of one key head that a program holds. float32, which tensor cores do not multiply, is for tests."""
    return 16 if dtype is torch.float32 else min(64, max(16, 1 << (heads_per_key - 1).bit_length()))


def choose_tile(heads_per_key: int, key_dim: int, dtype: torch.dtype, splits: int) -> AttentionTile:
    """So that the stages of keys and values fit the shared memory of a Hopper multiprocessor beside the query, and no
    register spills (benchmarks/gpu/resources.py); the fastest of those tried on an H100."""
    heads = tile_heads(heads_per_key, dtype)
    if dtype is torch.float32:
        return AttentionTile(heads, entries=16, num_warps=4, num_stages=2)
    if key_dim > 256:
        return (
            AttentionTile(heads, entries=32, num_warps=8, num_stages=3)
            if heads > 16
            else AttentionTile(heads, 32, 4, 2)
        )
    if key_dim > 128:
        entries, num_stages = (64, 3) if splits == 1 else (32, 4)
        return AttentionTile(heads, entries, num_warps=4, num_stages=num_stages)
    return AttentionTile(heads, entries=64, num_warps=4, num_stages=4)


def paged_decode_attention_reference(
    query_TNK: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    value_dim: int | None = None,
) -> Tensor:
    """The same in plain torch, in the query's dtype or float32 if that is wider, request by request."""
    rows, num_heads, key_dim = query_TNK.shape
    value_dim = value_dim or key_dim
    exact = torch.promote_types(query_TNK.dtype, torch.float32)
    outputs = torch.zeros(rows, num_heads, value_dim, dtype=exact, device=query_TNK.device)
    for row, length in enumerate(lengths.tolist()):
        entries = cache[block_tables[row].long()].flatten(0, 1)[:length].to(exact)
        keys, values = (
            entries.unbind(1) if cache.dim() == 5 else (entries[:, None], entries[:, None, :value_dim])
        )
        query_GMK = query_TNK[row].to(exact).unflatten(0, (keys.shape[1], -1))
        scores_GML = torch.einsum("gmk,lgk->gml", query_GMK, keys) * scale
        outputs[row] = torch.einsum("gml,lgv->gmv", scores_GML.softmax(-1), values).flatten(0, 1)
    return outputs.to(query_TNK.dtype)
