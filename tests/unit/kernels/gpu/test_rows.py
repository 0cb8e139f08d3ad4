"""The row kernels in Triton against plain torch."""

import pytest
import torch

from afd_server.kernels.gpu.rows import add_rms_norm, add_rms_norm_reference
from afd_server.models.norm import rms_norm


@pytest.mark.parametrize("hidden", [64, 100])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_add_and_norm(random, hidden, adds, dtype, tolerance):
    """Of rows that are parts of wider ones."""
    wide, weight = random(5, 2 * hidden, dtype=dtype), random(hidden, dtype=dtype)
    delta = random(5, hidden, dtype=dtype) if adds else None
    x, beside = wide[:, :hidden], wide[:, hidden:].clone()
    expected_x = x.clone()
    expected = add_rms_norm_reference(expected_x, delta, weight, 1e-5)
    output = add_rms_norm(x, delta, weight, 1e-5)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x, expected_x, rtol=tolerance, atol=tolerance)
    assert torch.equal(wide[:, hidden:], beside)
    assert torch.equal(expected, rms_norm(expected_x, weight, 1e-5))
