"""Products with packed matrices against torch's own, for sizes that fill vectors, tiles and panels and that do not."""

import pytest
import torch
import torch.nn.functional as F

from afd_server.kernels.matmul import PackedMatrix, linear, packed_rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 12, 13, 40])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (33, 7), (1, 1), (130, 65)])
def test_float32_equals_torch(instruction_set, rows, n, k):
    weight, x, bias = random(n, k), random(rows, k, seed=1), random(n, seed=2)
    packed = PackedMatrix.pack([weight], "float32", instruction_set)
    torch.testing.assert_close(
        linear(x, packed, bias, instruction_set), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_stores_rounded_weights_and_computes_in_float32(instruction_set):
    weight, x = random(70, 50), random(5, 50, seed=1)
    packed = PackedMatrix.pack([weight], "bfloat16", instruction_set)
    expected = F.linear(x, weight.bfloat16().float())
    torch.testing.assert_close(linear(x, packed, None, instruction_set), expected, rtol=1e-4, atol=1e-4)


def rounded_to(matrix, largest):
    """Per row: whole numbers up to `largest`, and their scale, exactly as the kernel rounds them."""
    scale = matrix.abs().amax(dim=1, keepdim=True) / largest
    return (matrix * (1 / scale)).round().clamp(-largest, largest), scale


@pytest.mark.parametrize(("n", "k"), [(64, 96), (33, 7), (130, 65)])
@pytest.mark.parametrize("rows", [1, 5, 12, 30])
def test_int8_equals_exact_sums_of_rounded_values(instruction_set, rows, n, k):
    weight, x = random(n, k), random(rows, k, seed=1)
    packed = PackedMatrix.pack([weight], "int8", instruction_set)
    (w_int, w_scale), (x_int, x_scale) = rounded_to(weight, 127), rounded_to(x, 32767)
    expected = (x_int.double() @ w_int.double().T) * x_scale * w_scale.T
    torch.testing.assert_close(
        linear(x, packed, None, instruction_set).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_int8_of_zero_rows_is_zero(instruction_set):
    packed = PackedMatrix.pack([torch.zeros(40, 8)], "int8", instruction_set)
    assert torch.equal(linear(torch.zeros(3, 8), packed, None, instruction_set), torch.zeros(3, 40))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(instruction_set, format):
    weight, x = random(100, 64), random(29, 64, seed=1)
    packed = PackedMatrix.pack([weight], format, instruction_set)
    together = linear(x, packed, None, instruction_set)
    for row in (0, 11, 28):
        assert torch.equal(together[row : row + 1], linear(x[row : row + 1], packed, None, instruction_set))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_more_rows_than_a_cache_holds(instruction_set, format):
    weight, x = random(70, 1030), random(330, 1030, seed=1)
    packed = PackedMatrix.pack([weight], format, instruction_set)
    together = linear(x, packed, None, instruction_set)
    expected = F.linear(x, weight)
    assert (together - expected).norm() < {"float32": 1e-5, "bfloat16": 0.005, "int8": 0.02}[
        format
    ] * expected.norm()
    for row in (0, 155, 156, 329):
        assert torch.equal(together[row : row + 1], linear(x[row : row + 1], packed, None, instruction_set))


def test_rows_of_x_may_be_parts_of_wider_rows(instruction_set):
    weight, wide = random(40, 16), random(6, 50)
    packed = PackedMatrix.pack([weight], "float32", instruction_set)
    assert torch.equal(
        linear(wide[:, 3:19], packed, None, instruction_set),
        linear(wide[:, 3:19].contiguous(), packed, None, instruction_set),
    )


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_packed_rows_are_the_matrix_rows(instruction_set, format):
    weight = random(75, 24)
    packed = PackedMatrix.pack([weight], format, instruction_set)
    ids = torch.tensor([74, 0, 33, 33])
    expected = weight[ids] if format == "float32" else weight.bfloat16()[ids].float()
    assert torch.equal(packed_rows(ids, packed, instruction_set), expected)


def test_no_rows_give_no_rows(instruction_set):
    packed = PackedMatrix.pack([random(8, 8)], "float32", instruction_set)
    assert linear(torch.empty(0, 8), packed, None, instruction_set).shape == (0, 8)
