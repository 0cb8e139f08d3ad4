"""How much KV cache there is: the tensors' shapes, and the number of blocks a memory holds."""

from types import SimpleNamespace

import pytest
import torch

from afd_server.config import ServeConfig
from afd_server.errors import InsufficientMemoryError
from afd_server.kvcache.storage import allocate_cache, num_blocks_for

# 3 layers x 10 elements a token: a block of 4 tokens takes 120 elements.
SPEC = SimpleNamespace(num_layers=3, attention=SimpleNamespace(cache_entry_shape=(2, 1, 5)))


def config(**settings):
    return ServeConfig(
        **{"dtype": "bfloat16", "block_size": 4, "max_model_len": 10, "max_num_seqs": 8, **settings}
    )


FREE = 1 << 50


def test_one_zeroed_tensor_a_layer():
    cache = allocate_cache(SPEC, 7, 4, torch.device("cpu"), torch.bfloat16)
    assert [tuple(tensor.shape) for tensor in cache] == [(7, 4, 2, 1, 5)] * 3
    assert all(tensor.dtype is torch.bfloat16 and not tensor.any() for tensor in cache)


@pytest.mark.parametrize(("dtype", "block_bytes"), [("bfloat16", 240), ("float32", 480)])
def test_as_many_blocks_as_the_memory_holds(dtype, block_bytes):
    assert num_blocks_for(SPEC, config(dtype=dtype), 5 * block_bytes - 1, FREE) == 4
    assert num_blocks_for(SPEC, config(dtype=dtype), 5 * block_bytes, FREE) == 5


def test_the_setting_overrides_what_is_free():
    assert num_blocks_for(SPEC, config(kv_cache_memory_bytes=240 * 6), 240 * 20, FREE) == 6


def test_no_more_than_all_requests_can_fill():
    assert num_blocks_for(SPEC, config(max_num_seqs=2), 1 << 40, FREE) == 2 * 3


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(InsufficientMemoryError, match="1200 bytes of KV cache, and only 1199 are free"):
        num_blocks_for(SPEC, config(kv_cache_memory_bytes=240 * 5), 0, 1199)


def test_too_little_for_one_request_is_refused_with_both_numbers():
    with pytest.raises(InsufficientMemoryError) as refusal:
        num_blocks_for(SPEC, config(kv_cache_memory_bytes=240 * 2 + 1), 1 << 40, FREE)
    for part in ("--kv-cache-memory-bytes", "720", "481", "--max-model-len to at most 8"):
        assert part in str(refusal.value)


def test_a_remedy_that_is_none_is_not_offered():
    with pytest.raises(InsufficientMemoryError) as refusal:
        num_blocks_for(SPEC, config(kv_cache_memory_bytes=10), 0, FREE)
    assert "--max-model-len" not in str(refusal.value)
