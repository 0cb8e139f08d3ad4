"""Attention over a paged cache, for every kind of heads: entries are written, gathered by block table, attended to.

What lives here: which rows see which entries, in plain torch. What does not: projections and RoPE (attention_gqa.py,
attention_mla.py, attention_mfa.py, which come here through operations.py).

Shapes: T rows, N query heads, G key heads (each shared by N / G query heads), L entries, K width of a head, D requests
of a group of single rows, C rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.models.batch import AttentionBatch, Chunk, SingleRows

# Heads x rows x entries of one call to torch, where it has more than one row. Fused kernels hold none of these scores,
# but torch falls back on its unfused one where a type, width or mask does not suit them: 256 MiB in float32, several
# times over. The mask, which all kernels hold, is bounded by it as well. Smaller calls would leave parts of a GPU idle.
MAX_SCORES = 2**26


def write_entries(cache: Tensor, batch: AttentionBatch, entries: Tensor) -> None:
    """Puts row t's entry into its slot. cache: [blocks, block_size, ...], entries: [T, ...]."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, batch.slots, entries.to(cache.dtype))


def paged_attention(query_TNK: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """[T, N, K]: every row's heads over its request's entries up to its own, which must be written already.

    cache: [blocks, block_size, 2, G, K] keys and values, or [blocks, block_size, K] entries that are both for one head.

    Softmax is done in float32. A row's result depends on its own request alone, beyond float rounding. The cache must
    hold finite numbers everywhere: padding is masked, not skipped.
    """
    if len(batch.singles) == 1 and not batch.chunks:  # the rows are all there, and in order
        return _attend_single_rows(query_TNK, cache, batch.singles[0], scale)
    output = torch.empty_like(query_TNK)
    for group in batch.singles:
        output[group.rows] = _attend_single_rows(query_TNK[group.rows], cache, group, scale)
    for chunk in batch.chunks:
        rows = slice(chunk.start, chunk.stop)
        _attend_chunk(query_TNK[rows], cache, chunk, scale, output[rows])
    return output


def _attend_single_rows(query_DNK: Tensor, cache: Tensor, group: SingleRows, scale: float) -> Tensor:
    num_requests, num_heads, width = query_DNK.shape
    keys, values = _keys_and_values(_gather(cache, group.block_tables))
    # The query heads that share a key head stand where the queries of one head would: keys are not copied for them.
    num_key_heads = keys.shape[2]
    output = F.scaled_dot_product_attention(
        query_DNK.view(num_requests, num_key_heads, num_heads // num_key_heads, width),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=group.visible[:, None, None, :],
        scale=scale,
    )
    return output.reshape(num_requests, num_heads, -1)


def _attend_chunk(query_CNK: Tensor, cache: Tensor, chunk: Chunk, scale: float, output_CNK: Tensor) -> None:
    """Piece by piece, of as many rows as MAX_SCORES allows; a piece sees the entries up to its last row's."""
    num_rows, num_heads, _ = query_CNK.shape
    keys, values = _keys_and_values(_gather(cache, chunk.block_table[None])[:, : chunk.length])
    rows_of_a_piece = max(1, MAX_SCORES // (num_heads * chunk.length))
    for start in range(0, num_rows, rows_of_a_piece):
        stop = min(start + rows_of_a_piece, num_rows)
        length = chunk.length - num_rows + stop
        output_CNK[start:stop] = _attend_last_rows(
            query_CNK[start:stop], keys[0, :length], values[0, :length], scale
        )


def _attend_last_rows(query_CNK: Tensor, keys_LGK: Tensor, values_LGK: Tensor, scale: float) -> Tensor:
    """[C, N, K] for the C last of L tokens, each of which sees those up to its own."""
    (num_rows, num_heads, _), (length, num_key_heads, width) = query_CNK.shape, keys_LGK.shape
    heads_per_key = num_heads // num_key_heads
    mask = None
    if num_rows < length:  # not from the beginning: row c also sees the entries before the first row's
        visible = torch.ones(num_rows, length, dtype=torch.bool, device=query_CNK.device)
        mask = visible.tril(length - num_rows)

    def for_every_query_head(heads_LGK: Tensor) -> Tensor:
        """[G, N / G, L, K]: a view with stride 0. Nothing is copied, unless torch has no fused kernel for it."""
        return heads_LGK.transpose(0, 1)[:, None].expand(num_key_heads, heads_per_key, length, width)

    output = F.scaled_dot_product_attention(
        query_CNK.unflatten(1, (num_key_heads, heads_per_key)).permute(1, 2, 0, 3),
        for_every_query_head(keys_LGK),
        for_every_query_head(values_LGK),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).flatten(1, 2)


def _keys_and_values(entries: Tensor) -> tuple[Tensor, Tensor]:
    """[R, L, 2, G, K] or [R, L, K] -> keys and values, [R, L, G, K] each.

    A latent entry's value is only its first part, but attending to whole entries, some columns of the result unused, is far
    cheaper than to values of another width than the keys: torch's fused kernels ask for one width, and the others hold every
    score in memory.
    """
    if entries.dim() == 3:
        return entries[:, :, None], entries[:, :, None]
    keys, values = entries.unbind(2)
    return keys, values


def _gather(cache: Tensor, block_tables: Tensor) -> Tensor:
    """The entries of R requests, [R, B * block_size, ...], for their block tables [R, B].

    index_select copies whole blocks; indexing by the table itself takes twice as long on a CPU.
    """
    blocks = cache.index_select(0, block_tables.flatten())
    return blocks.view(len(block_tables), -1, *cache.shape[2:])
