# mypy: ignore-errors
# What stands in a kernel is Triton's language, which type checkers do not know, and Triton may not be installed.
"""The kernels of experts.py: a sort of choices by expert, two grouped products, a weighted sum.

What does not live here: checks of the arguments and the choice of tiles. experts.py's grouped_expert_ffn calls launch.

How many choices an expert has is known to the device alone. The sort writes a list of tiles, each a piece of one expert's
choices, and the products' programs are persistent: as many as the device runs at once, each going through the list.
Shapes: as in experts.py; C choices, M rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from afd_server.kernels.gpu.arithmetic_triton import how_to_multiply, product, to_fp8
from afd_server.kernels.gpu.device import interpreted, num_multiprocessors
from afd_server.kernels.gpu.fp8 import FP8_MAX, MIN_SCALE, BlockScaledWeight

_CHOICES_AT_A_TIME = 1024
_COLUMNS_OF_A_SUM = 1024
_BLOCK = 128  # of a scale


def launch(x_TH, gate_up, down, topk_ids, topk_weights, first_expert, out, tiles):
    scaled = isinstance(gate_up, BlockScaledWeight)
    (rows, hidden), top_k = x_TH.shape, topk_ids.shape[1]
    up_values, up_scales = (gate_up.values, gate_up.scales) if scaled else (gate_up, gate_up)
    down_values, down_scales = (down.values, down.scales) if scaled else (down, down)
    num_experts, _, width = down_values.shape
    device = x_TH.device
    plan = _sort(topk_ids, first_expert, num_experts, tiles[0].rows)
    x_scales = x_TH
    if scaled:
        x_TH, x_scales = _quantize(x_TH)
    inner = torch.empty(rows * top_k, width, dtype=x_TH.dtype, device=device)
    inner_scales = inner
    if scaled:
        inner_scales = torch.empty(rows * top_k, width // _BLOCK, dtype=torch.float32, device=device)
    answers = torch.empty(rows * top_k, hidden, dtype=torch.float32, device=device)
    constants = {"HIDDEN": hidden, "WIDTH": width, "EXPERTS": num_experts, "SCALED": scaled}
    for kernel, tile, arguments in (
        (_gate_up, tiles[0], (x_TH, x_scales, up_values, up_scales, inner, inner_scales, x_TH.stride(0))),
        (_down, tiles[1], (inner, inner_scales, down_values, down_scales, answers)),
    ):
        kernel[(num_multiprocessors(device) * tile.programs,)](
            *arguments, *plan, **constants,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, TOP_K=top_k,
            FP8_LIMIT=FP8_MAX, SMALLEST=MIN_SCALE, BLOCK=_BLOCK, **how_to_multiply(x_TH.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    _weighted_sum[(rows, triton.cdiv(hidden, _COLUMNS_OF_A_SUM))](
        answers, topk_ids, topk_weights, out, first_expert, out.stride(0),
        HIDDEN=hidden, EXPERTS=num_experts, TOP_K=top_k, COLUMNS=_COLUMNS_OF_A_SUM,
    )  # fmt: skip


def _sort(topk_ids, first_expert, num_experts, tile_rows):
    """(choices [C]: those of held experts by expert; tile_experts: of each tile; row_starts, tile_starts [E + 1])."""
    num_choices = topk_ids.numel()
    int32 = {"dtype": torch.int32, "device": topk_ids.device}
    counts = torch.empty(num_experts, **int32)
    choices = torch.empty(num_choices, **int32)
    max_tiles = min(num_choices, triton.cdiv(num_choices, tile_rows) + num_experts)
    tile_experts = torch.empty(max_tiles, **int32)
    row_starts, tile_starts = torch.empty(num_experts + 1, **int32), torch.empty(num_experts + 1, **int32)
    at_a_time = min(_CHOICES_AT_A_TIME, triton.next_power_of_2(num_choices))
    _count[(num_experts,)](topk_ids, counts, num_choices, first_expert, AT_A_TIME=at_a_time)
    _place[(num_experts,)](
        topk_ids, counts, choices, tile_experts, row_starts, tile_starts, num_choices, first_expert,
        EXPERTS=num_experts, EXPERTS_POWER=triton.next_power_of_2(num_experts), ROWS=tile_rows, AT_A_TIME=at_a_time,
    )  # fmt: skip
    return choices, tile_experts, row_starts, tile_starts


def _quantize(x_TH):
    rows, hidden = x_TH.shape
    values = torch.empty(rows, hidden, dtype=torch.float8_e4m3fn, device=x_TH.device)
    scales = torch.empty(rows, hidden // _BLOCK, dtype=torch.float32, device=x_TH.device)
    groups = hidden // _BLOCK
    _quantize_rows[(rows,)](
        x_TH, values, scales, x_TH.stride(0), GROUPS=groups, GROUPS_POWER=triton.next_power_of_2(groups),
        FP8_LIMIT=FP8_MAX, SMALLEST=MIN_SCALE, BLOCK=_BLOCK, INTERPRETED=interpreted(),
    )  # fmt: skip
    return values, scales


@triton.jit
def _count(topk_ids, counts, num_choices, first_expert, AT_A_TIME: tl.constexpr):
    """How many choices fell on one expert."""
    expert = tl.program_id(0)
    count = tl.full([AT_A_TIME], 0, tl.int32)
    for first in range(0, num_choices, AT_A_TIME):
        choice = first + tl.arange(0, AT_A_TIME)
        ids = tl.load(topk_ids + choice, mask=choice < num_choices, other=-1)
        count += ((ids == first_expert + expert) & (choice < num_choices)).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, 0))


@triton.jit
def _place(
    topk_ids, counts, choices, tile_experts, row_starts, tile_starts, num_choices, first_expert,
    EXPERTS: tl.constexpr, EXPERTS_POWER: tl.constexpr, ROWS: tl.constexpr, AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """One expert's choices in their place of the sorted list, and its tiles in theirs. A choice is row * K + rank."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS_POWER)
    every_count = tl.load(counts + every, mask=every < EXPERTS, other=0)
    every_tiles = (every_count + ROWS - 1) // ROWS
    row_start = tl.sum(tl.where(every < expert, every_count, 0), 0)
    tile_start = tl.sum(tl.where(every < expert, every_tiles, 0), 0)
    row_stop = row_start + tl.sum(tl.where(every == expert, every_count, 0), 0)
    tile_stop = tile_start + tl.sum(tl.where(every == expert, every_tiles, 0), 0)
    tl.store(row_starts + expert, row_start)
    tl.store(tile_starts + expert, tile_start)
    if expert == EXPERTS - 1:
        tl.store(row_starts + EXPERTS, row_stop)
        tl.store(tile_starts + EXPERTS, tile_stop)
    for first in range(tile_start, tile_stop, 64):
        tile = first + tl.arange(0, 64)
        tl.store(tile_experts + tile, tl.full([64], 0, tl.int32) + expert, mask=tile < tile_stop)
    placed = row_start
    for first in range(0, num_choices, AT_A_TIME):
        choice = first + tl.arange(0, AT_A_TIME)
        ids = tl.load(topk_ids + choice, mask=choice < num_choices, other=-1)
        own = ((ids == first_expert + expert) & (choice < num_choices)).to(tl.int32)
        place = placed + tl.cumsum(own, 0) - own
        tl.store(choices + place, choice, mask=own != 0)
        placed += tl.sum(own, 0)


