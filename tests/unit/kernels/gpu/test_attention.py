"""Paged decode attention in Triton against the plain torch, and that against the models' own attention."""

import pytest
import torch

from afd_server.kernels.gpu.attention import (
    AttentionTile,
    choose_splits,
    paged_decode_attention,
    paged_decode_attention_reference,
)
from afd_server.models.batch import AttentionBatch
from afd_server.models.paged_attention import paged_attention
from afd_server.types import ScheduledRequest

BLOCK_SIZE = 4
TILE = AttentionTile(heads=16, entries=16, num_warps=4, num_stages=2)
LENGTHS = [1, 40, 16, 0, 7]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def paged(random, lengths, entry_shape, dtype=torch.float32):
    """A cache, and block tables that scatter these requests over it; NaN wherever no request has an entry."""
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(7)).tolist()
    cache = random(sum(blocks) + 3, BLOCK_SIZE, *entry_shape, dtype=dtype)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    owned = torch.zeros(cache.shape[:2], dtype=torch.bool)
    for row, (count, length) in enumerate(zip(blocks, lengths, strict=True)):
        own = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
        tables[row, :count] = own.to(torch.int32)
        owned[own] = (torch.arange(count * BLOCK_SIZE) < length).view(-1, BLOCK_SIZE)
    cache[~owned.to(cache.device)] = float("nan")
    return {
        "cache": cache,
        "block_tables": tables.to(cache.device),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=cache.device),
        "scale": 0.2,
    }


def assert_equals_reference(query, options, **how):
    value_dim = how.get("value_dim")
    expected = paged_decode_attention_reference(query, **options, value_dim=value_dim)
    output = paged_decode_attention(query, **options, **how)
    tolerance = TOLERANCE[options["cache"].dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "groups", "dim"),
    [
        pytest.param(8, 2, 16, id="gqa"),
        pytest.param(3, 3, 20, id="a-head-of-its-own-each"),
        pytest.param(40, 1, 32, id="mfa"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values(random, heads, groups, dim, dtype, splits):
    options = paged(random, LENGTHS, (2, groups, dim), dtype)
    query = random(len(LENGTHS), heads, dim, dtype=dtype)
    assert_equals_reference(query, options, splits=splits, tile=TILE)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("rank", "rope"), [(32, 16), (20, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_entries(random, rank, rope, dtype, splits):
    options = paged(random, LENGTHS, (rank + rope,), dtype)
    query = random(len(LENGTHS), 18, rank + rope, dtype=dtype)
    assert_equals_reference(query, options, value_dim=rank, splits=splits, tile=TILE)


@pytest.mark.parametrize(
    ("heads", "entry", "value_dim"),
    [
        pytest.param(64, (2, 1, 256), None, id="step3"),
        pytest.param(128, (576,), 512, id="deepseek"),
        pytest.param(32, (2, 8, 128), None, id="llama"),
    ],
)
def test_the_shapes_of_real_models(random, heads, entry, value_dim):
    """With the tiles and splits that are chosen for them."""
    options = paged(random, [530, 37], entry, torch.bfloat16) | {"scale": entry[-1] ** -0.5}
    assert_equals_reference(random(2, heads, entry[-1], dtype=torch.bfloat16), options, value_dim=value_dim)


def test_large_scores_do_not_overflow(random):
    options = paged(random, [50], (2, 1, 16)) | {"scale": 1.0}
    query = random(1, 2, 16) * 1e3
    expected = paged_decode_attention_reference(query.double(), **options).float()
    for splits in (1, 2):
        output = paged_decode_attention(query, **options, splits=splits, tile=TILE)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_more_splits_than_are_combined_at_a_time(random):
    options = paged(random, [300, 9], (2, 1, 16))
    assert_equals_reference(random(2, 2, 16), options, splits=19, tile=TILE)


def test_a_request_has_the_same_bits_in_any_company(random):
    options = paged(random, LENGTHS, (2, 2, 16))
    query = random(len(LENGTHS), 8, 16)
    together = paged_decode_attention(query, **options, splits=3, tile=TILE)
    for row in range(len(LENGTHS)):
        own = {name: options[name][row : row + 1] for name in ("block_tables", "lengths")}
        alone = paged_decode_attention(query[row : row + 1], **(options | own), splits=3, tile=TILE)
        assert torch.equal(alone[0], together[row])


def test_heads_and_output_may_be_parts_of_wider_rows(random):
    options = paged(random, [9, 30], (2, 1, 16))
    wide, out = random(2, 7, 16), torch.full((2, 9, 16), 7.0, device=options["cache"].device)
    for splits in (1, 2):
        expected = paged_decode_attention(wide[:, :5].contiguous(), **options, splits=splits, tile=TILE)
        paged_decode_attention(wide[:, :5], **options, splits=splits, tile=TILE, out=out[:, :5])
        assert torch.equal(out[:, :5], expected)
        assert (out[:, 5:] == 7.0).all()


def test_it_equals_the_attention_of_the_models(random):
    lengths = [3, 21, 8]
    options = paged(random, lengths, (2, 2, 16))
    options["cache"].nan_to_num_()  # that one multiplies what it masks
    requests = [
        ScheduledRequest(str(row), length - 1, (0,), tuple(table), samples=True)
        for row, (length, table) in enumerate(zip(lengths, options["block_tables"].tolist(), strict=True))
    ]
    batch = AttentionBatch.build(requests, BLOCK_SIZE, options["cache"].device)
    query = random(3, 4, 16)
    output = paged_decode_attention(query, options["cache"], batch.block_tables, batch.lengths, 0.2, tile=TILE)
    torch.testing.assert_close(
        output, paged_attention(query, options["cache"], batch, 0.2), rtol=1e-5, atol=1e-5
    )


def test_contexts_are_split_only_where_the_device_would_idle():
    device = {"part_entries": 64, "multiprocessors": 132}
    assert choose_splits(programs=1000, max_length=8192, **device) == 1
    assert choose_splits(programs=128, max_length=8192, **device) == 1  # hardly any multiprocessor is idle
    assert (
        choose_splits(programs=200, max_length=8192, **device) == 3
    )  # 600 of 660 places, where 1 would fill 200 of 264
    assert choose_splits(programs=16, max_length=8192, **device) == 8
    assert choose_splits(programs=1, max_length=65536, **device) == 122
    assert choose_splits(programs=1, max_length=100, **device) == 1
