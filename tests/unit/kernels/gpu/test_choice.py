"""The choice of experts in Triton against torch's operations."""

import pytest
import torch

from afd_server.kernels.gpu.choice import choose_experts
from afd_server.models.operations import TorchOperations
from afd_server.models.spec import MoESpec


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (48, 3), (5, 5)])
@pytest.mark.parametrize(("dtype", "renormalise"), [(torch.float32, True), (torch.bfloat16, False)])
def test_equals_torch(random, num_experts, top_k, scoring, corrected, dtype, renormalise):
    spec = MoESpec(num_experts, top_k, 16, renormalise=renormalise, scoring=scoring, scaling=2.5)
    # Logits of bfloat16 that differ: of equal ones torch may take either.
    logits = torch.stack([random(num_experts).argsort() for _ in range(7)]).to(dtype) / 4
    correction = random(num_experts) if corrected else None
    expected_ids, expected = TorchOperations(dtype).route(spec, logits, correction)
    ids, weights = choose_experts(
        logits, top_k, sigmoid=scoring == "sigmoid", correction=correction, renormalise=renormalise, scaling=2.5
    )
    assert ids.equal(expected_ids)
    torch.testing.assert_close(weights, expected)


def test_a_row_of_nan_chooses_experts_that_exist(random):
    logits = torch.full_like(random(2, 6), float("nan"))
    ids, _ = choose_experts(logits, 3, sigmoid=False, correction=None, renormalise=True, scaling=1.0)
    assert ((ids >= 0) & (ids < 6)).all()
