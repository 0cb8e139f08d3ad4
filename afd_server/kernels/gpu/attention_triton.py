# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""The kernels of attention.py, flash-decoding style: partial softmaxes over parts of a context, then their combination.

What does not live here: checks of the arguments and the choice of tiles. attention.py's paged_decode_attention calls launch.

Shapes: as in attention.py; a program holds M heads of one key head and reads L entries at a time. Scores are kept in units
of log2, since the device has exp2 and no exp.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from afd_server.kernels.gpu.arithmetic_triton import how_to_multiply, product

# Splits that the combination reads at a time.
_COMBINED_SPLITS = 16


def launch(query_TNK, cache, block_tables, lengths, scale, value_dim, out, splits, tile):
    rows, num_heads, key_dim = query_TNK.shape
    latent = cache.dim() == 3
    num_key_heads = 1 if latent else cache.shape[3]
    heads_per_key = num_heads // num_key_heads
    head_tiles = triton.cdiv(heads_per_key, tile.heads)
    float32 = {"dtype": torch.float32, "device": query_TNK.device}
    partial_TSNV = out[:, None]
    log_sums_TNS = torch.empty(rows, num_heads, splits, **float32)
    if splits > 1:
        partial_TSNV = torch.empty(rows, splits, num_heads, value_dim, **float32)
    _partial_attention[(rows, num_key_heads * head_tiles, splits)](
        query_TNK, cache, block_tables, lengths, partial_TSNV, log_sums_TNS,
        scale / math.log(2), heads_per_key, head_tiles,
        query_TNK.stride(0), query_TNK.stride(1), block_tables.stride(0),
        cache.stride(0), cache.stride(1), 0 if latent else cache.stride(3), 0 if latent else cache.stride(2),
        partial_TSNV.stride(0), partial_TSNV.stride(1), partial_TSNV.stride(2),
        BLOCK_SIZE=cache.shape[1], SPLITS=splits, LATENT=latent,
        DIM=value_dim, DIM_POWER=max(16, triton.next_power_of_2(value_dim)),  # 16: the least that is multiplied
        REST=key_dim - value_dim, REST_POWER=max(16, triton.next_power_of_2(key_dim - value_dim)),
        HEADS=tile.heads, ENTRIES=tile.entries, **how_to_multiply(cache.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, num_heads)](
            partial_TSNV, log_sums_TNS, out, out.stride(0), out.stride(1), num_heads,
            SPLITS=splits, SPLITS_POWER=triton.next_power_of_2(splits),
            AT_A_TIME=min(_COMBINED_SPLITS, triton.next_power_of_2(splits)),
            DIM=value_dim, DIM_POWER=triton.next_power_of_2(value_dim), num_warps=4,
        )  # fmt: skip


