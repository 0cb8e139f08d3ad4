"""Both halves as CUDA graphs with the GPU's kernels against the same kernels launched one by one.

Under the interpreter a graph is the function itself, called again. How sizes are filled up is tested in tests/unit/models/test_graphs.py.
"""

import pytest
import torch

from afd_server.models.attention_graphs import AttentionGraphs
from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.ffn_graphs import FFNGraphs
from afd_server.models.graphs import CUDACapture
from afd_server.models.halves import FFNShard
from afd_server.models.operations_gpu import GPUOperations
from tests.checkpoints import write_checkpoint
from tests.unit.models.decoding import BLOCK_SIZE, MAX_MODEL_LEN, PLAN, Decoding

# The interpreter is slow: prompts of 1, 2 and 3 tokens, and then 3 rows in a graph of 4, as it is and again.
SHORT_PLAN = [[[1, 4, 2]]] * 3


def again(function):
    return function


# One family is enough for the interpreter, which is slow.
@pytest.mark.parametrize(
    "family", ["step3", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("qwen3_moe", "deepseek_v3"))]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["float32", "bfloat16"]
)
def test_decoding(tmp_path, device, family, dtype):
    if dtype is torch.bfloat16 and device.type == "cpu":
        pytest.skip("bfloat16 is compared on a GPU: the interpreter takes minutes for it")
    directory = write_checkpoint(
        family, tmp_path, num_hidden_layers=2, **({"moe_layers_enum": "1"} if family == "step3" else {})
    )
    spec, operations = read_model_spec(directory), GPUOperations(dtype)
    where = {"device": device, "dtype": dtype, "gate_on": "attention", "operations": operations}
    attention = load_attention_half(directory, spec, **where)
    ffn = load_ffn_half(directory, spec, FFNShard(), **where)
    captures = [CUDACapture(device, name) if device.type == "cuda" else again for name in ("attention", "ffn")]
    graphed = Decoding(attention, FFNGraphs(ffn, captures[1], max_rows=8))
    graphed.graphs = AttentionGraphs(
        attention,
        graphed.cache,
        block_size=BLOCK_SIZE,
        max_rows=8,
        max_model_len=MAX_MODEL_LEN,
        capture=captures[0],
    )
    plan = PLAN if device.type == "cuda" else SHORT_PLAN
    tolerance = 1e-3 if dtype is torch.float32 else 5e-2
    alike = total = 0
    for got, wanted in zip(graphed.run(plan), Decoding(attention, ffn).run(plan), strict=True):
        near = (got - wanted).norm(dim=1) <= tolerance * wanted.norm(dim=1)
        alike, total = alike + int(near.sum()), total + len(near)
    # Rounded otherwise among more rows, one in bfloat16 may choose another expert.
    assert alike >= total * (1.0 if dtype is torch.float32 else 0.8)
    if device.type == "cuda":
        assert all(capture.num_graphs > 2 * spec.num_layers for capture in captures)
