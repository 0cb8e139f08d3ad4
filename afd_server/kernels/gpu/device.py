"""What the kernels ask about a device before they are launched on it."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# The interpreter runs one program after the other. A few are enough to take every path of a persistent kernel.
_INTERPRETED_MULTIPROCESSORS = 3


def can_run(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: Triton is installed, and it is a CUDA device or interpreted."""
    return importlib.util.find_spec("triton") is not None and (device.type == "cuda" or interpreted())


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _INTERPRETED_MULTIPROCESSORS


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, if it is imported in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