@triton.jit
def _partial_attention(
    query, cache, block_tables, lengths, partial, log_sums,
    scale_log2, heads_per_key, head_tiles,
    query_row_stride, query_head_stride, table_stride,
    block_stride, token_stride, key_head_stride, value_offset,
    partial_row_stride, partial_split_stride, partial_head_stride,
    BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, LATENT: tl.constexpr,
    DIM: tl.constexpr, DIM_POWER: tl.constexpr, REST: tl.constexpr, REST_POWER: tl.constexpr,
    HEADS: tl.constexpr, ENTRIES: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row, some heads of one key head, one part of the context: its normed output and the log of its exponentials' sum.

    A key is DIM elements that are shaped like a value and REST more (a latent entry's rotated part, else none).
    """
    row, key_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1) // head_tiles, tl.program_id(2)
    local_head = tl.program_id(1) % head_tiles * HEADS + tl.arange(0, HEADS)
    own_head = local_head < heads_per_key
    head = key_head * heads_per_key + local_head
    length = tl.load(lengths + row)
    entries_per_split = tl.cdiv(tl.cdiv(length, SPLITS), ENTRIES) * ENTRIES
    start = split * entries_per_split
    stop = tl.minimum(start + entries_per_split, length)
    dim, rest = tl.arange(0, DIM_POWER), DIM + tl.arange(0, REST_POWER)
    at = query + row * query_row_stride + head[:, None] * query_head_stride
    queries = tl.load(at + dim[None, :], mask=own_head[:, None] & (dim < DIM)[None, :], other=0.0)
    queries_rest = queries
    if LATENT:
        own_rest = own_head[:, None] & (rest < DIM + REST)[None, :]
        queries_rest = tl.load(at + rest[None, :], mask=own_rest, other=0.0)
    queries, queries_rest = queries.to(cache.dtype.element_ty), queries_rest.to(cache.dtype.element_ty)

    highest, total = tl.full([HEADS], float("-inf"), tl.float32), tl.full([HEADS], 0.0, tl.float32)
    output = tl.full([HEADS, DIM_POWER], 0.0, tl.float32)
    for first in range(start, stop, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        block = tl.load(block_tables + row * table_stride + entry // BLOCK_SIZE, mask=entry < stop, other=0)
        # Caches are larger than what 32 bits can address.
        entries = cache + block.to(tl.int64) * block_stride + entry % BLOCK_SIZE * token_stride
        scores, values = _scores_and_values(
            queries, queries_rest, entries + key_head * key_head_stride, entry < stop, value_offset, scale_log2,
            LATENT, DIM, DIM_POWER, REST, REST_POWER, PRECISION, INTERPRETED,
        )  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(scores, 1))  # finite: there is an entry in every tile
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        output = product(weights.to(values.dtype), values, output * shrink[:, None], PRECISION, INTERPRETED)
        highest = new_highest

    total_or_1 = tl.where(total == 0.0, 1.0, total)
    output = output / total_or_1[:, None]
    at = partial + row * partial_row_stride + split * partial_split_stride + head[:, None] * partial_head_stride
    written = own_head[:, None] & (dim < DIM)[None, :]
    if SPLITS > 1:
        written = written & (start < length)  # the combination reads no part that is empty
        num_heads = tl.num_programs(1) // head_tiles * heads_per_key
        log_sum = tl.where(total == 0.0, float("-inf"), highest + tl.log2(total_or_1))
        tl.store(log_sums + (row * num_heads + head) * SPLITS + split, log_sum, mask=own_head)
    tl.store(at + dim[None, :], output.to(partial.dtype.element_ty), mask=written)


@triton.jit
def _scores_and_values(
    queries, queries_rest, entries, seen, value_offset, scale_log2,
    LATENT: tl.constexpr, DIM: tl.constexpr, DIM_POWER: tl.constexpr, REST: tl.constexpr, REST_POWER: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Scores [M, L], and values [L, DIM]. A latent entry is read once: its first part serves as key and as value."""
    dim, rest = tl.arange(0, DIM_POWER), DIM + tl.arange(0, REST_POWER)
    inside = seen[:, None] & (dim < DIM)[None, :]
    keys = tl.load(entries[:, None] + dim[None, :], mask=inside, other=0.0)
    scores = tl.full([queries.shape[0], seen.shape[0]], 0.0, tl.float32)
    scores = product(queries, tl.trans(keys), scores, PRECISION, INTERPRETED)
    if LATENT:
        inside_rest = seen[:, None] & (rest < DIM + REST)[None, :]
        keys_rest = tl.load(entries[:, None] + rest[None, :], mask=inside_rest, other=0.0)
        scores = product(queries_rest, tl.trans(keys_rest), scores, PRECISION, INTERPRETED)
        values = keys
    else:
        values = tl.load(entries[:, None] + value_offset + dim[None, :], mask=inside, other=0.0)
    return tl.where(seen[None, :], scores * scale_log2, float("-inf")), values


@triton.jit
def _combine(
    partial, log_sums, out, out_row_stride, out_head_stride, num_heads,
    SPLITS: tl.constexpr, SPLITS_POWER: tl.constexpr, AT_A_TIME: tl.constexpr,
    DIM: tl.constexpr, DIM_POWER: tl.constexpr,
):  # fmt: skip
    """One head of one row: the mean of its parts, each weighted with its share of all exponentials."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    log_sums += (row * num_heads + head) * SPLITS
    every_split = tl.arange(0, SPLITS_POWER)
    every_log = tl.load(log_sums + every_split, mask=every_split < SPLITS, other=float("-inf"))
    highest = tl.max(every_log, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a row without entries
    total = tl.sum(tl.exp2(every_log - highest), 0)
    dim = tl.arange(0, DIM_POWER)
    output = tl.full([DIM_POWER], 0.0, tl.float32)
    for first in range(0, SPLITS, AT_A_TIME):
        split = first + tl.arange(0, AT_A_TIME)
        log_sum = tl.load(log_sums + split, mask=split < SPLITS, other=float("-inf"))
        filled = log_sum != float("-inf")
        parts = tl.load(
            partial + ((row * SPLITS + split[:, None]) * num_heads + head) * DIM + dim[None, :],
            mask=filled[:, None] & (dim < DIM)[None, :], other=0.0,
        )  # fmt: skip
        output += tl.sum(parts * tl.exp2(log_sum - highest)[:, None], 0)
    output = output / tl.where(total == 0.0, 1.0, total)
    place = out + row * out_row_stride + head * out_head_stride + dim
    tl.store(place, output.to(out.dtype.element_ty), mask=dim < DIM)
