"""The expert kernel against a loop over experts in float64."""

import pytest
import torch
import torch.nn.functional as F

from afd_server.kernels.experts import PackedExperts, run_experts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x, gate_up, down, ids, weights, first_expert):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(len(x)):
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            if 0 <= expert - first_expert < len(gate_up):
                gate, up = (gate_up[expert - first_expert].double() @ x[row].double()).chunk(2)
                y[row] += weight * (down[expert - first_expert].double() @ (F.silu(gate) * up))
    return y.float()


def batch(rows, hidden, num_experts, top_k, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(rows)])
    return random(rows, hidden, seed=seed), ids.to(torch.int32), torch.rand(rows, top_k, generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 26, 100])
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (40, 13), (33, 70)])
def test_equals_a_loop_over_experts(instruction_set, rows, hidden, width):
    gate_up, down = random(6, 2 * width, hidden) / 8, random(6, hidden, width, seed=1) / 8
    x, ids, weights = batch(rows, hidden, 6, 3)
    packed = PackedExperts.pack(list(gate_up), list(down), "float32", instruction_set)
    y = run_experts(x, packed, ids, weights, first_expert=0, num_experts=6, instruction_set=instruction_set)
    torch.testing.assert_close(y, reference(x, gate_up, down, ids, weights, 0), rtol=1e-4, atol=1e-4)


def test_experts_of_other_shards_are_passed_over(instruction_set):
    gate_up, down = random(2, 64, 48) / 8, random(2, 48, 32, seed=1) / 8
    x, ids, weights = batch(20, 48, 6, 2)
    packed = PackedExperts.pack(list(gate_up), list(down), "float32", instruction_set)
    y = run_experts(x, packed, ids, weights, first_expert=2, num_experts=2, instruction_set=instruction_set)
    torch.testing.assert_close(y, reference(x, gate_up, down, ids, weights, 2), rtol=1e-4, atol=1e-4)
    nothing = ~((ids == 2) | (ids == 3)).any(dim=1)
    assert nothing.any() and torch.equal(y[nothing], torch.zeros_like(y[nothing]))


def test_the_result_is_written_where_it_is_wanted(instruction_set):
    gate_up, down = random(4, 64, 48) / 8, random(4, 48, 32, seed=1) / 8
    x, ids, weights = batch(5, 48, 4, 2)
    packed = PackedExperts.pack(list(gate_up), list(down), "float32", instruction_set)

    def run(**more):
        return run_experts(x, packed, ids, weights, first_expert=0, num_experts=4, instruction_set=instruction_set, **more)  # fmt: skip

    out = random(5, 48, seed=9)
    assert run(out=out) is out
    assert torch.equal(out, run())


@pytest.mark.parametrize(("format", "tolerance"), [("bfloat16", 0.02), ("int8", 0.03)])
def test_smaller_formats_are_near(instruction_set, format, tolerance):
    gate_up, down = random(4, 128, 96) / 10, random(4, 96, 64, seed=1) / 8
    x, ids, weights = batch(9, 96, 4, 2)
    packed = PackedExperts.pack(list(gate_up), list(down), format, instruction_set)
    y = run_experts(x, packed, ids, weights, first_expert=0, num_experts=4, instruction_set=instruction_set)
    expected = reference(x, gate_up, down, ids, weights, 0)
    assert (y - expected).norm() < tolerance * expected.norm()
    assert not torch.equal(y, expected)


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(instruction_set, format):
    gate_up, down = random(4, 64, 48) / 8, random(4, 48, 32, seed=1) / 8
    x, ids, weights = batch(31, 48, 4, 2)
    packed = PackedExperts.pack(list(gate_up), list(down), format, instruction_set)

    def run(rows):
        return run_experts(x[rows], packed, ids[rows], weights[rows], first_expert=0, num_experts=4, instruction_set=instruction_set)  # fmt: skip

    together = run(slice(0, 31))
    for row in (0, 17, 30):
        assert torch.equal(together[row], run(slice(row, row + 1))[0])


def test_more_rows_than_a_cache_holds(instruction_set):
    gate_up, down = random(2, 40, 1030) / 32, random(2, 1030, 20, seed=1) / 5
    x, ids, weights = batch(330, 1030, 2, 2)
    packed = PackedExperts.pack(list(gate_up), list(down), "float32", instruction_set)

    def run(rows):
        return run_experts(x[rows], packed, ids[rows], weights[rows], first_expert=0, num_experts=2, instruction_set=instruction_set)  # fmt: skip

    together = run(slice(0, 330))
    torch.testing.assert_close(together, reference(x, gate_up, down, ids, weights, 0), rtol=1e-4, atol=1e-4)
    for row in (0, 155, 329):
        assert torch.equal(together[row], run(slice(row, row + 1))[0])
