# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""The kernel of heads.py, which calls it through launch_rotate_and_write."""

from __future__ import annotations

import triton
import triton.language as tl

_HEADS = 8  # of a program


def launch_rotate_and_write(query, key, value, norms, eps, cos, sin, interleaved, cache, slots, out):
    (rows, num_heads, dim), num_key_heads = query.shape, key.shape[1]
    query_weight, key_weight = norms or (query, key)
    query_tiles, key_tiles = triton.cdiv(num_heads, _HEADS), triton.cdiv(num_key_heads, _HEADS)
    _rotate_and_write[(rows, query_tiles + key_tiles)](
        query, key, value, query_weight, key_weight, eps, cos, sin, cache, slots, out, num_heads, num_key_heads, query_tiles,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        cache.stride(1), cache.stride(2),
        HALF=dim // 2, HALF_POWER=triton.next_power_of_2(dim // 2), HEADS=_HEADS,
        INTERLEAVED=interleaved, NORMS=norms is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate_and_write(
    query, key, value, query_weight, key_weight, eps, cos, sin, cache, slots, out, num_heads, num_key_heads, query_tiles,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    slot_stride, value_offset,
    HALF: tl.constexpr, HALF_POWER: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: query heads in the first query_tiles programs, key and value heads in the others."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF_POWER)
    first_at, second_at = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + HALF)
    cosine = tl.load(cos + row * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + row * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if tile < query_tiles:
        head = tile * HEADS + tl.arange(0, HEADS)
        inside = (head < num_heads)[:, None] & (pair < HALF)[None, :]
        heads = query + row * query_row_stride + head[:, None] * query_head_stride
        first, second = _rotated(
            heads, query_weight, first_at, second_at, pair < HALF, inside, cosine, sine, eps, HALF, NORMS
        )
        target = out + (row * num_heads + head)[:, None] * (2 * HALF) + pair[None, :]
        tl.store(target, first.to(out.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(out.dtype.element_ty), mask=inside)
    else:
        head = (tile - query_tiles) * HEADS + tl.arange(0, HEADS)
        inside = (head < num_key_heads)[:, None] & (pair < HALF)[None, :]
        heads = key + row * key_row_stride + head[:, None] * key_head_stride
        first, second = _rotated(
            heads, key_weight, first_at, second_at, pair < HALF, inside, cosine, sine, eps, HALF, NORMS
        )
        target = (
            cache + tl.load(slots + row) * slot_stride + head[:, None].to(tl.int64) * (2 * HALF) + pair[None, :]
        )
        tl.store(target, first.to(cache.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(cache.dtype.element_ty), mask=inside)
        values = value + row * value_row_stride + head[:, None] * value_head_stride + pair[None, :]
        tl.store(target + value_offset, tl.load(values, mask=inside).to(cache.dtype.element_ty), mask=inside)
        values_2 = tl.load(values + HALF, mask=inside).to(cache.dtype.element_ty)
        tl.store(target + value_offset + HALF, values_2, mask=inside)


@triton.jit
def _rotated(
    heads,
    weight,
    first_at,
    second_at,
    own_pair,
    inside,
    cosine,
    sine,
    eps,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Both elements of every pair, float32 [heads, pairs]."""
    first = tl.load(heads + first_at[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + second_at[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        of_type = heads.dtype.element_ty  # rounded before and after it is weighted, as in models/norm.py
        first_weight = tl.load(weight + first_at, mask=own_pair, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(weight + second_at, mask=own_pair, other=0.0).to(tl.float32)[None, :]
        first = ((first * scale).to(of_type).to(tl.float32) * first_weight).to(of_type).to(tl.float32)
        second = ((second * scale).to(of_type).to(tl.float32) * second_weight).to(of_type).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine
