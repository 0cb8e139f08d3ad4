"""What step3_stages.py times is compared with plain torch before: relative distance of the results, kernel by kernel.

Runs on a CUDA device at real shapes, and on CPU tensors under Triton's interpreter at small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from step3 import FFN_SEED, AttentionPart, FFNStep, Shapes, decoding_batch, random_on
from torch import Tensor

from afd_server.kernels.gpu.attention import paged_decode_attention, paged_decode_attention_reference
from afd_server.kernels.gpu.experts import grouped_expert_ffn_reference
from afd_server.kernels.gpu.rows import add_rms_norm, add_rms_norm_reference
from afd_server.models.operations import TorchOperations
from afd_server.models.operations_gpu import GPUOperations

# Between two ways to compute in bfloat16, which has 8 bits, and in FP8 with both rounding at the same places.
LIMIT = 1e-2


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    distance: float

    def passes(self) -> bool:
        return self.distance < LIMIT  # NaN does not


def distance(output: Tensor, expected: Tensor) -> float:
    """|output - expected| / |expected|, both as vectors."""
    return float((output.double() - expected.double()).norm() / expected.double().norm())


def run_checks(shapes: Shapes, device: torch.device) -> list[Check]:
    checks = [check_norm(shapes, device)]
    heads, dim = shapes.num_heads, shapes.head_dim
    for name, num_heads, entry, value_dim in (
        ("MFA", heads, (2, 1, dim), dim),
        ("GQA", heads, (2, heads // 4, dim // 2), dim // 2),
        ("MLA", 2 * heads, (2 * dim + dim // 4,), 2 * dim),
    ):
        checks.append(check_attention(name, num_heads, entry, value_dim, shapes, device))
    checks += [check_ffn(shapes, device, fp8=fp8) for fp8 in (False, True)]
    return [*checks, check_attention_part(shapes, device)]


def check_norm(shapes: Shapes, device: torch.device) -> Check:
    random = random_on(device)
    x, delta, weight = random(5, shapes.hidden), random(5, shapes.hidden), random(shapes.hidden)
    expected = add_rms_norm_reference(x.clone(), delta, weight, 1e-5)
    return Check("add and RMSNorm", distance(add_rms_norm(x, delta, weight, 1e-5), expected))


def check_attention(
    name: str, num_heads: int, entry: tuple[int, ...], value_dim: int, shapes: Shapes, device: torch.device
) -> Check:
    random, context, rows = random_on(device, 1), shapes.contexts[0], min(4, shapes.requests)
    batch = decoding_batch(rows, context, shapes.block_size, device)
    cache = random(rows * -(-context // shapes.block_size), shapes.block_size, *entry)
    query = random(rows, num_heads, entry[-1])
    lengths = batch.lengths - torch.arange(rows, dtype=torch.int32, device=device) * (context // 5)
    options = (query, cache, batch.block_tables, lengths, entry[-1] ** -0.5)
    output = paged_decode_attention(*options, value_dim=value_dim)
    expected = paged_decode_attention_reference(*options, value_dim=value_dim)
    return Check(f"attention, {name}, {num_heads} heads", distance(output, expected))


def check_ffn(shapes: Shapes, device: torch.device, *, fp8: bool) -> Check:
    step = FFNStep(shapes, random_on(device, FFN_SEED), fp8=fp8)
    step.answer.fill_(float("nan"))
    expected = grouped_expert_ffn_reference(step.x, step.gate_up, step.down, step.topk_ids, step.topk_weights)
    return Check(f"FFN step, {'FP8' if fp8 else 'bfloat16'}", distance(step.forward(), expected))


def check_attention_part(shapes: Shapes, device: torch.device) -> Check:
    """The same weights and cache, once with the kernels and once with the operations that every model is tested with."""
    kernels, plain = (
        AttentionPart(shapes, shapes.contexts[0], random_on(device, 3), operations)
        for operations in (GPUOperations(torch.bfloat16), TorchOperations(torch.bfloat16))
    )
    output, expected = kernels.forward()[0], plain.forward()[0]
    assert kernels.cache.equal(plain.cache) or distance(kernels.cache, plain.cache) < LIMIT
    return Check("attention part of a layer", distance(output, expected))
