"""Heads normed, rotated and written in Triton against torch's operations."""

import pytest
import torch

from afd_server.kernels.gpu.heads import rotate_and_write
from afd_server.models.batch import AttentionBatch
from afd_server.models.operations import TorchOperations
from afd_server.models.rope import RopeTable
from afd_server.types import ScheduledRequest

BLOCK_SIZE = 4


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(9, 3, 16), (8, 8, 20), (17, 1, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equals_torch(random, device, heads, groups, dim, normed, interleaved, dtype, tolerance):
    requests = [
        ScheduledRequest("a", 5, (0, 0, 0), (3, 1), samples=True),
        ScheduledRequest("b", 0, (0,), (2,), samples=True),
    ]
    batch = AttentionBatch.build(requests, BLOCK_SIZE, device)
    wide = random(4, (heads + 2 * groups) * dim, dtype=dtype)  # as one product gives them
    query, key, value = wide.split([heads * dim, groups * dim, groups * dim], dim=1)
    query, key, value = (part.view(4, -1, dim) for part in (query, key, value))
    angles = random(4, dim // 2)
    rope = RopeTable(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype)) if normed else None
    cache = random(6, BLOCK_SIZE, 2, groups, dim, dtype=dtype)
    expected_cache = cache.clone()
    expected = TorchOperations(dtype).rotate_and_write(
        query.clone(), key.clone(), value.clone(), norms, 1e-5, rope, expected_cache, batch
    )
    output = rotate_and_write(
        query, key, value, norms, 1e-5, rope.cos, rope.sin, interleaved, cache, batch.slots
    )
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cache, expected_cache, rtol=tolerance, atol=tolerance)
    untouched = torch.ones(6 * BLOCK_SIZE, dtype=torch.bool)
    untouched[batch.slots.cpu()] = False
    assert cache.flatten(0, 1)[untouched].equal(expected_cache.flatten(0, 1)[untouched])
