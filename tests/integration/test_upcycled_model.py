"""The real checkpoint as a mixture of experts: equal to the dense model without noise, to transformers with noise."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from afd_server.checkpoints.default_model import afd_home, default_model
from afd_server.checkpoints.upcycle import upcycle
from afd_server.config import ServeConfig
from afd_server.llm import LLM
from afd_server.types import SamplingParams

pytestmark = pytest.mark.integration

TEXTS = ["The capital of France is", "Water boils at a temperature of", "import numpy as"]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0)


def generate(directory, **settings):
    with LLM(ServeConfig(model=str(directory), executor="local", max_model_len=256, **settings)) as llm:
        prompts = [llm.tokenizer.encode(text) for text in TEXTS]
        return prompts, llm.generate_token_ids(prompts, GREEDY)


def test_equal_experts_speak_as_the_dense_model_does(tmp_path):
    dense = default_model(afd_home())
    upcycle(dense, tmp_path / "moe", experts=4, top_k=2)
    assert generate(tmp_path / "moe", ffn_workers=2) == generate(dense)


def test_unequal_experts_speak_as_transformers_mixtral_does(tmp_path):
    upcycle(default_model(afd_home()), tmp_path / "moe", experts=4, top_k=2, noise=0.05)
    prompts, outputs = generate(tmp_path / "moe", ffn_workers=4, micro_batches="2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
        assert output == expected.tolist()
