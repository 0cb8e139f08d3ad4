"""Memory that two processes of one host share, without a name and thus without anything to clean up.

The attention side creates it (memfd), seals its size and passes the descriptor over a unix socket; the FFN side checks
seal and size before it maps, so that a peer cannot shrink the file under the mapping and kill the worker by SIGBUS. The
kernel frees it with the last process that maps it. Linux only.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import torch
from torch import Tensor

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create_shared_memory(size_bytes: int) -> int:
    """Descriptor of new, zeroed shared memory of fixed size. Its pages are taken when they are first written."""
    descriptor = os.memfd_create("afd-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def map_shared_memory(descriptor: int, size_bytes: int) -> Tensor:
    """uint8 [size_bytes] over the shared memory; unmapped when the last view of it is gone. The descriptor may be closed.

    Raises ValueError, with what is wrong, when it is not sealed memory of exactly that size.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise ValueError("the descriptor is not a memfd") from None
    if seals & _SEALS != _SEALS:
        raise ValueError("the shared memory's size is not sealed")
    actual_bytes = os.fstat(descriptor).st_size
    if actual_bytes != size_bytes:
        raise ValueError(f"the shared memory has {actual_bytes} bytes, the link needs {size_bytes}")
    return torch.frombuffer(mmap.mmap(descriptor, size_bytes), dtype=torch.uint8)
