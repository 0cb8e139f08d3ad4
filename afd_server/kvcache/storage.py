"""The tensors of the KV cache, and how many blocks of it fit the memory.

What lives here: sizes and allocation. What does not: which block holds what (block_pool.py), and how much memory is
free (cluster/). Called once, when an attention worker starts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afd_server.config import ServeConfig
from afd_server.errors import InsufficientMemoryError
from afd_server.kernels.memory import allocate

if TYPE_CHECKING:
    from afd_server.models.spec import ModelSpec

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def allocate_cache(
    spec: ModelSpec, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """One tensor per layer, [num_blocks, block_size, *cache_entry_shape].

    Zeros, not raw memory: attention multiplies masked entries by zero, and a stray NaN would survive that.
    """
    shape = (num_blocks, block_size, *spec.attention.cache_entry_shape)
    if device.type != "cpu":
        return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.num_layers)]
    # Pages that are zero when first touched; torch would write the zeros, which takes seconds for gigabytes.
    num_bytes = math.prod(shape) * dtype.itemsize
    return [allocate(num_bytes).view(dtype).view(shape) for _ in range(spec.num_layers)]


def num_blocks_for(spec: ModelSpec, config: ServeConfig, share_bytes: int, free_bytes: int) -> int:
    """Blocks of one attention worker's cache: what the memory holds, but no more than its requests can ever fill.

    share_bytes: what the worker may take where config.kv_cache_memory_bytes does not say; free_bytes: all that is there.
    `config` is a resolved one. Raises InsufficientMemoryError when one request of full length does not fit, or the memory
    asked for is not there.
    """
    assert config.max_model_len is not None
    entry_elements = math.prod(spec.attention.cache_entry_shape)
    block_bytes = config.block_size * spec.num_layers * entry_elements * ELEMENT_BYTES[config.dtype]
    blocks_per_request = -(-config.max_model_len // config.block_size)
    budget_bytes = share_bytes if config.kv_cache_memory_bytes is None else config.kv_cache_memory_bytes
    affordable = budget_bytes // block_bytes
    if affordable < blocks_per_request:
        raise InsufficientMemoryError(
            f"--kv-cache-memory-bytes: one request of {config.max_model_len} tokens needs "
            f"{blocks_per_request * block_bytes} bytes of KV cache, there are {budget_bytes} "
            f"(give more"
            + (f", or set --max-model-len to at most {affordable * config.block_size})" if affordable else ")")
        )
    num_blocks = min(affordable, config.max_num_seqs * blocks_per_request)
    if num_blocks * block_bytes > free_bytes:
        raise InsufficientMemoryError(
            f"--kv-cache-memory-bytes: {num_blocks * block_bytes} bytes of KV cache, and only {free_bytes} are free (lower it)"
        )
    return num_blocks