@triton.jit
def _work_item(work, tile_experts, row_starts, tile_starts, COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr):
    """(expert, column tile, first and one past the last of the sorted choices) of a piece of work.

    All row tiles of an expert's column tile come one after the other: its weights are read from memory by the first.
    """
    expert = tl.load(tile_experts + work // COLUMN_TILES)
    tile_start = tl.load(tile_starts + expert)
    num_tiles = tl.load(tile_starts + expert + 1) - tile_start
    within = work - tile_start * COLUMN_TILES
    row_start = tl.load(row_starts + expert) + within % num_tiles * ROWS
    return expert, within // num_tiles, row_start, tl.load(row_starts + expert + 1)


@triton.jit
def _gate_up(
    x, x_scales, weights, weight_scales, inner, inner_scales, x_row_stride,
    choices, tile_experts, row_starts, tile_starts,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOP_K: tl.constexpr,
    FP8_LIMIT: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """inner[c] = silu(gate x[row of c]) * up x[row of c], for the sorted choices c."""
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    blocks: tl.constexpr = HIDDEN // BLOCK
    num_work = tl.load(tile_starts + EXPERTS) * column_tiles
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        expert, column_tile, row_start, row_stop = _work_item(
            work, tile_experts, row_starts, tile_starts, column_tiles, ROWS
        )
        place = row_start + tl.arange(0, ROWS)
        own = place < row_stop
        row = (tl.load(choices + place, mask=own, other=0) // TOP_K).to(tl.int64)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        x_tile = x + row[:, None] * x_row_stride + depth[None, :]
        gate_tile = (
            weights + expert.to(tl.int64) * 2 * WIDTH * HIDDEN + column[:, None] * HIDDEN + depth[None, :]
        )
        gates, ups = tl.full([ROWS, COLUMNS], 0.0, tl.float32), tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        # The tile lies in one block of each of the two weights, and DEPTH is a block's. A step's scales are loaded during
        # the one before: nothing of the next product would be under way while they came.
        own_scales = x_scales + row * blocks
        gate_scales = weight_scales + (expert * 2 * WIDTH + column_tile * COLUMNS) // BLOCK * blocks
        up_scales = gate_scales + WIDTH // BLOCK * blocks
        if SCALED:
            scale = tl.load(own_scales, mask=own, other=0.0)
            gate_scale, up_scale = tl.load(gate_scales), tl.load(up_scales)
        for first in range(0, HIDDEN, DEPTH):
            inside = first + depth < HIDDEN
            x_part = tl.load(x_tile + first, mask=own[:, None] & inside[None, :], other=0.0)
            weight_mask = (column < WIDTH)[:, None] & inside[None, :]
            gate = tl.load(gate_tile + first, mask=weight_mask, other=0.0)
            up = tl.load(gate_tile + WIDTH * HIDDEN + first, mask=weight_mask, other=0.0)
            if SCALED:
                step, more = first // BLOCK + 1, first + DEPTH < HIDDEN
                next_scale = tl.load(own_scales + step, mask=own & more, other=0.0)
                next_gate_scale = tl.load(gate_scales + step, mask=more, other=0.0)
                next_up_scale = tl.load(up_scales + step, mask=more, other=0.0)
                gates += tl.dot(x_part, tl.trans(gate)) * (scale * gate_scale)[:, None]
                ups += tl.dot(x_part, tl.trans(up)) * (scale * up_scale)[:, None]
                scale, gate_scale, up_scale = next_scale, next_gate_scale, next_up_scale
            else:
                gates = product(x_part, tl.trans(gate), gates, PRECISION, INTERPRETED)
                ups = product(x_part, tl.trans(up), ups, PRECISION, INTERPRETED)
        activated = gates / (1.0 + tl.exp(-gates)) * ups
        target = place.to(tl.int64)[:, None] * WIDTH + column[None, :]
        written = own[:, None] & (column < WIDTH)[None, :]
        if SCALED:
            scale = tl.maximum(tl.max(tl.abs(activated), 1) / FP8_LIMIT, SMALLEST)
            tl.store(inner_scales + place * (WIDTH // BLOCK) + column_tile, scale, mask=own)
            tl.store(inner + target, to_fp8(activated / scale[:, None], INTERPRETED), mask=written)
        else:
            tl.store(inner + target, activated.to(inner.dtype.element_ty), mask=written)


@triton.jit
def _down(
    inner, inner_scales, weights, weight_scales, answers,
    choices, tile_experts, row_starts, tile_starts,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOP_K: tl.constexpr,
    FP8_LIMIT: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """answers[choice c] = down inner[c]: back in the order of the rows."""
    column_tiles: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    num_work = tl.load(tile_starts + EXPERTS) * column_tiles
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        expert, column_tile, row_start, row_stop = _work_item(
            work, tile_experts, row_starts, tile_starts, column_tiles, ROWS
        )
        place = row_start + tl.arange(0, ROWS)
        own = place < row_stop
        place = place.to(tl.int64)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        inner_tile = inner + place[:, None] * WIDTH + depth[None, :]
        weight_tile = weights + expert.to(tl.int64) * HIDDEN * WIDTH + column[:, None] * WIDTH + depth[None, :]
        sums = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        own_scales = inner_scales + place * (WIDTH // BLOCK)
        block_scales = weight_scales + ((expert * HIDDEN + column_tile * COLUMNS) // BLOCK) * (WIDTH // BLOCK)
        if SCALED:
            scale, block_scale = tl.load(own_scales, mask=own, other=0.0), tl.load(block_scales)
        for first in range(0, WIDTH, DEPTH):
            inside = first + depth < WIDTH
            part = tl.load(inner_tile + first, mask=own[:, None] & inside[None, :], other=0.0)
            weight_mask = (column < HIDDEN)[:, None] & inside[None, :]
            weight = tl.load(weight_tile + first, mask=weight_mask, other=0.0)
            if SCALED:
                step, more = first // BLOCK + 1, first + DEPTH < WIDTH
                next_scale = tl.load(own_scales + step, mask=own & more, other=0.0)
                next_block_scale = tl.load(block_scales + step, mask=more, other=0.0)
                sums += tl.dot(part, tl.trans(weight)) * (scale * block_scale)[:, None]
                scale, block_scale = next_scale, next_block_scale
            else:
                sums = product(part, tl.trans(weight), sums, PRECISION, INTERPRETED)
        choice = tl.load(choices + place, mask=own, other=0).to(tl.int64)
        written = own[:, None] & (column < HIDDEN)[None, :]
        tl.store(answers + choice[:, None] * HIDDEN + column[None, :], sums, mask=written)


@triton.jit
def _weighted_sum(
    answers, topk_ids, topk_weights, out, first_expert, out_row_stride,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row's sum over those of its choices that are held: the others' answers were never written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    total = tl.full([COLUMNS], 0.0, tl.float32)
    for rank in range(TOP_K):
        choice = row * TOP_K + rank
        local = tl.load(topk_ids + choice) - first_expert
        held = (local >= 0) & (local < EXPERTS)
        answer = tl.load(answers + choice * HIDDEN + column, mask=inside & held, other=0.0)
        total += answer * tl.load(topk_weights + choice)
    tl.store(out + row * out_row_stride + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_rows(
    x, values, scales, x_row_stride, GROUPS: tl.constexpr, GROUPS_POWER: tl.constexpr,
    FP8_LIMIT: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row of fp8.py's quantize_rows."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_POWER)
    at = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (group < GROUPS)[:, None] & (tl.arange(0, BLOCK) >= 0)[None, :]
    numbers = tl.load(x + row * x_row_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), 1) / FP8_LIMIT, SMALLEST)
    tl.store(values + row * GROUPS * BLOCK + at, to_fp8(numbers / scale[:, None], INTERPRETED), mask=inside)
    tl.store(scales + row * GROUPS + group, scale, mask=group < GROUPS)
