"""The gated MLPs of a mixture of experts on a GPU, all of a call in five launches.

What lives here: the call, how the work is cut, and the plain torch that it equals. What does not: the kernels
(experts_triton.py), the choice of experts, and the shared expert (both models/).

    sort the rows' choices by expert -> inner = silu(gate x) * up x, per choice -> down inner -> weighted sum per row

Weights and activations are bfloat16 (float32 for tests), or float8_e4m3fn with scales (fp8.py).
Shapes: T rows, H hidden, I intermediate, E experts held, K experts per token; a choice is one of the T * K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_server.kernels.gpu.fp8 import BLOCK, BlockScaledWeight, quantize_rows

Weight = Tensor | BlockScaledWeight


@dataclass(frozen=True, slots=True)
class ProductTile:
    """What one program computes, rows x columns of the result, and the depth of the inner dimension that it reads at a time.

    programs: persistent ones per multiprocessor.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    programs: int = 1


def grouped_expert_ffn(
    x_TH: Tensor,
    gate_up: Weight,
    down: Weight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    first_expert: int = 0,
    out: Tensor | None = None,
    tiles: tuple[ProductTile, ProductTile] | None = None,
) -> Tensor:
    """[T, H] float32: the weighted sum over each row's experts; those outside first_expert to first_expert + E - 1 are
    passed over, so rows may come that nothing is done for (their sum is 0).

    gate_up: [E, 2 I, H], the gate's rows first; down: [E, H, I]; both plain, of x's dtype, or both block-scaled. topk_ids:
    [T, K] int32, topk_weights: [T, K] float32; an expert comes at most once in a row. tiles: of gate_up and of down.
    Each weight is read from memory about once, those of experts without rows not at all. No atomic additions: a row's sum
    is added in the order of its choices, and does not change with the rows beside it as long as the tiles are the same.
    """
    from afd_server.kernels.gpu import experts_triton

    scaled = isinstance(gate_up, BlockScaledWeight)
    assert scaled == isinstance(down, BlockScaledWeight)
    up_values, down_values = _values(gate_up), _values(down)
    (rows, hidden), (num_experts, width) = x_TH.shape, (len(down_values), down_values.shape[2])
    assert up_values.shape == (num_experts, 2 * width, hidden) and down_values.shape[1] == hidden
    assert up_values.is_contiguous() and down_values.is_contiguous() and x_TH.stride(1) == 1
    assert topk_ids.dtype is torch.int32 and topk_weights.dtype is torch.float32
    assert topk_ids.is_contiguous() and topk_weights.is_contiguous()
    assert scaled or up_values.dtype is down_values.dtype is x_TH.dtype
    if out is None:
        out = torch.empty(rows, hidden, dtype=torch.float32, device=x_TH.device)
    assert out.shape == x_TH.shape and out.stride(1) == 1
    tiles = tiles or choose_tiles(rows * topk_ids.shape[1] / num_experts, up_values.dtype)
    assert tiles[0].rows == tiles[1].rows, "both products go through the same list of tiles"
    if scaled:
        assert all(tile.depth == BLOCK and tile.columns == BLOCK for tile in tiles)
    if rows:
        experts_triton.launch(x_TH, gate_up, down, topk_ids, topk_weights, first_expert, out, tiles)
    return out


def choose_tiles(rows_per_expert: float, dtype: torch.dtype) -> tuple[ProductTile, ProductTile]:
    """For about so many rows of an expert, at most: a shard of many sees fewer of a call's choices.

    As many programs on a multiprocessor as its shared memory holds, no register spilled (benchmarks/gpu/resources.py), and
    the fastest of those tried on an H100.
    """
    rows = 16
    while rows < min(rows_per_expert, 64):
        rows *= 2
    if dtype is torch.float8_e4m3fn:
        num_warps = 8 if rows > 16 else 4
        return ProductTile(rows, 128, 128, num_warps, 4), ProductTile(rows, 128, 128, 4, 4, programs=2)
    if dtype is torch.float32:  # which tensor cores do not multiply: for tests
        return ProductTile(rows, 32, 32, 4, 2), ProductTile(rows, 32, 32, 4, 2)
    if rows < 64:  # few rows of activations beside each weight: deeper tiles, so that as much is on its way
        return ProductTile(rows, 64, 128, 4, 3, programs=2), ProductTile(rows, 128, 128, 4, 3, programs=2)
    if rows_per_expert > 256:
        return ProductTile(128, 128, 64, 8, 3), ProductTile(128, 128, 64, 8, 4)
    return ProductTile(rows, 128, 64, 4, 5), ProductTile(rows, 128, 64, 4, 4, programs=2)


def _values(weight: Weight) -> Tensor:
    return weight.values if isinstance(weight, BlockScaledWeight) else weight


def grouped_expert_ffn_reference(
    x_TH: Tensor,
    gate_up: Weight,
    down: Weight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    first_expert: int = 0,
) -> Tensor:
    """The same in plain torch, expert by expert in float32, with what lies between two products rounded as there."""
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for local in range(len(_values(down))):
        rows, choices = (topk_ids == first_expert + local).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate, up = _rounded_product(x_TH[rows], gate_up, local).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).to(x_TH.dtype if isinstance(down, Tensor) else torch.float32)
        y_TH.index_add_(0, rows, _rounded_product(inner, down, local) * topk_weights[rows, choices, None])
    return y_TH


def _rounded_product(x: Tensor, weight: Weight, expert: int) -> Tensor:
    """float32, of x as the kernels multiply it."""
    if isinstance(weight, Tensor):
        return F.linear(x.to(torch.float32), weight[expert].to(torch.float32))
    values, scales = quantize_rows(x)
    x = values.to(torch.float32) * scales.repeat_interleave(BLOCK, -1)
    return F.linear(x, BlockScaledWeight(weight.values[expert], weight.scales[expert]).dequantize())
