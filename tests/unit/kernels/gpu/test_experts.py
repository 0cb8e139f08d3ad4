"""The grouped expert kernels in Triton against the plain torch, and that against the models' own experts."""

import pytest
import torch

from afd_server.kernels.gpu.experts import (
    ProductTile,
    choose_tiles,
    grouped_expert_ffn,
    grouped_expert_ffn_reference,
)
from afd_server.kernels.gpu.fp8 import BlockScaledWeight, quantize_rows
from afd_server.models.operations import TorchExperts

TILES = (ProductTile(16, 32, 32, 4, 2), ProductTile(16, 16, 32, 4, 2))
FP8_TILES = (ProductTile(16, 128, 128, 4, 2),) * 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def choices(rows, num_experts, top_k, device):
    """Different experts of every row, with weights."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(rows, num_experts, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
    return ids.to(device), torch.rand(rows, top_k, generator=generator).to(device)


def weights(random, experts, hidden, width, dtype=torch.float32):
    gate_up, down = random(experts, 2 * width, hidden), random(experts, hidden, width)
    return (gate_up / hidden**0.5).to(dtype), (down / width**0.5).to(dtype)


def assert_close(output, expected, tolerance):
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "hidden", "width"),
    [
        pytest.param(1, 4, 2, 32, 32, id="one-row"),
        pytest.param(50, 3, 1, 64, 48, id="several-tiles-of-an-expert"),
        pytest.param(9, 40, 3, 32, 32, id="most-experts-without-rows"),
        pytest.param(11, 5, 5, 40, 24, id="sizes-that-are-no-multiples"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_of_a_layer(random, device, rows, experts, top_k, hidden, width, dtype):
    x, (gate_up, down) = random(rows, hidden, dtype=dtype), weights(random, experts, hidden, width, dtype)
    chosen = choices(rows, experts, top_k, device)
    output = grouped_expert_ffn(x, gate_up, down, *chosen, tiles=TILES)
    expected = grouped_expert_ffn_reference(x, gate_up, down, *chosen)
    assert_close(output, expected, TOLERANCE[dtype])
    assert_close(expected, TorchExperts(gate_up, down, 0).forward(x, *chosen), TOLERANCE[dtype])


def test_the_sums_of_shards_add_up(random, device):
    x, (gate_up, down) = random(20, 32), weights(random, 7, 32, 32)
    ids, topk_weights = choices(20, 7, 3, device)
    ids[4] = torch.tensor([0, 1, 2])  # nothing for the second shard
    bounds = ((0, 4), (4, 7))
    parts = [
        grouped_expert_ffn(x, gate_up[a:b], down[a:b], ids, topk_weights, first_expert=a, tiles=TILES)
        for a, b in bounds
    ]
    assert_close(sum(parts), grouped_expert_ffn_reference(x, gate_up, down, ids, topk_weights), 1e-5)
    assert (parts[1][4] == 0).all()


def test_a_call_that_no_expert_of_the_shard_is_named_in(random, device):
    x, (gate_up, down) = random(3, 32), weights(random, 2, 32, 32)
    ids, topk_weights = choices(3, 4, 2, device)
    out = torch.full((3, 32), 7.0, device=device)
    assert grouped_expert_ffn(x, gate_up, down, ids, topk_weights, first_expert=4, out=out, tiles=TILES) is out
    assert (out == 0).all()


def test_more_choices_than_are_sorted_at_a_time(random, device):
    x, (gate_up, down) = random(700, 16), weights(random, 3, 16, 16)
    chosen = choices(700, 3, 2, device)
    output = grouped_expert_ffn(x, gate_up, down, *chosen, tiles=(ProductTile(64, 16, 16, 4, 2),) * 2)
    assert_close(output, grouped_expert_ffn_reference(x, gate_up, down, *chosen), 1e-5)


def test_a_row_has_the_same_bits_in_any_company(random, device):
    if device.type == "cpu":
        pytest.skip("NumPy's products, which the interpreter uses, depend on where in a tile a row stands")
    x, (gate_up, down) = random(20, 32), weights(random, 4, 32, 32)
    ids, topk_weights = choices(20, 4, 2, device)
    together = grouped_expert_ffn(x, gate_up, down, ids, topk_weights, tiles=TILES)
    alone = grouped_expert_ffn(x[7:8], gate_up, down, ids[7:8], topk_weights[7:8], tiles=TILES)
    assert torch.equal(alone[0], together[7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_fp8(random, device, dtype):
    """The kernels round as the reference does, so they agree far better than either does with the unrounded experts."""
    x, (gate_up, down) = random(9, 256, dtype=dtype), weights(random, 3, 256, 128)
    x[4] = 0  # a scale of its own
    chosen = choices(9, 3, 2, device)
    scaled = BlockScaledWeight.quantize(gate_up), BlockScaledWeight.quantize(down)
    output = grouped_expert_ffn(x, *scaled, *chosen, tiles=FP8_TILES)
    expected = grouped_expert_ffn_reference(x, *scaled, *chosen)
    assert (output - expected).norm() < 5e-3 * expected.norm()
    exact = grouped_expert_ffn_reference(x.float(), gate_up, down, *chosen)
    assert 2e-2 * exact.norm() < (output - exact).norm() < 8e-2 * exact.norm()
    assert (output[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_with_the_tiles_that_are_chosen(random, device, dtype):
    x, (gate_up, down) = random(70, 128, dtype=torch.bfloat16), weights(random, 2, 128, 128, torch.bfloat16)
    if dtype is torch.float8_e4m3fn:
        gate_up, down = BlockScaledWeight.quantize(gate_up), BlockScaledWeight.quantize(down)
    chosen = choices(70, 2, 1, device)
    output = grouped_expert_ffn(x, gate_up, down, *chosen)
    expected = grouped_expert_ffn_reference(x, gate_up, down, *chosen)
    # Where one of the two rounds to the next FP8 number and the other does not, single elements are further apart.
    assert (output - expected).norm() < 1e-2 * expected.norm()


def test_few_rows_get_small_tiles():
    assert [choose_tiles(rows, torch.bfloat16)[0].rows for rows in (0.1, 16, 17, 64, 256, 257)] == [
        16, 16, 32, 64, 64, 128,
    ]  # fmt: skip


def test_a_block_scaled_weight_is_close_to_the_weight():
    weight = torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(1))
    weight[0, :128, :128] *= 1e4  # spoils its own block alone
    weight[1, 128:, 256:] = 0
    scaled = BlockScaledWeight.quantize(weight)
    assert scaled.values.shape == weight.shape and scaled.scales.shape == (2, 2, 3)
    blocks = (weight - scaled.dequantize()).unflatten(1, (2, 128)).unflatten(3, (3, 128)).norm(dim=(2, 4))
    sizes = weight.unflatten(1, (2, 128)).unflatten(3, (3, 128)).norm(dim=(2, 4))
    assert (blocks <= 0.04 * sizes).all()
    with pytest.raises(ValueError, match="multiples of 128"):
        BlockScaledWeight.quantize(weight[:, :100])


def test_rows_are_quantized_by_128_columns():
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    x[2, :128] *= 1e4
    values, scales = quantize_rows(x)
    errors = (values.float() * scales.repeat_interleave(128, -1) - x).unflatten(1, (2, 128)).norm(dim=2)
    assert (errors <= 0.04 * x.unflatten(1, (2, 128)).norm(dim=2)).all()
