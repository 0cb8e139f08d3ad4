"""Row kernels against the models' plain torch code."""

import pytest
import torch

from afd_server.kernels import rows
from afd_server.models.norm import rms_norm
from afd_server.models.rope import Rope
from afd_server.models.spec import RopeSpec


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [5, 64, 100])
@pytest.mark.parametrize("num_rows", [1, 700])
def test_add_rms_norm(instruction_set, num_rows, hidden):
    x, delta, weight = random(num_rows, hidden), random(num_rows, hidden, seed=1), random(hidden, seed=2)
    expected = rms_norm(x + delta, weight, 1e-5)
    kept = x.clone()
    normed = rows.add_rms_norm(kept, delta, weight, 1e-5, instruction_set)
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, x + delta)
    torch.testing.assert_close(
        rows.add_rms_norm(kept, None, weight, 1e-5, instruction_set), expected, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(kept, x + delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("num_rows", "dim"), [(3, 8), (200, 64)])
def test_rotate_and_write(instruction_set, dtype, interleaved, norms, num_rows, dim):
    heads, groups, block_size = 6, 2, 4
    qkv = random(num_rows, heads + 2 * groups, dim)
    query, key, value = qkv.split([heads, groups, groups], dim=1)
    query_norm, key_norm = (random(dim, seed=1), random(dim, seed=2)) if norms else (None, None)
    table = Rope(RopeSpec(kind="default", theta=1e4, interleaved=interleaved), dim, torch.device("cpu")).table(
        torch.arange(num_rows) * 3, torch.float32
    )
    cache = torch.zeros(num_rows, block_size, 2, groups, dim, dtype=dtype)
    slots = torch.randperm(num_rows * block_size, generator=torch.Generator().manual_seed(5))[:num_rows]
    expected_query = table.rotate(query if query_norm is None else rms_norm(query, query_norm, 1e-6))
    expected_key = table.rotate(key if key_norm is None else rms_norm(key, key_norm, 1e-6))
    expected_entries = torch.stack((expected_key, value), dim=1)

    rows.rotate_and_write(
        query, key, value, query_norm=query_norm, key_norm=key_norm, eps=1e-6, cos=table.cos, sin=table.sin,
        interleaved=interleaved, cache=cache, slots=slots, instruction_set=instruction_set,
    )  # fmt: skip

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(query, expected_query, rtol=1e-5, atol=1e-5)
    entries = cache.view(-1, 2, groups, dim)
    torch.testing.assert_close(entries[slots], expected_entries.to(dtype), **tolerance)
    untouched = torch.ones(len(entries), dtype=torch.bool)
    untouched[slots] = False
    assert not entries[untouched].any()


def reference_route(logits, top_k, softmax, renormalise, scaling, correction):
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    ids = (scores if correction is None else scores + correction).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return ids, (weights / weights.sum(-1, keepdim=True) if renormalise else weights) * scaling


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (33, 5), (1, 1)])
def test_route(instruction_set, softmax, renormalise, corrected, num_experts, top_k):
    logits = random(50, num_experts) * 3
    correction = random(num_experts, seed=1) / 5 if corrected else None
    options = {"softmax": softmax, "renormalise": renormalise, "scaling": 1.5, "correction": correction}
    ids, weights = rows.route(logits, top_k, **options, instruction_set=instruction_set)
    expected_ids, expected_weights = reference_route(logits, top_k, **options)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


def test_route_settles_ties_by_id(instruction_set):
    ids, weights = rows.route(
        torch.zeros(2, 6), 3, softmax=True, renormalise=True, scaling=1.0, correction=None,
        instruction_set=instruction_set,
    )  # fmt: skip
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
