"""Large memory as the kernels like it: taken for packed weights and for the KV cache on a CPU, given back after loading."""

from __future__ import annotations

import ctypes
import mmap
import sys

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


def give_back_freed_memory() -> None:
    """Hands what malloc keeps of freed memory to the system: what weights were staged in while they were packed."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's own
        if trim is not None:
            trim(0)
