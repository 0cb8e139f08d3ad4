"""A layer in one kernel call against the same operations one by one: equal to the bit, cache included."""

import pytest
import torch

from afd_server.models.attention_gqa import GQAttention
from afd_server.models.attention_layer import AttentionLayer, StepByStep
from afd_server.models.attention_layer_cpu import KernelLayer
from afd_server.models.batch import AttentionBatch
from afd_server.models.operations_cpu import CPUOperations
from afd_server.models.rope import Rope
from afd_server.models.router import ExpertRouter
from afd_server.models.spec import GQASpec, MoESpec, RopeSpec
from afd_server.types import ScheduledRequest

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, BLOCK_SIZE, EPS = 48, 6, 2, 16, 5, 4, 1e-6
CPU = torch.device("cpu")


def layer(operations, *, generator, qk_norm=True, biases=False, scoring="softmax", num_groups=1, routed=True):
    def random(*shape):
        return torch.randn(*shape, generator=generator)

    spec = GQASpec(HEADS, KV_HEADS, DIM, RopeSpec("default", 1e4), qkv_bias=biases, qk_norm=qk_norm)
    weights = {"q": random(HEADS * DIM, HIDDEN), "k": random(KV_HEADS * DIM, HIDDEN), "v": random(KV_HEADS * DIM, HIDDEN),
               "o": random(HIDDEN, HEADS * DIM), "q_norm": random(DIM), "k_norm": random(DIM)}  # fmt: skip
    if biases:
        weights |= {"q_bias": random(HEADS * DIM), "k_bias": random(KV_HEADS * DIM), "v_bias": random(KV_HEADS * DIM),
                    "o_bias": random(HIDDEN)}  # fmt: skip
    experts = MoESpec(EXPERTS, 2, 8, scoring=scoring, correction_bias=scoring == "sigmoid", scaling=2.5,
                      num_groups=num_groups)  # fmt: skip
    correction = random(EXPERTS) if experts.correction_bias else None
    router = ExpertRouter(experts, random(EXPERTS, HIDDEN), correction, operations) if routed else None
    attention = GQAttention(spec, weights, EPS, operations)
    return AttentionLayer(random(HIDDEN), attention, random(HIDDEN), router)


def outcome(side, batch, rope, cache_dtype, with_answer):
    """What the layer gives, and what it leaves in x and in the cache."""
    generator = torch.Generator().manual_seed(7)
    rows = len(batch.token_ids)
    x, answer = torch.randn(2, rows, HIDDEN, generator=generator)
    cache = torch.randn(16, BLOCK_SIZE, 2, KV_HEADS, DIM, generator=generator).to(cache_dtype)
    given = side.forward(x, answer if with_answer else None, batch, rope, cache)
    return *given, x, cache


CASES = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
    "without head norms": {"qk_norm": False},
    "biases": {"biases": True},
    "sigmoid": {"scoring": "sigmoid"},
    "routed elsewhere": {"routed": False},
}


@pytest.mark.parametrize("with_answer", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_call_is_all_the_steps(case, interleaved, with_answer):
    options = dict(case)
    dtype = options.pop("dtype", torch.float32)
    operations = CPUOperations(dtype, options.pop("quantization", None))
    of_layer = layer(operations, generator=torch.Generator().manual_seed(3), **options)
    requests = [
        ScheduledRequest("prompt", 0, tuple(range(7)), (3, 5), samples=True),
        ScheduledRequest("decodes", 9, (1,), (2, 0, 7), samples=True),
        ScheduledRequest("goes on", 5, (4, 2, 8), (1, 9), samples=False),
    ]
    batch = AttentionBatch.build(requests, BLOCK_SIZE, CPU)
    rope = Rope(RopeSpec("default", 1e4, interleaved), DIM, CPU).table(batch.positions, torch.float32)
    kernel = operations.attention_side(of_layer, EPS)
    assert isinstance(kernel, KernelLayer)
    got = outcome(kernel, batch, rope, dtype, with_answer)
    expected = outcome(StepByStep(of_layer, operations, EPS), batch, rope, dtype, with_answer)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_experts_in_groups_are_chosen_step_by_step():
    operations = CPUOperations(torch.float32)
    of_layer = layer(operations, generator=torch.Generator().manual_seed(3), num_groups=5)
    assert isinstance(operations.attention_side(of_layer, EPS), StepByStep)
