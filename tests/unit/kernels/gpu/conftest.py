"""The Triton kernels run on CPU tensors under Triton's interpreter, or, with -m gpu, as compiled on a CUDA device.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before any test of this folder imports it.
"""

import importlib.util
import os
import sys

import pytest
import torch

WITHOUT_TRITON = importlib.util.find_spec("triton") is None
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def is_interpreted():
    from triton import knobs

    return knobs.runtime.interpret


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a kernel test puts its tensors."""
    if WITHOUT_TRITON:
        pytest.skip("Triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and not is_interpreted():
        pytest.skip("Triton compiles in this process (TRITON_INTERPRET is not set, there is a CUDA device)")
    return torch.device(request.param)


@pytest.fixture
def random(device):
    """Numbers from a normal distribution, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype).to(device)
