"""The Triton kernels run on CPU tensors under Triton's interpreter, or, with -m gpu, as compiled on a CUDA device.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before any test of this folder imports it. Where a test of
another folder has done so already, or there is a CUDA device, test_interpreted.py runs the folder's in a process of their own.
"""

import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def interpreted():
    """Whether this process interprets kernels. Skips where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    import triton

    @triton.jit
    def kernel():
        pass

    return not isinstance(kernel, triton.JITFunction)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, interpreted):
    """Where a kernel test puts its tensors."""
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("no CUDA device, or Triton interprets in this process")
    if request.param == "cpu" and not interpreted:
        pytest.skip("Triton compiles in this process: test_interpreted.py runs this one in another")
    return torch.device(request.param)


@pytest.fixture
def random(device):
    """Numbers from a normal distribution, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype).to(device)
