"""What the kernels ask about a device before they are launched on it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch

# The interpreter runs one program after the other. A few are enough to take every path of a persistent kernel.
_INTERPRETED_MULTIPROCESSORS = 3


def what_is_missing(device: torch.device) -> str:
    """What the kernels need to run on tensors of this device and have not; nothing where all is there."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return ""
    if device.type != "cuda":
        return "they are for CUDA devices"
    compilers = (os.environ.get("CC"), "gcc", "clang")
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "Triton needs a C compiler"
    return ""


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _INTERPRETED_MULTIPROCESSORS


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, if it is imported in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
