"""Requests of any lengths are attended to in bounded pieces, with the result of a plain softmax for each by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from afd_server.models import batch as batch_module
from afd_server.models import paged_attention as paged_module
from afd_server.models.batch import AttentionBatch
from afd_server.models.paged_attention import paged_attention
from afd_server.types import ScheduledRequest
from tests.checkpoints import write_checkpoint
from tests.unit.models.served import CPU, PLANS, load_whole, random_texts, run

BLOCK_SIZE, NUM_HEADS, KEY_HEADS, WIDTH = 4, 6, 2, 8
# (tokens in the cache before the step, tokens of the step)
REQUESTS = [(3, 1), (0, 9), (80, 1), (11, 6), (0, 1), (75, 1), (40, 12), (5, 1)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Bounds that these small requests reach."""
    monkeypatch.setitem(batch_module.MAX_GROUP_TOKENS, "cpu", 16)
    monkeypatch.setattr(paged_module, "MAX_SCORES", 200)


@pytest.fixture
def calls(monkeypatch):
    """(query, keys) shapes of every call to torch's attention."""
    seen, attend = [], F.scaled_dot_product_attention

    def noted(query, key, value, **options):
        seen.append((tuple(query.shape), tuple(key.shape)))
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return seen


def problem():
    generator = torch.Generator().manual_seed(3)
    requests, next_block = [], 0
    for index, (before, count) in enumerate(REQUESTS):
        blocks = -(-(before + count) // BLOCK_SIZE)
        table = tuple(reversed(range(next_block, next_block + blocks)))
        requests.append(ScheduledRequest(str(index), before, (1,) * count, table, samples=True))
        next_block += blocks
    cache = torch.randn(next_block, BLOCK_SIZE, 2, KEY_HEADS, WIDTH, generator=generator)
    query = torch.randn(sum(count for _, count in REQUESTS), NUM_HEADS, WIDTH, generator=generator)
    return requests, cache, query


def plain_attention(requests, cache, query, scale):
    rows, output = iter(query), []
    for request in requests:
        entries = cache[list(request.block_table)].flatten(0, 1)
        for at in range(request.start_position, request.start_position + len(request.token_ids)):
            keys, values = entries[: at + 1].repeat_interleave(NUM_HEADS // KEY_HEADS, dim=2).unbind(1)
            scores = torch.einsum("nk,lnk->nl", next(rows), keys) * scale
            output.append(torch.einsum("nl,lnk->nk", scores.softmax(-1), values))
    return torch.stack(output)


def attend():
    requests, cache, query = problem()
    batch = AttentionBatch.build(requests, BLOCK_SIZE, CPU)
    output = paged_attention(query, cache, batch, 0.4)
    torch.testing.assert_close(output, plain_attention(requests, cache, query, 0.4), atol=1e-5, rtol=1e-5)


def test_groups_and_chunks_give_a_plain_softmax(calls):
    attend()
    assert len(calls) == 2 + 3  # short and long single rows; a call for each chunk


def test_so_do_small_pieces(small_pieces, calls):
    attend()
    assert len(calls) > 10
    for (*heads, rows, _), (*_, length, _) in calls:
        scores = heads[0] * heads[1] * rows * length
        # A single row of a chunk, or the query heads of a single request that share a key head, are not cut any more.
        assert scores <= 200 or rows == 1 or (heads[0] == 1 and rows == NUM_HEADS // KEY_HEADS)


def test_so_does_the_unfused_kernel(small_pieces):
    """Which torch takes by itself where no fused one suits."""
    with sdpa_kernel(SDPBackend.MATH):
        attend()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "step3"])
def test_every_kind_of_attention_suits_the_fused_kernel(tmp_path, family, dtype):
    """The other one holds every score in memory. Torch raises RuntimeError where the only one allowed does not suit."""
    texts = random_texts()
    model = load_whole(write_checkpoint(family, tmp_path), dtype=dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        run(model, texts, PLANS["mixed"](texts), dtype=dtype)


@pytest.mark.parametrize("plan", ["in_one_go", "in_chunks", "mixed"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "step3"])
def test_a_model_in_small_pieces_gives_the_same_logits(tmp_path, request, family, plan):
    texts = random_texts()
    model, steps = load_whole(write_checkpoint(family, tmp_path)), PLANS[plan](texts)
    uncut = run(model, texts, steps)
    calls = request.getfixturevalue("calls")
    run(model, texts, steps)
    num_uncut = len(calls)
    calls.clear()
    request.getfixturevalue("small_pieces")
    for key, row in run(model, texts, steps).items():
        torch.testing.assert_close(row, uncut[key], atol=5e-5, rtol=5e-5)
    assert len(calls) > num_uncut
