"""Whole models with the GPU's kernels give what they give with torch's operations."""

import pytest
import torch

from afd_server.models.checkpoint import load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard, WholeModel
from afd_server.models.operations_gpu import GPUOperations
from tests.checkpoints import write_checkpoint
from tests.unit.models.served import PLANS, load_whole, random_texts, run

TEXTS = random_texts((5, 1, 3))


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek_v3", "step3"])
def test_logits(tmp_path, device, family):
    directory = write_checkpoint(family, tmp_path)
    spec, operations = read_model_spec(directory), GPUOperations(torch.float32)
    where = {"device": device, "dtype": torch.float32, "gate_on": "attention", "operations": operations}
    model = WholeModel(
        load_attention_half(directory, spec, **where), [load_ffn_half(directory, spec, FFNShard(), **where)]
    )
    plan = PLANS["mixed"](TEXTS)
    expected = run(load_whole(directory, device=device), TEXTS, plan, device=device)
    for key, row in run(model, TEXTS, plan, device=device).items():
        torch.testing.assert_close(row, expected[key], atol=1e-3, rtol=1e-3)
