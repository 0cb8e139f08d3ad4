"""Attention over a paged cache, for every kind of heads: entries are written, gathered by block table, attended to.

What lives here: which rows see which entries, in plain torch. What does not: projections, RoPE, and what an entry is
made of (attention_gqa.py, attention_mla.py, attention_mfa.py, which call this).

Shapes: T rows, N query heads, G key heads (each shared by N / G query heads), L entries, K and V widths of a key and a
value head, D single-row requests, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.batch import AttentionBatch, Chunk, SingleRows

# Entries [R, L, ...] of R requests -> keys [R, L, G, K] and values [R, L, G, V].
Split = Callable[[Tensor], tuple[Tensor, Tensor]]


def write_entries(cache: Tensor, batch: AttentionBatch, entries: Tensor) -> None:
    """Puts row t's entry into its slot. cache: [blocks, block_size, ...], entries: [T, ...]."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, batch.slots, entries.to(cache.dtype))


def paged_attention(
    query_TNK: Tensor, cache: Tensor, batch: AttentionBatch, split: Split, scale: float, value_dim: int
) -> Tensor:
    """[T, N, V]: every row's heads over its request's entries up to its own, which must be written already.

    Softmax is done in float32. A row's result depends on its own request alone, beyond float rounding. The cache must
    hold finite numbers everywhere: padding is masked, not skipped.
    """
    output = query_TNK.new_empty(*query_TNK.shape[:2], value_dim)
    if batch.single is not None:
        if not batch.chunks:
            return _attend_single_rows(query_TNK, cache, batch.single, split, scale)
        rows = batch.single.rows
        output[rows] = _attend_single_rows(query_TNK[rows], cache, batch.single, split, scale)
    for chunk in batch.chunks:
        output[chunk.start : chunk.stop] = _attend_chunk(
            query_TNK[chunk.start : chunk.stop], cache, chunk, split, scale
        )
    return output


def _attend_single_rows(
    query_DNK: Tensor, cache: Tensor, single: SingleRows, split: Split, scale: float
) -> Tensor:
    num_requests, num_heads, key_dim = query_DNK.shape
    keys, values = split(_gather(cache, single.block_tables))
    # The query heads that share a key head stand where the queries of one head would: keys are not copied for them.
    num_key_heads = keys.shape[2]
    output = F.scaled_dot_product_attention(
        query_DNK.view(num_requests, num_key_heads, num_heads // num_key_heads, key_dim),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=single.visible[:, None, None, :],
        scale=scale,
    )
    return output.reshape(num_requests, num_heads, -1)


def _attend_chunk(query_CNK: Tensor, cache: Tensor, chunk: Chunk, split: Split, scale: float) -> Tensor:
    num_rows, num_heads, _ = query_CNK.shape
    keys, values = split(_gather(cache, chunk.block_table[None])[:, : chunk.length])
    mask = None
    if num_rows < chunk.length:  # not from the beginning: row c also sees the entries before the chunk
        visible = torch.ones(num_rows, chunk.length, dtype=torch.bool, device=query_CNK.device)
        mask = visible.tril(chunk.length - num_rows)
    output = F.scaled_dot_product_attention(
        query_CNK.transpose(0, 1)[None],
        _for_every_query_head(keys, num_heads),
        _for_every_query_head(values, num_heads),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return output[0].transpose(0, 1)


def _gather(cache: Tensor, block_tables: Tensor) -> Tensor:
    """The entries of R requests, [R, B * block_size, ...], for their block tables [R, B].

    index_select copies whole blocks; indexing by the table itself takes twice as long on a CPU.
    """
    blocks = cache.index_select(0, block_tables.flatten())
    return blocks.view(len(block_tables), -1, *cache.shape[2:])


def _for_every_query_head(heads: Tensor, num_heads: int) -> Tensor:
    """[1, L, G, K] -> [1, N, L, K], head g repeated for its N / G query heads (as a view when there is only one)."""
    _, length, num_key_heads, width = heads.shape
    spread = heads.transpose(1, 2)[:, :, None].expand(
        1, num_key_heads, num_heads // num_key_heads, length, width
    )
    return spread.flatten(1, 2)
