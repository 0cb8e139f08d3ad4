"""Large memory as the kernels like it. Used for packed weights and for the KV cache on a CPU."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def allocate(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], zeros, in huge pages where the system gives them: a sweep through it would miss the TLB otherwise.

    Pages are taken when they are first touched.
    """
    # Private: what may be shared counts as a file, and gets no huge pages.
    memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]
